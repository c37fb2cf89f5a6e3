"""The report: one self-contained HTML page, the same as Markdown, tables, figures, claims."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from attention_transfer.config import Report, Study
from attention_transfer.errors import StudyError
from attention_transfer.files import write_json, write_text
from attention_transfer.reporting import (
    answer,
    attention_viewer,
    charts,
    claims,
    cost,
    experiment_figures,
    figures,
    follow_ups,
    further_claims,
    published,
    replication,
    robustness,
    scripts,
    sections,
    similarity_figures,
    tables,
    wording,
)
from attention_transfer.reporting import experiments as experiment_records
from attention_transfer.reporting.charts import Chart
from attention_transfer.reporting.claims import Claim
from attention_transfer.reporting.experiment_claims import CONTRASTS
from attention_transfer.reporting.figures import Drawing
from attention_transfer.reporting.records import Records, load
from attention_transfer.reporting.tables import Table

_NUMBER = re.compile(r"[-−+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")
EXPERIMENTS = {
    "main": "Main comparison",
    "ensemble": "Ensembles",
    "shift": "Distribution shift",
    "similarity": "How alike the models are",
    "maps": "Where the models look",
    "cost": "What the methods cost",
}


def build(
    study: Study,
    metrics: Path,
    artifacts: Path,
    out: Path,
    *,
    params: Path = Path("params.yaml"),
    experiments: Mapping[str, Study] | None = None,
    rules_fixed: Mapping[str, str | None] | None = None,
    ui: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Writes the report of a study and of its experiments.

    Args:
        metrics: the study's folder of records, metrics/<study>.
        artifacts: its folder of large outputs, runs/<study>; read are the attention maps and the contact sheet.
        out: written are report.html, report.md, claims.json, tables/ and figures/; tables and figures of an
            earlier report that this one does not have are removed.
        params: the study's params file, which the report names.
        experiments: by name, see `config.experiments`; what has not been run yet is said to be so.
        rules_fixed: by claim the commit that last changed its rule; None where that is not known.
        ui: by experiment ("main" for the runs of none), addresses of its pages in the MLflow UI by title.

    Raises:
        StudyError: the study has no report section or does not predict on the test set, or a record is missing
            or damaged.
    """
    report = study.report
    if report is None:
        raise StudyError(
            "the study has no report section",
            where=f"study {study.name}: report",
            remedy="name the runs of the main comparison under report, or leave the stage report out",
        )
    if "test" not in study.evaluation.sets:
        raise StudyError(
            f"{list(study.evaluation.sets)} does not name test, on which the report compares the runs",
            where=f"study {study.name}: evaluation.sets",
            remedy="add test, or set report to null",
        )
    experiments = experiments or {}
    ready = experiment_records.have_run(experiments, metrics)
    records = load(
        experiment_records.as_far_as_run(study, experiments, metrics),
        metrics,
        maybe_unprobed=experiment_records.of_experiments_alone(study, ready),
    )
    judged, untested = claims.judge(records, report)
    more = experiment_records.load(ready, metrics)
    found, reasons = claims.of_experiments(records, more, report)
    judged, untested = judged + found, untested | reasons
    found, reasons = further_claims.judge(
        records, report, metrics, {name: name in ready for name in experiments}
    )
    judged, untested = judged + found, untested | reasons
    untested |= claims.not_run([name for name in experiments if name not in ready])
    all_tables = tables.build(records, report) + [
        experiment_records.table(experiment, records, report) for experiment in more
    ]
    all_tables.append(cost.table(records))
    all_tables += filter(
        None,
        (
            robustness.table(records, report),
            published.table(records, report),
            replication.table(records, more, report),
        ),
    )
    drawings = figures.build(records, report, artifacts) + experiment_figures.build(more, records, report)
    drawings += similarity_figures.build(records, report)
    drawings += filter(None, (robustness.figure(records),))
    _remove_stale(out)
    tables.write(all_tables, out / "tables")
    figures.write(drawings, out / "figures")
    fixed = rules_fixed or {}
    write_json(
        out / "claims.json", [claim.as_json() | {"rule_commit": fixed.get(claim.id)} for claim in judged]
    )
    headings = EXPERIMENTS | {name: experiment_records.heading(name) for name in experiments}
    context = _context(records, all_tables) | _verdicts(judged, untested, headings, fixed)
    parts = sections.of_study(
        study,
        params,
        more,
        figures={drawing.name for drawing in drawings},
        tables={table.name for table in all_tables},
        claims=context["claims"],
    )
    context |= {
        "answer": answer.sentences(records, report, judged),
        "ui": {section.anchor: _addresses(ui or {}, section.experiment) for section in parts},
        "sections": parts,
        "params": params.as_posix(),
    }
    captions = {drawing.name: drawing.caption for drawing in drawings}
    context |= {"captions": captions, "alternatives": {each.name: each.alternative for each in drawings}}
    inline = {drawing.name: _data_uri(drawing, out / "figures") for drawing in drawings}
    html = _environment(html=True).get_template("report.html.j2")
    moving = _moving(
        charts.build(records, more, report), attention_viewer.payload(records, artifacts), captions
    )
    write_text(out / "report.html", html.render(context | moving, images=inline))
    text = _environment(html=False).get_template("report.md.j2")
    write_text(out / "report.md", text.render(context, images=inline.keys()))


def _addresses(ui: Mapping[str, Mapping[str, str]], experiment: str) -> Mapping[str, str]:
    """Of an experiment's pages in the MLflow UI; what is no experiment of its own is among the main comparison's."""
    main = ui.get("main", {})
    views = {title: address for title, address in main.items() if title.endswith(f": {experiment}")}
    return ui.get(experiment) or (views or main if experiment in EXPERIMENTS else {})


def _moving(found: Sequence[Chart], attention: dict[str, Any], captions: Mapping[str, str]) -> dict[str, Any]:
    """What only a page with scripts shows: charts, by name, the viewers' data, and the scripts."""
    specs = {
        chart.name: chart.spec | {"description": chart.caption or captions[chart.name]}
        for chart in (*found, *attention_viewer.charts())
    }
    return {
        "charts": specs,
        "attention": attention,
        "pictures_beside_charts": specs.keys()
        & {f"experiment_{name}" for name in experiment_figures.FIGURES},
        "page_data": {"charts": specs, "attention": attention},
        "vega": scripts.vega(),
        "own_script": scripts.own(),
        "tables_script": scripts.tables(),
        "tables_style": scripts.tables_style(),
    }


def _remove_stale(out: Path) -> None:
    for folder, ends in (("tables", (".csv", ".md", ".tex")), ("figures", (".png", ".svg"))):
        if (out / folder).is_dir():
            for path in (out / folder).iterdir():
                if path.suffix in ends:
                    path.unlink()


FEW = 3
"""Claims that could not be judged for one reason, no more than which are told one by one."""


def _environment(*, html: bool) -> Environment:
    """Both escape every value: HTML by Jinja's own escaping, Markdown by ours."""
    environment = Environment(
        loader=PackageLoader("attention_transfer.reporting"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=None if html else _escape_markdown,
    )
    environment.filters["markdown"] = lambda table: Markup(tables.markdown(table))
    environment.filters["sort_key"] = _sort_key
    environment.filters["words"] = _words
    environment.filters["commit"] = lambda commit: commit[:12] if commit else "commit not known"
    return environment


def _sort_key(cell: object) -> str:
    """The number that a cell begins with, by which its column is sorted; else the cell; nothing of an empty one."""
    if cell == tables.NONE:
        return ""
    found = _NUMBER.match(str(cell))
    return found[0].replace("−", "-").replace(",", "") if found else str(cell)


def _words(shown: pd.DataFrame) -> list[bool]:
    """Of each column behind the first, whether it holds words, which stand at the left."""
    return [
        any(_sort_key(cell) == str(cell) and not _NUMBER.match(str(cell)) for cell in shown[name])
        for name in shown
    ]


def _escape_markdown(value: Any) -> str:
    return str(value) if isinstance(value, Markup) else tables.escape(value)


def _data_uri(drawing: Drawing, folder: Path) -> str:
    form, kind = ("png", "png") if drawing.raster else ("svg", "svg+xml")
    content = (folder / f"{drawing.name}.{form}").read_bytes()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _verdicts(
    judged: list[Claim],
    untested: Mapping[str, str],
    headings: Mapping[str, str],
    fixed: Mapping[str, str | None],
) -> dict[str, Any]:
    """Claims by experiment, how they stand, and what could not be tested."""
    by_experiment: dict[str, list[Claim]] = {}
    for claim in judged:
        by_experiment.setdefault(claim.section, []).append(claim)
    rows = {claim.id: _claim_row(claim, headings, fixed) for claim in judged}
    return {
        "claims": {name: [rows[claim.id] for claim in found] for name, found in by_experiment.items()},
        "every_claim": list(rows.values()),
        "main_claims": [rows[name] for name in claims.MAIN if name in rows],
        "surprises": [
            {
                "claim": rows[each.claim.id],
                "again": [{"changed": changed, "claim": rows[claim.id]} for changed, claim in each.again],
            }
            for each in follow_ups.surprises(judged)
        ],
        "contradicted": sum(claim.verdict == "contradicted" for claim in judged),
        "overview": [
            {
                "experiment": name,
                "heading": headings[name],
                "verdicts": [sum(c.verdict == verdict for c in found) for verdict in answer.VERDICTS],
            }
            for name, found in by_experiment.items()
        ],
        "verdicts": answer.VERDICTS,
        "untested": _untested(untested),
        "correction": claims.HOLM,
    }


def _untested(reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row a reason: few claims are told, of an experiment that has not been run their number alone."""
    texts = claims.CLAIMS | {contrast.id: contrast.claim for contrast in CONTRASTS}
    texts |= {further.id: further.claim for further in further_claims.FURTHER}
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(wording.claim(name, texts[name]))
    return [
        {"reason": reason, "count": len(found), "claims": found if len(found) <= FEW else []}
        for reason, found in by_reason.items()
    ]


def _context(records: Records, all_tables: Sequence[Table]) -> dict[str, Any]:
    """What a template may print beside the verdicts."""
    study, report = records.study, records.study.report
    assert report is not None  # see `build`
    by_name = {table.name: table for table in all_tables}
    return {
        "study": study,
        "report": report,
        "tables": by_name,
        "unbounded": _unbounded(records, report),
        "published_on": tables.PUBLISHED_ON,
        "level": tables.level(records),
        "single_seed": len(study.seeds) == 1,
        "distilling": [
            {
                "run": name,
                "reduction": run.attention_loss.reduction,
                "weight": f"{run.attention_loss.weight:g}",
            }
            for name, run in study.runs.items()
            if run.attention_loss is not None
        ],
        "sharing": ", ".join(name for name, run in study.runs.items() if run.shares_stochastic_depth),
        "transferring": [
            {
                "run": name,
                "teacher": run.teacher,
                "layers": ", ".join(map(str, study.layers(name))),
                "how": _how(study, name),
            }
            for name, run in study.runs.items()
            if run.layers is not None
        ],
        "averaged": [name for name, run in study.runs.items() if run.ema is not None],
        "test_examples": _test_examples(records),
        "shifts": [charts.ALL_SHIFTS, *(shift.replace("_", " ") for shift in study.evaluation.shifts)],
        "severities": sorted(study.evaluation.severities),
    } | _provenance(records)


def _how(study: Study, name: str) -> str:
    """What of these layers a run takes, where it is not all maps of all heads as they are."""
    run, heads = study.runs[name], study.heads(name)
    parts = []
    if run.method == "distill_features":
        parts.append("the residual stream behind them")
    elif run.transfer != "map":
        parts.append({"query": "their queries", "key": "their keys", "value": "their values"}[run.transfer])
    if any(len(chosen) != study.architecture(name).heads for chosen in heads):
        parts.append("of heads " + "; ".join(", ".join(map(str, chosen)) for chosen in dict.fromkeys(heads)))
    if run.average is not None:
        parts.append(f"their maps averaged over {run.average}")
    return f" ({', '.join(parts)})" if parts else ""


def _claim_row(
    claim: Claim, headings: Mapping[str, str], fixed: Mapping[str, str | None]
) -> dict[str, str | None]:
    return {
        "id": claim.id,
        "anchor": claim.id.replace("/", "-"),
        "experiment": headings[claim.section],
        "place": "exploratory"
        if claim.exploratory
        else "main claim"
        if claim.id in claims.MAIN
        else "premise",
        "claim": claim.claim,
        "published": claim.published,
        "effect": claim.effect_text.removesuffix(","),
        "measured": claim.measured,
        "rule": claim.rule,
        "fixed": fixed.get(claim.id),
        "sentence": claim.sentence,
        "test": _test(claim),
        "seeds": str(claim.effect.n),
        "verdict": claim.verdict,
        "kind": claim.verdict.replace(" ", "-"),
        "note": claim.note,
    }


def _test(claim: Claim) -> str:
    """p-value and effect size in words; empty with one seed."""
    parts = []
    if math.isfinite(claim.p_value):
        parts.append(f"p = {claim.p_value:.2g}")
    if math.isfinite(claim.p_adjusted):
        parts.append(f"{claim.p_adjusted:.2g} after Holm's correction")
    if claim.size is not None and math.isfinite(claim.size.mean):
        size = claim.size
        parts.append(f"effect size g = {size.mean:.2g} [{size.low:.2g}, {size.high:.2g}]")
    return ", ".join(parts)


def _unbounded(records: Records, report: Report) -> list[str]:
    """Runs whose gap recovered has an interval without end."""
    return [run for run in records.study.runs if math.isinf(tables.run_gap(records, report, run).low)]


def _test_examples(records: Records) -> str:
    examples = records.scores.xs("test", level="set")["examples"].unique()
    return ", ".join(f"{int(count):,}" for count in sorted(examples))


def _provenance(records: Records) -> dict[str, list[str]]:
    """Revisions, versions and machines of all stages, each different one once."""
    stages = records.provenance
    dirty = {False: "", True: " with uncommitted changes", None: " (not known whether changed)"}
    return {
        "revisions": _unique(
            f"{stage['git_revision']}{dirty[stage['git_dirty']]}" if stage["git_revision"] else "not recorded"
            for stage in stages
        ),
        "versions": _unique(_listing(stage["versions"]) for stage in stages),
        "machines": _unique(_listing(stage["machine"]) for stage in stages),
    }


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _listing(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()
    )
