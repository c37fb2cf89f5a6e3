"""The data of the next step, read while the present one trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class Prefetch(Generic[Request, Result]):
    """Calls `read` in one background thread.

        with Prefetch(read) as prefetch:
            ...
            batch = prefetch.take((epoch, step))
            prefetch.ask(next_step)  # before the step's work

    What is taken is `read(request)` whether it was asked for or not: asking changes when it is read,
    never what. At most one result is kept.

    Args:
        read: a function of its request alone. No other thread calls it, so it may keep state; but
            PyTorch's and NumPy's global random generators belong to every thread, and it must not use them.
            Settings that belong to a thread (autocast, gradient mode) are this thread's own.
    """

    def __init__(self, read: Callable[[Request], Result]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._asked: tuple[Request, Future[Result]] | None = None

    def ask(self, request: Request) -> None:
        """Starts to read; what was asked before and not taken is dropped."""
        if self._asked is not None:
            self._asked[1].cancel()
        self._asked = request, self._thread.submit(self._read, request)

    def take(self, request: Request) -> Result:
        """The result, as soon as it is there; an error of `read` is raised here."""
        asked, self._asked = self._asked, None
        if asked is not None and asked[0] == request:
            return asked[1].result()
        if asked is not None:
            asked[1].cancel()
        return self._thread.submit(self._read, request).result()

    def close(self) -> None:
        """Waits for the read that is under way, and ends the thread; a result or error not taken is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._asked = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
