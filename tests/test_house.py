"""Who may import whom, read from the sources: every import counts, also those inside functions."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "attention_transfer"

# By file or folder of src/attention_transfer, the longest that fits: what it may import of the package,
# beside itself where it is a folder.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    # The ground that every room stands on.
    "errors": (),
    "files": ("errors",),
    "layout": ("config",),
    "params_yaml": ("errors",),
    "config_values": (),
    "config_teachers": ("config_values",),
    "config_errors": (),
    "config_runs": ("config_teachers", "config_values"),
    "config": ("config_errors", "config_runs", "config_teachers", "config_values", "errors", "params_yaml"),
    "provenance": ("files",),
    "stop_signals": (),
    "machine_file": ("errors",),
    "launching": ("errors", "machine_file"),
    "cluster": ("errors", "launching", "machine_file", "stop_signals"),
    "processes": (),
    "draws": (),
    "ahead": (),
    "yaml_files": (),
    "lock_file": ("errors", "files", "yaml_files"),
    "graph_file": ("config", "errors", "lock_file", "yaml_files"),
    "run_record": ("errors", "files"),
    # The rooms. Models and data do not know each other.
    "data": ("config", "errors", "files"),
    "data.views": (),
    "data.corruptions": (),
    "blocks": (),
    "models": ("blocks", "config", "draws", "errors", "files"),
    # Transfer knows tensors, and attention as they are read and replaced, but no model by name.
    "transfer": ("errors", "files", "models.attention", "models.tokens"),
    "transfer.teacher_source": ("models.attention", "models.stochastic_depth", "models.tokens", "transfer"),
    "transfer.losses": ("blocks",),
    "transfer.joint_attention": ("blocks", "transfer.losses"),
    "transfer.methods": (
        "config",
        "models.constant_map",
        "transfer.attention_copy",
        "transfer.attention_distill",
        "transfer.distill_features",
        "transfer.distill_logits",
        "transfer.joint_attention",
        "transfer.method",
        "transfer.supervised",
    ),
    **{  # The cache stores arrays and never sees a model.
        f"transfer.{name}": ("errors", "files", *(f"transfer.{other}" for other in parts))
        for name, parts in {
            "cache_layout": (),
            "quantisation": ("cache_layout",),
            "packing": ("cache_layout", "quantisation"),
            "shards": ("cache_layout",),
            "cache_plan": ("cache_layout", "shards"),
            "cache_manifest": ("cache_layout", "shards"),
            "cache_reader": ("cache_layout", "cache_manifest", "packing", "shards"),
            "cache_writer": ("cache_layout", "cache_manifest", "packing", "quantisation", "shards"),
            "cache": ("cache_layout", "cache_plan", "cache_reader", "cache_writer", "shards"),
            "cache_size": ("cache_layout", "cache_manifest", "shards"),
        }.items()
    },
    # Training knows the protocols: no method, no data set, no tracker.
    "training": (
        *("errors", "files", "stop_signals", "transfer.method", "transfer.teacher_source"),
        *("draws", "machine_file", "processes"),
    ),
    "evaluation": ("ahead", "blocks", "errors", "files", "processes"),
    "evaluation.metrics": (),
    "evaluation.statistics": (),
    "reporting": (
        *("config", "errors", "files", "run_record"),
        # Of evaluation, what needs NumPy and SciPy alone.
        *(
            f"evaluation.{name}"
            for name in ("statistics", "multiple_tests", "power", "robustness", "variance")
        ),
    ),
    "tracking": ("errors", "files", "layout", "provenance", "run_record", "yaml_files"),
    # What puts the rooms together, for the stages.
    "plan": ("config", "errors", "layout", "transfer.cache_layout", "transfer.cache_plan"),
    "assembly": (
        "config",
        "data",
        "errors",
        "files",
        "layout",
        "models",
    ),
    "teaching": (
        "assembly",
        "evaluation.predictions",
        "models",
        "transfer.cache",
        "transfer.method",
        "transfer.teacher_source",
    ),
    "fitting": (
        "assembly",
        "data",
        "evaluation",
        "machine_file",
        "models",
        "teaching",
        "training",
        "transfer",
    ),
    "stage": (
        "cluster",
        "config",
        "errors",
        "files",
        "launching",
        "layout",
        "lock_file",
        "machine_file",
        "provenance",
        "run_record",
        "tracking",
    ),
    # The commands beside the stages, and what they measure: on any room, but never on a stage's way.
    "measuring": (
        "assembly",
        "config",
        "data",
        "errors",
        "evaluation.predictions",
        "layout",
        "models",
        "plan",
        "training",
        "transfer",
    ),
    # How a student leaves the study: its weights, and what the records say of them.
    "exporting": (
        "config",
        "data.images",
        "errors",
        "evaluation.predictions",
        "evaluation.statistics",
        "files",
        "layout",
        "models.vit",
        "reporting.records",
        "run_record",
    ),
    "commands": (
        "assembly",
        "config",
        "config_errors",
        "data",
        "errors",
        "evaluation.statistics",
        "exporting",
        "files",
        "graph_file",
        "layout",
        "lock_file",
        "machine_file",
        "measuring",
        "models.students",
        "models.releases",
        "models.timm_entries",
        "models.weights_of_timm",
        "params_yaml",
        "plan",
        "provenance",
        "reporting",
        "stop_signals",
        "training.machine",
        "transfer.cache",
        "transfer.quantisation",
        "transfer.teacher_source",
    ),
    "__main__": ("commands", "config", "errors", "layout", "lock_file", "tracking"),
}

# Third-party packages that only some may import.
ONLY_IN = {
    "mlflow": ("tracking",),
    "altair": ("reporting",),
    "vl_convert": ("reporting.scripts",),
    "yaml": ("machine_file", "params_yaml", "yaml_files"),
    "pydantic": ("config", "config_errors", "config_runs", "config_teachers", "config_values"),
    "timm": ("assembly", "data.decoding", "data.sources", "exporting.timm_folder", "models", "training"),
    "onnx": ("exporting.onnx_file",),
    "onnxruntime": ("exporting.onnx_file",),
    "huggingface_hub": ("exporting.card", "exporting.hub", "models.weights_of_timm"),
    "torchvision": ("data.sources",),
}


def below(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@functools.cache
def sources() -> dict[str, str]:
    """The text of every module of the package, by its name without the package's."""
    root = ROOT / "src" / PACKAGE
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for path in sorted(root.rglob("*.py"))
    }


@functools.cache
def imports(text: str) -> tuple[str, ...]:
    """Every module or name that a source imports, in full; a relative import begins with a dot."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names += (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
    return tuple(names)


def siblings(text: str, modules: Mapping[str, str]) -> set[str]:
    """The package's modules that a source imports."""
    found = set()
    for name in imports(text):
        if below(name, PACKAGE):
            inner = name.removeprefix(PACKAGE).removeprefix(".")
            while inner and inner not in modules:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found - {""}


def room(module: str) -> str:
    """The longest entry of MAY_IMPORT that a module falls under."""
    return max((entry for entry in MAY_IMPORT if below(module, entry)), key=len)


def violations(modules: Mapping[str, str]) -> list[str]:
    """Imports that the tables do not allow."""
    found = []
    for module, text in modules.items():
        if not module or module == "__init__":
            continue
        entry = room(module)
        allowed = MAY_IMPORT[entry]
        for other in sorted(siblings(text, modules)):
            if not any(below(other, part) for part in (entry, *allowed)):
                found.append(f"{module} imports {other}")
        for name in imports(text):
            holders = ONLY_IN.get(name.partition(".")[0])
            if holders and not any(below(module, holder) for holder in holders):
                found.append(f"{module} imports {name}")
    return found


def closure(module: str, modules: Mapping[str, str]) -> set[str]:
    """A module and all of the package that it imports, directly or not."""
    found: set[str] = set()
    queue = [module]
    while queue:
        here = queue.pop()
        if here not in found:
            found.add(here)
            queue += siblings(modules[here], modules)
    return found


def test_every_module_has_a_place() -> None:
    for module in sources():
        if module not in ("", "__init__"):
            assert room(module)
    for entry in MAY_IMPORT:
        assert any(below(module, entry) for module in sources()), f"nothing is called {entry}"


def test_rooms_import_what_they_may() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("training.loop", "from attention_transfer.transfer import attention_copy"),
        ("training.loop", "from attention_transfer.transfer.attention_distill import AttentionDistill"),
        ("training.student_task", "import attention_transfer.data.views"),
        ("training.batches", "import mlflow"),
        ("training.loop", "def f():\n    from attention_transfer.tracking.runs import Tracker"),
        ("data.images", "from attention_transfer.models import vit"),
        ("models.vit", "from attention_transfer import data"),
        ("data.views", "from attention_transfer.data import images"),
        ("transfer.cache_writer", "from attention_transfer.models.attention import read"),
        ("transfer.attention_copy", "from attention_transfer.models.vit import create"),
        ("evaluation.predictions", "from attention_transfer.models import students"),
        ("evaluation.metrics", "from attention_transfer.evaluation.ood import auroc"),
        ("reporting.tables", "from attention_transfer.evaluation.metrics import accuracy"),
        ("models.vit", "if TYPE_CHECKING:\n    import yaml"),
        ("config", "from attention_transfer.layout import Layout"),
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str) -> None:
    text = sources()[module]
    found = violations({**sources(), module: f"{text}\n{line}\n"})
    assert len(set(found) - set(violations(sources()))) == 1


def test_imports_are_what_these_tests_can_see() -> None:
    """No relative imports, and none whose name is put together while the program runs."""
    scripts = {path.name: path.read_text() for path in (ROOT / "pipeline").glob("*.py")}
    for module, text in {**sources(), **scripts}.items():
        assert not [name for name in imports(text) if name.startswith(".")], module
        assert not re.search(r"import_module|__import__|\b(?<!\.)(exec|eval)\(", text), module


def test_reporting_never_reaches_torch() -> None:
    modules = sources()
    reached = {name for name in modules if below(name, "reporting")}
    for module in list(reached):
        reached |= closure(module, modules)
    heavy = ("torch", "torchvision", "torchmetrics", "timm", "safetensors")
    for module in reached:
        assert not [name for name in imports(modules[module]) if name.partition(".")[0] in heavy], module
    assert "evaluation.statistics" in reached


def test_the_cache_and_the_tracker_never_reach_a_model() -> None:
    modules = sources()
    for module in ("transfer.cache", "tracking", "plan"):
        assert not [name for name in closure(module, modules) if below(name, "models")]


def test_params_yaml_is_read_by_config_alone() -> None:
    """Others hold its path, for messages and arguments; only config's reader parses YAML that is not DVC's."""
    modules = sources()
    scripts = {path.name: path.read_text() for path in (ROOT / "pipeline").glob("*.py")}
    parsers = ("yaml", "ruamel", "oyaml", "strictyaml")
    reading = {
        name
        for name, text in {**modules, **scripts}.items()
        if any(imported.partition(".")[0] in parsers for imported in imports(text))
    }
    assert reading == {
        "machine_file",  # where it runs
        "params_yaml",
        "yaml_files",  # DVC's files
    }
    assert "params.yaml" not in modules["tracking.sync"]
    reading = {name for name in modules if "params_yaml" in siblings(modules[name], modules)}
    assert reading == {"config", "commands.compare"}  # which shows files of other revisions, and runs none


SCRIPTS = sorted((ROOT / "pipeline").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_stage_is_a_thin_script_of_its_own(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) < 250
    stages = {path.stem for path in SCRIPTS}
    assert not {name.partition(".")[0] for name in imports(text)} & {*stages, "pipeline"}
    assert not siblings(text, sources()) & {"__main__"}
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.slow
def test_a_stage_explains_itself() -> None:
    answer = subprocess.run(
        [sys.executable, "pipeline/train.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert answer.returncode == 0, answer.stderr
    for word in ("Trains one student", "--params", "--run", "--seed"):
        assert word in answer.stdout
