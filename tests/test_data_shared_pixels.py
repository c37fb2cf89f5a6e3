"""Memory that is lent to one batch after another: who has it, and who is told of it; no pixel depends on that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_transfer.data import decoding, shared_pixels, workers
from attention_transfer.data.image_files import Shape
from attention_transfer.data.shared_pixels import SharedPixels, UnknownBlockError

SHAPE = Shape(channels=3, resize=8, size=8)


@pytest.fixture(autouse=True)
def nothing_lent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(workers.WORKERS, "2")
    shared_pixels._free.clear()
    yield
    shared_pixels._free.clear()


@pytest.fixture
def nothing_mapped() -> Iterator[None]:
    """As in a worker that has just begun."""
    shared_pixels._mapped.clear()
    yield
    shared_pixels._mapped.clear()


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(count).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))


def rendered(given: list[np.ndarray]) -> Tensor:
    return workers.render(given, SHAPE, None, np.arange(len(given)), 0)


def expected(given: list[np.ndarray]) -> Tensor:
    found = np.empty((len(given), 3, 8, 8), np.uint8)
    decoding.render(given, SHAPE, None, np.arange(len(given)), 0, pixels=found)
    return torch.from_numpy(found)


def test_batches_of_any_size_have_their_own_pixels() -> None:
    for count in (32, 5, 64, 1, 33, 64, 64, 128, 7):
        given = pictures(count)
        assert torch.equal(rendered(given), expected(given))


def test_a_block_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, bool]] = []

    def told(pixels: SharedPixels, own: Callable[..., SharedPixels] = SharedPixels.to_send) -> SharedPixels:
        sent.append((pixels.number, (found := own(pixels)).block is not None))
        return found

    monkeypatch.setattr(SharedPixels, "to_send", told)
    for _ in range(3):
        rendered(pictures(8))
    assert len({number for number, _ in sent}) == 1
    shares = len(sent) // 3
    assert [whole for _, whole in sent] == [True] * shares + [False] * 2 * shares


def test_a_worker_that_lacks_a_block_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was at something else while the others got it, or has had too many others since."""
    lend = shared_pixels.lend
    monkeypatch.setattr(shared_pixels, "lend", lambda shape: replace(lend(shape), lent=1))
    given = pictures(40)
    assert torch.equal(rendered(given), expected(given))


def test_blocks_are_lent_again_where_they_are_long_enough() -> None:
    first = shared_pixels.lend((4, 3, 8, 8))
    other = shared_pixels.lend((4, 3, 8, 8))
    assert first.number != other.number
    first.give_back()
    longer = shared_pixels.lend((5, 3, 8, 8))
    assert longer.number not in (first.number, other.number)
    again = shared_pixels.lend((2, 3, 8, 8))
    assert (again.number, again.lent, again.shape) == (first.number, 1, (2, 3, 8, 8))
    assert again.rows(slice(0, 2)).data_ptr() == first.rows(slice(0, 4)).data_ptr()


def test_a_worker_keeps_the_last_blocks(nothing_mapped: None) -> None:
    blocks = [shared_pixels.lend((1, 1, 2, 2)) for _ in range(shared_pixels.KEPT + 1)]
    for block in blocks:
        block.keep_mapped()
    with pytest.raises(UnknownBlockError):
        replace(blocks[0], block=None).rows(slice(0, 1))
    for block in blocks[1:]:
        told = replace(block, block=None)
        told.keep_mapped()
        assert told.rows(slice(0, 1)).data_ptr() == block.rows(slice(0, 1)).data_ptr()
