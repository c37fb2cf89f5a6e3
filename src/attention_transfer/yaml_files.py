"""The YAML that programs write: DVC's lock files and graphs, of up to tens of thousands of lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

YAMLError = yaml.YAMLError


def load(path: Path) -> Any:
    """The content of a file, by libyaml: PyYAML alone takes much longer over large ones.

    Raises:
        YAMLError: it is no YAML.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


def dump(content: Any) -> str:
    """The text of a file with this content, keys in their order."""
    return yaml.dump(content, Dumper=yaml.CSafeDumper, sort_keys=False)
