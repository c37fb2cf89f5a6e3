"""The masked autoencoder, against a float64 loop over images and patches, and by what its parts see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from attention_transfer.config import Architecture
from attention_transfer.files import read_json
from attention_transfer.models import vit
from attention_transfer.models.masked_autoencoder import MaskedAutoencoder

PATCH, GRID = 4, 3
PATCHES, SIZE = GRID * GRID, PATCH * GRID


def arguments(channels: int = 1) -> dict[str, Any]:
    architecture = Architecture(patch_size=PATCH, width=16, depth=2, heads=2, mlp_ratio=2.0)
    return vit.model_arguments(architecture, image_size=SIZE, channels=channels, classes=0)


def make(mask_ratio: float = 0.6, channels: int = 1, seed: int = 0) -> MaskedAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MaskedAutoencoder(
            vit.create(arguments(channels), seed=seed),
            decoder_width=12,
            decoder_depth=1,
            decoder_heads=2,
            mask_ratio=mask_ratio,
        )


def make_images(count: int = 3, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def loss_and_order(model: MaskedAutoencoder, images: Tensor, seed: int = 5) -> tuple[Tensor, Tensor]:
    """The loss under a seed, and the order of the patches that this seed draws; visible ones first."""
    torch.manual_seed(seed)
    loss = model(images)
    torch.manual_seed(seed)
    return loss, torch.rand(len(images), model.patches).argsort(dim=1)


class Given(nn.Module):
    """A decoder whose predictions are given: (batch, patches, pixels)."""

    def __init__(self, predictions: Tensor) -> None:
        super().__init__()
        self.predictions = predictions

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([torch.full_like(self.predictions[:, :1], torch.nan), self.predictions], dim=1)


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_loss_is_that_of_a_loop_over_images_and_patches(channels: int) -> None:
    model, images = make(channels=channels).double(), make_images(channels=channels).double()
    loss, order = loss_and_order(model, images)
    encoder, errors = model.encoder, []
    projection = encoder.patch_embed.proj
    with torch.no_grad():
        for image, places in zip(images, order.tolist(), strict=True):
            blocks = [
                image[:, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
                for row in range(GRID)
                for column in range(GRID)
            ]
            visible = places[: model.visible]
            tokens = [encoder.cls_token[0, 0] + encoder.pos_embed[0, 0]]
            for place in visible:
                embedded = projection.weight.flatten(1) @ blocks[place].flatten() + projection.bias
                tokens.append(embedded + encoder.pos_embed[0, 1 + place])
            latent = model.to_decoder(model.norm(encoder.blocks(torch.stack(tokens)[None])))[0]
            decoder_tokens = [latent[0]] + [model.mask_token[0, 0]] * PATCHES
            for index, place in enumerate(visible):
                decoder_tokens[1 + place] = latent[1 + index]
            decoded = model.decoder(torch.stack(decoder_tokens)[None] + model.decoder_positions)[0, 1:]
            for place in places[model.visible :]:
                pixels = np.array(
                    [
                        float(blocks[place][channel, row, column])
                        for row in range(PATCH)
                        for column in range(PATCH)
                        for channel in range(channels)
                    ]
                )
                target = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
                errors.append(np.mean((decoded[place].numpy() - target) ** 2))
    assert len(errors) == len(images) * (PATCHES - model.visible)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-10)


def test_targets_are_normalised_within_each_patch() -> None:
    images = 7 + 3 * make_images(channels=3)
    targets = make(channels=3).targets(images)
    assert targets.shape == (3, PATCHES, 3 * PATCH**2)
    torch.testing.assert_close(targets.mean(dim=-1), torch.zeros(3, PATCHES), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.std(dim=-1), torch.ones(3, PATCHES), atol=1e-5, rtol=0)
    # Contrast and brightness of a patch are not predicted; an even patch is no division by zero.
    torch.testing.assert_close(make(channels=3).targets(2 * images + 1), targets, atol=1e-5, rtol=0)
    assert torch.equal(make().targets(torch.ones(1, 1, SIZE, SIZE)), torch.zeros(1, PATCHES, PATCH**2))


def test_only_hidden_patches_count() -> None:
    model, images = make(), make_images()
    _, order = loss_and_order(model, images)
    right = model.targets(images)
    wrong_where_visible = right.scatter_add(
        1,
        order[:, : model.visible, None].expand(-1, -1, right.shape[-1]),
        torch.full((len(images), model.visible, right.shape[-1]), 100.0),
    )
    model.decoder = Given(wrong_where_visible)  # type: ignore[assignment]
    assert loss_and_order(model, images)[0].item() == 0
    for place in range(model.visible, PATCHES):
        once_wrong = right.clone()
        once_wrong[1, order[1, place]] += 2.0
        model.decoder = Given(once_wrong)  # type: ignore[assignment]
        hidden = len(images) * (PATCHES - model.visible)
        assert loss_and_order(model, images)[0].item() == pytest.approx(2.0**2 / hidden, rel=1e-5)


def test_the_encoder_sees_the_visible_patches_alone() -> None:
    model, images = make(), make_images()
    _, order = loss_and_order(model, images)

    def latent(pixels: Tensor) -> Tensor:
        seen: list[Tensor] = []
        with model.encoder.blocks.register_forward_hook(lambda _, __, output: seen.append(output)):
            loss_and_order(model, pixels)
        return seen[0].detach()

    expected = latent(images)
    assert expected.shape == (3, 1 + model.visible, 16)
    for index in range(PATCHES):
        row, column = divmod(int(order[0, index]), GRID)
        changed = images.clone()
        changed[0, :, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)] += 10.0
        found = latent(changed)
        assert torch.equal(found, expected) == (index >= model.visible), f"patch {index} in order of masking"
        assert torch.equal(found[1:], expected[1:])  # the other images


def test_the_decoder_gets_each_token_at_its_own_place() -> None:
    model, images = make(), make_images()
    seen: dict[str, Tensor] = {}
    with (
        model.to_decoder.register_forward_hook(lambda _, __, output: seen.update(latent=output)),
        model.decoder.register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0])),
    ):
        _, order = loss_and_order(model, images)
    tokens = (seen["tokens"] - model.decoder_positions).detach()
    assert tokens.shape == (3, 1 + PATCHES, 12)
    for image in range(3):
        torch.testing.assert_close(tokens[image, 0], seen["latent"][image, 0].detach(), atol=1e-6, rtol=0)
        for index, place in enumerate(order[image].tolist()):
            expected = (
                seen["latent"][image, 1 + index] if index < model.visible else model.mask_token[0, 0]
            ).detach()
            torch.testing.assert_close(tokens[image, 1 + place], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("mask_ratio", "visible"), [(0.001, 8), (0.25, 7), (0.6, 4), (0.75, 2), (0.999, 1)], ids=str
)
def test_number_of_visible_patches(mask_ratio: float, visible: int) -> None:
    model = make(mask_ratio)
    assert model.visible == visible
    assert torch.isfinite(model(make_images()))


def test_masks_differ_between_images_and_follow_the_seed() -> None:
    model, images = make(), make_images(count=1).expand(40, -1, -1, -1)
    first, order = loss_and_order(model, images)
    hidden_often = torch.zeros(PATCHES).scatter_add(
        0, order[:, model.visible :].flatten(), torch.ones(40 * (PATCHES - model.visible))
    )
    assert hidden_often.min() > 8  # of 40 images; 22 are expected for every patch
    assert torch.equal(first, loss_and_order(model, images)[0])
    assert not torch.equal(first, loss_and_order(model, images, seed=6)[0])


def test_every_weight_that_is_trained_gets_a_gradient() -> None:
    model = make()
    model(make_images()).backward()
    # The teacher's own last norm stands behind its pool; students draw theirs anew.
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without == {"encoder.fc_norm.weight", "encoder.fc_norm.bias"}
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


def test_loss_falls_in_30_steps_where_hidden_patches_follow_from_visible_ones() -> None:
    model = make()
    # Ramps in one of two directions: a visible patch tells the direction, and so the others.
    ramp = torch.linspace(-1, 1, SIZE).expand(1, SIZE, SIZE)
    images = torch.stack([ramp, ramp.transpose(1, 2), -ramp, -ramp.transpose(1, 2)] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        torch.manual_seed(step)
        loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.35 * losses[0], losses


def test_the_encoder_is_a_plain_timm_model_when_saved(tmp_path: Path) -> None:
    model, images = make(), make_images()
    model(images).backward()
    vit.save(tmp_path, model.encoder, arguments())
    config = read_json(tmp_path / vit.CONFIG, made_by="pretrain")
    loaded = timm.create_model(
        config["architecture"],
        checkpoint_path=str(tmp_path / vit.WEIGHTS),
        num_classes=config["num_classes"],
        **config["model_args"],
    ).eval()
    with torch.no_grad():
        expected = model.encoder.eval().forward_features(images)
        assert torch.equal(loaded.forward_features(images), expected)
