"""The stage `pretrain` with teachers that others have trained, and students that learn from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import release_files
import timm
import tiny_study
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout
from attention_transfer.models import timm_entries, vit
from attention_transfer.training import machine
from attention_transfer.transfer.distill_features import features

LAYOUT = Layout("tiny")
NAME, SIZE = "test_vit3.r160_in1k", 32  # the smallest that timm publishes: no class token, an attention pool


def work_in(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    tiny_study.write_inputs(folder, size)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(machine, "prepare", lambda: tiny_study.CPU)


def pretrain(changes: dict[str, Any]) -> tuple[tiny_study.InMemory, Any]:
    """The stage after it has run, and the teacher that it made."""
    study = tiny_study.make_study("scratch", changes)
    script = tiny_study.PIPELINE / "pretrain.py"
    this = tiny_study.InMemory("pretrain", {"teacher": "first"}, study, Path("params.yaml"), script, LAYOUT)
    this.record.mkdir(parents=True, exist_ok=True)
    tiny_study.script("pretrain").main(this)
    return this, vit.load(LAYOUT.teacher("first"), made_by="pretrain@first")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mae_release(path: Path) -> Any:
    """Of twice the study's size, and of RGB images."""
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "img_size": 16}
    return release_files.write(path, "MAE, with decoder", **sizes)


def of_file(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "kind": "file", "architecture": tiny_study.ARCHITECTURE, "path": str(path), "sha256": sha256(path), **more,
    }  # fmt: skip


def test_a_release_becomes_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path, monkeypatch, 8)
    original = mae_release(tmp_path / "mae.pth")
    this, teacher = pretrain({"teachers.first": of_file(tmp_path / "mae.pth")})
    assert {key: this.metrics[key] for key in ("weights_patches", "patches", "images_folded")} == {
        "weights_patches": 16, "patches": 4, "images_folded": 1,
    }  # fmt: skip
    assert this.paths["weights"].startswith(
        "positions of 4 x 4 patches resampled to 2 x 2; images with mean 0.485"
    )
    parts = tiny_study.make_parts(tiny_study.make_study("scratch"))
    pixels = parts.train.images[:4]
    original.set_input_size(img_size=8)
    mean, deviation = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    seen = (torch.from_numpy(pixels).expand(-1, 3, -1, -1) / 255 - mean) / deviation
    with torch.no_grad():
        expected = features(original.eval(), seen.float(), (0, 1))[1]
        found = features(teacher, parts.clean(pixels)(np.arange(4)), (0, 1))[1]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_another_normalisation_can_be_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path, monkeypatch, 8)
    mae_release(tmp_path / "mae.pth")
    usual, stated = (
        pretrain({"teachers.first": of_file(tmp_path / "mae.pth", **more)})[1].patch_embed.proj.weight
        for more in ({}, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    )
    assert not torch.equal(usual, stated)
    with pytest.raises(StudyError, match=r"has SHA-256 .*, not 0{64}"):
        pretrain({"teachers.first": of_file(tmp_path / "mae.pth") | {"sha256": "0" * 64}})
    with pytest.raises(StudyError, match="has no encoder in the layout of moco_v3"):
        pretrain({"teachers.first": of_file(tmp_path / "mae.pth", format="moco_v3")})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["finetune", "copy", "distill"])
def test_students_of_a_release_are_trained(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_in(tmp_path, monkeypatch, 8)
    mae_release(tmp_path / "mae.pth")
    teacher = {"teachers.first": of_file(tmp_path / "mae.pth")}
    pretrain(teacher)
    weights, metrics = tiny_study.train(tiny_study.make_study(method, teacher))
    untrained, _ = tiny_study.train(tiny_study.make_study("scratch", teacher))
    assert np.isfinite(list(metrics.values())).all()
    assert ("blocks.0.attn.qkv.weight" in weights) == (method != "copy")
    assert not torch.equal(weights["blocks.1.mlp.fc1.weight"], untrained["blocks.1.mlp.fc1.weight"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub without a network, and one model's weights as timm keeps them."""
    work_in(tmp_path, monkeypatch, SIZE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "hub" / f"models--timm--{NAME}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    (model / "snapshots" / "abc").mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(
            timm.create_model("test_vit3").state_dict(), model / "snapshots" / "abc" / "model.safetensors"
        )
    return model / "snapshots" / "abc" / "model.safetensors"


def by_name(**more: Any) -> dict[str, Any]:
    architecture = timm_entries.described("test_vit3").architecture.model_dump()
    changes = {"kind": "timm", "name": NAME, "architecture": architecture, **more}
    # All runs of the tiny study but those of its fine-tuned teachers, whose classes have a class token.
    return {"teachers.first": changes, "data.image_size": SIZE}


def test_a_name_of_timm_becomes_a_teacher(hub: Path) -> None:
    this, teacher = pretrain(by_name(sha256=sha256(hub)))
    assert this.metrics["weights_image_size"] == 160
    assert (this.metrics["weights_patches"], this.metrics["patches"]) == (100, 4)
    assert this.inputs["weights"] == sha256(hub)
    assert teacher.cls_token is None
    assert teacher.in_chans == 1
    assert not hasattr(teacher, "attn_pool") or teacher.attn_pool is None


def test_without_a_network_it_is_said_where_the_file_belongs(hub: Path) -> None:
    with pytest.raises(StudyError, match="has SHA-256") as caught:
        pretrain(by_name(sha256="0" * 64))
    shutil.rmtree(hub.parents[2])
    with pytest.raises(StudyError, match=f"timm/{NAME} is not on this machine") as caught:
        pretrain(by_name())
    for part in (str(hub.parents[2]), "HF_HOME", f"hf download timm/{NAME} model.safetensors", "kind: file"):
        assert part in caught.value.remedy
    assert caught.value.where == "params.yaml: teachers.first.name"


def on_hub(hub: Path, **config: Any) -> dict[str, Any]:
    """The same weights as a model of somebody's."""
    mine = hub.parents[3] / "models--owner--mine"
    shutil.copytree(hub.parents[2], mine, dirs_exist_ok=True)
    settings = {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 1000}
    content = {"architecture": "test_vit3", "num_classes": 1000, "pretrained_cfg": settings, **config}
    (mine / "snapshots" / "abc" / "config.json").write_text(json.dumps(content))
    return by_name(name="hf-hub:owner/mine")


def test_models_of_the_hub_are_taken_by_their_config(hub: Path) -> None:
    expected = pretrain(by_name())[1].state_dict()
    this, teacher = pretrain(on_hub(hub))
    assert this.inputs["weights"] == sha256(hub)
    assert torch.equal(teacher.blocks[0].attn.qkv.weight, expected["blocks.0.attn.qkv.weight"])
    for config, says in (
        ({"architecture": "test_vit2"}, "is built by test_vit2, not by test_vit3"),
        ({"model_args": {"depth": 4}}, "changes depth of test_vit3"),
    ):
        with pytest.raises(StudyError, match=says):
            pretrain(on_hub(hub, **config))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["copy", "distill"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "matched"])
def test_students_of_a_published_teacher_are_trained(plain: bool, method: str, hub: Path) -> None:
    changes = by_name()
    pretrain(changes)
    if plain:
        sizes = changes["teachers.first"]["architecture"]
        kept = {
            key: sizes[key] for key in ("patch_size", "width", "depth", "heads", "mlp_ratio", "class_token")
        }
        changes["runs.run.architecture"] = kept
    weights, _ = tiny_study.train(tiny_study.make_study(method, changes))
    assert ("reg_token" in weights) != plain
    assert "cls_token" not in weights
