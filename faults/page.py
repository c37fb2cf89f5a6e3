"""docs/reliability.md from docs/reliability.json, and that from the records of kill.py and damage.py.

    python faults/page.py [FOLDER]

FOLDER holds kills.json and damages.json; without it the page is made anew from docs/reliability.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from attention_transfer.files import write_json, write_text

DOCS = Path(__file__).parents[1] / "docs"
RECORD, PAGE = DOCS / "reliability.json", DOCS / "reliability.md"
PROMISES = Path(__file__).with_name("promises.md")


def collect(folder: Path) -> dict[str, Any]:
    """One record of what the two drivers found."""
    kills = json.loads((folder / "kills.json").read_text())
    asked = ["git", "-C", str(folder / "killed"), "rev-parse", "HEAD"]
    return {
        "revision": subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip(),
        "kills": len(kills["kills"]),
        "bit_identical": kills["bit_identical"],
        "files_compared": kills["files"],
        "left_behind": kills["left_behind"],
        "killed": kills["kills"],
        "damages": json.loads((folder / "damages.json").read_text()),
    }


def render(record: dict[str, Any], promises: str) -> str:
    """The page."""
    return "\n\n".join([promises.strip(), *_kills(record), *_damages(record["damages"])]) + "\n"


def _kills(record: dict[str, Any]) -> list[str]:
    killed = record["killed"]
    families = Counter(kill["stage"].partition("@")[0] for kill in killed)
    rows = [
        f"| {family} | {count} | "
        + " | ".join(
            str(sum(kill["stage"].partition("@")[0] == family and kill[key] == value for kill in killed))
            for key, value in COLUMNS
        )
        + " |"
        for family, count in families.items()
    ]
    head = ["stage", "kills", *(value for _, value in COLUMNS)]
    identical = "all equal to the bit" if record["bit_identical"] else "**not all equal**"
    left = "; ".join(record["left_behind"]) or "nothing"
    return [
        "## The recorded run: kills",
        f"Commit {record['revision'][:7]}. {record['kills']} kills; {record['files_compared']} files of results "
        f"compared with an undisturbed run's: {identical}. Left behind: {left}. A `moment` is drawn from the stage's "
        "usual time, a `write` is struck while a temporary file exists, a `lock` while DVC writes its lock file.",
        "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]),
    ]


COLUMNS = (
    *(("when", value) for value in ("moment", "write", "lock")),
    *(("target", value) for value in ("dvc", "stage", "group")),
    *(("signal", value) for value in ("SIGKILL", "SIGTERM", "SIGINT")),
)


def _damages(damages: list[dict[str, Any]]) -> list[str]:
    kinds = list(dict.fromkeys(damage["damage"] for damage in damages))
    rows = []
    for artifact in dict.fromkeys(damage["artifact"] for damage in damages):
        found = {damage["damage"]: damage for damage in damages if damage["artifact"] == artifact}
        rows.append(f"| {artifact} | " + " | ".join(_cell(found.get(kind)) for kind in kinds) + " |")
    detected = sum(damage["detected"] for damage in damages)
    return [
        "## The recorded run: damage",
        f"{detected} of {len(damages)} damages detected before the file was used. *refused*: the stage that reads "
        "the file ends with a message that names it and a command, which mends it; *made anew*: DVC reruns the "
        "stage that makes the file, first of all; empty: no other version of the file exists. Afterwards the file was "
        "the same again.",
        "\n".join([f"| file | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 1), *rows]),
    ]


def _cell(damage: dict[str, Any] | None) -> str:
    if damage is None:
        return ""
    if not damage["detected"]:
        return "**not detected**"
    message = damage["message"]
    return "refused" if message.startswith("error:") else "made anew" if "anew" in message else message


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder
    if folder is not None:
        write_json(RECORD, collect(folder))
    write_text(PAGE, render(json.loads(RECORD.read_text()), PROMISES.read_text()))


if __name__ == "__main__":
    main()
