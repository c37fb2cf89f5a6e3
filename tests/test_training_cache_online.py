"""Cached and online attention: the same batches, the same attention, the same gradients, the same training."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
import torch
from torch import Tensor

from attention_transfer.assembly import Parts
from attention_transfer.config import Architecture
from attention_transfer.data import views
from attention_transfer.data.labelled import LabelledViews
from attention_transfer.models import students, vit
from attention_transfer.models.attention import read
from attention_transfer.teaching import teacher_source
from attention_transfer.training.batches import order
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.loop import fit
from attention_transfer.training.student_task import StudentTask
from attention_transfer.transfer import methods
from attention_transfer.transfer.maps import Maps
from attention_transfer.transfer.method import Given, Needs
from attention_transfer.transfer.teacher_source import CachedTeacher, OnlineTeacher

TRANSFER = ("copy", "distill")
STEPS = 21  # 7 epochs of 3 steps, over 2 views of each image


@functools.cache
def _cache(precision: str, dtype: str, content: str) -> None:
    """Writes the teacher's cache below the present folder, which holds one at a time."""
    parts = make_parts("distill", "cache", precision, dtype, content)
    write = tiny_study.script("cache").write
    for which in ("views", "validation"):
        write(parts, "first", which)


def make_parts(
    method: str,
    source: str,
    precision: str = "float32",
    dtype: str = "float16",
    content: str = "queries_and_keys",
) -> Parts:
    changes = {
        "attention.source": source,
        "attention.dtype": dtype,
        "attention.content": content,
        "training.precision": precision,
        "runs.run.epochs": 7,
        "runs.run.drop_path": 0.3,
    }
    return tiny_study.make_parts(tiny_study.make_study(method, changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture
def cached(
    request: pytest.FixtureRequest, root: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str, str]:
    """Runs in the folder of a study whose cache has been written for (precision, dtype, content)."""
    form: tuple[str, str, str] = getattr(request, "param", ("float32", "float16", "queries_and_keys"))
    folder = root / "-".join(form)
    if not folder.exists():
        tiny_study.write_inputs(folder)
    monkeypatch.chdir(folder)
    _cache(*form)
    return form


formats = pytest.mark.parametrize(
    "cached",
    [
        ("float32", "float16", "queries_and_keys"),
        ("float32", "float32", "queries_and_keys"),
        ("float32", "int8", "queries_and_keys"),
        ("bfloat16", "float16", "queries_and_keys"),
        ("float32", "float16", "maps"),
        ("bfloat16", "float32", "maps"),
    ],
    indirect=True,
    ids="-".join,
)


def stacked(given: Given | None) -> Tensor:
    """Queries and keys, or maps, of all layers."""
    assert given is not None
    return torch.stack(
        [
            layer.map() if isinstance(layer, Maps) else torch.stack((layer.queries, layer.keys), dim=1)
            for layer in given.attention
        ],
        dim=2,
    )


class Recorded:
    """A task, and what its method and its loop saw of each step."""

    def __init__(self, parts: Parts) -> None:
        run = parts.study.runs["run"]
        student = students.create(
            parts.student_arguments("run"),
            seed=0,
            drop_path=run.drop_path,
            teacher=None,
            copied_layers=methods.slimmed_layers(parts.study, "run"),
        )
        images = parts.labelled
        self.batches: list[tuple[np.ndarray, int, Tensor]] = []
        self.attention: list[Tensor] = []
        self.losses: list[dict[str, float]] = []
        recorded = self.batches

        class Images(LabelledViews):
            def render(self, rows: np.ndarray, view: int) -> Tensor:
                rendered = super().render(rows, view)
                recorded.append((rows.copy(), view, rendered.clone()))
                return rendered

        self.method = methods.build(parts.study, "run", student)
        self.task = StudentTask(
            self.method,
            images=Images(**vars(images)),
            views=parts.study.views.per_image,
            teacher=teacher_source(parts, "run", "views", self.method.needs),
            accuracy=lambda model: 0.0,
            batch_size=run.batch_size,
            seed=0,
            device=tiny_study.CPU,
            bfloat16=parts.study.training.precision == "bfloat16",
        )
        method_loss, task_losses = self.method.loss, self.task.losses

        def recorded_loss(images: Tensor, labels: Tensor, given: Given | None) -> Any:
            self.attention.append(stacked(given))
            return method_loss(images, labels, given)

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
    recorded = Recorded(parts)
    with recorded.task:
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
    del recorded.batches[STEPS:]  # the one that was read ahead of the end
    return recorded


@formats
@pytest.mark.parametrize("method", TRANSFER)
def test_cached_and_online_give_equal_attention_and_gradients_from_one_state(
    method: str, cached: tuple[str, str, str]
) -> None:
    precision, dtype, content = cached
    made = {source: Recorded(make_parts(method, source, *cached)) for source in ("cache", "online")}
    assert isinstance(made["cache"].task.teacher, CachedTeacher)
    assert isinstance(made["online"].task.teacher, OnlineTeacher)
    for epoch, step in ((0, 0), (0, 2), (1, 1), (2, 1)):
        gradients = {source: recorded.gradients(epoch, step) for source, recorded in made.items()}
        found, expected = (made[source].attention[-1] for source in ("cache", "online"))
        assert found.dtype == expected.dtype == torch.float32
        if content == "queries_and_keys":
            assert found.shape == (8, 2, 2, tiny_study.HEADS, tiny_study.TOKENS, tiny_study.HEAD_DIM)
        else:
            assert found.shape == (8, tiny_study.HEADS, 2, tiny_study.TOKENS, tiny_study.TOKENS)
        # A number that lies between two of the format may fall to either side; no other difference is allowed.
        tolerance = {"float16": 2.0**-10, "float32": 1e-5, "int8": 2.0**-10}[dtype]
        quantum = expected.abs().max().item() / 127 if dtype == "int8" else 1e-6
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1.01 * quantum)
        equal = (found - expected).abs() <= 1e-6 * expected.abs()
        assert equal.double().mean() > (0.98 if dtype == "int8" or precision == "bfloat16" else 0.995)
        assert gradients["cache"].keys() == gradients["online"].keys()
        difference, size = (
            torch.cat([part.flatten().double() for part in parts]).norm().item()
            for parts in (
                [gradients["cache"][n] - gradients["online"][n] for n in gradients["cache"]],
                gradients["online"].values(),
            )
        )
        assert size > 0
        share = {("float32", "int8"): 1e-2, ("bfloat16", "float16"): 1e-3}.get((precision, dtype), 1e-5)
        assert difference <= share * size


@pytest.mark.parametrize("mixed", ["mixup", "cutmix"])
def test_the_attention_of_mixed_views_is_cached(
    mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partner belongs to the view: what the teacher saw when the cache was written is what the student sees."""
    monkeypatch.chdir(tmp_path)
    tiny_study.write_inputs(tmp_path)
    changes = {f"views.{mixed}": 1.0, "attention.dtype": "float32"}
    made = {
        source: tiny_study.make_parts(
            tiny_study.make_study("distill", {**changes, "attention.source": source})
        )
        for source in ("cache", "online")
    }
    for which in ("views", "validation"):
        tiny_study.script("cache").write(made["cache"], "first", which)
    records = {source: Recorded(parts) for source, parts in made.items()}
    for epoch, step in ((0, 0), (1, 2)):
        for record in records.values():
            record.task.losses(epoch, step)
        found, expected = (record.attention[-1] for record in records.values())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        rows = records["cache"].task.rows(epoch, step)
        partners = made["cache"].labelled.partners(epoch % 2)
        assert partners is not None
        assert set(partners[rows]) == set(rows)


def test_the_map_of_a_flipped_image_is_not_the_flipped_map() -> None:
    """So a view that a cache does not hold cannot be made of one that it holds."""
    parts = tiny_study.ARCHITECTURE
    model = vit.create(
        vit.model_arguments(Architecture(**parts), image_size=8, channels=1, classes=0), seed=1
    ).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.normal_(std=0.5)
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = []
    for shown in (image, image.flip(-1)):
        with torch.no_grad(), read(model, (0,)) as found:
            model(shown)
        maps.append(found[0].map())
    mirrored = [0, 2, 1, 4, 3]  # the class token, then 2 x 2 patches
    assert (maps[1] - maps[0][..., mirrored, :][..., mirrored]).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", TRANSFER)
def test_cached_and_online_training_go_the_same_way(method: str, cached: tuple[str, str, str]) -> None:
    first, second = trained(method, "cache"), trained(method, "online")
    assert len(first.losses) == len(second.losses) == STEPS
    for step, (a, b) in enumerate(zip(first.losses, second.losses, strict=True)):
        assert a == pytest.approx(b, rel=1e-4), f"step {step}"
    assert first.losses[0]["total"] != pytest.approx(first.losses[-1]["total"], rel=1e-2)  # it does train


@pytest.mark.slow
def test_all_methods_and_sources_see_the_same_batches(cached: tuple[str, str, str]) -> None:
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


@pytest.mark.parametrize("source", ["cache", "online"])
def test_the_next_step_is_read_beside_the_present_one(
    source: str, cached: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its views, and its attention where that is cached; a teacher that runs does so in the step."""
    threads: dict[str, list[bool]] = {"render": [], "teacher": []}
    here = threading.current_thread()

    def watch(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def watched(*arguments: Any) -> Any:
            threads[name].append(threading.current_thread() is here)
            return original(*arguments)

        monkeypatch.setattr(owner, method, watched)

    watch(LabelledViews, "render", "render")
    watch(CachedTeacher if source == "cache" else OnlineTeacher, "__call__", "teacher")
    recorded, running = Recorded(make_parts("distill", source, *cached)), set(threading.enumerate())
    with recorded.task:
        for step in range(3):
            recorded.task.losses(0, step)
    assert set(threading.enumerate()) <= running  # those of earlier tests may end meanwhile
    assert len(threads["render"]) in (3, 4)  # the fourth may have been under way
    assert not any(threads["render"])
    assert set(threads["teacher"]) == {source == "online"}
    assert [rows.tolist() for rows, _, _ in recorded.batches[:3]] == [
        recorded.task.rows(0, step).tolist() for step in range(3)
    ]


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
def test_the_cached_attention_of_clean_images_is_the_teachers(cached: tuple[str, str, str]) -> None:
    parts, online = (make_parts("copy", source, *cached) for source in ("cache", "online"))
    images, examples = parts.evaluated("validation")
    rows = np.array([4, 0, 7])
    pixels = parts.clean(images.images)(rows)
    needs = Needs("attention", (0, 1))
    sources = [teacher_source(each, "run", "validation", needs) for each in (parts, online)]
    with torch.autocast("cpu", torch.bfloat16, enabled=cached[0] == "bfloat16"):
        found, expected = (source(pixels, examples[rows], views.CLEAN) for source in sources if source)
    step = stacked(expected).abs().max().item() / 127 if cached[1] == "int8" else 1e-6
    torch.testing.assert_close(stacked(found), stacked(expected), rtol=2.0**-10, atol=1.01 * step)
