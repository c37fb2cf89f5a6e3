"""Writes what one run depends on: its resolved params and what it uses of its teacher, no more.

Training depends on this small file alone. So a new teacher, or another teacher's new weights, does not
rerun this run; and a default changed in config.py reruns the runs whose values change.
"""

from attention_transfer.stage import Stage, run_script

from typing import Any

from attention_transfer.files import read_json, sha256, write_json


def main(this: Stage) -> None:
    name, study, layout = this.instance["run"], this.study, this.layout
    run = study.runs[name]
    uses: dict[str, object] = {
        "run": run.model_dump(mode="json"),
        "architecture": study.teachers[run.teacher].architecture.model_dump(mode="json"),
    }
    if run.method != "scratch":
        uses["teacher"] = sha256(layout.teacher_weights(run.teacher))
    if run.method in ("copy", "distill"):
        # The budget decides whether a cache may be written, not what it holds.
        uses["attention"] = study.attention.model_dump(mode="json", exclude={"budget_gb"})
        uses["cache"] = read_json(layout.cache_manifest(run.teacher), made_by=f"cache@{run.teacher}")

    def work() -> dict[str, Any]:
        write_json(layout.resolved(name), uses)
        return {}

    this.run(params={f"runs.{name}": uses["run"]}, inputs={}, work=work, live=False)


if __name__ == "__main__":
    run_script("resolve", main, __file__, run=str)
