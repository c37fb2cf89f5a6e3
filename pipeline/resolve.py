"""Writes what one run depends on: its resolved params and what it uses of its teacher, no more.

Training depends on this small file alone. So a new teacher, or another teacher's new weights, does not
rerun this run; and a default changed in config.py reruns the runs whose values change.
"""

from attention_transfer.stage import Stage, run_script

from typing import Any

from attention_transfer import config
from attention_transfer.files import read_sealed, sha256, write_sealed


def main(this: Stage) -> None:
    name, study, layout = this.instance["run"], this.study, this.layout
    run = study.runs[name]
    uses: dict[str, object] = {
        "run": run.model_dump(mode="json"),
        "architecture": study.architecture(name).model_dump(mode="json"),
    }
    if run.method not in ("scratch", "distill_logits"):
        uses["teacher"] = sha256(layout.teacher_weights(run.teacher))
    if run.initial is not None:
        uses["initial"] = sha256(layout.teacher_weights(run.initial))
    if run.logit_loss is not None:
        weights = layout.finetuned_teacher(run.logit_loss.teacher) / "model.safetensors"
        uses["finetuned_teacher"] = sha256(weights)
    if run.method in config.COPIES_ATTENTION and run.transfer != "value":  # values are never cached
        cache = read_sealed(layout.cache_manifest(run.teacher), made_by=f"cache@{run.teacher}")
        # The budget decides whether a cache may be written, not what it holds; `auto` is not what training
        # depends on, but what the stage `cache` has resolved it to.
        uses["attention"] = {
            **study.attention.model_dump(mode="json", exclude={"budget_gb"}),
            "source": "cache" if cache else "online",
        }
        uses["cache"] = cache

    def work() -> dict[str, Any]:
        write_sealed(layout.resolved(name), uses)
        return {}

    this.run(params={f"runs.{name}": uses["run"]}, inputs={}, work=work, live=False)


if __name__ == "__main__":
    run_script("resolve", main, __file__, run=str)
