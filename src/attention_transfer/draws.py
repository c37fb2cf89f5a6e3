"""Random numbers of the examples in a pass: those that they would get if all of the step were in one pass.

So a step has the same numbers on one process or many, in one pass or several, as long as each pass begins with the
same seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

# Of the process, not of a thread: on a GPU, activation checkpointing draws again in autograd's own thread.
_drawn_for: tuple[int, slice] | None = None


@contextlib.contextmanager
def for_part(batch: int, part: slice) -> Iterator[None]:
    """In the `with` block, forward and backward pass of a part of a batch of so many examples."""
    global _drawn_for  # noqa: PLW0603
    _drawn_for = (batch, part)
    try:
        yield
    finally:
        _drawn_for = None


def of_examples(count: int, draw: Callable[[int], Tensor]) -> Tensor:
    """The rows that `draw`, from a number of examples to as many rows of random numbers, has for those in this pass.

    Args:
        count: examples in this pass.
    """
    if _drawn_for is None:
        return draw(count)
    batch, part = _drawn_for
    if count != part.stop - part.start:
        raise ValueError(f"random numbers for {count} examples, but the pass has {part.stop - part.start}")
    return draw(batch)[part]
