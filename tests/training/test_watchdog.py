"""The watchdog on real threads that stand still, with a clock of the test's own."""

import importlib
import inspect
import threading
from collections.abc import Iterator

import pytest

from rayalign.data.stream import ahead
from rayalign.training.watchdog import LEAST_SECONDS, TIMES_LONGEST, WAITS, Watchdog
from tests.watching import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_worker_that_waits_for_data_is_named_once_with_its_stack(clock: Clock, said: list[str]) -> None:
    release, made = threading.Event(), threading.Event()
    idle: list[float] = []

    def batches() -> Iterator[int]:
        release.wait()
        yield 1

    def work() -> None:
        dogs.append(Watchdog(3, said.append, idle=idle.append, clock=clock))
        made.set()
        assert list(dogs[0].watched(ahead(batches(), depth=1))) == [1]

    dogs: list[Watchdog] = []
    thread = threading.Thread(target=work)
    thread.start()
    made.wait()
    while not threading_stands_in("taken", thread):
        pass
    clock.now = LEAST_SECONDS - 1
    dogs[0].look()
    assert said == []
    for clock.now in (LEAST_SECONDS, 2 * LEAST_SECONDS):
        dogs[0].look()
    release.set()
    thread.join()
    assert len(said) == 1
    first, *stack = said[0].splitlines()
    assert (
        first == "Rank 3 has not moved for 10 min: it waits for the next batch of data. The run goes on waiting. Where it is:"
    )
    assert any("in taken" in line for line in stack)
    assert idle == [LEAST_SECONDS - 1, LEAST_SECONDS, 2 * LEAST_SECONDS]


def threading_stands_in(function: str, thread: threading.Thread) -> bool:
    import sys

    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


def test_it_ends_with_the_thread_that_it_watches(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr("rayalign.training.watchdog.LOOK_SECONDS", 0.01)

    def work() -> None:
        Watchdog(0, said.append).start()

    before = threading.enumerate()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for other in threading.enumerate():
        if other not in before:
            other.join(5)
    assert not [other.name for other in threading.enumerate() if other not in before]


def test_a_run_of_long_steps_is_given_more_time(clock: Clock, said: list[str]) -> None:
    dog = Watchdog(0, said.append, clock=clock)
    clock.now = 500
    dog.tick()
    clock.now += TIMES_LONGEST * 500 - 1
    dog.look()
    assert said == []
    clock.now += 1
    dog.look()
    assert len(said) == 1


def test_the_next_standstill_is_said_again(clock: Clock, said: list[str]) -> None:
    dog = Watchdog(0, said.append, clock=clock)
    for clock.now in (LEAST_SECONDS, LEAST_SECONDS + 5):
        dog.look()
    dog.tick()
    clock.now += TIMES_LONGEST * clock.now
    dog.look()
    assert len(said) == 2


@pytest.mark.parametrize("place", WAITS, ids=".".join)
def test_what_a_worker_may_wait_for_is_still_a_function_there(place: tuple[str, str]) -> None:
    module, function = place
    assert f"def {function}(" in inspect.getsource(importlib.import_module(module))
