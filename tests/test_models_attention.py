"""Reading and replacing attention, against the forward pass itself and a float64 loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, DiffAttention
from timm.models import VisionTransformer
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.xcit import XCA
from torch import Tensor, nn

from attention_transfer.models.attention import Attention, ValueAttention, hand_over, read, slim

WIDTH, DEPTH, HEADS, TOKENS = 16, 3, 2, 5
TINY: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
}
PLAIN: dict[str, dict[str, Any]] = {
    "plain": {"global_pool": "avg", "fc_norm": True},
    "class_token": {},
    "pre_norm": {"pre_norm": True},
    "qk_norm": {"qk_norm": True},
    "attention_norm": {"scale_attn_norm": True},
    "layer_scale_and_registers": {"init_values": 0.1, "reg_tokens": 2},
    "attention_pool": {"global_pool": "map"},  # which calls the same function as the blocks
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "deit_distilled": lambda: VisionTransformerDistilled(**TINY, num_classes=3),
    "eva": lambda: Eva(**TINY, num_classes=3, init_values=0.1),
    "eva02": lambda: Eva(
        **TINY, num_classes=3, use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True,
        scale_attn_inner=True,
    ),
    "dinov3": lambda: Eva(
        **TINY, num_classes=3, use_rot_pos_emb=True, use_abs_pos_emb=False, rope_type="dinov3",
        rope_rotate_half=True, num_reg_tokens=2, init_values=0.1, qkv_bias=False, use_fc_norm=False,
    ),
    "rotary_attention": lambda: Eva(**TINY, num_classes=3, use_rot_pos_emb=True, attn_type="rope"),
    "rotary_mixed": lambda: Eva(
        **TINY, num_classes=3, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"
    ),
    "beit": lambda: Beit(**TINY, num_classes=3, use_rel_pos_bias=True, init_values=0.1),
    "beit_shared_bias": lambda: Beit(**TINY, num_classes=3, use_shared_rel_pos_bias=True),
    "relative_positions": lambda: VisionTransformerRelPos(**TINY, num_classes=3, rel_pos_type="bias"),
    "relative_positions_mlp": lambda: VisionTransformerRelPos(**TINY, num_classes=3, rel_pos_type="mlp"),
}  # fmt: skip
FAMILIES = (*PLAIN, *OTHERS)


def make(family: str = "plain", seed: int = 0) -> Any:
    """A tiny model, in eval mode, whose maps are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        build = OTHERS.get(family) or (lambda: VisionTransformer(**TINY, num_classes=3, **PLAIN[family]))
        model: Any = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "attn." in name and "norm" not in name and "attn.proj." not in name:
                    parameter.normal_(std=0.7)  # queries, keys, values, their biases, relative positions
                if "rel_pos_bias" in name or name.startswith("head"):
                    parameter.normal_(std=0.5)
    return model.eval()


def make_images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def capture(model: nn.Module, images: Tensor, layers: range | tuple[int, ...] = range(DEPTH)) -> Any:
    with torch.no_grad(), read(model, layers) as found:
        model(images)
    return found


def untouched(model: Any) -> bool:
    return all(
        "forward" not in vars(block.attn) and getattr(block.attn, "handed_over", None) is None
        for block in model.blocks
    )


def naive_map(queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float | None) -> np.ndarray:
    q, k = queries.double().numpy(), keys.double().numpy()
    batch, heads, tokens, width = q.shape
    b = np.zeros((batch, heads, tokens, tokens))
    if bias is not None:
        b = np.broadcast_to(bias.double().numpy(), b.shape)
    result = np.zeros_like(b)
    for i in range(batch):
        for h in range(heads):
            for row in range(tokens):
                logits = np.array(
                    [
                        sum(q[i, h, row, d] * k[i, h, column, d] for d in range(width))
                        * (width**-0.5 if scale is None else scale)
                        + b[i, h, row, column]
                        for column in range(tokens)
                    ]
                )
                weights = np.exp(logits - logits.max())
                result[i, h, row] = weights / weights.sum()
    return result


@pytest.mark.parametrize("scale", [None, 0.9], ids=["default_scale", "own_scale"])
@pytest.mark.parametrize(
    "bias_shape", [None, (1, 2, 5, 5), (3, 1, 1, 5)], ids=["no_bias", "bias_per_head", "bias_per_image"]
)
def test_map_and_apply_are_softmax_attention(bias_shape: tuple[int, ...] | None, scale: float | None) -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 6)
    bias = None if bias_shape is None else torch.randn(bias_shape)
    attention = Attention(queries, keys, bias, scale)
    expected = naive_map(queries, keys, bias, scale)
    np.testing.assert_allclose(attention.map().numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(attention.apply(values).numpy(), expected @ values.double().numpy(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_maps_are_those_that_timm_materialises_and_their_products_its_outputs(family: str) -> None:
    """The oracle is timm's own path without the fused function: its map goes through attn_drop."""
    model, images = make(family), make_images()
    maps: dict[int, Tensor] = {}
    outputs: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = []
    for i, block in enumerate(model.blocks):
        block.attn.fused_attn = False
        hooks += [
            block.attn.attn_drop.register_forward_hook(lambda _, a, output, i=i: maps.update({i: output})),
            block.attn.register_forward_hook(lambda _, a, out, i=i: outputs.update({i: (a[0], out)})),
        ]
    with torch.no_grad():
        logits = model(images)
    for hook in hooks:
        hook.remove()
    found = capture(model, images)  # which switches the fused function on
    assert sorted(found) == sorted(maps) == list(range(DEPTH))
    for layer, expected in maps.items():
        torch.testing.assert_close(found[layer].map(), expected, atol=1e-5, rtol=1e-5)
        assert expected.max() > 1.5 / expected.shape[-1]
        module = ValueAttention(model.blocks[layer].attn)
        module.handed_over = found[layer]
        with torch.no_grad():
            torch.testing.assert_close(module(outputs[layer][0]), outputs[layer][1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_changes_no_bit_of_outputs_and_gradients(family: str, training: bool) -> None:
    model, images = make(family).train(training), make_images()

    def run() -> list[Tensor]:
        torch.manual_seed(0)  # of dropout
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = run()
    with read(model, range(DEPTH)):
        reading = run()
    assert len(plain) == len(reading)
    assert all(torch.equal(a, b) for a, b in zip(plain, reading, strict=True))
    assert untouched(model)


def test_reading_sees_a_model_that_timm_built_without_fused_attention() -> None:
    model, images = make(), make_images()
    expected = capture(model, images)
    for block in model.blocks:
        block.attn.fused_attn = False
    found = capture(model, images)
    assert sorted(found) == sorted(expected)
    torch.testing.assert_close(found[2].map(), expected[2].map())


def test_gradients_flow_through_what_was_read() -> None:
    model = make()
    with read(model, (1,)) as found:
        model(make_images())
    found[1].logits().square().sum().backward()
    gradient = model.blocks[1].attn.qkv.weight.grad
    assert gradient[: 2 * WIDTH].abs().min() > 0
    assert gradient[2 * WIDTH :].abs().max() == 0  # values are no part of a map
    assert model.blocks[2].attn.qkv.weight.grad is None


@pytest.mark.parametrize("layers", [(), (1,), (0, 2), (2, 1, 0)], ids=str)
def test_only_the_chosen_layers_are_read(layers: tuple[int, ...]) -> None:
    assert sorted(capture(make(), make_images(), layers)) == sorted(layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_handed_its_own_attention_keeps_its_logits(family: str) -> None:
    model, images = make(family), make_images()
    with torch.no_grad():
        expected = model(images)
        with hand_over(model, capture(model, images)):
            torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("layer", range(DEPTH))
def test_the_attention_of_other_images_changes_the_logits(layer: int) -> None:
    model, images = make(), make_images()
    foreign = capture(model, make_images(seed=1))
    with torch.no_grad():
        own = model(images)
        with hand_over(model, {layer: foreign[layer]}):
            changed = model(images)
    assert (changed - own).abs().min(dim=0).values.max() > 1e-4


def test_handing_over_replaces_the_given_layers_alone() -> None:
    model, images = make(), make_images()
    foreign = capture(model, make_images(seed=1))
    own = capture(model, images)
    with hand_over(model, {1: foreign[1]}):
        seen = capture(model, images)
    assert torch.equal(seen[0].queries, own[0].queries)
    assert torch.equal(seen[1].queries, foreign[1].queries)
    assert torch.equal(seen[1].keys, foreign[1].keys)
    assert not torch.allclose(seen[2].queries, own[2].queries)  # its input has changed
    assert not torch.allclose(seen[2].queries, foreign[2].queries)


@pytest.mark.parametrize("slimmed", [False, True], ids=["ordinary", "slimmed"])
def test_reading_inside_handing_over_sees_what_is_used_and_all_hooks_go(slimmed: bool) -> None:
    model, images = make(), make_images()
    foreign = capture(model, make_images(seed=1))
    if slimmed:
        slim(model, range(DEPTH))
    with torch.no_grad(), hand_over(model, foreign):
        with read(model, range(DEPTH)) as found:
            inside = model(images)
        assert torch.equal(model(images), inside)  # the inner block has left the outer one in place
    assert untouched(model)
    for layer in range(DEPTH):
        assert torch.equal(found[layer].queries, foreign[layer].queries)
        assert torch.equal(found[layer].keys, foreign[layer].keys)


@pytest.mark.parametrize("slimmed", [False, True], ids=["ordinary", "slimmed"])
def test_all_hooks_go_after_an_exception(slimmed: bool) -> None:
    model, images = make(), make_images()
    attention = capture(model, images)
    if slimmed:
        slim(model, (0,))

    def fail() -> None:
        with hand_over(model, attention), read(model, range(DEPTH)):
            model(images)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert untouched(model)
    # .. and after one within the forward pass, of a batch that does not fit.
    with pytest.raises(RuntimeError), hand_over(model, attention), read(model, range(DEPTH)):
        model(make_images(3))
    assert untouched(model)
    # .. and when a layer does not exist, after others have been intercepted.
    with pytest.raises(IndexError), read(model, (0, 1, DEPTH)):
        pass
    assert untouched(model)


@pytest.mark.parametrize("layers", [(0,), (0, 2), (0, 1, 2)], ids=str)
def test_slimming_removes_exactly_the_query_and_key_weights(layers: tuple[int, ...]) -> None:
    model = make()
    before = sum(p.numel() for p in model.parameters())
    slim(model, layers)
    after = sum(p.numel() for p in model.parameters())
    assert before - after == len(layers) * 2 * (WIDTH * WIDTH + WIDTH)
    held = {name.split(".")[1] for name, _ in model.named_parameters() if ".qkv." in name}
    assert held == {str(i) for i in range(DEPTH) if i not in layers}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)], ids=str)
def test_a_slimmed_model_computes_what_it_did(layers: tuple[int, ...], family: str) -> None:
    model, images = make(family), make_images()
    foreign = capture(model, make_images(seed=1))
    given = {layer: foreign[layer] for layer in layers}
    with torch.no_grad(), hand_over(model, given):
        expected = model(images)
    slim(model, layers)
    for layer in layers:
        held = {name.split(".")[0] for name, _ in model.blocks[layer].attn.named_parameters()}
        assert held <= {"value", "norm", "proj"}
    with torch.no_grad(), hand_over(model, given):
        torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-6)


def test_a_slimmed_model_without_attention_raises() -> None:
    model = make()
    attention = capture(model, make_images())
    slim(model, (0, 1))
    with pytest.raises(RuntimeError, match="inside hand_over"):
        model(make_images())
    with pytest.raises(RuntimeError, match="inside hand_over"), hand_over(model, {0: attention[0]}):
        model(make_images())


def test_a_gated_attention_keeps_its_gate() -> None:
    torch.manual_seed(0)
    module, tokens = TimmAttention(WIDTH, HEADS, qkv_bias=True, gated=True), torch.randn(2, TOKENS, WIDTH)
    queries, keys, _ = module.qkv(tokens).view(2, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    slimmed = ValueAttention(module)
    slimmed.handed_over = Attention(queries, keys)
    torch.testing.assert_close(slimmed(tokens), module(tokens))


def test_grouped_queries_are_not_slimmed() -> None:
    with pytest.raises(ValueError, match="grouped-query"):
        ValueAttention(AttentionRope(WIDTH, 4, num_kv_heads=2, qkv_fused=False))


def test_queries_and_keys_stand_for_a_map_only_without_a_bias() -> None:
    assert len(capture(make("eva02"), make_images())[0].queries_and_keys()) == 2
    for family in ("beit", "relative_positions"):
        with pytest.raises(TypeError, match="attention bias"):
            capture(make(family), make_images())[0].queries_and_keys()


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=2,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
    )


class BlocksOf(nn.Module):
    """A model with one block, whose attention is given."""

    def __init__(self, attention: nn.Module | None = None, block: nn.Module | None = None) -> None:
        super().__init__()
        if block is None:
            block = nn.Module()
            block.attn = attention
        self.blocks = nn.ModuleList([block])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (swin, "SwinTransformer has no transformer blocks"),
        (lambda: BlocksOf(DiffAttention(WIDTH, HEADS)), "DiffAttention: cannot be served, it subtracts"),
        (
            lambda: BlocksOf(block=ParallelScalingBlock(WIDTH, HEADS)),
            "ParallelScalingBlock: cannot be served",
        ),
        (lambda: BlocksOf(XCA(WIDTH, HEADS)), "attends between channels"),
        (
            lambda: BlocksOf(nn.Identity()),
            "Identity: cannot be served, it is none of Attention, AttentionRope",
        ),
        (lambda: nn.Linear(2, 2), "Linear has no transformer blocks"),
    ],
    ids=["windowed", "differential", "parallel", "channels", "unknown", "no_transformer"],
)
def test_other_models_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(TypeError, match=message), read(build(), (0,)):
        pass
    with pytest.raises(TypeError, match=message):
        slim(build(), (0,))
