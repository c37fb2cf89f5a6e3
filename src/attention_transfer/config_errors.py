"""What is wrong with a params.yaml, in the words of its user."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def nearest(name: str, names: Any) -> str:
    """Which of the names may have been meant."""
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(map(str, names))}"


def explain(problem: Any, sections: Mapping[Any, type[BaseModel]]) -> str:
    """One of pydantic's problems with a params.yaml, in words.

    Args:
        sections: by key, what stands below it; under None the whole file.
    """
    location = _location(problem["loc"])
    key = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(str(location[-1]), _fields_beside(problem['loc'], sections))}"
    if problem["type"] == "missing":
        return f"{key}: is missing; it has no default"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.kind: is missing; it has no default"
    if problem["type"] == "union_tag_invalid":
        return f"{key}.kind: {problem['ctx']['tag']!r} is refused: choose {problem['ctx']['expected_tags']}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}.{message}" if key else message
    message = _MESSAGES.get(problem["type"], message)
    return f"{key}: {_shown(problem['input'])} is refused: {message}"


# Where pydantic speaks of Python's types, the words of a params.yaml.
_MESSAGES = {
    "tuple_type": "Input should be a list",
    "dict_type": "Input should be a section with keys",
    "model_type": "Input should be a section with keys",
    "model_attributes_type": "Input should be a section with keys",
    "invalid_key": "A key should be a word",
}


def _location(location: tuple[Any, ...]) -> list[Any]:
    """The way to a value in the user's file: without the members of unions that pydantic tried."""
    match location:
        case ("teachers", name, _, *rest):  # the kind
            return ["teachers", name, *rest]
        case ("runs", name, "layers" | "heads" as key, _, *rest):  # `all`, or a list
            return ["runs", name, key, *rest]
        case ("runs" | "ensembles" | "finetuned_teachers" as section, name, "[key]"):
            return [section, name]
    return list(location)


def _fields_beside(location: tuple[Any, ...], sections: Mapping[Any, type[BaseModel]]) -> list[str]:
    """The valid keys at the place of an unknown one."""
    named = location[0] in ("teachers", "finetuned_teachers", "runs", "ensembles")
    # The second part is then a name that the user chose, which may be that of a section.
    path = [location[0], *location[2:-1]] if named else location[:-1]
    if location[:2] == ("evaluation", "published"):
        path = ["published"]
    return list(sections[path[-1] if path else None].model_fields)


def _shown(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    try:
        shown = repr(list(value) if isinstance(value, tuple) else value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        return "this value"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
