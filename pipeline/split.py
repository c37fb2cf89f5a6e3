"""Draws the labelled, validation and pre-training images."""

from attention_transfer.stage import Stage, run_script

from typing import Any

from attention_transfer.data import images, splits


def main(this: Stage) -> None:
    data = this.study.data
    description = images.describe(this.layout.images)

    def work() -> dict[str, Any]:
        drawn = splits.draw(images.load(this.layout.images, "train").labels, data)
        splits.save(this.layout.splits, drawn)
        return {name: len(indices) for name, indices in drawn.items()}

    this.run(
        params={f"data.{key}": getattr(data, key) for key in ("labelled", "validation", "seed")},
        inputs={"images": description.fingerprint},
        work=work,
        live=False,
    )


if __name__ == "__main__":
    run_script("split", main, __file__)
