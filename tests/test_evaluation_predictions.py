"""Predictions on disk: what is written comes back, and damage does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attention_transfer.errors import StudyError
from attention_transfer.evaluation import predictions
from attention_transfer.evaluation.predictions import Predictions, load, matches, predict_all, save


def make(count: int = 7, classes: int = 3) -> Predictions:
    generator = torch.Generator().manual_seed(count)
    return Predictions(
        logits=torch.randn(count, classes, generator=generator),
        labels=torch.randint(classes, (count,), generator=generator),
        examples=torch.randperm(1000, generator=generator)[:count],
    )


@pytest.mark.parametrize(("count", "classes"), [(1, 2), (7, 3), (501, 10)], ids=str)
def test_what_is_saved_comes_back(count: int, classes: int, tmp_path: Path) -> None:
    made = make(count, classes)
    save(tmp_path / "a" / "test.safetensors", made, "print")
    loaded = load(tmp_path / "a" / "test.safetensors", made_by="predict@x-0")
    assert loaded.groups is None
    for name in ("logits", "labels", "examples"):
        assert torch.equal(getattr(loaded, name), getattr(made, name)), name
        assert getattr(loaded, name).dtype == getattr(made, name).dtype
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["test.safetensors"]


def test_tensors_that_are_views_of_others_are_saved_whole(tmp_path: Path) -> None:
    logits = torch.randn(3, 7)
    made = Predictions(logits.T, torch.arange(14)[::2], torch.arange(7))
    save(tmp_path / "p", made, "print")
    loaded = load(tmp_path / "p", made_by="predict")
    assert torch.equal(loaded.logits, logits.T)
    assert torch.equal(loaded.labels, torch.arange(0, 14, 2))


def test_equal_predictions_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, make(), "print")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_correct_is_where_the_largest_logit_is_the_labels() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 2.0], [0.0, 0.1, 0.2]])
    found = Predictions(logits, torch.tensor([1, 2, 2]), torch.arange(3)).correct
    assert found.tolist() == [True, False, True]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """One bit of each byte of the file, header and all, in turn."""
    path, made = tmp_path / "test.safetensors", make(2, 2)
    save(path, made, "print")
    content = path.read_bytes()
    accepted = []
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(flipped))
        assert not matches(path, "print") or _loads_as(path, made), f"byte {place}"
        try:
            load(path, made_by="predict")
        except StudyError:
            continue
        accepted.append(place)
        assert _loads_as(path, made), f"byte {place}"
    # What is accepted has the same content: flips in the fingerprint, in names of metadata nobody reads.
    assert len(accepted) < 0.15 * len(content)


def _loads_as(path: Path, made: Predictions) -> bool:
    loaded = vars(load(path, made_by="predict"))
    return all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
        for name, value in vars(made).items()
    )


@pytest.mark.parametrize(
    "kept", [0, 4, 100, -8, -1], ids=lambda n: f"first_{n}" if n >= 0 else f"without_{-n}"
)
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "test.safetensors"
    save(path, make(), "print")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StudyError, match=r"test\.safetensors: is damaged") as caught:
        load(path, made_by="predict@x-0")
    assert "python -m attention_transfer remake predict@x-0" in caught.value.remedy
    assert not matches(path, "print")


def test_a_missing_file_is_named_with_its_stage(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="does not exist") as caught:
        load(tmp_path / "test.safetensors", made_by="predict@x-0")
    assert caught.value.remedy.endswith(": dvc repro predict@x-0")


def test_only_a_whole_file_of_the_same_fingerprint_matches(tmp_path: Path) -> None:
    path = tmp_path / "test.safetensors"
    assert not matches(path, "print")
    save(path, make(), "print")
    assert matches(path, "print")
    assert not matches(path, "other")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not matches(path, "print")


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(StudyError, match="is damaged"):
        load(tmp_path / "w.safetensors", made_by="predict")
    assert not matches(tmp_path / "w.safetensors", "print")


@pytest.mark.parametrize("batch", [1, 4, 500])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 13])
def test_every_example_is_predicted_once_in_order(
    count: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "BATCH", batch)
    asked: list[int] = []
    begun: list[int] = []

    def predict(rows: np.ndarray) -> torch.Tensor:
        asked.extend(rows.tolist())
        assert begun == list(range(min(count, len(asked) + batch))), "this batch and the next, no more"
        assert torch.is_inference_mode_enabled()
        return torch.from_numpy(np.stack([rows, rows**2], axis=1)).bfloat16()

    found = predict_all(predict, count, lambda rows: begun.extend(rows.tolist()))
    assert asked == begun == list(range(count))
    assert found.dtype == torch.float32
    assert found.tolist() == [[row, row**2] for row in range(count)]
