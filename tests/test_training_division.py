"""Examples shared out among processes and passes: each once, in order, as equally as can be, pairs together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attention_transfer import draws
from attention_transfer.errors import StudyError
from attention_transfer.processes import share_of
from attention_transfer.training.division import UNDIVIDED, divide


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 2, 3, 1000])
@pytest.mark.parametrize("among", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [10, 12, 26])
def test_every_example_is_in_one_pass(batch: int, among: int, micro_batch: int | None, pairs: bool) -> None:
    divisions = [
        divide(batch, process=number, among=among, micro_batch=micro_batch, pairs=pairs, where="")
        for number in range(among)
    ]
    if among == 1 and micro_batch in (None, 1000):
        assert divisions == [UNDIVIDED]
        assert UNDIVIDED.is_whole
        return
    seen = [np.arange(batch)[part] for division in divisions for part in division.passes]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(batch))
    assert sum(division.share(part) for division in divisions for part in division.passes) == pytest.approx(1)
    sizes = [sum(len(np.arange(batch)[part]) for part in division.passes) for division in divisions]
    unit = 2 if pairs else 1
    assert max(sizes) - min(sizes) <= unit
    assert max(map(len, seen)) <= (micro_batch or batch)
    if pairs:
        assert all(len(rows) % 2 == 0 and rows[0] % 2 == 0 for rows in seen)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("batch", [10, 12, 14, 26])
def test_in_step_all_processes_have_as_many_passes(batch: int, pairs: bool) -> None:
    options: dict[str, Any] = {"micro_batch": 4, "pairs": pairs, "in_step": True, "where": ""}
    divisions = [divide(batch, process=number, among=3, **options) for number in range(3)]
    assert len({len(division.passes) for division in divisions}) == 1
    seen = [np.arange(batch)[part] for division in divisions for part in division.passes]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(batch))
    assert 0 < min(map(len, seen)) <= max(map(len, seen)) <= 4


@pytest.mark.parametrize("process", [0, 1])
def test_an_empty_pass_is_refused(process: int) -> None:
    with pytest.raises(StudyError, match="5 images are no whole number for each of 2") as caught:
        divide(5, process=process, among=2, micro_batch=1, pairs=False, in_step=True, where="")
    assert "set micro_batch to 2 or more" in caught.value.remedy


def test_too_few_examples_for_the_processes_are_refused() -> None:
    with pytest.raises(StudyError, match="a step has 3 images, too few for 4 processes") as caught:
        divide(3, process=0, among=4, micro_batch=None, pairs=False, where="params.yaml: runs.a.batch_size")
    assert caught.value.where == "params.yaml: runs.a.batch_size"
    with pytest.raises(StudyError, match="a step has 3 pairs of mixed images, too few for 4"):
        divide(6, process=0, among=4, micro_batch=None, pairs=True, where="")
    with pytest.raises(StudyError, match="micro_batch 1 holds no pair"):
        divide(6, process=0, among=1, micro_batch=1, pairs=True, where="")


@pytest.mark.parametrize("items", [0, 1, 7, 8, 100])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_a_share_is_a_stretch(items: int, processes: int) -> None:
    parts = [np.arange(items)[share_of(items, number, processes)] for number in range(processes)]
    expected = np.array_split(np.arange(items), processes)
    assert [part.tolist() for part in parts] == [part.tolist() for part in expected]


def test_random_numbers_belong_to_the_examples_of_the_whole_step() -> None:
    import torch

    def draw(count: int) -> torch.Tensor:
        torch.manual_seed(3)
        return torch.rand(count, 2)

    whole = draws.of_examples(7, draw)
    for part in (slice(0, 3), slice(3, 7)):
        with draws.for_part(7, part):
            assert torch.equal(draws.of_examples(part.stop - part.start, draw), whole[part])
            with pytest.raises(ValueError, match="for 5 examples, but the pass has"):
                draws.of_examples(5, draw)
    assert torch.equal(draws.of_examples(7, draw), whole)
