"""Trains one student with one seed."""

from attention_transfer.stage import Stage, run_script, shared_out

from typing import Any

from attention_transfer.assembly import Parts
from attention_transfer.files import fingerprint, read_sealed, sha256, write_csv
from attention_transfer.fitting import execution_of, fit_student, save_student
from attention_transfer.training import machine
from attention_transfer.transfer import methods


def main(this: Stage) -> None:
    name, seed = this.instance["run"], this.instance["seed"]
    study, layout = this.study, this.layout
    run = study.runs[name]
    parts = Parts(study, layout, machine.prepare())
    resolved = read_sealed(layout.resolved(name), made_by=f"resolve@{name}")
    where = this.where(f"runs.{name}")
    this.paths = methods.paths(study, name, device=parts.device.type)
    this.paths |= execution_of(parts, name, where=where).paths(parts.device)

    def work() -> dict[str, Any]:
        model, history, score = fit_student(
            parts,
            name,
            seed,
            checkpoints=this.checkpoints(),
            sink=this.tracker,
            label=this.label,
            where=where,
        )
        if this.writes:
            save_student(parts, name, model, layout.student(name, seed))
            write_csv(this.record / "curve.csv", columns(history.rows), history.rows)
        accuracy, loss = score(model, study.data.validation)
        return {
            "validation_accuracy": accuracy,
            "validation_loss": loss,
            "train_loss": history.rows[-1]["task_loss"],
            "epochs": run.epochs,
            "steps": history.steps,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        }

    this.run(
        params={
            f"runs.{name}": run.model_dump(mode="json"),
            "training": study.training.model_dump(mode="json"),
            "views": study.views.model_dump(mode="json"),
            "attention": {
                **study.attention.model_dump(mode="json"),
                "source": parts.attention_source(run.teacher),
            },
            "data": study.data.model_dump(mode="json"),
        },
        inputs={
            "images": parts.description.fingerprint,
            "labelled": sha256(layout.splits / "labelled.txt"),
            "validation": sha256(layout.splits / "validation.txt"),
            "resolved": fingerprint(resolved),
        },
        work=work,
        live=True,
    )


def columns(rows: list[dict[str, float]]) -> list[str]:
    """The columns of curve.csv, which every method has; those that distil features or logits have one more."""
    more = [column for column in ("feature_loss", "logit_loss") if column in rows[0]]
    return [
        *("epoch", "step", "task_loss", "attention_loss", "learning_rate", "validation_accuracy"),
        *more,
    ]


if __name__ == "__main__":
    run_script("train", main, __file__, shared_out, run=str, seed=int)
