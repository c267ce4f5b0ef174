import contextlib
import json
from pathlib import Path

import pytest

from rayalign.report.page import Times
from rayalign.storage import Store
from rayalign.training.run_times import RUN_TIMES, Stopwatch, begin_start, end_start, note_workers, times_of, workers_before
from tests.watching import Clock


def test_a_stage_within_another_counts_for_itself_alone() -> None:
    clock = Clock(100.0)
    watch = Stopwatch({"saving": 7.0}, clock=clock)
    clock.now += 1  # of no stage
    with watch.stage("training"):
        clock.now += 10
        with watch.stage("evaluation"):
            clock.now += 3
        clock.now += 5
        assert watch.seconds == {"saving": 7, "training": 15, "evaluation": 3}  # up to now
        with contextlib.suppress(KeyError), watch.stage("saving"):
            clock.now += 2
            raise KeyError
    clock.now += 1
    assert watch.seconds == {"saving": 9, "training": 15, "evaluation": 3}


def test_starts_add_up_and_what_no_stage_accounts_for_is_the_rest() -> None:
    first = {"began": 1000.0, "seen": 1100.0, "driver": {"encoding": 30.0}, "workers": {"training": 50.0, "model_loading": 5.0}}
    second = {"began": 5000.0, "seen": 5060.0, "driver": {"encoding": 1.0}, "workers": {"training": 40.0}}
    stages = {"encoding": 31.0, "model_loading": 5.0, "training": 90.0, "other": 34.0}
    assert times_of([first, second]) == Times(160.0, stages, starts=2)
    # Clocks of two machines may differ: no start takes less than no time.
    assert times_of([{**first, "seen": 900.0}]) == Times(
        0.0, {"encoding": 30.0, "model_loading": 5.0, "training": 50.0, "other": 0.0}, starts=1
    )
    assert times_of([]) == Times(0.0, {"other": 0.0}, starts=0)


def test_a_killed_start_keeps_what_its_worker_noted_and_the_next_one_adds_to_it(tmp_path: Path) -> None:
    folder = Store(str(tmp_path))
    watch = Stopwatch(began=0.0)
    begin_start(folder, watch)
    note_workers(folder, {"training": 20.0})
    assert workers_before(folder) == {"training": 20.0}  # what a worker that is restarted goes on from
    begin_start(folder, Stopwatch())
    assert workers_before(folder) == {}
    note_workers(folder, {"training": 4.0})
    times = end_start(folder, Stopwatch())
    assert (times.starts, times.stages["training"]) == (2, 24.0)
    assert len(json.loads((tmp_path / RUN_TIMES).read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "7", "[1, {}]", '[{"began": 1}]', '"text"', "null"])
def test_times_that_are_damaged_end_no_run(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN_TIMES).write_text(content)
    folder = Store(str(tmp_path))
    assert workers_before(folder) == {}
    begin_start(folder, Stopwatch())
    assert end_start(folder, Stopwatch()).starts == 1


def test_times_that_cannot_be_written_end_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    folder = Store(str(tmp_path / "file"))
    begin_start(folder, Stopwatch())
    assert end_start(folder, Stopwatch()).starts == 0
