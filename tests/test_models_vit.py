"""Saving and loading models, through our own code and through timm's, and what a student starts from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from attention_transfer.config import Architecture
from attention_transfer.errors import StudyError
from attention_transfer.files import read_json
from attention_transfer.models import students, vit
from attention_transfer.models.attention import hand_over, read

WIDTH, DEPTH, CLASSES = 16, 3, 4


def make_arguments(*, classes: int = CLASSES, channels: int = 1, width: int = WIDTH) -> dict[str, Any]:
    architecture = Architecture(patch_size=7, width=width, depth=DEPTH, heads=2, mlp_ratio=2.0)
    return vit.model_arguments(architecture, image_size=28, channels=channels, classes=classes)


def make_images(channels: int = 1) -> Tensor:
    return torch.randn(3, channels, 28, 28, generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def student(seed: int = 0, **options: Any) -> Any:
    chosen: dict[str, Any] = {"drop_path": 0.0, "teacher": None, "copied_layers": (), **options}
    arguments = chosen.pop("arguments", None) or make_arguments()
    return students.create(arguments, seed=seed, **chosen)


def test_architecture_is_the_papers() -> None:
    model = vit.create(make_arguments(), seed=0)
    assert model.global_pool == "avg"
    assert isinstance(model.fc_norm, torch.nn.LayerNorm)
    assert isinstance(model.norm, torch.nn.Identity)
    assert model.pos_embed.shape == (1, 16 + 1, WIDTH)  # patches and class token
    hidden = 2 * WIDTH
    block = 4 * WIDTH * (WIDTH + 1) + hidden * (WIDTH + 1) + WIDTH * (hidden + 1) + 2 * 2 * WIDTH
    rest = WIDTH * (7 * 7 + 1) + 17 * WIDTH + WIDTH + 2 * WIDTH + CLASSES * (WIDTH + 1)
    assert sum(p.numel() for p in model.parameters()) == DEPTH * block + rest


def test_a_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    model = vit.create(make_arguments(), seed=1, drop_path=0.3)
    vit.save(tmp_path, model, make_arguments())
    loaded = vit.load(tmp_path, made_by="train")
    assert not loaded.training
    assert torch.equal(logits(loaded, make_images()), logits(model, make_images()))
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
@pytest.mark.parametrize("way", ["checkpoint_path", "local-dir"])
def test_timm_alone_loads_a_distilled_student(way: str, channels: int, tmp_path: Path) -> None:
    arguments = make_arguments(channels=channels)
    model = student(seed=2, arguments=arguments, drop_path=0.2)
    students.save(tmp_path, model, arguments, copied_layers=())
    config = read_json(tmp_path / vit.CONFIG, made_by="train")
    if way == "checkpoint_path":
        loaded = timm.create_model(
            "vit_tiny_patch16_224",
            checkpoint_path=str(tmp_path / vit.WEIGHTS),
            num_classes=config["num_classes"],
            **config["model_args"],
        )
    else:
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    images = make_images(channels)
    assert torch.equal(logits(loaded, images), logits(model, images))


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("format", ["pickle", "torch"])
def test_a_pickle_is_refused_and_none_of_its_code_runs(format: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "model.safetensors"
    if format == "pickle":
        path.write_bytes(pickle.dumps(Evil(trace)))
    else:
        torch.save({"weight": Evil(trace)}, path)
    with pytest.raises(StudyError, match="other formats are refused") as caught:
        vit.load_weights(path, made_by="convert the file")
    assert str(path) in str(caught.value)
    assert "convert the file" in str(caught.value)
    assert not trace.exists()
    if format == "pickle":  # the trap does work
        pickle.loads(path.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    vit.save(tmp_path, vit.create(make_arguments(), seed=0), make_arguments())
    path = tmp_path / vit.WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(StudyError, match=r"model\.safetensors: is not a whole safetensors file"):
        vit.load(tmp_path, made_by="train@x-0")


@pytest.mark.parametrize("name", [vit.WEIGHTS, vit.CONFIG])
def test_a_missing_file_is_named_with_its_stage(name: str, tmp_path: Path) -> None:
    vit.save(tmp_path, vit.create(make_arguments(), seed=0), make_arguments())
    (tmp_path / name).unlink()
    with pytest.raises(StudyError, match=name) as caught:
        vit.load(tmp_path, made_by="train@x-0")
    assert "train@x-0" in caught.value.remedy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.update({"head.weight": torch.zeros(5, WIDTH)}),
            r"1 weights .* head.weight: .*\(4, 16\).*\(5, 16\)",
        ),
        (lambda w: w.pop("cls_token"), r"1 weights .* cls_token: expected \(1, 1, 16\), found none"),
        (
            lambda w: w.update(extra=torch.zeros(2)),
            r"1 weights .* extra: expected no such weight, found \(2,\)",
        ),
    ],
    ids=["other_shape", "missing", "unknown"],
)
def test_weights_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    model = vit.create(make_arguments(), seed=0)
    weights = dict(model.state_dict())
    change(weights)
    with pytest.raises(StudyError, match=message) as caught:
        vit.insert(model, weights, where=tmp_path / "w.safetensors")
    assert caught.value.where.endswith("w.safetensors")


def test_equal_seeds_give_equal_weights_and_no_other_random_state_is_touched() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = vit.create(make_arguments(), seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    same = vit.create(make_arguments(), seed=7, drop_path=0.1).state_dict()
    other = vit.create(make_arguments(), seed=8).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("teacher_classes", [0, 9], ids=["without_head", "with_another_head"])
def test_a_fine_tuned_student_takes_the_teachers_weights_and_a_fresh_head(teacher_classes: int) -> None:
    teacher = vit.create(make_arguments(classes=teacher_classes), seed=3)
    with torch.no_grad():
        teacher.fc_norm.weight.fill_(5.0)  # was not pre-trained
    made = student(seed=4, teacher=teacher)
    weights, taken, fresh = (m.state_dict() for m in (made, teacher, student(seed=4)))
    for name, value in weights.items():
        own = name.startswith(("head.", "fc_norm."))
        assert torch.equal(value, fresh[name] if own else taken[name]), name
    with torch.no_grad():
        made.pos_embed.add_(1.0)  # it holds copies
    assert not torch.equal(made.pos_embed, teacher.pos_embed)


def test_students_of_two_seeds_of_one_teacher_differ_in_the_head_alone() -> None:
    teacher = vit.create(make_arguments(classes=0), seed=3)
    first, second = (student(seed=seed, teacher=teacher).state_dict() for seed in (0, 1))
    different = {name for name in first if not torch.equal(first[name], second[name])}
    assert different == {"head.weight"}


def test_drop_path_reaches_the_blocks() -> None:
    rates = [block.drop_path1.drop_prob for block in student(drop_path=0.4).blocks[1:]]
    assert rates == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize("copied", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_a_copy_student_is_saved_without_the_weights_that_it_copies(
    copied: tuple[int, ...], tmp_path: Path
) -> None:
    teacher, images = vit.create(make_arguments(classes=0), seed=3).eval(), make_images()
    with torch.no_grad(), read(teacher, copied) as attention:
        teacher(images)
    made = student(seed=4, copied_layers=copied)
    students.save(tmp_path, made, make_arguments(), copied)
    assert read_json(tmp_path / vit.CONFIG, made_by="train")[students.COPIED] == list(copied)
    loaded = students.load(tmp_path, made_by="train@copy-0")
    assert not loaded.training
    assert {name for name in loaded.state_dict() if name.endswith("qkv.weight")} == {
        f"blocks.{layer}.attn.qkv.weight" for layer in range(DEPTH) if layer not in copied
    }
    with hand_over(made, attention):
        expected = logits(made, images)
    with hand_over(loaded, attention):
        assert torch.equal(logits(loaded, images), expected)


def test_a_student_that_copies_nothing_is_saved_as_an_ordinary_model(tmp_path: Path) -> None:
    made = student(seed=4)
    students.save(tmp_path, made, make_arguments(), ())
    assert students.COPIED not in read_json(tmp_path / vit.CONFIG, made_by="train")
    for loaded in (students.load(tmp_path, made_by="train"), vit.load(tmp_path, made_by="train")):
        assert torch.equal(logits(loaded, make_images()), logits(made, make_images()))


def test_a_truncated_student_is_refused_with_its_stage(tmp_path: Path) -> None:
    students.save(tmp_path, student(), make_arguments(), ())
    path = tmp_path / vit.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StudyError, match="python -m attention_transfer remake train@x-0"):
        students.load(tmp_path, made_by="train@x-0")
