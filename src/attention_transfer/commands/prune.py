"""What no entry of params.yaml needs any longer: found, sized, and deleted on request."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attention_transfer import lock_file, plan
from attention_transfer.config import Study
from attention_transfer.data import shifted
from attention_transfer.errors import StudyError
from attention_transfer.files import TEMPORARY, is_left_over
from attention_transfer.layout import Layout

Tree = Mapping[str, Any]
"""By name what lies in a folder: another tree, or None where everything below is needed."""

OF_EXPERIMENTS = ("evaluate", "similarity")  # stages of which a study has one, and each experiment another
OF_DATA = ("data", "split")  # an experiment with data of its own has another of these as well
GITIGNORE = ".gitignore"  # DVC's, beside its outputs


@dataclass(frozen=True)
class Stale:
    """A file or folder that nothing needs.

    Attributes:
        bytes: of all files in it.
        shared: bytes of those with a second name, such as DVC's cache has for its files: deleting frees
            them only once that goes too.
    """

    path: Path
    reason: str
    bytes: int
    shared: int


def show(study: Study, experiments: Sequence[Study] = (), *, delete_too: bool, as_json: bool = False) -> None:
    """Prints every find with its size and reason, and deletes it on request.

    Args:
        experiments: all that extend the study: their outputs lie among its own.
    """
    layout = Layout.of(study)
    if layout.experiment:
        raise StudyError(
            "an experiment is tidied up together with the study that it extends",
            where=study.name,
            remedy=f"name that study: --params presets/{layout.base}.yaml",
        )
    found = find(study, layout, experiments)
    if as_json:
        for stale in found if delete_too else ():
            delete(stale)
        rows = [asdict(stale) | {"path": str(stale.path), "deleted": delete_too} for stale in found]
        print(json.dumps({"found": rows, "left_alone": [*map(str, _linked(study, layout))]}))
        return
    for root in _linked(study, layout):
        print(f"{root} is reached through a symbolic link: left alone")
    for stale in found:
        print(
            f"{'delete' if delete_too else 'would delete'} {stale.path}: {_megabytes(stale)}, {stale.reason}"
        )
        if delete_too:
            delete(stale)
    total, shared = sum(stale.bytes for stale in found), sum(stale.shared for stale in found)
    print(f"{len(found)} in all, {total / 1e6:.3f} MB" if found else "nothing to delete: all is still needed")
    if shared:
        print(
            f"{shared / 1e6:.3f} MB of that have another name, as files in DVC's cache have: "
            "they are freed when dvc gc drops them there"
        )
    if found and not delete_too:
        print("nothing is deleted yet: add --delete")


def _megabytes(stale: Stale) -> str:
    return f"{stale.bytes / 1e6:.3f} MB"


def find(study: Study, layout: Layout, experiments: Sequence[Study] = ()) -> list[Stale]:
    """Everything in the study's own folders that params.yaml does not need; nothing behind a symlink."""
    found = dict.fromkeys(_unnamed(study, layout, experiments), "params.yaml needs it no longer")
    for each in (study, *(each for each in experiments if each.own_data)):
        found |= _other_recipe(each, Layout.of(each))
    found |= _checkpoints(study, experiments)
    for root in (layout.artifacts, layout.metrics, layout.report):
        found |= dict.fromkeys(_leftovers(root), "left by a process that was killed")
    # What lies in a stale folder goes with it.
    outer = {path: reason for path, reason in found.items() if not any(up in found for up in path.parents)}
    return [Stale(path, reason, *_sizes(path)) for path, reason in sorted(outer.items())]


def delete(stale: Stale) -> None:
    """Deletes it; of a symlink the link alone."""
    try:
        if stale.path.is_dir() and not stale.path.is_symlink():
            shutil.rmtree(stale.path)
        else:
            stale.path.unlink()
    except OSError as error:
        raise StudyError(
            f"cannot be deleted: {error.strerror or error}",
            where=str(stale.path),
            remedy="make its folder writable, and start again",
        ) from error


def _linked(study: Study, layout: Layout) -> list[Path]:
    """Folders of the study that are reached through a symlink, and are therefore left alone."""
    roots = (layout.artifacts, layout.metrics, layout.report, _checkpoint_root(study))
    return [root for root in roots if root.exists() and not _own(root)]


def _grid(study: Study) -> dict[str, Tree]:
    return {run: dict.fromkeys(map(str, study.seeds)) for run in study.runs}


def _of_runs(study: Study) -> Tree:
    """Large outputs of a study's runs, or of an experiment's."""
    shifts = shifted.wanted(study.evaluation, study.data)
    sets = [which for which in ("validation", "test") if which in study.evaluation.sets] + list(shifts)
    logits = dict.fromkeys(f"{name}.safetensors" for name in sets)
    return {
        "students": _grid(study),
        "predictions": {run: dict.fromkeys(map(str, study.seeds), logits) for run in study.runs},
        "resolved": dict.fromkeys(f"{run}.json" for run in study.runs),
    }


def _needed(study: Study, layout: Layout, experiments: Sequence[Study]) -> dict[Path, Tree]:
    """By root, the families of outputs that params.yaml names one by one; other families are always needed."""
    shifts = shifted.wanted(study.evaluation, study.data)
    shift_files = [*(f"{name}.npz" for name in shifts), shifted.MANIFEST, shifted.CONTACT_SHEET]
    artifacts: Tree = {
        **_of_runs(study),
        "experiments": {_name(each): {**_of_runs(each), **_of_data(each)} for each in experiments},
        "teachers": dict.fromkeys(study.teachers),
        "finetuned": dict.fromkeys([*study.finetuned_teachers, "names.json"]),
        "cache": {name: _needed_sets(study, layout, name) for name in study.teachers},
        "shifts": dict.fromkeys(shift_files),
    }
    grid = {run: tree for each in (study, *experiments) for run, tree in _grid(each).items()}
    metrics: Tree = {
        "train": grid,
        "predict": grid,
        "resolve": dict.fromkeys(grid),
        "pretrain": dict.fromkeys(study.teachers),
        "probe": dict.fromkeys(study.teachers),
        "cache": dict.fromkeys(study.teachers)
        | {_name(each): dict.fromkeys(each.cached_teachers) for each in experiments if each.own_data},
    }
    return {layout.artifacts: artifacts, layout.metrics: metrics}


def _of_data(experiment: Study) -> Tree:
    """Large outputs of an experiment with data of its own, beside those of its runs."""
    if not experiment.own_data:
        return {}
    layout = Layout.of(experiment)
    caches = {name: _needed_sets(experiment, layout, name) for name in experiment.cached_teachers}
    return {"data": None, "splits": None, "cache": caches}


def _name(experiment: Study) -> str:
    return Layout.of(experiment).experiment


def _needed_sets(study: Study, layout: Layout, teacher: str) -> Tree:
    sets = plan.cached_sets(study, teacher)
    locks = (f".{which}.lock" for which in sets)  # the writer's
    return dict.fromkeys([layout.cache_manifest(teacher).name, *sets, *locks])


def _unnamed(study: Study, layout: Layout, experiments: Sequence[Study]) -> Iterator[Path]:
    for root, families in _needed(study, layout, experiments).items():
        if _own(root):
            for family, tree in families.items():
                yield from _not_in(root / family, tree)
    names = {
        **{stage: {_name(each) for each in experiments} for stage in OF_EXPERIMENTS},
        **{stage: {_name(each) for each in experiments if each.own_data} for stage in OF_DATA},
    }
    for stage, known in names.items() if _own(layout.metrics) else ():
        for path in _below(layout.record(stage)):
            if path.is_dir() and path.name not in known:  # the study's own records lie beside them
                yield path


def _not_in(folder: Path, tree: Tree) -> Iterator[Path]:
    for path in _below(folder):
        if path.name not in tree:
            yield path
        elif tree[path.name] is not None:
            yield from _not_in(path, tree[path.name])


def _other_recipe(study: Study, layout: Layout) -> dict[Path, str]:
    """Cached sets whose rows are of another teacher, other images or other views than the present ones."""
    folders = [
        (name, which, layout.cache(name) / which)
        for name in study.cached_teachers
        for which in plan.cached_sets(study, name)
        if _own(layout.artifacts) and (layout.cache(name) / which).is_dir()
    ]
    if not folders:
        return {}
    from attention_transfer.commands import cached  # torch and timm take seconds

    found = {}
    for name, which, folder in folders:
        if (difference := cached.difference(study, layout, name, which)) is not None:
            found[folder] = difference
    return found


def _checkpoint_root(study: Study) -> Path:
    return Path(".ckpt") / study.name


def _checkpoints(study: Study, experiments: Sequence[Study]) -> dict[Path, str]:
    """Checkpoints of stages that are there no longer, and older ones beside a newer one of the same stage."""
    root = _checkpoint_root(study)
    names = [_name(each) for each in experiments]
    found = {path: reason for each in experiments for path, reason in _checkpoints(each, ()).items()}
    labels = {f"{stage}-{name}" for stage in ("pretrain", "probe", "cache") for name in study.teachers}
    labels |= {f"{stage}-{run}-{seed}" for stage in ("train", "predict") for run, seed in study.grid}
    labels |= {f"resolve-{run}" for run in study.runs}
    labels |= {"data", "split", "finetuned", "shifts", *OF_EXPERIMENTS, "maps", "report"}
    own = _name(study)
    labels |= {f"{stage}-{own}" for stage in (*OF_EXPERIMENTS, *OF_DATA)}
    labels |= {f"cache-{own}-{name}" for name in study.cached_teachers}
    newest: dict[str, Path] = {}
    folders = (
        [path for path in _below(root) if path.name not in (lock_file.NAME, *names)] if _own(root) else []
    )
    for path in sorted(folders, key=lambda folder: folder.lstat().st_mtime, reverse=True):
        label = path.name.rpartition("-")[0]
        if label not in labels:
            found[path] = "checkpoint of a stage that params.yaml names no longer"
        elif newest.setdefault(label, path) != path:
            found[path] = "checkpoint of other values, older than the one beside it"
    return found


def _leftovers(root: Path) -> Iterator[Path]:
    """Unfinished files and folders whose writer is not alive."""
    if _own(root):
        for folder, folders, names in os.walk(root):  # which follows no symlinks
            for name in (*folders, *names):
                if name.startswith(TEMPORARY) and is_left_over(Path(folder) / name):
                    yield Path(folder) / name


def _own(root: Path) -> bool:
    """Whether a folder lies below the present one, without a symlink on the way."""
    return root.resolve() == Path.cwd().resolve() / root


def _below(folder: Path) -> list[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name != GITIGNORE)


def _sizes(path: Path) -> tuple[int, int]:
    """Bytes of all files at `path`, and of those among them that have another name."""
    if path.is_symlink() or not path.is_dir():
        files = [path]
    else:
        files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    stats = [file.lstat() for file in files]
    shared = sum(stat.st_size for stat in stats if stat.st_nlink > 1)
    return sum(stat.st_size for stat in stats), shared
