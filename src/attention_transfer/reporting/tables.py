"""Tables of the report: numbers in fractions for the CSV, the same numbers as text for readers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attention_transfer.config import Pretrained, Report
from attention_transfer.evaluation.statistics import Interval, gap_recovered, mean_interval
from attention_transfer.files import atomic, write_text
from attention_transfer.reporting.records import MEASURES, UNSHIFTED, Records

PUBLISHED_ON = "published: ImageNet-1K, ViT-L/16, MAE"
"""Setting of every published number (Li et al., NeurIPS 2024, arXiv 2411.09702)."""
PUBLISHED_ACCURACY = {"scratch": "83.0", "finetune": "85.7", "copied": "85.1", "distilled": "85.7"}
PUBLISHED_GAP = {"copied": "77.8"}
PUBLISHED_ENSEMBLE = "86.3"
NONE = "–"
ALL_SHIFTS = "all"
LABELS = {
    "accuracy": "accuracy, %",
    "top5": "top-5 accuracy, %",
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "ECE, %",
}


@dataclass(frozen=True)
class Table:
    """One table; `name` is its file name."""

    name: str
    caption: str
    frame: pd.DataFrame
    """For the CSV: numbers, accuracies as fractions, an empty cell where there is no number."""
    shown: pd.DataFrame
    """For readers: text, accuracies in per cent, an interval in brackets behind its mean."""


def main_table(records: Records, report: Report) -> Table:
    """Test accuracy and gap recovered of every run."""
    rows, shown = [], []
    part_of = {getattr(report, part): part for part in reversed(PUBLISHED_ACCURACY)}
    for run in records.study.runs:
        accuracy, gap = test_accuracy(records, run), run_gap(records, report, run)
        rows.append(
            {"run": run, "seeds": accuracy.n} | spread("accuracy", accuracy) | spread("gap_recovered", gap)
        )
        part = part_of.get(run, "")
        shown.append(
            {
                "run": run,
                "seeds": str(accuracy.n),
                "test accuracy, %": per_cent(accuracy),
                "gap recovered, %": by_definition(report, run) or per_cent(gap, digits=1),
                f"{PUBLISHED_ON}: accuracy, %": PUBLISHED_ACCURACY.get(part, NONE),
                f"{PUBLISHED_ON}: gap recovered, %": PUBLISHED_GAP.get(part, NONE),
            }
        )
    caption = (
        "Accuracy on the test set, and gap recovered, (run − scratch) / (fine-tune − scratch) with Fieller's "
        f"interval: mean over seeds and {level(records)} interval. The published columns are from another "
        "data set and a larger model: a yardstick for directions, not for values."
    )
    return Table("main", caption, pd.DataFrame(rows), pd.DataFrame(shown))


def by_definition(report: Report, run: str) -> str:
    """The gap recovered where it is no measurement: 0 for scratch, 100 (per cent) for fine-tune."""
    return {report.scratch: "0, by definition", report.finetune: "100, by definition"}.get(run, "")


def test_accuracy(records: Records, run: str) -> Interval:
    """Test accuracy over seeds."""
    return mean_interval(records.values("accuracy", run), records.study.evaluation.confidence)


def run_gap(records: Records, report: Report, run: str) -> Interval:
    """Gap recovered by a run; exactly 0 and 1 for scratch and fine-tune."""
    n = len(records.study.seeds)
    if run in (report.scratch, report.finetune):
        exact = float(run == report.finetune)
        return Interval(exact, exact, exact, n)
    return gap_recovered(
        method=records.values("accuracy", run),
        scratch=records.values("accuracy", report.scratch),
        finetune=records.values("accuracy", report.finetune),
        confidence=records.study.evaluation.confidence,
    )


def ensembles_table(records: Records, report: Report) -> Table:
    """Every ensemble of the study, test set."""
    rows, shown = [], []
    for name, ensemble in records.study.ensembles.items():
        pairs = records.pairs(name)
        first, second = ensemble.members
        over = {
            column: over_seeds(records, pairs[column])
            for column in ("accuracy", "first_accuracy", "second_accuracy", "gain", "disagreement")
        }
        consistency = over_seeds(records, pairs["error_consistency"])
        row: dict[str, Any] = {"ensemble": name, "first": first, "second": second, "pairs": len(pairs)}
        for column, interval in over.items():
            row |= spread(column, interval)
        rows.append(row | spread("error_consistency", consistency))
        published = {first, second} == {report.finetune, report.distilled}
        shown.append(
            {
                "ensemble": name,
                "members": f"{first} + {second}",
                "pairs": str(len(pairs)),
                "accuracy, %": per_cent(over["accuracy"]),
                "first member, %": per_cent(over["first_accuracy"]),
                "second member, %": per_cent(over["second_accuracy"]),
                "gain over the better member, points": per_cent(over["gain"]),
                "disagreement, %": per_cent(over["disagreement"]),
                "error consistency": plain(consistency),
                f"{PUBLISHED_ON}: accuracy, %": PUBLISHED_ENSEMBLE if published else NONE,
            }
        )
    caption = (
        "Average of two models' predicted probabilities, test set: mean over pairs and "
        f"{level(records)} interval. Two runs are paired by seed; a run with itself is paired with another of "
        "its seeds, so that pairs of one run share models and their interval is only a guide. Disagreement: "
        "share of images on which the members' predictions differ. Error consistency: Cohen's kappa of being "
        "right or wrong."
    )
    return Table("ensembles", caption, pd.DataFrame(rows), pd.DataFrame(shown))


def teachers_table(records: Records) -> Table:
    """Every teacher: how it was obtained, and what its features are worth without fine-tuning."""
    rows, shown = [], []
    for name, measured in records.probes.items():
        teacher = records.study.teachers[name]
        images = teacher.images if isinstance(teacher, Pretrained) else ""
        architecture = teacher.architecture
        rows.append(
            {"teacher": name, "kind": teacher.kind, "images": images}
            | {"width": architecture.width, "components": " ".join(architecture.components)}
            | {
                key: measured[key]
                for key in ("knn_accuracy", "logistic_regression_accuracy", "effective_rank")
            }
        )
        shown.append(
            {
                "teacher": name,
                "pre-training": teacher.kind,
                "on images of": {"task": "the task", "": NONE}.get(images, images),
                "width": str(architecture.width),
                "components": ", ".join(architecture.components) or "plain",
                "nearest neighbours, %": f"{100 * measured['knn_accuracy']:.2f}",
                "logistic regression, %": f"{100 * measured['logistic_regression_accuracy']:.2f}",
                "effective rank": f"{measured['effective_rank']:.1f}",
            }
        )
    caption = (
        "Teachers before any fine-tuning, by the mean of their patch tokens: accuracy on the validation images of "
        "the nearest labelled images (20 of them, weighted) and of logistic regression on the labelled images, "
        "both without augmentation; and the effective rank of the features of the validation images (RankMe), "
        "which a collapse would bring to 1."
    )
    if unprobed := [name for name in records.study.teachers if name not in records.probes]:
        caption += f" The stage probe has not been run for {', '.join(unprobed)}."
    return Table("teachers", caption, pd.DataFrame(rows), pd.DataFrame(shown))


def similarity_table(records: Records, report: Report) -> Table:
    """Every run against its teacher and against the fine-tuned student."""
    rows, shown = [], []
    names = {"teacher": "its teacher", "finetune": report.finetune}
    for (run, reference), group in records.similarity.groupby(["run", "reference"], sort=False):
        last = group[group["layer"] == group["layer"].max()]
        means = group.groupby("seed")[["cka", "divergence", "matched_divergence"]].mean()
        over = {column: over_seeds(records, means[column]) for column in means}
        over["last_cka"] = over_seeds(records, last["cka"])
        over["on_objects"] = over_seeds(records, group.groupby("seed")["on_objects"].mean())
        row: dict[str, Any] = {"run": run, "reference": reference, "seeds": len(means)}
        for column, interval in over.items():
            row |= spread(column, interval)
        rows.append(row)
        shown.append(
            {
                "run": str(run),
                "compared with": names[str(reference)]
                + (", another seed" if (run, reference) == (report.finetune, "finetune") else ""),
                "CKA of features, mean over layers": plain(over["cka"]),
                "CKA behind the last layer": plain(over["last_cka"]),
                "divergence of maps, nats": plain(over["divergence"]),
                "divergence, heads matched, nats": plain(over["matched_divergence"]),
                "attention on the object": plain(over["on_objects"]),
            }
        )
    caption = (
        "How alike two models are on the same test images, layer by layer: linear CKA of the mean of the patch "
        "tokens (1: alike but for a rotation; 0: unrelated), and Jensen-Shannon divergence of the attention maps (0 "
        "to 0.693), head by head and under the best assignment of heads: mean over layers and seeds with "
        f"{level(records)} interval. The fine-tuned student is that of the same seed, or, of itself, of the next. "
        "Attention on the object: that of patches to what differs from the plain ground around it, as a multiple of "
        "what equal attention to all patches gives it."
    )
    columns = ["run", "reference", "seeds"] if not rows else None
    return Table("similarity", caption, pd.DataFrame(rows, columns=columns), pd.DataFrame(shown))


def shifts_table(records: Records, report: Report) -> Table:
    """Every run under every shift, averaged over severities, and under all shifts together."""
    reference = {shift: _drop(records, report.finetune, shift) for shift in _shifts(records)}
    rows, shown = [], []
    for run in records.study.runs:
        for shift in _shifts(records):
            measures = {
                measure: over_seeds(records, _under(records, measure, run, shift))
                for measure in ("accuracy", "nll", "brier", "ece")
            }
            drop = over_seeds(records, _drop(records, run, shift))
            usual = float(reference[shift].mean())
            relative = drop.mean / usual if usual > 0 else math.nan
            row: dict[str, Any] = {"run": run, "shift": shift, "seeds": drop.n}
            for measure, interval in measures.items():
                row |= spread(measure, interval)
            rows.append(row | spread("drop", drop) | {"drop_relative_to_finetune": relative})
            shown.append(
                {"run": run, "shift": shift, "seeds": str(drop.n)}
                | {LABELS[m]: _measure(m, interval) for m, interval in measures.items()}
                | {
                    "drop from clean, points": per_cent(drop),
                    "drop relative to fine-tune": f"{relative:.2f}" if math.isfinite(relative) else NONE,
                }
            )
    caption = (
        "Corrupted test images, mean over severities "
        f"{', '.join(map(str, records.study.evaluation.severities))}; '{ALL_SHIFTS}' is the mean over all "
        f"shifts. Mean over seeds and {level(records)} interval. The drop is from the run's own accuracy on "
        "the same images as they are; it is divided by fine-tune's drop under the same shift, and the ratio is "
        "left out where fine-tune does not drop."
    )
    return Table("shifts", caption, pd.DataFrame(rows), pd.DataFrame(shown))


def _shifts(records: Records) -> list[str]:
    return [*records.study.evaluation.shifts, ALL_SHIFTS]


def _under(records: Records, measure: str, run: str, shift: str) -> np.ndarray:
    return records.all_shifts(measure, run) if shift == ALL_SHIFTS else records.shifted(measure, run, shift)


def _drop(records: Records, run: str, shift: str) -> np.ndarray:
    return records.values("accuracy", run, UNSHIFTED) - _under(records, "accuracy", run, shift)


def metrics_table(records: Records) -> Table:
    """All measures on the clean test set."""
    rows, shown = [], []
    for run in records.study.runs:
        measures = {measure: over_seeds(records, records.values(measure, run)) for measure in MEASURES}
        row: dict[str, Any] = {"run": run, "seeds": len(records.study.seeds)}
        for measure, interval in measures.items():
            row |= spread(measure, interval)
        rows.append(row)
        shown.append(
            {"run": run, "seeds": str(len(records.study.seeds))}
            | {LABELS[measure]: _measure(measure, interval) for measure, interval in measures.items()}
        )
    caption = (
        f"All measures on the clean test set: mean over seeds and {level(records)} interval. NLL: negative "
        "log-likelihood in nats. ECE: expected calibration error with "
        f"{records.study.evaluation.calibration_bins} equally wide bins."
    )
    return Table("metrics", caption, pd.DataFrame(rows), pd.DataFrame(shown))


def training_table(records: Records) -> Table:
    """What training recorded: size, steps, last losses, validation accuracy."""
    rows, shown = [], []
    for run in records.study.runs:
        seeds = records.training[records.training.run == run]
        first = seeds.iloc[0]
        loss = over_seeds(records, seeds["train_loss"])
        accuracy = over_seeds(records, seeds["validation_accuracy"])
        row = {"run": run, "seeds": len(seeds)}
        row |= {key: int(first[key]) for key in ("parameters", "epochs", "steps")}
        rows.append(row | spread("train_loss", loss) | spread("validation_accuracy", accuracy))
        shown.append(
            {key: str(value) if key == "run" else f"{value:,}" for key, value in row.items()}
            | {"training loss": plain(loss), "validation accuracy, %": per_cent(accuracy)}
        )
    caption = f"Training, at the last epoch: mean over seeds and {level(records)} interval."
    return Table("training", caption, pd.DataFrame(rows), pd.DataFrame(shown))


def ood_table(records: Records) -> Table:
    """Telling images of another data set from the test images."""
    rows, shown = [], []
    groups = records.ood.groupby(["set", "score"], sort=False)
    for run in records.study.runs:
        for (image_set, score), group in groups:
            seeds = group[group.run == run]
            auroc, fpr = (over_seeds(records, seeds[measure]) for measure in ("auroc", "fpr95"))
            row = {"run": run, "set": image_set, "score": score, "seeds": len(seeds)}
            rows.append(row | spread("auroc", auroc) | spread("fpr95", fpr))
            shown.append(
                {key: str(value) for key, value in row.items()}
                | {"AUROC, %": per_cent(auroc), "FPR at 95 % TPR, %": per_cent(fpr)}
            )
    caption = (
        "Out-of-distribution detection against the test images: mean over seeds and "
        f"{level(records)} interval. max_probability: the largest predicted probability; energy: the "
        "log-sum-exp of the logits."
    )
    return Table("ood", caption, pd.DataFrame(rows), pd.DataFrame(shown))


def calibration_table(records: Records) -> Table:
    """Temperature, and calibration on the test set before and after it."""
    rows, shown = [], []
    for run in records.study.runs:
        seeds = records.calibration[records.calibration.run == run]
        row: dict[str, Any] = {"run": run, "seeds": len(seeds)}
        cells = {"run": run, "seeds": str(len(seeds)), "temperature": ""}
        for measure in ("temperature", "nll", "nll_scaled", "ece", "ece_scaled"):
            interval = over_seeds(records, seeds[measure])
            name, _, scaled = measure.partition("_")
            label = "temperature" if name == "temperature" else LABELS[name] + (", scaled" if scaled else "")
            row |= spread(measure, interval)
            cells[label] = _measure(name, interval)
        rows.append(row)
        shown.append(cells)
    caption = (
        "Calibration on the test set, before and after the logits are divided by a temperature, which is fitted on the "
        f"validation images: mean over seeds and {level(records)} interval. A run without a temperature (right on all "
        "validation images, or no better than chance) has none."
    )
    return Table("calibration", caption, pd.DataFrame(rows), pd.DataFrame(shown))


def comparisons_table(records: Records) -> Table:
    """Paired differences of accuracy with bootstrap intervals over seeds and examples; shown: the test set."""
    frame = records.comparisons
    clean = frame[frame["set"] == "test"]
    shown = pd.DataFrame(
        [
            {
                "first − second": f"{row.first} − {row.second}",
                "seeds": str(row.seeds),
                "examples": f"{int(row.examples):,}",
                "difference, points": per_cent(Interval(row.difference, row.low, row.high, int(row.seeds))),
            }
            for row in clean.itertuples(index=False)
        ],
        columns=["first − second", "seeds", "examples", "difference, points"],
    )
    caption = (
        "Differences of accuracy, paired by seed and example, with the "
        f"{level(records)} interval of a hierarchical bootstrap over seeds and examples "
        f"({records.study.evaluation.bootstrap:,} resamples): these also cover the draw of the test images. "
        "Shown is the test set; the CSV holds the other sets and each shift too."
    )
    return Table("comparisons", caption, frame, shown)


def recipes_table(records: Records) -> Table:
    """Resolved params of every run, as its run.json recorded them."""
    columns = {run: _flat(records.recipes[run], run) for run in records.study.runs}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    frame = pd.DataFrame(
        [{"param": name} | {run: column.get(name, "") for run, column in columns.items()} for name in names],
        columns=["param", *columns],
    )
    caption = "Resolved params, defaults included, as each run's first seed recorded them."
    return Table("recipes", caption, frame, frame.replace("", NONE))


def _flat(params: Mapping[str, Any], run: str) -> dict[str, str]:
    """Nested params under dotted names; the run's own lose their prefix so that runs stand side by side."""
    found: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        elif isinstance(value, list):
            found[prefix] = ", ".join(map(str, value))
        elif value is not None:
            found[prefix] = str(value)

    walk("", params)
    return {name.removeprefix(f"runs.{run}."): text for name, text in found.items()}


def time_table(records: Records) -> Table:
    """Seconds of every family of stages."""
    groups = records.stages.groupby("stage", sort=True)
    frame = pd.DataFrame(
        [
            {
                "stage": stage,
                "instances": len(group),
                "seconds": float(group["seconds"].sum()),
                "longest_seconds": float(group["seconds"].max()),
                "peak_memory_mb": pd.to_numeric(group["peak_memory_mb"]).max(),
            }
            for stage, group in groups
        ]
    )
    shown = pd.DataFrame(
        {
            "stage": frame["stage"],
            "instances": frame["instances"].map(str),
            "seconds, all together": frame["seconds"].map("{:,.1f}".format),
            "seconds, longest instance": frame["longest_seconds"].map("{:,.1f}".format),
            "peak memory, MB": [
                f"{value:,.0f}" if math.isfinite(value) else NONE for value in frame["peak_memory_mb"]
            ],
        }
    )
    caption = (
        "Wall-clock time of the stages, summed over the instances of a family, on the machines named below."
    )
    return Table("time", caption, frame, shown)


def build(records: Records, report: Report) -> list[Table]:
    """The tables that the study's image sets and ensembles allow, in the order of the page."""
    sets = records.study.evaluation.sets
    tables = [main_table(records, report), metrics_table(records), teachers_table(records)]
    if records.study.ensembles:
        tables.append(ensembles_table(records, report))
    if "shifts" in sets:
        tables.append(shifts_table(records, report))
    tables.append(similarity_table(records, report))
    if "digits" in sets:
        tables.append(ood_table(records))
    if {"validation", "test"} <= set(sets):
        tables.append(calibration_table(records))
    return [
        *tables,
        comparisons_table(records),
        training_table(records),
        recipes_table(records),
        time_table(records),
    ]


def write(tables: Sequence[Table], folder: Path) -> None:
    """Writes NAME.csv, NAME.md and NAME.tex of every table."""
    for table in tables:
        with atomic(folder / f"{table.name}.csv") as temporary:
            table.frame.to_csv(temporary, index=False, float_format="%.6g")
        write_text(folder / f"{table.name}.md", f"{escape(table.caption)}\n\n{markdown(table)}\n")
        write_text(folder / f"{table.name}.tex", latex(table))


def markdown(table: Table) -> str:
    """The shown table in Markdown, with every cell escaped."""
    if table.shown.empty:
        return "No rows."
    shown = table.shown.rename(columns=escape).map(escape)
    align = ["left", *["right"] * (shown.shape[1] - 1)]
    return str(shown.to_markdown(index=False, disable_numparse=True, colalign=align))


LATEX_ROWS = 40
"""A table with more does not fit on a page."""
LATEX_HEADER = 14
"""Characters of a line of a column's header."""


def latex(table: Table) -> str:
    """The shown table for a paper, with the packages booktabs, graphicx (no wider than the text), and, where it takes
    pages, longtable.
    """
    shown = table.shown.rename(columns=_latex_header).map(escape_latex)
    long = len(shown) > LATEX_ROWS
    text = str(
        shown.to_latex(
            index=False,
            escape=False,
            column_format="l" + "r" * (shown.shape[1] - 1),
            caption=escape_latex(table.caption),
            label=f"tab:{table.name}",
            position=None if long else "htbp",
            longtable=long,
        )
    )
    if not long:
        fitted = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
        text = text.replace(r"\begin{tabular}", f"{fitted}\n\\begin{{tabular}}")
        text = text.replace(r"\end{tabular}", "\\end{tabular}%\n}")
    return f"{{\\scriptsize\\setlength{{\\tabcolsep}}{{3pt}}\n{text}}}\n"


def _latex_header(name: object) -> str:
    """In lines, the widest of which is hardly wider than the numbers beneath it."""
    lines = textwrap.wrap(str(name), LATEX_HEADER, break_long_words=False)
    if len(lines) < 2:
        return escape_latex(name)
    return r"\shortstack[r]{" + r" \\ ".join(map(escape_latex, lines)) + "}"


LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{"−": "$-$", "²": r"$^2$", "–": "--", "’": "'"},
}


def escape_latex(value: object) -> str:
    """Text that means itself in LaTeX, in ASCII as far as the report's own words go."""
    return "".join(LATEX.get(character, character) for character in " ".join(str(value).split()))


def escape(value: object) -> str:
    """Text that means itself in a Markdown cell: no HTML, no links, no emphasis, one line."""
    text = " ".join(str(value).split()).replace("\\", "\\\\")
    for plain_character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(plain_character, entity)
    for special in "|`*[]":
        text = text.replace(special, f"\\{special}")
    return text


def level(records: Records) -> str:
    """The level of the intervals, as in '95 %'."""
    return f"{100 * records.study.evaluation.confidence:g} %"


def per_cent(interval: Interval, digits: int = 2) -> str:
    """Mean and interval in per cent, as in '81.20 [80.91, 81.49]'; an open interval is said in words."""
    return _text(interval, lambda value: f"{100 * value:.{digits}f}")


def plain(interval: Interval, digits: int = 3) -> str:
    """Mean and interval as they are."""
    return _text(interval, lambda value: f"{value:.{digits}f}")


def _text(interval: Interval, form: Any) -> str:
    mean, low, high = (_signed(form(value)) for value in (interval.mean, interval.low, interval.high))
    if not math.isfinite(interval.mean):
        return NONE
    if interval.n == 1:
        return f"{mean} (no interval from one)"
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return f"{mean} (interval unbounded)"
    return f"{mean} [{low}, {high}]"


def _signed(number: str) -> str:
    """With a minus for a hyphen, and without it where all digits are 0."""
    return number.replace("-", "−" if number.strip("-0.") else "")


def _measure(measure: str, interval: Interval) -> str:
    return per_cent(interval) if measure in ("accuracy", "top5", "ece") else plain(interval)


def over_seeds(records: Records, values: Any) -> Interval:
    """Mean and interval; NaN where the measure is not defined for every seed (top-5 of few classes)."""
    values = np.asarray(values, dtype=float)
    if not np.isfinite(values).all():
        return Interval(math.nan, math.nan, math.nan, len(values))
    return mean_interval(values, records.study.evaluation.confidence)


def spread(name: str, interval: Interval) -> dict[str, float]:
    """Three columns; NaN, and so an empty cell, in place of a bound that is not finite."""
    bounds = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {f"{name}_{key}": value if math.isfinite(value) else math.nan for key, value in bounds.items()}
