"""Claims about other things than accuracy, on records whose numbers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import synthetic_records as synthetic

from attention_transfer import run_record
from attention_transfer.config import Study
from attention_transfer.reporting import further_claims, wording
from attention_transfer.reporting.claims import Claim
from attention_transfer.reporting.further_claims import FURTHER
from attention_transfer.reporting.records import load


@pytest.fixture
def written(tmp_path: Path) -> tuple[Study, Path]:
    study = synthetic.study()
    return study, synthetic.write(tmp_path, study)[0]


def judge(study: Study, metrics: Path, **experiments: bool) -> tuple[dict[str, Claim], dict[str, str]]:
    assert study.report is not None
    judged, untested = further_claims.judge(load(study, metrics), study.report, metrics, experiments)
    return {claim.id: claim for claim in judged}, untested


def change(folder: Path, **values: object) -> None:
    """Other values in a stage's run.json, signed anew."""
    record = json.loads((folder / "run.json").read_text()) | values
    kept = {key: value for key, value in record.items() if key not in ("digest", "outputs")}
    run_record.write(folder, kept, [folder / name for name in record["outputs"]])


def test_what_the_main_comparison_can_tell(written: tuple[Study, Path]) -> None:
    assert judge(*written)[1] == {}, "what takes runs from experiments is nobody's claim without them"
    judged, untested = judge(*written, qkv=False, feature=False)
    assert set(judged) == {"similarity/features_differ", "maps/objects", "cost/finetune_cheapest"}
    assert set(untested) == {"similarity/query_maps", "cost/like_distillation"}
    assert "the experiment qkv has not been run" in untested["similarity/query_maps"]
    # CKA falls from 0.5 with the fine-tuned student, from 0.8 between two of them, by a tenth a layer.
    features = judged["similarity/features_differ"]
    kept = sum(1 - layer / 10 for layer in range(synthetic.DEPTH)) / synthetic.DEPTH
    assert features.effect.mean == pytest.approx((0.5 - 0.8) * kept)
    assert features.verdict == "supported"
    looks = judged["maps/objects"]
    seeds = written[0].seeds
    assert looks.effect.mean == pytest.approx(1.5 - 1.1 - sum(seeds) / len(seeds) / 100)
    assert (looks.verdict, looks.effect.n) == ("supported", len(seeds))
    assert looks.measured.endswith(" times equal attention")
    assert looks.measured.startswith("0.3")  # not in hundredths
    cost = judged["cost/finetune_cheapest"]
    assert (cost.effect.mean, cost.verdict) == (0, "not resolved")  # all steps take equally long
    assert all(claim.exploratory and claim.as_json()["unit"] == claim.unit for claim in judged.values())


@pytest.mark.parametrize(("seconds", "verdict"), [(20.0, "supported"), (10.0, "contradicted")])
def test_cost_of_a_step(seconds: float, verdict: str, written: tuple[Study, Path]) -> None:
    study, metrics = written
    for seed in study.seeds:
        change(metrics / "train" / "distill" / str(seed), seconds=seconds + seed / 100)
    claim = judge(study, metrics)[0]["cost/finetune_cheapest"]
    mean_seed = sum(study.seeds) / len(study.seeds)
    assert claim.effect.mean == pytest.approx((seconds + mean_seed / 100) / 12.5 - 1)
    assert claim.verdict == verdict
    assert claim.measured.endswith(" %")


@pytest.mark.parametrize(
    ("share", "verdict"), [(1.05, "supported"), (0.8, "supported"), (1.3, "contradicted")]
)
def test_distilling_attention_costs_what_distilling_predictions_does(
    share: float, verdict: str, written: tuple[Study, Path]
) -> None:
    study, metrics = written
    for seed in study.seeds:
        source, folder = (metrics / "train" / run / str(seed) for run in ("scratch", "distill_logits"))
        folder.mkdir(parents=True)
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change(folder, seconds=12.5 / (share + seed / 1000))
    assert judge(study, metrics, feature=True)[0]["cost/like_distillation"].verdict == verdict


@pytest.mark.parametrize(("divergence", "verdict"), [(0.04, "supported"), (0.01, "contradicted")])
def test_maps_of_copied_queries(divergence: float, verdict: str, written: tuple[Study, Path]) -> None:
    """Half of what scratch has is 0.025."""
    study, metrics = written
    frame = synthetic.write_similarity_of(metrics, "qkv", "copy_query")
    frame["matched_divergence"] = divergence + frame["seed"] / 1000
    frame.to_csv(metrics / "similarity" / "qkv" / "layers.csv", index=False)
    change(metrics / "similarity" / "qkv")
    claim = judge(study, metrics, qkv=True)[0]["similarity/query_maps"]
    mean_seed = sum(study.seeds) / len(study.seeds)
    assert claim.effect.mean == pytest.approx(divergence + mean_seed / 1000 - 0.025)
    assert claim.verdict == verdict


def test_images_without_a_plain_ground_have_no_objects_to_look_at(written: tuple[Study, Path]) -> None:
    study, metrics = written
    folder = metrics / "similarity"
    pd.read_csv(folder / "layers.csv").assign(on_objects=float("nan")).to_csv(
        folder / "layers.csv", index=False
    )
    change(folder)
    judged, untested = judge(study, metrics)
    assert "maps/objects" not in judged
    assert "no plain ground" in untested["maps/objects"]


def test_every_claim_says_what_it_is() -> None:
    assert len({further.id for further in FURTHER}) == len(FURTHER)
    for further in FURTHER:
        assert further.id.split("/")[0] in ("similarity", "maps", "cost")
        assert further.claim.endswith(".")
        assert further.id in wording.EFFECTS
        assert further.effect in further.rule_text
        assert "margin" not in further.rule_text
