"""Where a step gets what it needs of the teacher: from the cache, or from the frozen teacher itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from attention_transfer.models import stochastic_depth
from attention_transfer.models.attention import Attention, read
from attention_transfer.models.tokens import TokenLayout
from attention_transfer.transfer.cache import CacheReader
from attention_transfer.transfer.cache_layout import Content, DType
from attention_transfer.transfer.distill_features import features
from attention_transfer.transfer.maps import Maps, averaged, normalised
from attention_transfer.transfer.method import Given, Needs
from attention_transfer.transfer.quantisation import rounded
from attention_transfer.transfer.token_layout import align, align_maps


class TeacherSource(Protocol):
    """Gives what the teacher says about a batch of views."""

    def __call__(self, images: Tensor, examples: np.ndarray, view: int) -> Given:
        """What was needed.

        Args:
            images: the rendered views, (batch, channels, size, size).
            examples: the images' numbers in their split.
            view: number of the view; `views.CLEAN` for the images themselves.
        """


def is_cached(needs: Needs, content: Content) -> bool:
    """Whether a cache with this content serves a method; else the teacher runs in the step."""
    return needs.what in ("attention", content)


class CachedTeacher:
    """Reads attention from the cache; a view that it does not hold is an error."""

    def __init__(self, reader: CacheReader, needs: Needs) -> None:
        if not is_cached(needs, reader.layout.content):
            raise ValueError(f"a cache of {reader.layout.content} holds no {needs.what}")
        self.reader, self.layers = reader, needs.layers

    def __call__(self, images: Tensor, examples: np.ndarray, view: int) -> Given:
        if self.reader.layout.content == "maps":
            maps = self.reader.read_maps(examples, view, self.layers).to(images.device)
            return Given(attention=tuple(map(normalised, maps.unbind(dim=1))))
        rows = self.reader.read(examples, view, self.layers).to(images.device, torch.float32)
        return Given(attention=tuple(map(self._attention, self.layers, rows.unbind(dim=2))))

    def _attention(self, layer: int, rows: Tensor) -> Attention:
        queries, keys = rows.unbind(dim=1)
        bias = self.reader.bias
        return Attention(queries, keys, None if bias is None else bias[layer, None].to(rows.device))


class OnlineTeacher:
    """Runs the teacher, frozen and in eval mode, on exactly the images that the student sees.

    Args:
        teacher: a timm model.
        dtype: queries and keys are rounded through it, so that this equals reading the cache.
        content: of the cache that it equals: maps are rounded as such.
        shared_drop_path: of the student that is trained on the same images right afterwards, and whose
            stochastic-depth masks it shares; 0 for none.
    """

    def __init__(
        self,
        teacher: nn.Module,
        needs: Needs,
        dtype: DType,
        content: Content = "queries_and_keys",
        *,
        shared_drop_path: float = 0.0,
    ) -> None:
        self.teacher: Any = teacher.eval().requires_grad_(False)
        self.needs, self.dtype, self.content = needs, dtype, content
        self.shares = shared_drop_path > 0
        if self.shares:
            stochastic_depth.insert(self.teacher, shared_drop_path)

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: np.ndarray, view: int) -> Given:
        if self.shares:
            with stochastic_depth.same_as_next(images.device):
                return self._given(images)
        return self._given(images)

    def _given(self, images: Tensor) -> Given:
        match self.needs.what:
            case "logits":
                return Given(logits=self.teacher(images))
            case "features":
                return Given(features=features(self.teacher, images, self.needs.layers)[1])
            case "attention" | "queries_and_keys" | "values":
                found = attention_of(self.teacher, images, self.needs.layers)
                return Given(attention=tuple(map(self._rounded, found)))

    def _rounded(self, found: Attention) -> Attention | Maps:
        if self.content == "maps" and self.needs.what == "attention":
            return normalised(rounded(found.map(), self.dtype))
        queries, keys = (rounded(part, self.dtype).float() for part in (found.queries, found.keys))
        return Attention(queries, keys, found.bias, found.scale, found.values)


@torch.no_grad()
def attention_of(teacher: Any, images: Tensor, layers: tuple[int, ...]) -> tuple[Attention, ...]:
    """The teacher's attention in these layers; what comes after the last of them is not computed."""
    with read(teacher, layers, then_stop=True) as found:
        teacher.forward_features(images)
    return tuple(found[layer] for layer in layers)


def teacher_maps(teacher: nn.Module, images: Tensor, layers: tuple[int, ...]) -> Tensor:
    """The teacher's maps as the cache takes them: (batch, layers, heads, tokens, tokens)."""
    return torch.stack([layer.map() for layer in attention_of(teacher, images, layers)], dim=1)


def teacher_attention(teacher: nn.Module, images: Tensor, layers: tuple[int, ...]) -> Tensor:
    """The teacher's queries and keys as the cache takes them: (batch, 2, layers, heads, tokens, head_dim).

    With `teacher_bias` they are all of its maps.
    """
    found = attention_of(teacher, images, layers)
    return torch.stack([torch.stack((layer.queries, layer.keys), dim=1) for layer in found], dim=2)


def teacher_bias(teacher: nn.Module, image: Tensor, layers: tuple[int, ...]) -> Tensor | None:
    """What the teacher adds to its logits, the same for every image, (layers, heads or 1, tokens, tokens); or None.

    Args:
        image: any one, (1, channels, size, size).

    Raises:
        TypeError: it scales its logits in its own way, which no cache says.
    """
    found = attention_of(teacher, image, layers)
    if any(layer.scale is not None for layer in found):
        raise TypeError("attention with a scale of its own cannot be cached: set attention.source to online")
    biases = [layer.bias for layer in found if layer.bias is not None]
    return torch.cat(biases) if biases else None


class Aligned:
    """A teacher's attention for the tokens of a student that lacks some of the teacher's.

    Args:
        source: of the attention.
        teacher, student: their tokens.
    """

    def __init__(self, source: TeacherSource, teacher: TokenLayout, student: TokenLayout) -> None:
        self.source, self.teacher, self.student = source, teacher, student

    def __call__(self, images: Tensor, examples: np.ndarray, view: int) -> Given:
        found = self.source(images, examples, view).attention
        return Given(attention=tuple(map(self._aligned, found)))

    def _aligned(self, layer: Attention | Maps) -> Attention | Maps:
        if isinstance(layer, Maps):
            return Maps(align_maps(layer.probabilities, self.teacher, self.student))
        return align(layer, self.teacher, self.student)


def aligning(
    source: TeacherSource, needs: Needs, teacher: TokenLayout, student: TokenLayout
) -> TeacherSource:
    """The source, for a student whose tokens may be others; features and logits have none to align."""
    alike = teacher == student or needs.what in ("features", "logits")
    return source if alike else Aligned(source, teacher, student)


class Averaged:
    """A teacher's maps, each replaced by its mean over queries, heads or the transferred layers."""

    def __init__(self, source: TeacherSource, over: Literal["queries", "heads", "layers"]) -> None:
        self.source, self.over = source, over

    def __call__(self, images: Tensor, examples: np.ndarray, view: int) -> Given:
        found = self.source(images, examples, view).attention
        return Given(attention=averaged(found, self.over))


def averaging(
    source: TeacherSource,
    over: Literal["examples", "queries", "heads", "layers"] | None,
    batches: Iterable[tuple[Tensor, np.ndarray, int]],
) -> TeacherSource:
    """The source with its maps averaged as a run asks; over examples, over those of `batches`."""
    if over is None:
        return source
    return AveragedOverExamples(source, batches) if over == "examples" else Averaged(source, over)


class AveragedOverExamples:
    """The same maps for every image: a teacher's mean maps over a set of images.

    Over a set, and not over the batch, so that a prediction does not depend on its neighbours.

    Args:
        source: of the attention.
        batches: arguments of `source` for the set.
    """

    def __init__(self, source: TeacherSource, batches: Iterable[tuple[Tensor, np.ndarray, int]]) -> None:
        sums: list[Tensor] = []
        count = 0
        for images, examples, view in batches:
            found = [layer.map().double().sum(dim=0) for layer in source(images, examples, view).attention]
            sums = [total + part for total, part in zip(sums, found, strict=True)] if sums else found
            count += len(images)
        self.maps = [(total / count).float() for total in sums]

    def __call__(self, images: Tensor, examples: np.ndarray, view: int) -> Given:
        return Given(attention=tuple(Maps(mean.expand(len(images), -1, -1, -1)) for mean in self.maps))
