"""Cached and online attention: the same batches, the same attention, the same gradients, the same training."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
import torch
from torch import Tensor

from attention_transfer.assembly import Parts
from attention_transfer.data import views
from attention_transfer.models import students
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.loop import fit
from attention_transfer.training.tasks import StudentTask, order
from attention_transfer.transfer import methods
from attention_transfer.transfer.attention_source import CachedAttention, OnlineAttention

TRANSFER = ("copy", "distill")
STEPS = 21  # 7 epochs of 3 steps, over 2 views of each image


@functools.cache
def _cache(precision: str, dtype: str) -> None:
    """Writes the teacher's cache below the present folder, which holds one at a time."""
    parts = make_parts("distill", "cache", precision, dtype)
    write = tiny_study.script("cache").write
    for which in ("views", "validation"):
        write(parts, "first", which)


def make_parts(method: str, source: str, precision: str = "float32", dtype: str = "float16") -> Parts:
    changes = {
        "attention.source": source,
        "attention.dtype": dtype,
        "training.precision": precision,
        "runs.run.epochs": 7,
        "runs.run.drop_path": 0.3,
    }
    return tiny_study.make_parts(tiny_study.make_study(method, changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture
def cached(request: pytest.FixtureRequest, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Runs in the folder of a study whose cache has been written for (precision, dtype)."""
    precision, dtype = getattr(request, "param", ("float32", "float16"))
    folder = root / f"{precision}-{dtype}"
    if not folder.exists():
        tiny_study.write_inputs(folder)
    monkeypatch.chdir(folder)
    _cache(precision, dtype)
    return precision, dtype


formats = pytest.mark.parametrize(
    "cached",
    [("float32", "float16"), ("float32", "float32"), ("bfloat16", "float16")],
    indirect=True,
    ids="-".join,
)


class Recorded:
    """A task, and what its method and its loop saw of each step."""

    def __init__(self, parts: Parts, method: str) -> None:
        run, layers = parts.study.runs["run"], parts.study.layers("run")
        student = students.create(
            parts.student_arguments("first"),
            seed=0,
            drop_path=run.drop_path,
            teacher=None,
            copied_layers=layers if method == "copy" else (),
        )
        examples = parts.split("labelled")
        self.batches: list[tuple[np.ndarray, int, Tensor]] = []
        self.attention: list[Tensor] = []
        self.losses: list[dict[str, float]] = []
        render = parts.renderer(examples, parts.study.views)

        def recorded_render(rows: np.ndarray, view: int) -> Tensor:
            images = render(rows, view)
            self.batches.append((rows.copy(), view, images.clone()))
            return images

        self.method = methods.build(run, student, layers)
        self.task = StudentTask(
            self.method,
            labels=parts.train.labels[examples],
            examples=examples,
            render=recorded_render,
            views=parts.study.views.per_image,
            attention=parts.attention("run", "views"),
            accuracy=lambda model: 0.0,
            batch_size=run.batch_size,
            seed=0,
            device=tiny_study.CPU,
            bfloat16=parts.study.training.precision == "bfloat16",
        )
        method_loss, task_losses = self.method.loss, self.task.losses

        def recorded_loss(images: Tensor, labels: Tensor, attention: Tensor | None) -> Any:
            assert attention is not None
            self.attention.append(attention)
            return method_loss(images, labels, attention)

        def recorded_losses(epoch: int, step: int) -> dict[str, Tensor]:
            losses = task_losses(epoch, step)
            self.losses.append({name: value.item() for name, value in losses.items()})
            return losses

        self.method.loss = recorded_loss  # type: ignore[method-assign]
        self.task.losses = recorded_losses  # type: ignore[method-assign]

    def gradients(self, epoch: int, step: int) -> dict[str, Tensor]:
        """Of one step, from the present weights."""
        torch.manual_seed(7)
        self.task.train()
        self.method.student.zero_grad()
        self.task.losses(epoch, step)["total"].backward()
        return {n: p.grad.clone() for n, p in self.method.student.named_parameters() if p.grad is not None}


class Silent:
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...


@functools.cache
def trained(method: str, source: str) -> Recorded:
    """The record of a whole training, of which the folder's cache is part."""
    parts = make_parts(method, source)
    recorded = Recorded(parts, method)
    fit(
        recorded.task,
        parts.study.runs["run"],
        seed=0,
        clip_norm=None,
        validate_every=7,
        checkpoint=Checkpoint(Path("checkpoints") / f"{method}-{source}"),
        sink=Silent(),
        label="x",
        where="x",
    )
    return recorded


@formats
@pytest.mark.parametrize("method", TRANSFER)
def test_cached_and_online_give_equal_attention_and_gradients_from_one_state(
    method: str, cached: tuple[str, str]
) -> None:
    precision, dtype = cached
    made = {source: Recorded(make_parts(method, source, *cached), method) for source in ("cache", "online")}
    assert isinstance(made["cache"].task.attention, CachedAttention)
    assert isinstance(made["online"].task.attention, OnlineAttention)
    for epoch, step in ((0, 0), (0, 2), (1, 1), (2, 1)):
        gradients = {source: recorded.gradients(epoch, step) for source, recorded in made.items()}
        found, expected = (made[source].attention[-1] for source in ("cache", "online"))
        assert found.dtype == expected.dtype == torch.float32
        assert found.shape == (8, 2, 2, tiny_study.HEADS, tiny_study.TOKENS, tiny_study.HEAD_DIM)
        # A float16 that lies between two others may fall to either side; no other difference is allowed.
        tolerance = {"float16": 2.0**-10, "float32": 1e-6}[dtype]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)
        assert (found == expected).double().mean() > 0.999 or dtype == "float32"
        assert gradients["cache"].keys() == gradients["online"].keys()
        difference, size = (
            torch.cat([part.flatten().double() for part in parts]).norm().item()
            for parts in (
                [gradients["cache"][n] - gradients["online"][n] for n in gradients["cache"]],
                gradients["online"].values(),
            )
        )
        assert size > 0
        assert difference <= (1e-6 if precision == "float32" else 1e-3) * size


@pytest.mark.slow
@pytest.mark.parametrize("method", TRANSFER)
def test_cached_and_online_training_go_the_same_way(method: str, cached: tuple[str, str]) -> None:
    first, second = trained(method, "cache"), trained(method, "online")
    assert len(first.losses) == len(second.losses) == STEPS
    for step, (a, b) in enumerate(zip(first.losses, second.losses, strict=True)):
        assert a == pytest.approx(b, rel=1e-4), f"step {step}"
    assert first.losses[0]["total"] != pytest.approx(first.losses[-1]["total"], rel=1e-2)  # it does train


@pytest.mark.slow
def test_all_methods_and_sources_see_the_same_batches(cached: tuple[str, str]) -> None:
    records = {
        (method, source): trained(method, source) for method in TRANSFER for source in ("cache", "online")
    }
    reference = records["distill", "cache"].batches
    assert len(reference) == STEPS
    for key, record in records.items():
        for (rows, view, images), (others, other, pixels) in zip(reference, record.batches, strict=True):
            np.testing.assert_array_equal(rows, others, err_msg=str(key))
            assert view == other
            assert torch.equal(images, pixels)
    for epoch in range(7):
        shown = [reference[3 * epoch + step] for step in range(3)]
        assert {view for _, view, _ in shown} == {epoch % 2}
        assert sorted(np.concatenate([rows for rows, _, _ in shown])) == list(range(24))


def test_the_order_of_examples_follows_seed_and_epoch_alone() -> None:
    orders = {
        (seed, epoch): order(50, seed=seed, epoch=epoch).tolist() for seed in (0, 1) for epoch in (0, 1)
    }
    assert all(sorted(rows) == list(range(50)) for rows in orders.values())
    assert len({tuple(rows) for rows in orders.values()}) == 4
    order.cache_clear()
    torch.manual_seed(1)
    assert order(50, seed=1, epoch=1).tolist() == orders[1, 1]


@formats
def test_the_cached_attention_of_clean_images_is_the_teachers(cached: tuple[str, str]) -> None:
    parts, online = (make_parts("copy", source, *cached) for source in ("cache", "online"))
    images, examples = parts.evaluated("validation")
    rows = np.array([4, 0, 7])
    pixels = parts.clean(images.images)(rows)
    found = parts.attention("run", "validation")(pixels, examples[rows], views.CLEAN)
    with torch.autocast("cpu", torch.bfloat16, enabled=cached[0] == "bfloat16"):
        expected = online.attention("run", "validation")(pixels, examples[rows], views.CLEAN)
    torch.testing.assert_close(found, expected, rtol=2.0**-10, atol=1e-6)
