"""What a long stage says of itself: no rate before one can be known, and no time to go that counts the start."""

from collections.abc import Callable

import pytest

from rayalign.progress import LINE_SECONDS, Progress, StepProgress, duration, per_second
from tests.watching import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def count_at(clock: Clock) -> Callable[[Progress, float, int], str | None]:
    """`count_at(progress, seconds, count)`: the line that is said after a count at that time from the start, if any."""

    def add(progress: Progress, seconds: float, count: int) -> str | None:
        clock.now = 1000.0 + seconds
        return progress.line("records encoded") if progress.add(count) else None

    return add


Add = Callable[[Progress, float, int], str | None]


def test_the_first_line_says_how_long_it_took_and_no_rate(clock: Clock, count_at: Add) -> None:
    progress = Progress(1500, clock=clock)
    assert count_at(progress, 52, 256) == "256 of 1500 records encoded after 52 s"
    assert (progress.rate, progress.time_to_go) == (None, None)


def test_two_results_at_almost_the_same_time_give_no_rate(clock: Clock, count_at: Add) -> None:
    progress = Progress(1500, clock=clock)
    count_at(progress, 60, 256)
    assert count_at(progress, 60.003, 256) is None  # 85,000 a second it is not
    assert progress.rate is None


def test_the_start_does_not_count_into_the_rate(clock: Clock, count_at: Add) -> None:
    progress = Progress(1000, clock=clock)
    count_at(progress, 100, 100)
    # 200 in the ten seconds since the first count, so the other 700 take 35 s.
    assert count_at(progress, 110, 200) == "300 of 1000 records encoded, 20/s, 35 s to go"


def test_the_rate_is_the_mean_since_the_first_count(clock: Clock, count_at: Add) -> None:
    progress = Progress(1000, clock=clock)
    for seconds, count in ((1, 10), (11, 100), (12, 0), (21, 20)):
        count_at(progress, seconds, count)
    assert progress.rate == pytest.approx(120 / 20)
    assert progress.time_to_go == "145 s to go"


def test_lines_are_apart(clock: Clock, count_at: Add) -> None:
    progress = Progress(1000, clock=clock)
    times = [second / 4 for second in range(4, 80)]
    said = [seconds for seconds in times if count_at(progress, seconds, 1)]
    assert said == [1, 6, 11, 16]
    assert LINE_SECONDS == 5


def test_the_end_is_said_by_whoever_knows_the_result(clock: Clock, count_at: Add) -> None:
    progress = Progress(20, clock=clock)
    assert count_at(progress, 1, 10)
    assert count_at(progress, 11, 10) is None
    assert progress.time_to_go == "0 s to go"
    assert count_at(Progress(20, clock=clock), 1, 20) is None


@pytest.mark.parametrize(("rate", "words"), [(0.24, "0.2/s"), (9.44, "9.4/s"), (17.4, "17/s"), (1234.5, "1234/s")])
def test_a_rate_has_the_digits_that_matter(rate: float, words: str) -> None:
    assert per_second(rate) == words


def step(progress: StepProgress, clock: Clock, seconds: float) -> None:
    with progress.step(pairs=8):
        clock.now += seconds


def test_the_first_step_of_a_run_gives_no_rate_and_counts_into_none(clock: Clock) -> None:
    progress = StepProgress(0, 100, every={}, clock=clock)
    step(progress, clock, 60)
    assert (progress.pairs_per_second, progress.seconds_to_go, progress.words) == (None, None, "")
    for _ in range(3):
        step(progress, clock, 2)
    assert progress.pairs_per_second == 4
    assert progress.words == "4.0 pairs/s, 3 min to go"  # 96 steps of 2 s


def test_a_runs_rate_is_that_of_its_last_steps(clock: Clock) -> None:
    progress = StepProgress(0, 100, every={}, clock=clock)
    for seconds in (60, *[10] * 20, *[2] * 20):
        step(progress, clock, seconds)
    assert progress.pairs_per_second == 4
    assert progress.seconds_to_go == 59 * 2


def test_what_comes_between_the_steps_counts_into_the_time_to_go_and_not_into_the_rate(clock: Clock) -> None:
    progress = StepProgress(10, 25, every={"evaluation": 5, "saving": 10}, clock=clock)
    with progress.pause("evaluation"):
        clock.now += 30
    for _ in range(3):
        step(progress, clock, 2)
    assert progress.pairs_per_second == 4
    assert progress.seconds_to_go == 12 * 2 + 3 * 30  # evaluations at 15, 20 and 25
    with progress.pause("saving"):
        clock.now += 7
    assert progress.seconds_to_go == 12 * 2 + 3 * 30 + 2 * 7  # at 20 and at the end


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (119.4, "119 s"), (119.6, "2 min"), (7170, "2 h 0 min"), (12000, "3 h 20 min")]
)
def test_a_duration_has_the_digits_that_matter(seconds: float, words: str) -> None:
    assert duration(seconds) == words
