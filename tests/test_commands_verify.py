"""`verify` on real small caches: whole ones, and ones in which something is wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_study
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.special import rel_entr, softmax

from attention_transfer import __main__ as command
from attention_transfer import plan
from attention_transfer.commands import cached
from attention_transfer.commands.verify import verify
from attention_transfer.layout import Layout
from attention_transfer.transfer.cache import CacheWriter
from attention_transfer.transfer.teacher_source import teacher_attention

TINY = Layout("tiny")
CHANGES = {"attention.source": "cache", "evaluation.sets": ("validation", "test")}
STUDY = tiny_study.make_study("copy", CHANGES)
ROWS = {"views": 48, "validation": 9, "test": 12}


def write_caches(study: object = STUDY) -> None:
    for teacher in STUDY.teachers:
        this = tiny_study.InMemory(
            "cache", {"teacher": teacher}, study, Path("params.yaml"), tiny_study.PIPELINE / "cache.py", TINY
        )
        tiny_study.script("cache").main(this)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_study.write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_caches()
    return folder


@pytest.fixture
def study_folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "study"
    shutil.copytree(whole, folder)
    (folder / "params.yaml").write_text(yaml.safe_dump(STUDY.model_dump(mode="json")))
    monkeypatch.chdir(folder)
    return folder


def shard(which: str = "views") -> Path:
    return TINY.cache("first") / which / "shard-00000.safetensors"


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What `python -m attention_transfer` ends with; empty when all is well."""
    monkeypatch.setattr(sys, "argv", ["attention_transfer", *arguments])
    try:
        command.main()
    except SystemExit as ended:
        return str(ended.code)
    return ""


def test_whole_caches_pass(
    study_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(monkeypatch, "verify") == ""
    said = capsys.readouterr().out
    for teacher in STUDY.teachers:
        for which, rows in ROWS.items():
            assert f"{teacher} {which}: {rows} of {rows} rows have their checksum" in said
            assert f"{teacher} {which}: KL from the recomputed maps of {min(rows, 32)} rows" in said


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", "float16"), ("float32", "float32")])
def test_other_formats_pass(precision: str, dtype: str, study_folder: Path) -> None:
    study = tiny_study.make_study(
        "copy", {**CHANGES, "training.precision": precision, "attention.dtype": dtype}
    )
    write_caches(study)
    assert verify(study) == []


@pytest.mark.parametrize("which", ROWS)
def test_a_flipped_bit_is_found(which: str, study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_bit(shard(which), -1)
    said = run_command(monkeypatch, "verify", "--params", "params.yaml")
    assert said.count("error:") == 1
    assert "shard-00000.safetensors: row" in said
    assert "fails its checksum" in said
    assert "python -m attention_transfer remake cache@first" in said


def test_the_remedy_makes_it_whole(study_folder: Path) -> None:
    flip_bit(shard(), -1)
    write_caches()  # what the command in the remedy runs
    assert verify(STUDY) == []


def test_the_remedy_names_the_graph_of_a_preset(study_folder: Path) -> None:
    graph = Path("studies/tiny/dvc.yaml")
    graph.parent.mkdir(parents=True)
    graph.write_text("")
    flip_bit(shard(), -1)
    (problem,) = verify(STUDY)
    assert problem.remedy.endswith("python -m attention_transfer remake studies/tiny/dvc.yaml:cache@first")


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "keys.safetensors", "manifest.json"])
def test_a_missing_file_is_found(name: str, study_folder: Path) -> None:
    (TINY.cache("first") / "views" / name).unlink()
    (problem,) = verify(STUDY)
    assert "missing" in str(problem)
    assert "remake cache@first" in problem.remedy


def test_a_missing_set_is_found(study_folder: Path) -> None:
    shutil.rmtree(TINY.cache("second") / "test")
    (problem,) = verify(STUDY)
    assert problem.problem == "is missing: not made yet, or removed"
    assert problem.remedy.endswith("cache@second")


def test_a_replaced_teacher_is_found(study_folder: Path) -> None:
    path = TINY.teacher_weights("first")
    weights = load_file(path)
    weights["blocks.0.attn.qkv.weight"] *= 1.5
    save_file(weights, path, metadata={"format": "pt"})
    problems = verify(STUDY)
    assert len(problems) == len(ROWS)
    for problem in problems:
        assert "was made from another recipe: teacher is" in problem.problem
        assert problem.remedy.endswith("dvc repro cache@first")


def test_other_views_are_found(study_folder: Path) -> None:
    (problem, *_) = verify(tiny_study.make_study("copy", {**CHANGES, "views.flip": 0.25}))
    assert "views.flip is 0.5, and 0.25 is expected" in problem.problem


def test_a_missing_teacher_keeps_its_own_remedy(study_folder: Path) -> None:
    shutil.rmtree(TINY.teacher("first"))
    problems = verify(STUDY)
    assert len(problems) == len(ROWS)
    assert "dvc repro" in problems[0].remedy
    assert "model.safetensors" in problems[0].where


@pytest.mark.parametrize("scale", [1.02, 1.5])
def test_rows_of_another_network_are_found_although_all_checksums_hold(
    scale: float, study_folder: Path
) -> None:
    parts = tiny_study.make_parts(STUDY)
    folder, keys = TINY.cache("first") / "validation", parts.cache_keys("validation")
    shutil.rmtree(folder)
    images = parts.clean(parts.evaluated("validation")[0].images)(np.arange(len(keys)))
    attention = teacher_attention(parts.teacher("first"), images, (0, 1)) * scale
    layout, recipe = plan.teacher_layout(STUDY, "first"), parts.cache_recipe("first", "validation")
    with CacheWriter(folder, layout=layout, recipe=recipe, keys=keys) as writer:
        writer.write(attention)
    (problem,) = verify(STUDY)
    assert "holds other maps than teacher and images give: KL mean" in problem.problem
    assert "delete this folder" in problem.remedy


def test_a_study_without_a_cache_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert verify(tiny_study.make_study("copy")) == []
    assert "first: no cache (online: params.yaml says so)" in capsys.readouterr().out


def pair(seed: int, size: float, shape: tuple[int, ...] = (3, 2, 2, 2, 5, 4)) -> tuple[torch.Tensor, ...]:
    """Queries and keys (batch, 2, layers, heads, tokens, head_dim), twice."""
    generator = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(shape, generator=generator) * size for _ in range(2))
    return one, two


def test_divergence_is_that_of_scipy() -> None:
    exact, given_ = pair(0, 2.0)
    maps = [
        softmax(np.einsum("blhqd,blhkd->blhqk", part[:, 0], part[:, 1]) / 2, axis=-1)
        for part in (exact.double().numpy(), given_.double().numpy())
    ]
    found = cached.divergence(exact, given_).numpy()
    np.testing.assert_allclose(found, rel_entr(*maps).sum(axis=-1), rtol=1e-10)


@given(seed=st.integers(0, 2**32), size=st.floats(0.01, 10), share=st.floats(1e-6, 0.3))
def test_noise_within_its_share_stays_within_the_bound(seed: int, size: float, share: float) -> None:
    """Hoeffding's lemma, on vectors that are off by at most `share` of their length."""
    exact, other = (part.double() for part in pair(seed, size))
    off = other / other.norm(dim=-1, keepdim=True) * exact.norm(dim=-1, keepdim=True)
    # Both queries and keys are off: (1 + u)^2 - 1 is at most 2 u for u / (1 + u / 2).
    found = cached.divergence(exact, exact + off * share / (1 + share / 2))
    assert bool((found <= cached.noise_bound(exact, share) + 1e-12).all())
