"""`check`: the whole params file, shapes and disk room included, and what the caches will take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attention_transfer import config, graph_file, lock_file, plan
from attention_transfer.data import shifted
from attention_transfer.layout import Layout


def show(params: Path, *, as_json: bool) -> None:
    """Checks, mends DVC's lock files after a kill, and removes checkpoints that are done with.

    Raises:
        StudyError: something is not in order.
    """
    found = examine(params)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    for path, count in found["mended"].items():
        print(f"{path}: put back {count} stages that were cut off")
    for name, source in found["attention"].items():
        print(f"attention of {name}: {source}")
    for note in found["notes"]:
        print(note)
    print(f"{params}: study {found['study']}, {found['runs']} runs x {found['seeds']} seeds, is in order")
    for name, each in found["experiments"].items():
        print(f"experiment {name}: {each['runs']} runs x {each['seeds']} seeds")


def examine(params: Path) -> dict[str, Any]:
    """What `show` shows, by name."""
    study, experiments = config.load(params), config.experiments(params)
    graph_file.check(study)
    for each in experiments.values():
        graph_file.check(each)
    mended = {}
    for each in (study, *experiments.values()):
        if count := lock_file.mend(each.name):
            mended[str(lock_file.path(each.name))] = count
        lock_file.forget_checkpoints(each.name)
    reserved = plan.check_room(study, Layout.of(study), params)
    for name, each in experiments.items():
        if each.own_data:
            file = config.experiment_file(params, name)
            reserved = plan.check_room(each, Layout.of(each), file, reserved=reserved)
    notes = [note] if (note := plan.unread_views(study)) else []
    if late := shifted.arrived(Layout.of(study).shifts, study.evaluation):
        graph = lock_file.path(study.name.partition("/")[0]).with_name("dvc.yaml")
        notes.append(
            f"evaluation.published: {', '.join(late)}: not there when the shifts were made, and now it is. What to do: "
            f"dvc repro -f {graph}:shifts, then run the study"
        )
    notes += _other_counts(study)
    return {
        "study": study.name,
        "runs": len(study.runs),
        "seeds": len(study.seeds),
        "bytes": reserved,
        "attention": {
            name: str(plan.attention_source(study, name))
            for name in (study.transferred_from if study.is_experiment else study.teachers)
        },
        "notes": notes,
        "mended": mended,
        "experiments": {
            name: {"runs": len(each.runs), "seeds": len(each.seeds)} for name, each in experiments.items()
        },
    }


def _other_counts(study: config.Study) -> list[str]:
    """Teachers whose folder or tar of images, which DVC does not look at, has grown or shrunk since they were made."""
    layout, notes = Layout.of(study), []
    for name, teacher in study.teachers.items():
        record = layout.record("pretrain", name) / "metrics.json"
        if not isinstance(teacher, config.Pretrained) or teacher.images in config.PRETRAINING_IMAGES:
            continue
        if not (record.exists() and Path(teacher.images).exists()):
            continue  # it is still to be made, which names a folder that is not there; or it is made and needs none
        from attention_transfer.data.pretraining_images import count_in_files

        then = json.loads(record.read_text(encoding="utf-8"))["images"]
        if (now := count_in_files(Path(teacher.images))) != then:
            graph = lock_file.path(layout.base).with_name("dvc.yaml")
            notes.append(
                f"teachers.{name}.images: {teacher.images} holds {now:,} images, {then:,} when the teacher was "
                f"pre-trained. What to do, if they are to count: dvc repro -f -s {graph}:pretrain@{name}, then run "
                "the study"
            )
    return notes
