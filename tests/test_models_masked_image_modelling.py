"""SimMIM against a float64 loop over hidden patches, and by what its parts see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_pretraining as tiny
import torch
from torch import Tensor

from attention_transfer.models.masked_autoencoder import MaskedAutoencoder
from attention_transfer.models.masked_image_modelling import MaskedImageModelling

pytestmark = pytest.mark.slow  # it trains

KINDS = list(tiny.ENCODERS)
PATCH, PATCHES = tiny.PATCH, tiny.GRID**2


def make(kind: str = "plain", *, mask_ratio: float = 0.5, **changed: Any) -> MaskedImageModelling:
    encoder = tiny.make_encoder(kind, **changed)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MaskedImageModelling(encoder, mask_ratio=mask_ratio)
        torch.nn.init.normal_(model.mask_pixels)  # large enough to be seen
    return model


def batch(step: int) -> tuple[Tensor]:
    return (tiny.structured(seed=step)[0],)


def loss_and_hidden(model: MaskedImageModelling, images: Tensor, seed: int = 5) -> tuple[Tensor, Tensor]:
    """The loss under a seed, and which patches this seed hides: (batch, patches) bool."""
    seen = []
    predict = model.predict

    def spy(images: Tensor, hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return predict(images, hidden)

    model.predict = spy  # type: ignore[method-assign]
    torch.manual_seed(seed)
    loss = model(images)
    model.predict = predict  # type: ignore[method-assign]
    return loss, seen[0]


def place_of(patch: int) -> tuple[slice, slice]:
    row, column = divmod(patch, tiny.GRID)
    return slice(PATCH * row, PATCH * (row + 1)), slice(PATCH * column, PATCH * (column + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_loss_is_that_of_a_loop_over_hidden_patches(kind: str, channels: int) -> None:
    model, images = make(kind, in_chans=channels), tiny.make_images(channels=channels)
    loss, hidden = loss_and_hidden(model, images)
    painted = images.clone()
    for image, patch in hidden.nonzero().tolist():
        rows, columns = place_of(patch)
        painted[image, :, rows, columns] = model.mask_pixels.detach().reshape(channels, PATCH, PATCH)
    with torch.no_grad():
        tokens = tiny.array(model.encoder.forward_features(painted))[:, -PATCHES:]
    weight, bias = tiny.array(model.head.weight), tiny.array(model.head.bias)
    errors = []
    for image, patch in hidden.nonzero().tolist():
        predicted = weight @ tiny.naive_layer_norm(tokens[image, patch], model.norm) + bias
        rows, columns = place_of(patch)
        pixels = tiny.array(images[image, :, rows, columns]).flatten()
        target = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
        errors.append(np.abs(predicted - target).mean())
    assert len(errors) == len(images) * model.hidden
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_targets_are_those_of_the_masked_autoencoder(channels: int) -> None:
    """Up to the order of a patch's pixels: the masked autoencoder's has channels last."""
    model = make(in_chans=channels)
    autoencoder = MaskedAutoencoder(
        model.encoder, decoder_width=4, decoder_depth=1, decoder_heads=1, mask_ratio=0.5
    )
    images = 7 + 3 * tiny.make_images(channels=channels)
    expected = autoencoder.targets(images).reshape(len(images), PATCHES, PATCH, PATCH, channels)
    found = model.targets(images).reshape(len(images), PATCHES, channels, PATCH, PATCH)
    torch.testing.assert_close(found, expected.permute(0, 1, 4, 2, 3), atol=1e-5, rtol=1e-5)
    even = torch.ones(1, channels, tiny.SIZE, tiny.SIZE)
    assert torch.equal(model.targets(even), torch.zeros_like(model.targets(even)))


@pytest.mark.parametrize("kind", KINDS)
def test_content_of_hidden_patches_has_no_influence(kind: str) -> None:
    model, images = make(kind).eval(), tiny.make_images(2)
    hidden = torch.tensor([[True, False, True, False], [False, True, False, False]])
    with torch.no_grad():
        expected = model.predict(images, hidden)
        for image, patch in np.ndindex(2, PATCHES):
            changed = images.clone()
            changed[(image, 0, *place_of(patch))] += 10.0
            found = model.predict(changed, hidden)
            assert torch.equal(found[image], expected[image]) == bool(hidden[image, patch])
            assert torch.equal(found[1 - image], expected[1 - image])
        changed = images.clone()
        changed[(0, 0, *place_of(0))] = torch.nan  # not even through a product with zero
        assert torch.equal(model.predict(changed, hidden), expected)


def test_only_hidden_patches_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make(), tiny.make_images()
    _, hidden = loss_and_hidden(model, images)
    right = model.targets(images)
    for image, patch in np.ndindex(len(images), PATCHES):
        once_wrong = right.clone()
        once_wrong[image, patch] += 2.0
        monkeypatch.setattr(model, "predict", lambda *_, given=once_wrong: given)
        found = loss_and_hidden(model, images)[0].item()
        expected = 2.0 / (len(images) * model.hidden) if hidden[image, patch] else 0.0
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("mask_ratio", "hidden"), [(0.001, 1), (0.25, 1), (0.5, 2), (0.75, 3), (0.999, 3)], ids=str
)
def test_number_of_hidden_patches(mask_ratio: float, hidden: int) -> None:
    model = make(mask_ratio=mask_ratio)
    loss, found = loss_and_hidden(model, tiny.make_images(40))
    assert (found.sum(dim=1) == hidden).all()
    assert torch.isfinite(loss)


def test_masks_differ_between_images_and_follow_the_seed() -> None:
    model, images = make(), tiny.make_images(1).expand(60, -1, -1, -1)
    first, hidden = loss_and_hidden(model, images)
    assert hidden.sum(dim=0).min() > 15  # of 60 images; 30 are expected for every patch
    assert len(hidden.unique(dim=0)) == 6  # 2 of 4 patches in every way
    again, same = loss_and_hidden(model, images)
    assert torch.equal(first, again)
    assert torch.equal(hidden, same)
    assert not torch.equal(hidden, loss_and_hidden(model, images, seed=6)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_that_is_trained_gets_a_gradient(kind: str) -> None:
    model = make(kind)
    # The encoder's own last norm stands behind its pool; students draw theirs anew.
    without = tiny.without_gradient(model, model(tiny.make_images(20)))
    assert without == {"encoder.fc_norm.weight", "encoder.fc_norm.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_bit(kind: str) -> None:
    tiny.assert_resumes_to_the_bit(lambda: make(kind, depth=2, drop_path_rate=0.3), batch)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_below_what_a_place_alone_tells(kind: str) -> None:
    """Every pattern has its negative: only the visible patches tell which one it is."""
    model = make(kind)
    targets = model.targets(tiny.structured(64, seed=999)[0])
    blind = (targets - targets.median(dim=0).values).abs().mean().item()
    losses = tiny.train(model, batch, range(40), learning_rate=1e-2)
    assert np.mean(losses[:3]) > blind > 0.8
    assert np.mean(losses[-3:]) < 0.8 * blind, losses


def test_bfloat16_is_for_the_network_and_not_for_the_loss() -> None:
    model, images = make(), tiny.make_images()
    expected, _ = loss_and_hidden(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = loss_and_hidden(model, images)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert not torch.equal(loss, expected)  # the network did run in bfloat16
    fc_norm = {"encoder.fc_norm.weight", "encoder.fc_norm.bias"}
    assert tiny.without_gradient(model, loss) == fc_norm


def test_unsound_arguments_are_refused() -> None:
    for ratio in (0.0, 1.0, 60):
        with pytest.raises(ValueError, match=f"mask_ratio: expected a number between 0 and 1, got {ratio}"):
            make(mask_ratio=ratio)
    with pytest.raises(TypeError, match="drops patches at random"):
        make(patch_drop_rate=0.5)
    assert (MaskedImageModelling.views, MaskedImageModelling.labelled) == (1, False)
