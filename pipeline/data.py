"""Obtains the images, checks them, and stores them as arrays."""

from attention_transfer.stage import Stage, run_script

from typing import Any

from attention_transfer import plan
from attention_transfer.data import images, sources


def main(this: Stage) -> None:
    """The first stage: whatever can be known to fail later is refused here."""
    data = this.study.data
    plan.check_room(this.study, this.layout, this.params_file)

    def work() -> dict[str, Any]:
        classes, splits = sources.read(data)
        images.save(this.layout.images, data.source, classes, splits)
        return {f"{split}_images": len(part) for split, part in splits.items()} | {"classes": len(classes)}

    keys = ("source", "folder", "train_split", "test_split", "resize", "image_size", "channels")
    this.run(params={f"data.{key}": getattr(data, key) for key in keys}, inputs={}, work=work, live=False)


if __name__ == "__main__":
    run_script("data", main, __file__)
