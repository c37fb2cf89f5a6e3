"""Published weights: every format gives timm's own features, and normalisation is folded exactly."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import release_files
import torch
from release_files import RELEASES, SIZE, images, native
from safetensors.torch import save_file
from test_models_vit import Evil
from torch import Tensor

from attention_transfer.errors import StudyError
from attention_transfer.models import published, releases, timm_entries, vit
from attention_transfer.models.releases import FORMATS, IMAGENET
from attention_transfer.transfer.distill_features import features

GREY = ((0.3,), (0.35,))
RGB = ((0.41, 0.5, 0.27), (0.21, 0.17, 0.33))
every_release = pytest.mark.parametrize("release", RELEASES)


def arguments(entry: str, *, size: int = SIZE, channels: int = 3, **changes: Any) -> vit.Arguments:
    """Of a small teacher of the entry: its sizes are smaller than those that params.yaml could state."""
    pooled = timm_entries.POOLED[type(native(entry, **changes))]
    values = {"img_size": size, "in_chans": channels, "num_classes": 0}
    return vit.Arguments(entry, {**release_files.SMALL, **values, **changes, **pooled})


def normalised(pixels: Tensor, by: releases.Normalisation) -> Tensor:
    mean, deviation = (torch.tensor(values, dtype=pixels.dtype).view(1, -1, 1, 1) for values in by)
    return (pixels - mean) / deviation


@torch.no_grad()
def tokens(model: Any, pixels: Tensor) -> Tensor:
    """Behind the last block, before any norm."""
    return features(model, pixels, (1,))[1][0]


@every_release
@pytest.mark.parametrize("study", [GREY, RGB], ids=["grey", "colour"])
def test_a_release_gives_timms_features(release: str, study: Any, tmp_path: Path) -> None:
    """timm's model sees what it was trained on; ours, the same pixels as the study normalises them."""
    entry, stated, _ = RELEASES[release]
    size = 28 if "patch14" in entry else SIZE
    original = release_files.write(tmp_path / "weights.pth", release)
    found = releases.load(tmp_path / "weights.pth", stated, where="params.yaml: teachers.x.path")  # type: ignore[arg-type]
    trained = FORMATS[found.format].images or IMAGENET
    made = published.fit(
        found.encoder,
        arguments(entry, size=size, channels=len(study[0])),
        trained=trained,
        study=study,
        where=tmp_path,
    )
    pixels = images(size=size, channels=len(study[0]))
    expected = tokens(original, normalised(pixels.expand(-1, 3, -1, -1), trained))
    torch.testing.assert_close(
        tokens(made.model.eval(), normalised(pixels, study)), expected, rtol=1e-4, atol=1e-4
    )
    assert not hasattr(made.model.norm, "weight")
    assert torch.equal(
        made.model.fc_norm.weight, torch.ones(16)
    )  # fresh: it was not trained behind this pool


@every_release
def test_a_file_tells_its_format_or_the_error_lists_all(release: str, tmp_path: Path) -> None:
    path, stated = tmp_path / "weights.pth", RELEASES[release][1]
    release_files.write(path, release)
    if stated is None:
        wanted = {"MA": "mae", "Mo": "moco_v3", "DINO,": "dino", "DINOv2": "dinov2", "BEiTv2": "beit_v2"}
        found = releases.load(path, None, where="params.yaml: teachers.x.path").format
        assert found == next(name for start, name in wanted.items() if release.startswith(start))
        return
    with pytest.raises(StudyError) as caught:
        releases.load(path, None, where="params.yaml: teachers.x.path")
    assert all(name in caught.value.remedy for name in FORMATS)


def test_safetensors_of_timm_are_taken_as_they_always_were(tmp_path: Path) -> None:
    """Not a bit of the weights changes, and nothing is folded."""
    model = native("vit_base_patch16_224")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    found = releases.load(tmp_path / "w.safetensors", None, where="")
    assert (found.format, FORMATS[found.format].images) == ("timm", None)
    made = published.fit(
        found.encoder, arguments("vit_base_patch16_224"), trained=None, study=RGB, where=tmp_path
    )
    kept = {
        name: value for name, value in model.state_dict().items() if not name.startswith(("head", "norm"))
    }
    own = made.model.state_dict()
    assert own.keys() - kept.keys() == {"fc_norm.weight", "fc_norm.bias"}
    assert all(torch.equal(own[name], value) for name, value in kept.items())
    assert made.changes == "none"


NO_BIAS = "vit_base_patch16_clip_quickgelu_224"  # patches without a bias: the rest goes into the positions


@pytest.mark.parametrize(
    "entry", ["vit_base_patch16_224", NO_BIAS, "vit_base_patch16_siglip_224", "vit_base_patch14_reg4_dinov2"]
)
@pytest.mark.parametrize("study", [GREY, RGB], ids=["grey", "colour"])
def test_the_fold_is_exact(entry: str, study: Any) -> None:
    """In float64 as good as float64 is: nothing is approximated."""
    size, trained = 28 if "patch14" in entry else SIZE, ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    original = native(entry, img_size=size)
    pixels = images(size=size, channels=len(study[0]), dtype=torch.float64)
    with torch.no_grad():
        own = normalised(pixels, study)
        errors = {}
        for dtype in (torch.float32, torch.float64):
            made = vit.create(arguments(entry, size=size, channels=len(study[0])), seed=0).to(dtype).eval()
            encoder = {
                k: v
                for k, v in original.to(dtype).state_dict().items()
                if not k.startswith(releases.NOT_ENCODER)
            }
            folded = published._renormalised(encoder, made, trained, study, where=Path("w"))
            made.load_state_dict(folded, strict=False)
            expected = tokens(original.double(), normalised(pixels.expand(-1, 3, -1, -1), trained))
            errors[dtype] = float(
                (tokens(made, own.to(dtype)).double() - expected).abs().max() / expected.abs().max()
            )
    assert errors[torch.float32] < 1e-5
    assert errors[torch.float64] < 1e-13


def test_without_a_place_for_the_rest_the_fold_is_refused() -> None:
    encoder = {"patch_embed.proj.weight": torch.randn(16, 3, 16, 16)}
    model = vit.create(arguments("vit_base_patch16_224"), seed=0)
    with pytest.raises(StudyError, match="neither a bias of patches nor positions"):
        published._renormalised(encoder, model, IMAGENET, RGB, where=Path("w"))
    encoder = {
        "patch_embed.proj.weight": torch.randn(16, 1, 16, 16),
        "patch_embed.proj.bias": torch.zeros(16),
    }
    with pytest.raises(StudyError, match=r"expected 3 channels, found \(16, 1, 16, 16\)"):
        published._renormalised(encoder, model, IMAGENET, RGB, where=Path("w"))


@pytest.mark.parametrize("release", ["MAE, encoder", "DINOv2 with registers"])
def test_positions_are_resampled_by_timm(release: str, tmp_path: Path) -> None:
    """To what `set_input_size`, another way of timm's, makes of them."""
    entry, stated, _ = RELEASES[release]
    patch = 14 if "patch14" in entry else 16
    original = release_files.write(tmp_path / "w.pth", release, img_size=4 * patch)
    found = releases.load(tmp_path / "w.pth", stated, where="")  # type: ignore[arg-type]
    made = published.fit(
        found.encoder, arguments(entry, size=3 * patch), trained=None, study=RGB, where=tmp_path
    )
    assert made.grid == 4
    assert made.changes == "positions of 4 x 4 patches resampled to 3 x 3"
    original.set_input_size(img_size=3 * patch)
    pixels = images(size=3 * patch)
    torch.testing.assert_close(
        tokens(made.model.eval(), pixels), tokens(original.eval(), pixels), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("release", ["BEiTv2", "BEiT, fine-tuned"])
@pytest.mark.parametrize(("old", "new"), [(4, 3), (3, 4)], ids=["fewer", "more"])
def test_tables_of_relative_positions_are_resampled(release: str, old: int, new: int, tmp_path: Path) -> None:
    """Neighbours keep their entries, as does the class token; with more patches, the farthest ones too."""
    entry, stated, _ = RELEASES[release]
    release_files.write(tmp_path / "w.pth", release, img_size=16 * old)
    found = releases.load(tmp_path / "w.pth", stated, where="")  # type: ignore[arg-type]
    made = published.fit(
        found.encoder, arguments(entry, size=16 * new), trained=None, study=RGB, where=tmp_path
    )
    assert made.changes == f"positions of {old} x {old} patches resampled to {new} x {new}"
    name = "attn.relative_position_bias_table"
    shared = found.encoder.get("rel_pos_bias.relative_position_bias_table")
    for number, block in enumerate(made.model.blocks):
        before = found.encoder[f"blocks.{number}.{name}"] if shared is None else shared
        after = block.get_parameter(name).detach()
        assert torch.equal(after[-3:], before[-3:])
        square = {
            side: table[:-3].view(2 * side - 1, 2 * side - 1, -1)
            for side, table in ((old, before), (new, after))
        }
        near = {side: table[side - 2 : side + 1, side - 2 : side + 1] for side, table in square.items()}
        torch.testing.assert_close(near[new], near[old], rtol=1e-5, atol=1e-5)
        if new > old:
            corners = [table[[0, 0, -1, -1], [0, -1, 0, -1]] for table in (square[new], square[old])]
            torch.testing.assert_close(*corners, rtol=1e-4, atol=1e-4)


def test_rotary_positions_need_no_resampling() -> None:
    original = native("vit_base_patch16_dinov3", img_size=64)
    encoder = {k: v for k, v in original.state_dict().items() if not k.startswith(releases.NOT_ENCODER)}
    made = published.fit(
        encoder, arguments("vit_base_patch16_dinov3", size=48), trained=None, study=RGB, where=Path("w")
    )
    assert (made.grid, made.changes) == (None, "none")
    assert made.model.state_dict().keys() - {"fc_norm.weight", "fc_norm.bias"} == encoder.keys()


@pytest.mark.parametrize("format", ["torch", "pickle"])
def test_code_in_a_file_is_refused_and_never_runs(format: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "w.pth"
    content = {"model": {"cls_token": torch.zeros(1)}, "args": Evil(trace)}
    if format == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(StudyError, match="is refused: it is neither safetensors nor a file of PyTorch's"):
        releases.load(path, "mae", where="params.yaml: teachers.x.path")
    assert not trace.exists()
    torch.load(path, weights_only=False) if format == "torch" else pickle.loads(path.read_bytes())
    assert trace.exists()  # the trap does work


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    release_files.write(path, "MAE, with decoder")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(StudyError, match=r"w\.pth: is (not a whole file of weights|refused)"):
        releases.load(path, None, where="params.yaml: teachers.x.path")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor, no weights by name"),
        (
            {"model": {"weight": torch.zeros(3)}},
            r"no encoder in the layout of mae: no patch_embed\.proj\.weight under 'model'",
        ),
    ],
    ids=["tensor", "other_model"],
)
def test_what_is_no_such_release_is_said(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(StudyError, match=message):
        releases.load(tmp_path / "w.pth", "mae", where="")
    with pytest.raises(StudyError, match="does not exist"):
        releases.load(tmp_path / "none.pth", "mae", where="")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"embed_dim": 32},
            r"\d+ weights do not fit; blocks\.0\.attn\.proj\.bias: expected \(32,\), found \(16,\)",
        ),
        ({"depth": 3}, r"12 weights do not fit; blocks\.2\.attn\.proj\.bias: expected \(16,\), found none"),
        ({"patch_size": 8}, r"patch_embed\.proj\.weight: expected patches of 8 pixels, found 16"),
        ({"class_token": False}, r"cannot be mapped|cls_token: expected no such weight"),
        ({"init_values": 0.1}, r"4 weights do not fit; blocks\.0\.ls1\.gamma: expected \(16,\), found none"),
    ],
    ids=["width", "depth", "patch", "class_token", "layer_scale"],
)
def test_another_architecture_names_the_first_weight(changes: Any, message: str, tmp_path: Path) -> None:
    release_files.write(tmp_path / "w.pth", "DINO, whole")
    found = releases.load(tmp_path / "w.pth", None, where="")
    with pytest.raises(StudyError, match=message) as caught:
        published.fit(
            found.encoder,
            arguments("vit_base_patch16_224", **{"global_pool": "avg", **changes}),
            trained=IMAGENET,
            study=RGB,
            where=tmp_path / "w.pth",
        )
    assert "w.pth" in caught.value.where


def test_formats_of_other_projects_are_not_mixed_up(tmp_path: Path) -> None:
    """The encoder that gradients train, not its average; the average of DINO, not the student."""
    for release, stated in (("MoCo v3", "dino"), ("DINO, whole", "moco_v3")):
        release_files.write(tmp_path / "w.pth", release)
        with pytest.raises(StudyError, match="has no encoder in the layout of"):
            releases.load(tmp_path / "w.pth", stated, where="")  # type: ignore[arg-type]
