"""Reading ahead: the same results in whatever order they are asked for, and errors where they are taken."""

from __future__ import annotations

import threading
import time
import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_transfer.training.prefetch import Prefetch

WAIT = 30.0  # seconds, for an event that comes at once unless the test fails


def square(request: int) -> int:
    return request**2


@settings(deadline=None, max_examples=50)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=20))
def test_what_is_taken_does_not_depend_on_what_was_asked(steps: list[tuple[bool, int]]) -> None:
    with Prefetch(square) as prefetch:
        for asks, request in steps:
            if asks:
                prefetch.ask(request)
            else:
                assert prefetch.take(request) == request**2


def test_it_is_read_before_it_is_taken_and_once() -> None:
    started, reads = threading.Event(), []

    def read(request: tuple[int, int]) -> tuple[int, int]:
        reads.append((request, threading.current_thread()))
        started.set()
        return request

    with Prefetch(read) as prefetch:
        prefetch.ask((0, 1))
        assert started.wait(WAIT)
        assert prefetch.take((0, 1)) == (0, 1)
        assert prefetch.take((0, 2)) == (0, 2)
    assert [request for request, _ in reads] == [(0, 1), (0, 2)]
    # One thread reads, and it is never the caller's.
    assert len({thread for _, thread in reads} - {threading.current_thread()}) == 1


def test_the_caller_goes_on_while_it_is_read() -> None:
    go = threading.Event()

    def read(request: int) -> int:
        assert go.wait(WAIT)
        return request

    with Prefetch(read) as prefetch:
        prefetch.ask(5)
        go.set()  # reached only if `ask` has returned
        assert prefetch.take(5) == 5


def test_an_error_comes_up_where_it_is_taken_and_the_next_request_is_read() -> None:
    def read(request: int) -> int:
        if request == 3:
            raise KeyError("row 3")
        return request

    with Prefetch(read) as prefetch:
        prefetch.ask(3)
        with pytest.raises(KeyError, match="row 3") as error:
            prefetch.take(3)
        assert "in read" in "".join(traceback.format_exception(error.value))
        assert prefetch.take(4) == 4


def test_closing_waits_for_the_read_under_way_and_drops_the_one_behind_it() -> None:
    started, go, read_requests = threading.Event(), threading.Event(), []

    def read(request: int) -> None:
        read_requests.append(request)
        started.set()
        assert go.wait(WAIT)

    with Prefetch(read) as prefetch:
        prefetch.ask(1)
        assert started.wait(WAIT)
        prefetch.ask(2)  # queued behind 1
        prefetch.ask(3)  # in place of 2
        waiting = prefetch._asked[1]  # type: ignore[index]

        def let_go() -> None:
            while not waiting.cancelled():
                time.sleep(0.01)
            go.set()

        helper = threading.Thread(target=let_go)
        helper.start()
    helper.join(WAIT)
    assert read_requests == [1]
    with pytest.raises(RuntimeError):
        prefetch.take(1)


def test_an_error_of_the_caller_closes_it() -> None:
    before = threading.active_count()

    def train() -> None:
        with Prefetch(square) as prefetch:
            prefetch.ask(1)
            raise ValueError("training failed")

    with pytest.raises(ValueError, match="training"):
        train()
    assert threading.active_count() == before
