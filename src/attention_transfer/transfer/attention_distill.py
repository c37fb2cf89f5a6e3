"""Attention Distill: the student learns maps like the teacher's and then stands alone (paper A, section 3.2).

Its variants learn queries, keys or values alone, and those of some heads alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention_transfer.models.attention import Attention, hand_over, read
from attention_transfer.transfer import joint_attention
from attention_transfer.transfer.attention_copy import NEEDED, Part, matching
from attention_transfer.transfer.joint_attention import attention_and_cross_entropy
from attention_transfer.transfer.losses import map_cross_entropy, streamed_attention_cross_entropy
from attention_transfer.transfer.maps import Maps, fitted
from attention_transfer.transfer.method import Given, Loss, Needs


class LearningLayer:
    """A layer of the student that attends as ever, and takes the distance of its map from the teacher's meanwhile.

    Attributes:
        distance: cross-entropy of the last pass, a scalar.
    """

    distance: Tensor

    def __init__(self, teacher: Attention) -> None:
        self.teacher = teacher

    def replace(self, own: Attention) -> Tensor:
        assert own.values is not None
        teacher, tokens, head_dim = self.teacher, *own.queries.shape[-2:]
        biased = own.bias is not None or teacher.bias is not None
        if not biased and joint_attention.path(own.queries.device.type, tokens, head_dim) == "joint":
            mixed, self.distance = attention_and_cross_entropy(
                own.queries,
                own.keys,
                own.values,
                teacher.queries,
                teacher.keys,
                scale=own.scale,
                teacher_scale=teacher.scale,
            )
            return mixed
        self.distance = streamed_attention_cross_entropy(
            teacher.queries,
            teacher.keys,
            own.queries,
            own.keys,
            teacher_bias=teacher.bias,
            teacher_scale=teacher.scale,
            bias=own.bias,
            scale=own.scale,
        )
        return own.apply(own.values)


class AttentionDistill:
    """Task loss plus `weight` times the distance of the attentions.

    Args:
        layers: same layer to same layer, same head to same head.
        heads: of each of these layers, which heads.
        transfer: `map`: cross-entropy of the maps; else the mean squared difference of that part.
        reduction: of the attention loss over the layers.
        temperature: divides the logits of both maps.
        student_heads: number of the student's heads; teachers with another number are fitted to it.
    """

    teacher_at_inference = False

    def __init__(
        self,
        student: nn.Module,
        *,
        layers: tuple[int, ...],
        heads: tuple[tuple[int, ...], ...],
        transfer: Part,
        weight: float,
        reduction: Literal["sum", "mean"],
        temperature: float,
        student_heads: int,
        label_smoothing: float,
    ) -> None:
        self.student = student
        self.layers, self.heads, self.transfer = layers, heads, transfer
        self.weight, self.reduction, self.temperature = weight, reduction, temperature
        self.student_heads = student_heads
        self.needs = Needs(NEEDED[transfer], layers)
        self.label_smoothing = label_smoothing

    def train(self) -> None:
        self.student.train()

    def loss(self, images: Tensor, labels: Tensor, given: Given | None) -> Loss:
        if given is None:
            raise ValueError("Attention Distill needs the teacher's attention in training")
        if learning := self._learning(given.attention):
            with hand_over(self.student, dict(zip(self.layers, learning, strict=True))):
                logits = self.student(images)
            layers = torch.stack([layer.distance for layer in learning])
        else:
            with read(self.student, self.layers) as own:
                logits = self.student(images)
            layers = torch.stack(
                [
                    self._distance(teacher, own[layer], heads)
                    for teacher, layer, heads in zip(given.attention, self.layers, self.heads, strict=True)
                ]
            )
        task = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        loss = layers.sum() if self.reduction == "sum" else layers.mean()
        return Loss(total=task + self.weight * loss, task=task, transfer=loss)

    def logits(self, student: nn.Module, images: Tensor, given: Given | None) -> Tensor:
        return student(images)

    def _learning(self, teachers: tuple[Attention | Maps, ...]) -> list[LearningLayer]:
        """Layers that learn whole maps from queries and keys; none where there is more to it than that."""
        whole = all(len(heads) == self.student_heads for heads in self.heads)
        if self.transfer != "map" or self.temperature != 1 or not whole:
            return []
        fitting = [fitted(teacher, self.student_heads) for teacher in teachers]
        return [LearningLayer(teacher) for teacher in fitting if isinstance(teacher, Attention)]

    def _distance(self, teacher: Attention | Maps, own: Attention, heads: tuple[int, ...]) -> Tensor:
        if self.transfer != "map":
            assert isinstance(teacher, Attention)  # config: only maps are averaged
            theirs, mine = matching(teacher, own, self.transfer)
            return F.mse_loss(self._chosen(mine, heads).float(), self._chosen(theirs, heads).float())
        teacher = fitted(teacher, self.student_heads)
        queries, keys = (self._chosen(part, heads) for part in (own.queries, own.keys))
        bias = self._chosen_bias(own.bias, heads)
        if isinstance(teacher, Maps):
            own = Attention(queries, keys, bias, own.scale)
            return map_cross_entropy(self._chosen(teacher.probabilities, heads), own.logits())
        return streamed_attention_cross_entropy(
            self._chosen(teacher.queries, heads),
            self._chosen(teacher.keys, heads),
            queries,
            keys,
            teacher_bias=self._chosen_bias(teacher.bias, heads),
            teacher_scale=teacher.scale,
            bias=bias,
            scale=own.scale,
            temperature=self.temperature,
        )

    def _chosen(self, part: Tensor, heads: tuple[int, ...]) -> Tensor:
        """These heads of (batch, heads, ..) or (heads, ..)."""
        return part if len(heads) == self.student_heads else part[..., list(heads), :, :]

    def _chosen_bias(self, bias: Tensor | None, heads: tuple[int, ...]) -> Tensor | None:
        """These heads of a bias, which may be the same for all of them."""
        if bias is None or bias.dim() < 3 or bias.shape[-3] == 1:
            return bias
        return self._chosen(bias, heads)
