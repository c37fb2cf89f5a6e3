"""The training loop: schedule, average and resume against closed forms and uninterrupted runs; faults injected."""

from __future__ import annotations

import functools
import math
import os
import shutil
import signal
import subprocess
import unittest.mock
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from attention_transfer.errors import StudyError
from attention_transfer.models.attention import slim
from attention_transfer.training import loop
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.loop import fit
from attention_transfer.training.optimisation import optimiser, schedule


@dataclass(frozen=True)
class Recipe:
    learning_rate: float = 0.02
    min_learning_rate: float = 1e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    layer_decay: float = 1.0
    epochs: int = 3
    warmup_epochs: float = 1.0
    ema: float | None = None


class Noisy(nn.Module):
    """Two layers with dropout, so that training draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class Task:
    """A regression whose batches are a function of (epoch, step); keeps what the loop asked for."""

    def __init__(self, steps_per_epoch: int = 4, *, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model: nn.Module = Noisy()
        self.steps_per_epoch = steps_per_epoch
        self.asked: list[tuple[int, int]] = []
        self.weights: list[dict[str, Tensor]] = []  # before each step
        self.validated: list[nn.Module] = []

    def train(self) -> None:
        self.model.train()

    def losses(self, epoch: int, step: int) -> dict[str, Tensor]:
        self.asked.append((epoch, step))
        self.weights.append({k: v.clone() for k, v in self.model.state_dict().items()})
        self.interrupt(epoch * self.steps_per_epoch + step)
        generator = torch.Generator().manual_seed(100 * epoch + step)
        inputs = torch.randn(16, 6, generator=generator)
        error = (self.model(inputs) - inputs[:, :2].sin()).square().mean()
        return {"total": error * self.factor(epoch), "task_loss": error}

    def interrupt(self, number: int) -> None:
        """Before the step of this number, counted over all epochs."""

    def factor(self, epoch: int) -> float:
        return 1.0

    def validate(self, model: nn.Module) -> dict[str, float]:
        self.validated.append(model)
        model.eval()
        return {"validation_accuracy": model(torch.ones(1, 6)).sum().item()}


class Sink:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(metrics)))


def run(task: Task, folder: Path, recipe: Recipe | None = None, **options: Any) -> tuple[Any, Any, Sink]:
    sink = Sink()
    chosen: dict[str, Any] = {"seed": 3, "clip_norm": None, "validate_every": 1, **options}
    model, history = fit(
        task,
        recipe or Recipe(),
        checkpoint=Checkpoint(folder),
        sink=sink,
        label="train-distill-3",
        where="params.yaml: runs.distill",
        **chosen,
    )
    return model, history, sink


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Task):
    """Sends SIGTERM to this process, or raises, before one step."""

    def __init__(self, at: int, how: str, **options: Any) -> None:
        super().__init__(**options)
        self.at, self.how = at, how

    def interrupt(self, number: int) -> None:
        if number == self.at:
            if self.how == "raise":
                raise ConnectionError
            os.kill(os.getpid(), getattr(signal, self.how))


# Resume


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Any]:
    """Runs a recipe to its end, once."""
    return functools.cache(lambda recipe: run(Task(), tmp_path_factory.mktemp("whole"), recipe))


@pytest.mark.parametrize("ema", [None, 0.8], ids=["plain", "ema"])
@pytest.mark.parametrize("how", ["SIGTERM", "raise"])
@pytest.mark.parametrize("at", [1, 3, 4, 6, 11], ids=lambda step: f"step{step}")
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    at: int,
    how: str,
    ema: float | None,
    tmp_path: Path,
    uninterrupted: Callable[[Recipe], Any],
) -> None:
    recipe = Recipe(ema=ema)
    expected, whole, sink = uninterrupted(recipe)
    error, seconds = (ConnectionError, 0.0) if how == "raise" else (SystemExit, 1e9)
    with (
        unittest.mock.patch.object(loop, "SECONDS_BETWEEN_CHECKPOINTS", seconds),
        pytest.raises(error) as caught,
    ):
        run(Killed(at, how), tmp_path / "killed", recipe)
    if how != "raise":
        assert caught.value.args == (128 + getattr(signal, how),)
    resumed = Task(seed=99)  # other weights, which the checkpoint replaces
    torch.manual_seed(1234)
    model, history, rest = run(resumed, tmp_path / "killed", recipe)
    done = at if how == "raise" else at + 1
    assert resumed.asked == [divmod(step, 4) for step in range(done, 12)]
    assert same(model, expected)
    assert history == whole
    assert rest.rows == sink.rows[done // 4 :]  # nothing is logged twice


def test_a_run_stopped_often_and_at_its_last_step_still_equals_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[Recipe], Any]
) -> None:
    expected, whole, _ = uninterrupted(Recipe(ema=0.8))
    for at, how in ((2, "SIGTERM"), (3, "SIGINT"), (9, "SIGINT"), (11, "SIGTERM")):
        with pytest.raises(SystemExit) as caught:
            run(Killed(at, how), tmp_path / "killed", Recipe(ema=0.8))
        assert caught.value.code == 128 + getattr(signal, how)
    finished = Task()
    model, history, _ = run(finished, tmp_path / "killed", Recipe(ema=0.8))
    assert finished.asked == []
    assert same(model, expected)
    assert history == whole


@pytest.mark.parametrize("how", ["SIGTERM", "raise"])
def test_signal_handlers_are_those_of_before(how: str, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises((SystemExit, ConnectionError)):
        run(Killed(1, how), tmp_path)
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_run_without_interruption_writes_no_checkpoint_before_its_time(tmp_path: Path) -> None:
    run(Task(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_in_the_folder_of_another_fingerprint_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(Killed(5, "SIGTERM"), tmp_path / "fingerprint-a")
    task = Task()
    run(task, tmp_path / "fingerprint-b")
    assert task.asked[0] == (0, 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[:2000] + bytes([content[2000] ^ 16]) + content[2001:],
        lambda content: content + b"\0",
    ],
    ids=["one_byte_less", "half", "no_checksum", "empty", "checksum_bit", "content_bit", "one_byte_more"],
)
def test_a_damaged_checkpoint_is_refused_with_its_path(damage: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(Killed(5, "SIGTERM"), tmp_path)
    path = Checkpoint(tmp_path).path
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StudyError, match="is damaged") as caught:
        run(Task(), tmp_path)
    assert caught.value.where == str(path)
    assert "delete this file" in caught.value.remedy


@pytest.mark.parametrize(
    ("fault", "reason"), [("full", "No space left"), ("read-only", "Read-only file system")]
)
def test_where_no_checkpoint_can_be_written_the_last_one_is_kept(
    fault: str, reason: str, tmpfs: Path, uninterrupted: Callable[[Recipe], Any]
) -> None:
    with pytest.raises(SystemExit):
        run(Killed(5, "SIGTERM"), tmpfs / "state")
    if fault == "full":
        (tmpfs / "other").write_bytes(bytes(shutil.disk_usage(tmpfs).free))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    with pytest.raises(StudyError, match=f"cannot be written: {reason}") as caught:
        run(Killed(8, "SIGTERM"), tmpfs / "state")
    assert caught.value.where == str(tmpfs / "state" / "state.pt")
    assert [path.name for path in (tmpfs / "state").iterdir()] == ["state.pt"]
    if fault == "full":
        (tmpfs / "other").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(tmpfs)], check=True)
    task = Task()
    model, history, _ = run(task, tmpfs / "state")
    assert task.asked[0] == divmod(6, 4)
    expected, whole, _ = uninterrupted(Recipe())
    assert same(model, expected)
    assert history == whole


def test_a_checkpoint_that_is_removed_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(Killed(5, "SIGTERM"), tmp_path)
    Checkpoint(tmp_path).remove()
    task = Task()
    run(task, tmp_path)
    assert task.asked[0] == (0, 0)


# Schedule and parameter groups


@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 2.5, 9.99])
@pytest.mark.parametrize("minimum", [0.0, 0.003])
def test_learning_rate_is_a_linear_warm_up_and_half_a_cosine(warmup_epochs: float, minimum: float) -> None:
    recipe = Recipe(epochs=10, warmup_epochs=warmup_epochs, min_learning_rate=minimum)
    optimizer = optimiser(Noisy(), recipe)
    scheduler = schedule(optimizer, recipe, 6)
    total, warmup = 60, min(round(warmup_epochs * 6), 59)
    for step in range(total):
        scheduler.step_update(step)
        if step < warmup:
            expected = recipe.learning_rate * step / warmup
        else:
            cosine = math.cos(math.pi * (step - warmup) / (total - warmup))
            expected = minimum + 0.5 * (recipe.learning_rate - minimum) * (1 + cosine)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [expected] * len(optimizer.param_groups)
        ), step


def test_the_curve_tells_the_learning_rate_of_each_epochs_last_step(tmp_path: Path) -> None:
    _, history, _ = run(Task(), tmp_path, Recipe(min_learning_rate=0.001))
    rates = [row["learning_rate"] for row in history.rows]
    cosine = [0.001 + 0.5 * 0.019 * (1 + math.cos(math.pi * step / 8)) for step in (3, 7)]
    assert rates == pytest.approx([0.02 * 3 / 4, *cosine])


def tiny_vit(copied: tuple[int, ...] = ()) -> VisionTransformer:
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2, num_classes=3,
        global_pool="avg", fc_norm=True,
    )  # fmt: skip
    slim(model, copied)
    return model


@pytest.mark.parametrize("copied", [(), (0, 1, 2)], ids=["ordinary", "copy"])
def test_layer_decay_scales_rates_and_only_matrices_decay(copied: tuple[int, ...]) -> None:
    model = tiny_vit(copied)
    recipe = Recipe(layer_decay=0.5)
    optimizer = optimiser(model, recipe)
    scheduler = schedule(optimizer, recipe, 4)
    scheduler.step_update(4)  # the peak
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = {
        names[id(weight)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    assert found.keys() == set(names.values())
    for name, (rate, decay) in found.items():
        # Embeddings lie at depth 0, block b at b + 1, what follows the last block above it.
        depth = 0 if name.split(".")[0] in {"patch_embed", "pos_embed", "cls_token"} else 4
        if name.startswith("blocks."):
            depth = int(name.split(".")[1]) + 1
        assert rate == pytest.approx(0.02 * 0.5 ** (4 - depth)), name
        weight = model.get_parameter(name)
        assert decay == (0.05 if weight.ndim == 2 or name == "patch_embed.proj.weight" else 0.0), name


def test_without_layer_decay_all_rates_are_equal_and_frozen_weights_stay_out() -> None:
    model = tiny_vit()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    optimizer = optimiser(model, Recipe())
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert {id(weight) for weight in held} == {id(weight) for weight in model.head.parameters()}
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}


def test_betas_and_weight_decay_are_adamws_own(tmp_path: Path) -> None:
    """One parameter, by hand: AdamW of Loshchilov & Hutter with decoupled decay."""

    class Slope(Task):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(1, 1, bias=False)
            self.slope = nn.init.constant_(self.model.weight, 1.5)

        def losses(self, epoch: int, step: int) -> dict[str, Tensor]:
            return {"total": (step + 1) * self.slope.square().sum()}

        def validate(self, model: nn.Module) -> dict[str, float]:
            return {}

    recipe = Recipe(betas=(0.8, 0.95), weight_decay=0.3, epochs=2)
    model, _, _ = run(Slope(), tmp_path, recipe)
    weight, first, second = 1.5, 0.0, 0.0
    for step in range(8):
        rate = 0.02 * step / 4 if step < 4 else 1e-4 + 0.5 * 0.0199 * (1 + math.cos(math.pi * (step - 4) / 4))
        gradient = 2 * (step % 4 + 1) * weight
        weight *= 1 - rate * 0.3
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        weight -= (
            rate * (first / (1 - 0.8 ** (step + 1))) / (math.sqrt(second / (1 - 0.95 ** (step + 1))) + 1e-8)
        )
    assert model.weight.item() == pytest.approx(weight, rel=1e-5)


# What the loop does beside a step


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_average_is_the_exponential_moving_average_of_the_weights(decay: float, tmp_path: Path) -> None:
    task = Task()
    model, _, _ = run(task, tmp_path, Recipe(ema=decay))
    weights = [*task.weights[1:], task.model.state_dict()]  # after each step
    for name, found in model.state_dict().items():
        # The first two steps are taken as they are, so that random initial weights do not linger.
        expected = weights[1][name].double()
        for later in weights[2:]:
            expected = decay * expected + (1 - decay) * later[name].double()
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    assert model is not task.model
    assert all(validated is model for validated in task.validated)


def test_without_an_average_the_trained_model_counts_in_eval_mode(tmp_path: Path) -> None:
    task = Task()
    model, _, _ = run(task, tmp_path)
    assert model is task.model
    assert not model.training
    assert task.validated == [model] * 3


@pytest.mark.parametrize(
    ("every", "validated"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (9, [5])], ids=str
)
def test_validate_every_so_many_epochs_and_at_the_end(
    every: int, validated: list[int], tmp_path: Path
) -> None:
    task = Task(steps_per_epoch=2)
    _, history, sink = run(task, tmp_path, Recipe(epochs=5), validate_every=every)
    assert [int(row["epoch"]) for row in history.rows] == [1, 2, 3, 4, 5]
    assert [int(row["step"]) for row in history.rows] == [2, 4, 6, 8, 10]
    assert [int(row["epoch"]) for row in history.rows if "validation_accuracy" in row] == validated
    assert len(task.validated) == len(validated)
    assert [step for step, _ in sink.rows] == [1, 2, 3, 4, 5]
    for (_, logged), row in zip(sink.rows, history.rows, strict=True):
        assert logged == {key: value for key, value in row.items() if key not in ("epoch", "step")}


def test_validation_does_not_change_training(tmp_path: Path) -> None:
    often, _, _ = run(Task(), tmp_path, validate_every=1)
    once, _, _ = run(Task(), tmp_path, validate_every=3)
    assert same(often, once)


def test_the_curve_holds_the_mean_loss_of_each_epoch(tmp_path: Path) -> None:
    class Counting(Task):
        def losses(self, epoch: int, step: int) -> dict[str, Tensor]:
            losses = super().losses(epoch, step)
            return {**losses, "attention_loss": torch.tensor(10.0 * epoch + step)}

    _, history, _ = run(Counting(), tmp_path)
    assert [row["attention_loss"] for row in history.rows] == [1.5, 11.5, 21.5]


@pytest.mark.parametrize("seed", [3, 4])
def test_the_seed_decides_what_the_model_draws(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, _, _ = run(Task(), tmp_path, seed=seed)
    torch.manual_seed(1)
    again, _, _ = run(Task(), tmp_path, seed=seed)
    other, _, _ = run(Task(), tmp_path, seed=seed + 1)
    assert same(first, again)
    assert not same(first, other)


def test_clip_norm_bounds_the_gradient_and_leaves_small_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(Task(), tmp_path, clip_norm=None)
    free = list(norms)
    assert len(free) == 12
    limit = sorted(free)[4]  # some gradients are longer, some are not
    norms.clear()
    run(Task(), tmp_path, clip_norm=limit)
    assert max(norms) == pytest.approx(limit, rel=1e-4)
    assert min(norms) < 0.999 * limit
    norms.clear()
    run(Task(), tmp_path, clip_norm=1e6)
    assert norms == free


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_loss_that_is_no_number_names_run_epoch_and_learning_rate(value: float, tmp_path: Path) -> None:
    class Diverging(Task):
        def factor(self, epoch: int) -> float:
            return value if epoch == 1 else 1.0

    task = Diverging()
    with pytest.raises(
        StudyError, match=r"the loss of train-distill-3 became (nan|inf) in epoch 2"
    ) as caught:
        run(task, tmp_path)
    assert caught.value.where == "params.yaml: runs.distill"
    assert "learning_rate (now 0.02)" in caught.value.remedy
    assert task.asked[-1] == (1, 3)  # not an epoch later


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="larger than its data set"):
        run(Task(steps_per_epoch=0), tmp_path)
