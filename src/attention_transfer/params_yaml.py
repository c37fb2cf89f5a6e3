"""Reads a params.yaml as DVC reads it: YAML 1.2, where 1e-3 is a number and `yes` and `no` are words."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from attention_transfer.errors import StudyError


class Loader(yaml.SafeLoader):
    """YAML 1.2 by way of DVC's reader, ruamel.yaml. A key given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return node

    def integer(self, node: yaml.ScalarNode) -> int:
        """017 is 17, as in YAML 1.2; octal numbers begin with 0o."""
        digits = str(self.construct_scalar(node)).replace("_", "")
        return int(digits, 0 if digits.lstrip("+-")[:2] in ("0b", "0o", "0x") else 10)


_TAG = "tag:yaml.org,2002:"
# What the plain words of YAML 1.2 mean, and 1_000 as ruamel.yaml, DVC's reader, takes it.
_PLAIN = {
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?(0b[01_]+|0o[0-7_]+|_*[0-9][0-9_]*|0x[0-9a-fA-F_]+)"),
    "float": (
        "-+.0123456789",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+([eE][-+][0-9]+)?)"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
}
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.removeprefix(_TAG) not in _PLAIN]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_first, _pattern) in _PLAIN.items():
    Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first))
Loader.add_constructor(_TAG + "int", Loader.integer)


def _nearest(path: Path) -> str:
    """The preset whose name is like that of a file that is not there."""
    presets = {preset.stem: preset for preset in Path("presets").glob("*.yaml")}
    near = difflib.get_close_matches(path.stem, presets, n=1)
    return f"; did you mean {presets[near[0]]}?" if near else ""


def read(path: Path) -> dict[str, Any]:
    """The content of a file, with tuples for lists.

    Raises:
        StudyError: it does not exist, cannot be read, is not YAML, or holds no keys.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise StudyError(
            "does not exist", where=str(path), remedy=f"give the path of a params.yaml{_nearest(path)}"
        ) from error
    except OSError as error:
        raise StudyError(
            f"cannot be read: {error.strerror}", where=str(path), remedy="give the path of a params.yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise StudyError(f"is not valid YAML: {error}", where=str(path), remedy="save it as UTF-8") from error


def parse(text: str, where: str) -> dict[str, Any]:
    """A file's content, with tuples for lists.

    Args:
        where: the file, for messages.

    Raises:
        StudyError: it is not YAML, or holds no keys.
    """
    try:
        values = _tuples(yaml.load(text, Loader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StudyError(
            f"is not valid YAML: {' '.join(str(error).split())}", where=where, remedy="correct that line"
        ) from error
    if not isinstance(values, dict):
        raise StudyError("holds no keys", where=where, remedy="start from a copy of params.yaml")
    return values


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
