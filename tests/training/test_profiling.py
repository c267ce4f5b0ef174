import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from rayalign.storage import Store
from rayalign.training.profiling import PROFILE, StepProfiler, profiled_steps


@pytest.mark.parametrize(("given", "steps"), [(None, []), ("10:12", [10, 11, 12]), ("7", [7]), (" 3:3 ", [3])])
def test_steps_are_counted_from_one_and_both_ends_are_in(given: str | None, steps: list[int]) -> None:
    assert list(profiled_steps(given)) == steps


@pytest.mark.parametrize("given", ["0:2", "3:2", "a:b", "1:2:3", "-1", ""])
def test_what_names_no_steps_is_refused(given: str) -> None:
    message = f"--profile_steps {given}: must be FIRST:LAST, steps counted from 1, such as 10:12 (quoted in YAML), or one step."
    with pytest.raises(ValueError, match=re.escape(message)):
        profiled_steps(given)


def run(profiler: StepProfiler, steps: range) -> None:
    for step in steps:
        profiler.before(step)
        torch.ones(2 + step, 3) @ torch.ones(3, 4)
        profiler.after(step)
    profiler.close()


def products_in(file: Path) -> list[list[int]]:
    """The shape of the left side of each matrix product that a trace holds."""
    trace = json.loads(gzip.decompress(file.read_bytes()))
    return [event["args"]["Input Dims"][0] for event in trace["traceEvents"] if event.get("name") == "aten::mm"]


@pytest.mark.parametrize(
    ("first_of_start", "name", "products"), [(1, "rank_1_step_2", [[4, 3], [5, 3]]), (3, "rank_1_step_3", [[5, 3]])]
)
def test_a_trace_has_the_steps_that_were_asked_for_and_no_others(
    tmp_path: Path, first_of_start: int, name: str, products: list[list[int]]
) -> None:
    run(StepProfiler(profiled_steps("2:3"), Store(str(tmp_path)), rank=1), range(first_of_start, 6))
    (file,) = (tmp_path / PROFILE).iterdir()
    assert file.name == f"{name}.json.gz"
    assert products_in(file) == products


def test_a_run_that_ends_within_the_steps_writes_what_it_has(tmp_path: Path) -> None:
    run(StepProfiler(profiled_steps("2:9"), Store(str(tmp_path)), rank=0), range(1, 3))
    assert products_in(tmp_path / PROFILE / "rank_0_step_2.json.gz") == [[4, 3]]


def test_nothing_is_traced_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", None)
    run(StepProfiler(profiled_steps(None), Store(str(tmp_path)), rank=0), range(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / PROFILE).write_text("in the way")
    run(StepProfiler(profiled_steps("1"), Store(str(tmp_path)), rank=0), range(1, 3))
    assert "rank_0_step_1.json.gz could not be written" in caplog.text
