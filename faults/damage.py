"""Damages every file that a stage reads, one way after the other, and tells what the study makes of it.

    python faults/damage.py FOLDER [--artifacts "predictions;cache, keys"]

FOLDER gets two copies of this repository with finished smoke studies, the second with other seeds: its files are
the `older` ones, where they differ. What FOLDER/damages.json says of other artifacts stays. Bits are flipped and
blocks zeroed without a change of size or time, which DVC does not see: the stage that reads the file is made to
run, and must refuse it. Files that are truncated, replaced or deleted are DVC's to find: it must make them anew
before anything reads them, or their reader refuses them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from copies import GRAPH, PARAMS, Study


@dataclass(frozen=True)
class Artifact:
    """A file, the stage that makes it and one that reads it.

    Attributes:
        glob: of the file, the first that is found.
        maker: stage of dvc.yaml; None for what the user brings.
        reader: stage of dvc.yaml.
        remove: output of the reader that must go, or it would not read the file.
    """

    name: str
    glob: str
    maker: str | None
    reader: str
    remove: str | None = None


RUNS, METRICS = "runs/smoke", "metrics/smoke"
CONTRAST = f"{RUNS}/predictions/copy/0/contrast-5.safetensors"
VIEWS, TEACHER = f"{RUNS}/cache/mae/views", f"{RUNS}/teachers/mae"
STUDENT = f"{RUNS}/students/distill/0"
ARTIFACTS = (
    Artifact("data file", "data/fashion-mnist/**/train-images-idx3-ubyte*", None, "data"),
    Artifact("images", f"{RUNS}/data/train_images.npy", "data", "train@copy-0"),
    Artifact("labels", f"{RUNS}/data/train_labels.npy", "data", "train@copy-0"),
    Artifact("description of the images", f"{RUNS}/data/dataset.json", "data", "train@copy-0"),
    Artifact("index file, labelled", f"{RUNS}/splits/labelled.txt", "split", "train@copy-0"),
    Artifact("index file, validation", f"{RUNS}/splits/validation.txt", "split", "train@copy-0"),
    Artifact("index file, pre-training", f"{RUNS}/splits/pretrain.txt", "split", "pretrain@mae"),
    Artifact("teacher's weights", f"{TEACHER}/model.safetensors", "pretrain@mae", "train@finetune-0"),
    Artifact("teacher's configuration", f"{TEACHER}/config.json", "pretrain@mae", "train@finetune-0"),
    Artifact("cache, shard", f"{VIEWS}/shard-00000.safetensors", "cache@mae", "train@distill-0"),
    Artifact("cache, keys", f"{VIEWS}/keys.safetensors", "cache@mae", "train@distill-0"),
    Artifact("cache, manifest", f"{VIEWS}/manifest.json", "cache@mae", "train@distill-0"),
    Artifact("cache, manifest of the sets", f"{RUNS}/cache/mae/manifest.json", "cache@mae", "resolve@distill"),
    Artifact("resolved run", f"{RUNS}/resolved/copy.json", "resolve@copy", "train@copy-0"),
    Artifact("shifted images", f"{RUNS}/shifts/contrast-5.npz", "shifts", "predict@copy-0", CONTRAST),
    Artifact("shifts, manifest", f"{RUNS}/shifts/manifest.json", "shifts", "predict@copy-0", CONTRAST),
    Artifact("contact sheet", f"{RUNS}/shifts/contact_sheet.npz", "shifts", "report"),
    Artifact("student's weights", f"{STUDENT}/model.safetensors", "train@distill-0", "predict@distill-0"),
    Artifact("student's configuration", f"{STUDENT}/config.json", "train@distill-0", "predict@distill-0"),
    Artifact("predictions", f"{RUNS}/predictions/distill/0/test.safetensors", "predict@distill-0", "evaluate"),
    Artifact("attention maps", f"{RUNS}/maps/maps.npz", "maps", "report"),
    Artifact("metrics of a training", f"{METRICS}/train/copy/0/metrics.json", "train@copy-0", "report"),
    Artifact("curve of a training", f"{METRICS}/train/copy/0/curve.csv", "train@copy-0", "report"),
    Artifact("run.json of a training", f"{METRICS}/train/copy/0/run.json", "train@copy-0", "report"),
    Artifact("metrics of a probe", f"{METRICS}/probe/mae/metrics.json", "probe@mae", "report"),
    Artifact("table of similarity", f"{METRICS}/similarity/layers.csv", "similarity", "report"),
    Artifact("table of scores", f"{METRICS}/evaluate/scores.csv", "evaluate", "report"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What became of one damage.

    Attributes:
        detected: an error named the file, and its command mended it; or DVC made it anew before it was read. Then
            the file was the same again.
        message: the error.
    """

    artifact: str
    damage: str
    detected: bool
    message: str


def truncate(path: Path, older: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path: Path, older: Path) -> None:
    in_place(path, lambda content: content.__setitem__(len(content) // 2, content[len(content) // 2] ^ 1))


def zero_block(path: Path, older: Path) -> None:
    def zero(content: bytearray) -> None:
        # Where there is something else than zeros to begin with.
        start = next(i for i in range(len(content) // 2, len(content)) if content[i])
        stop = min(start + 512, len(content))
        content[start:stop] = bytes(stop - start)

    in_place(path, zero)


def in_place(path: Path, change: Callable[[bytearray], None]) -> None:
    """Changes bytes as a failing disk does: no new size, no new time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    change(content)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path, older: Path) -> None:
    path.unlink()
    shutil.copyfile(older, path)


def delete(path: Path, older: Path) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "truncated": truncate,
    "bit flipped": flip_bit,
    "block zeroed": zero_block,
    "older version": replace,
    "deleted": delete,
}
UNSEEN_BY_DVC = ("bit flipped", "block zeroed")


def examine(study: Study, older: Study, artifact: Artifact, damage: str) -> Finding:
    """Damages the file, lets the study meet it, and makes it whole again by the command that the study names."""
    path = next(study.folder.glob(artifact.glob))
    name, whole = path.relative_to(study.folder), path.read_bytes()
    DAMAGES[damage](path, older.folder / name)
    if damage in UNSEEN_BY_DVC or artifact.maker is None:
        if artifact.remove:
            (study.folder / artifact.remove).unlink()
        ended = dvc(study, "--force", "--single-item", f"{GRAPH}:{artifact.reader}")
    else:
        ended = dvc(study)
    told = next((line for line in ended.stdout.splitlines() if line.startswith("error:")), "")
    stages = re.findall(r"Running stage '[^:]*:([^']*)'", ended.stdout)
    refused = ended.returncode != 0 and str(name) in told
    anew = ended.returncode == 0 and damage not in UNSEEN_BY_DVC and stages[:1] == [artifact.maker]
    mended = True
    if artifact.maker is None:
        path.write_bytes(whole)
    elif refused:
        remedy = re.search(r"python (-m attention_transfer remake \S+)", ended.stdout)
        mended = remedy is not None and run(study, sys.executable, *remedy[1].split()).returncode == 0
    after = dvc(study)
    # What holds times and versions is another file each time.
    mended = mended and after.returncode == 0 and (name.name == "run.json" or path.read_bytes() == whole)
    detected = mended and (refused or anew)
    message = told or ("made anew by DVC" if anew else ended.stdout[-300:])
    if not mended:
        message += f"\n  not mended: {after.stdout[-300:]}"
    return Finding(artifact.name, damage, detected, message)


def examine_checkpoint(study: Study, damage: str) -> Finding:
    """Stops pre-training half-way, damages its state, and lets it go on: refused, or the same weights at the end.

    The older version is the state of an earlier stop; without a state it starts from its beginning.
    """
    weights = next(study.folder.glob(f"{TEACHER}/model.safetensors"))
    whole = weights.read_bytes()
    state = stopped(study, 3.0)
    earlier = state.with_name("earlier")
    shutil.copy(state, earlier)
    if damage == "older version":
        stopped(study, 3.0)
    DAMAGES[damage](state, earlier)
    earlier.unlink()
    name = str(state.relative_to(study.folder))
    again = ("--force", "--single-item", f"{GRAPH}:pretrain@mae")
    ended = dvc(study, *again)
    told = next((line for line in ended.stdout.splitlines() if line.startswith("error:")), "")
    if damage in ("older version", "deleted"):
        detected, told = ended.returncode == 0, "goes on from what is there, to the same weights"
    else:
        detected = ended.returncode != 0 and name in told and "delete this file" in ended.stdout
        state.unlink()
        detected = detected and dvc(study, *again).returncode == 0
    return Finding("checkpoint", damage, detected and weights.read_bytes() == whole, told)


def stopped(study: Study, seconds: float) -> Path:
    """The state of a pre-training that was asked to stop so many seconds after its first steps."""
    running = study.begin("dvc", "repro", "--force", "--single-item", f"{GRAPH}:pretrain@mae")
    assert running.stdout is not None
    while not re.search(r"\| [1-9]\d*/\d+ \[", line := running.stdout.readline()):
        assert line, "pre-training ended before it could be stopped"
    time.sleep(seconds)
    for child in psutil.Process(running.pid).children(recursive=True):
        child.terminate()
    running.communicate()
    return next((study.folder / ".ckpt" / "smoke").glob("pretrain-mae-*/state.pt"))


def examine_params(study: Study, damage: str) -> Finding:
    """Refused; or it is an edit like any other, and what it affects runs: of a valid value nobody can tell."""
    path = study.folder / PARAMS
    whole = path.read_text()
    earlier = path.with_name("earlier")
    earlier.write_text(re.sub(r"epochs: 4", "epochs: 5", whole, count=1))
    if damage == "bit flipped":
        at = whole.index("labelled: 100") + len("labelled: ")
        path.write_text(whole[:at] + chr(ord(whole[at]) ^ 1) + whole[at + 1 :])  # 100 becomes 000
    else:
        DAMAGES[damage](path, earlier)
    earlier.unlink()
    checked = run(study, sys.executable, "-m", "attention_transfer", "check", "--params", PARAMS)
    told = next((line for line in checked.stdout.splitlines() if line.startswith("error:")), "")
    detected = checked.returncode != 0 and PARAMS in told
    if damage == "older version":
        status = run(study, "dvc", "status", GRAPH).stdout
        detected, told = "changed deps" in status and PARAMS in status, "an edit: what it affects runs"
    path.unlink(missing_ok=True)
    path.write_text(whole)
    return Finding("params", damage, detected, told)


SPECIAL: dict[str, Callable[[Study, str], Finding]] = {
    "checkpoint": examine_checkpoint,
    "params": examine_params,
}


def differs(study: Study, older: Study, artifact: Artifact) -> bool:
    """Whether there is another version of a file at all: images do not depend on a seed."""
    path = next(study.folder.glob(artifact.glob))
    other = older.folder / path.relative_to(study.folder)
    return other.exists() and path.read_bytes() != other.read_bytes()


def bring_data(folder: Path) -> None:
    """Puts Fashion-MNIST where params.yaml looks first, from Debian's package."""
    listing = subprocess.run(
        ["dpkg", "-L", "dataset-fashion-mnist"], capture_output=True, text=True, check=True
    ).stdout
    folder.mkdir(parents=True, exist_ok=True)
    for name in listing.split():
        if "ubyte" in name:
            shutil.copy(name, folder)


def dvc(study: Study, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(study, "dvc", "repro", *(arguments or [GRAPH]))


def run(study: Study, *command: str) -> subprocess.CompletedProcess[str]:
    running = study.begin(*command)
    output, _ = running.communicate()
    return subprocess.CompletedProcess(command, running.returncode, output)


def relative(finding: Finding, folder: str) -> Finding:
    """The finding without the place where it was made."""
    return dataclasses.replace(finding, message=finding.message.replace(folder, ""))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--artifacts", help="names, separated by semicolons (default: all)")
    options = parser.parse_args()
    folder = options.folder.resolve()
    study, older = Study(folder / "damaged"), Study(folder / "older")
    params = older.folder / PARAMS
    params.write_text(params.read_text().replace("seed: 0", "seed: 1").replace("contrast", "fog"))
    for made in (study, older):
        bring_data(made.folder / "data" / "fashion-mnist")
        assert dvc(made).returncode == 0
    names = [*(artifact.name for artifact in ARTIFACTS), *SPECIAL]
    wanted = options.artifacts.split(";") if options.artifacts else names
    record = folder / "damages.json"
    findings = json.loads(record.read_text()) if record.exists() else []
    findings = [found for found in findings if found["artifact"] not in wanted]

    def note(finding: Finding) -> None:
        finding = relative(finding, f"{study.folder}/")
        found = "detected" if finding.detected else "NOT DETECTED"
        print(f"{finding.artifact}, {finding.damage}: {found}: {finding.message}", flush=True)
        findings.append(asdict(finding))
        record.write_text(json.dumps(findings, indent=1))

    for artifact in ARTIFACTS:
        for damage in DAMAGES if artifact.name in wanted else ():
            # Of a data set that the user brings a missing file is looked for elsewhere.
            if damage == "deleted" and not artifact.maker:
                continue
            if damage == "older version" and not differs(study, older, artifact):
                continue
            note(examine(study, older, artifact, damage))
    for name, special in SPECIAL.items():
        for damage in DAMAGES if name in wanted else ():
            note(special(study, damage))
    missed = [finding for finding in findings if not finding["detected"]]
    print(f"{len(findings)} damages, {len(missed)} not detected")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
