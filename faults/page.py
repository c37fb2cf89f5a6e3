"""docs/reliability.md from docs/reliability.json, and that from the records of kill.py and damage.py.

    python faults/page.py [FOLDER [--add]]

FOLDER holds kills.json and damages.json; without it the page is made anew from docs/reliability.json. With `--add`
what FOLDER tells of further stages and files joins the record.
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
    run = {
        "revision": subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip(),
        "bit_identical": kills["bit_identical"],
        "jobs": kills["jobs"],
        "files_compared": kills["files"],
        "left_behind": kills["left_behind"],
        "killed": kills["kills"],
    }
    damages = folder / "damages.json"
    return summary([run], json.loads(damages.read_text()) if damages.exists() else [])


def summary(runs: list[dict[str, Any]], damages: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of some runs of the kill driver, and of damages."""
    return {
        "kills": sum(len(run["killed"]) for run in runs),
        "bit_identical": all(run["bit_identical"] for run in runs),
        "runs": runs,
        "damages": damages,
    }


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Both records; of an artifact that both damaged, the later findings."""
    anew = {damage["artifact"] for damage in later["damages"]}
    kept = [damage for damage in earlier["damages"] if damage["artifact"] not in anew]
    return summary(earlier["runs"] + later["runs"], kept + later["damages"])


def render(record: dict[str, Any], promises: str) -> str:
    """The page."""
    return "\n\n".join([promises.strip(), *_kills(record), *_damages(record["damages"])]) + "\n"


def _kills(record: dict[str, Any]) -> list[str]:
    killed = [kill for run in record["runs"] for kill in run["killed"]]
    families = Counter(kill["stage"].partition("@")[0] for kill in killed)
    names = {"": "before the first stage"}
    rows = [
        f"| {names.get(family, family)} | {count} | "
        + " | ".join(
            str(sum(kill["stage"].partition("@")[0] == family and kill[key] == value for kill in killed))
            for key, value in COLUMNS
        )
        + " |"
        for family, count in families.items()
    ]
    head = ["stage", "kills", *(value for _, value in COLUMNS)]
    return [
        "## The recorded run: kills",
        "\n".join(f"- {_run(run)}" for run in record["runs"]),
        "A `moment` is drawn from the stage's usual time, a `write` is struck while a temporary file exists, a `lock` "
        "while DVC writes its lock file.",
        "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]),
    ]


def _run(run: dict[str, Any]) -> str:
    identical = "all equal to the bit" if run["bit_identical"] else "**not all equal**"
    left = "; ".join(run["left_behind"]) or "nothing"
    jobs = f", {run['jobs']} stages at a time" if run.get("jobs") else ""
    return (
        f"Commit {run['revision'][:7]}{jobs}: {len(run['killed'])} kills; {run['files_compared']} files of results "
        f"compared with an undisturbed run's: {identical}. Left behind: {left}."
    )


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
    parser.add_argument("--add", action="store_true", help="to the record that there is")
    options = parser.parse_args()
    if options.folder is not None:
        found = collect(options.folder)
        write_json(RECORD, joined(json.loads(RECORD.read_text()), found) if options.add else found)
    write_text(PAGE, render(json.loads(RECORD.read_text()), PROMISES.read_text()))


if __name__ == "__main__":
    main()
