"""The one exception for problems that the user can mend."""

from __future__ import annotations

import functools
import os
from typing import Any


class StudyError(Exception):
    """Something that the user can mend: printed as one message, without a traceback.

    Args:
        problem: what is wrong, with the value that was found.
        where: file, and key or row in it.
        remedy: what to do about it.
    """

    def __init__(self, problem: str, *, where: str, remedy: str) -> None:
        self.problem, self.where, self.remedy = problem, where, remedy
        super().__init__(f"{where}: {problem}\n  What to do: {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        """How it comes back from another process."""
        return functools.partial(StudyError, where=self.where, remedy=self.remedy), (self.problem,)


def repro(stage: str, *, again: bool = False, graph: str | None = None) -> str:
    """The command that makes a stage's outputs; `again` also where DVC takes them for made.

    Presets have graphs of their own. Without `graph`, it is the one at work, which is in a variable that DVC
    gives its stages.
    """
    if graph is None:
        graph = os.environ.get("DVC_STAGE", "").rpartition(":")[0]
    command = "python -m attention_transfer remake" if again else "dvc repro"
    return f"{command} {graph}{':' if graph else ''}{stage}"
