"""Makes the shifted test images, each once, and the images of another data set."""

from attention_transfer.stage import Stage, run_script

import hashlib
from typing import Any

import numpy as np

from attention_transfer.data import images, published, shifted
from attention_transfer.data.image_files import Shape
from attention_transfer.provenance import code_fingerprint


def main(this: Stage) -> None:
    study, layout = this.study, this.layout
    description = images.describe(layout.images)
    evaluation = study.evaluation

    def work() -> dict[str, Any]:
        test = images.load(layout.images, "test")
        indices = shifted.subset(test.labels, evaluation.shift_images, study.data.seed)
        recipe = {
            "images": description.fingerprint,
            "indices": hashlib.sha256(np.ascontiguousarray(indices).tobytes()).hexdigest(),
            "seed": study.data.seed,
            "code": code_fingerprint(this.script),
        }
        wanted = shifted.wanted(evaluation, study.data)
        missing = published.missing(wanted)
        for name, problem in missing.items():
            print(f"{name}: {problem}; the study goes on without it")
        wanted = {name: what for name, what in wanted.items() if name not in missing}
        form = Shape(study.data.channels, study.data.resize, study.data.image_size)
        shifted.make(layout.shifts, wanted, test, indices, recipe, classes=description.classes, form=form)
        this.outputs += [path for path in [layout.shifts / shifted.CONTACT_SHEET] if path.exists()]
        found = {"sets": len(wanted), "images_a_shift": len(indices)}
        return found | ({"missing_sets": len(missing)} if evaluation.published else {})

    this.run(
        params={
            "evaluation.sets": list(evaluation.sets),
            "evaluation.shifts": list(evaluation.shifts),
            "evaluation.severities": list(evaluation.severities),
            "evaluation.shift_images": evaluation.shift_images,
            "data.seed": study.data.seed,
            **(
                {"evaluation.published": evaluation.model_dump(mode="json")["published"]}
                if evaluation.published
                else {}
            ),
        },
        inputs={"images": description.fingerprint},
        work=work,
        live=False,
    )


if __name__ == "__main__":
    run_script("shifts", main, __file__)
