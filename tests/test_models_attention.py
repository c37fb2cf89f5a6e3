"""Reading and replacing attention, against the forward pass itself and a float64 loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope
from timm.models import VisionTransformer
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
)
from timm.models.xcit import Xcit
from tiny_vits import DEPTH, FAMILIES, HEADS, TINY, TOKENS, WIDTH, capture, make, make_images, untouched
from torch import Tensor, nn

from attention_transfer.models.attention import Attention, hand_over, read, slim
from attention_transfer.models.attention_families import REFUSED
from attention_transfer.models.value_attention import ValueAttention


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
    found = capture(model, images)
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
    assert not any(block.attn.fused_attn for block in model.blocks)


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
def test_a_pass_can_stop_at_the_last_layer_that_is_read(family: str) -> None:
    model, images = make(family).eval(), make_images()
    ran: list[int] = []
    for number, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        whole = capture(model, images, (0, 1))
        ran.clear()
        with read(model, (1, 0), then_stop=True) as found:
            model.forward_features(images)
            raise AssertionError("the pass goes on")
    assert ran == [0]
    assert list(found) == [0, 1]
    for layer in (0, 1):
        assert torch.equal(found[layer].queries, whole[layer].queries)
        assert torch.equal(found[layer].keys, whole[layer].keys)
        assert torch.equal(found[layer].values, whole[layer].values)
    model(images)
    assert ran == [0, *range(len(model.blocks))]  # and the model is as it was


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


class TeacherQueries:
    """The teacher's queries with the layer's own keys, in some heads alone."""

    def __init__(self, teacher: Attention, heads: list[int]) -> None:
        self.teacher, self.heads = teacher, heads

    def replace(self, own: Attention) -> Tensor:
        queries = own.queries.clone()
        queries[:, self.heads] = self.teacher.queries[:, self.heads]
        assert own.values is not None
        return Attention(queries, own.keys, own.bias, own.scale).apply(own.values)


class Remember:
    """Changes nothing, and keeps what it was asked about."""

    def replace(self, own: Attention) -> Tensor:
        self.own = own
        return own.replace(own)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replacement_is_asked_about_the_layers_own_attention(family: str) -> None:
    model, images, remember = make(family), make_images(), Remember()
    read_before = capture(model, images)[1]
    with torch.no_grad():
        expected = model(images)
        with hand_over(model, {1: remember}):
            torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-6)
    for name in ("queries", "keys", "values", "bias"):
        before, own = getattr(read_before, name), getattr(remember.own, name)
        assert own is before is None or torch.equal(own, before)
    assert remember.own.scale == read_before.scale


@pytest.mark.parametrize("heads", [[], [1], [0, 1]], ids=str)
def test_queries_of_some_heads_alone_can_be_replaced(heads: list[int]) -> None:
    model, images = make(), make_images()
    own, foreign = capture(model, images)[1], capture(model, make_images(seed=1))[1]
    outputs: list[Tensor] = []
    hook = model.blocks[1].attn.proj.register_forward_pre_hook(lambda _, tokens: outputs.append(tokens[0]))
    with torch.no_grad(), hand_over(model, {1: TeacherQueries(foreign, heads)}):
        model(images)
    hook.remove()
    for head in range(HEADS):
        queries = (foreign if head in heads else own).queries[:, head : head + 1]
        expected = naive_map(queries, own.keys[:, head : head + 1], None, None)[:, 0]
        mixed = expected @ own.values[:, head].double().numpy()
        width = WIDTH // HEADS
        np.testing.assert_allclose(outputs[0][..., head * width : (head + 1) * width], mixed, atol=1e-5)


def test_a_map_of_equal_logits_is_the_mean_of_the_values() -> None:
    uniform = Attention(torch.zeros(2, 3, 5, 4), torch.randn(2, 3, 5, 4))
    values = torch.randn(2, 3, 5, 6)
    own = Attention(torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7), values=values)
    expected = values.mean(dim=2, keepdim=True).expand_as(values)
    torch.testing.assert_close(uniform.replace(own), expected)


def test_other_heads_or_tokens_are_not_broadcast() -> None:
    attention = Attention(torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 4))
    with pytest.raises(ValueError, match="values of 3 heads and 5 tokens, got 1 heads and 5 tokens"):
        attention.apply(torch.randn(2, 3, 5, 4))
    with pytest.raises(ValueError, match="values of 1 heads and 6 tokens"):
        attention.apply(torch.randn(2, 1, 6, 4))


def test_nothing_is_mixed_without_values() -> None:
    attention = Attention(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match="without its values"):
        attention.replace(attention)


def test_a_layer_without_queries_needs_a_whole_map() -> None:
    model = make()
    slim(model, (1,))
    with (
        pytest.raises(TypeError, match="layer without queries and keys"),
        hand_over(model, {1: Remember()}),
    ):
        pass


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


class BlocksOf(nn.Module):
    """A model with one block, whose attention is given."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        block = nn.Module()
        block.attn = attention
        self.blocks = nn.ModuleList([block])


def multiscale(pool_first: bool) -> nn.Module:
    sizes = MultiScaleVitCfg(depths=(1, 1), embed_dim=8, stride_q=((1, 1), (2, 2)), pool_first=pool_first)
    return MultiScaleVit(sizes, img_size=(32, 32))


REFUSED_MODELS: dict[str, Callable[[], nn.Module]] = {
    "ParallelScalingBlock": lambda: VisionTransformer(**TINY, block_fn=ParallelScalingBlock),
    "ParallelThingsBlock": lambda: VisionTransformer(**TINY, block_fn=ParallelThingsBlock),
    "DiffParallelScalingBlock": lambda: VisionTransformer(**TINY, block_fn=DiffParallelScalingBlock),
    "DiffAttention": lambda: VisionTransformer(**TINY, attn_layer="diff"),
    "MaskUnitAttention": lambda: Hiera(img_size=(64, 64), embed_dim=8, stages=(1, 1, 1, 1)),
    "MultiScaleAttention": lambda: multiscale(False),
    "MultiScaleAttentionPoolFirst": lambda: multiscale(True),
    "WindowAttention": lambda: SwinTransformer(
        img_size=32, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
    ),
    "XCA": lambda: Xcit(**TINY | {"img_size": 32, "patch_size": 8, "embed_dim": 32}),
    "TalkingHeadAttn": lambda: Cait(**TINY),
}


def assert_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(TypeError, match=message), read(model, (0,)):
        pass
    with pytest.raises(TypeError, match=message), hand_over(model, {}):
        pass
    with pytest.raises(TypeError, match=message):
        slim(model, (0,))


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_attend_otherwise_are_refused_with_the_reason(kind: str) -> None:
    with torch.device("meta"):
        model = REFUSED_MODELS[kind]()
    assert_refused(model, rf"{type(model).__name__} has .*, {REFUSED[kind]} \({kind}\)")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BlocksOf(nn.Identity()), "Identity: cannot be served, it is none of Attention, Att"),
        (lambda: nn.Linear(2, 2), "Linear has no transformer blocks$"),
    ],
    ids=["unknown", "no_transformer"],
)
def test_models_of_other_kinds_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    assert_refused(build(), message)


def masked(mask: Tensor | None, causal: bool, images: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = Eva(**TINY, use_rot_pos_emb=True).eval()
    return model, lambda: model(images, attn_mask=mask, is_causal=causal)


@pytest.mark.parametrize("kind", ["boolean", "causal", "additive"])
def test_masks_are_part_of_what_is_read(kind: str) -> None:
    torch.manual_seed(0)
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    mask = {
        "boolean": visible,
        "causal": None,
        "additive": torch.zeros(TOKENS, TOKENS).masked_fill(~visible, float("-inf")),
    }[kind]
    model, run = masked(mask, kind == "causal", make_images())
    with torch.no_grad():
        expected = run()
        with read(model, range(DEPTH)) as found:
            assert torch.equal(run(), expected)
        for attention in found.values():
            maps = attention.map()
            assert maps[..., ~visible].abs().max() == 0
            torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
        with hand_over(model, found):
            torch.testing.assert_close(run(), expected)


def test_attention_dropout_is_refused_where_a_map_is_handed_over() -> None:
    model, images = VisionTransformer(**TINY, attn_drop_rate=0.5).eval(), make_images()
    attention = capture(model, images)
    with torch.no_grad(), hand_over(model, attention):
        model(images)  # nothing is dropped in eval mode
        with pytest.raises(ValueError, match="attention dropout"):
            model.train()(images)
    with pytest.raises(ValueError, match="attention dropout"):
        slim(model, (0,))


@pytest.mark.parametrize("slimmed", [False, True], ids=["ordinary", "slimmed"])
def test_what_is_handed_over_last_counts_and_reading_sees_it(slimmed: bool) -> None:
    model, images = make(), make_images()
    first, last = capture(model, make_images(seed=1)), capture(model, make_images(seed=2))
    if slimmed:
        slim(model, range(DEPTH))
    with torch.no_grad():
        with hand_over(model, last):
            expected = model(images)
        with read(model, range(DEPTH)) as found, hand_over(model, first), hand_over(model, last):
            assert torch.equal(model(images), expected)
    for layer in range(DEPTH):
        assert torch.equal(found[layer].queries, last[layer].queries)
    assert untouched(model)


def test_the_first_pass_is_read() -> None:
    model, images = make(), make_images()
    with torch.no_grad(), read(model, (0,)) as found:
        model(images)
        model(make_images(seed=1))
    assert torch.equal(found[0].queries, capture(model, images)[0].queries)


def test_training_mode_set_while_reading_stays() -> None:
    model = make()
    with read(model, range(DEPTH)):
        model.train()
    assert all(module.training for module in model.modules())


def test_slimming_keeps_device_and_precision() -> None:
    model = make().to("meta", torch.bfloat16)
    slim(model, range(DEPTH))
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
