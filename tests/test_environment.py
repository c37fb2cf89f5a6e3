"""pyproject.toml, requirements.lock and environment.yml describe one environment: this one."""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
DECLARED = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
]
LOCKED = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]
PLACES = [
    {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": system,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "platform_machine": {"linux": "x86_64", "darwin": "arm64"}[system],
    }
    for python in ("3.11", "3.12")
    for system in ("linux", "darwin")
]


def pins(environment: dict[str, str]) -> dict[str, str]:
    """Version of each package of the lock in an environment; a package pinned twice there is an error."""
    found: dict[str, str] = {}
    for requirement in LOCKED:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", requirement
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice"
            found[name] = specifier.version
    return found


@pytest.mark.parametrize("place", PLACES, ids=lambda p: f"{p['python_version']}-{p['sys_platform']}")
def test_lock_pins_what_is_declared(place: dict[str, str]) -> None:
    locked = pins(place)
    for requirement in DECLARED:
        if requirement.marker is None or requirement.marker.evaluate(place):
            version = locked.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement.name} is not in the lock"
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version}"


def test_installed_versions_are_the_locked_ones() -> None:
    here = {key: str(value) for key, value in default_environment().items()}
    different = {}
    for name, version in pins(here).items():
        installed = metadata.version(name)
        if installed.partition("+")[0] != version:
            different[name] = (installed, version)
    assert different == {}


def test_lock_holds_what_the_installed_packages_require() -> None:
    """No package comes in past the lock: it holds the requirements of everything that it holds."""
    here = {key: str(value) for key, value in default_environment().items()}
    locked = pins(here)
    lacking = set()
    for name in locked:
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({**here, "extra": ""}):
                version = locked.get(canonicalize_name(needed.name))
                if version is None or not needed.specifier.contains(version, prereleases=True):
                    lacking.add(f"{name} needs {needed}, locked is {version}")
    assert lacking == set()


def test_conda_installs_the_lock_and_the_package() -> None:
    (pip,) = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    assert "pip" in CONDA["dependencies"]


def test_python_range_is_one() -> None:
    (conda,) = [
        entry for entry in CONDA["dependencies"] if isinstance(entry, str) and entry.startswith("python")
    ]
    declared = SpecifierSet(PROJECT["requires-python"])
    assert SpecifierSet(conda.removeprefix("python")) == declared
    assert [minor for minor in range(8, 20) if declared.contains(f"3.{minor}.0")] == [11, 12]
    assert declared.contains(platform.python_version()), sys.executable
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "((3, 11), (3, 12))" in makefile


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.lock", "environment.yml"])
def test_no_package_index_is_named(name: str) -> None:
    """Where packages come from is the machine's business: its pip and uv are configured for that."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert (
        re.findall(r"(?i)https?://\S+|--(?:extra-)?index-url\S*|--find-links\S*|\[\[?tool\.uv\.\S*", text)
        == []
    )


def test_each_dependency_says_why() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    for requirement in DECLARED:
        (line,) = [line for line in lines if re.match(rf'\s*"{re.escape(requirement.name)}[<>=!~\[" ]', line)]
        assert re.search(r"#\s*\w.{4,}", line), line
