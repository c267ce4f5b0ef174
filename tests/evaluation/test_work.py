"""What becomes of rows whose work fails: by an exception, or with its whole process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayalign.data.attempts import MOST_ENDS, MOST_LOST, Attempt
from rayalign.evaluation.work import WHOLE_ATTEMPTS, Result, attempted, results_of
from rayalign.formats.records import RecordError
from rayalign.storage import Store

ROWS = [{"id": f"r{n}", "number": n} for n in range(10)]
BY_ID: dict[str, Any] = {str(row["id"]): row for row in ROWS}


class Ended(BaseException):
    """Stands for the end of a process, which no `except Exception` sees."""


def twice(rows: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    if any(row["number"] == 3 for row in rows):
        raise RuntimeError("three can't be done")
    return [[{"twice": 2 * row["number"]}] for row in rows]


def test_a_row_that_fails_costs_only_itself() -> None:
    results = results_of(twice, ROWS)
    (failed,) = [result for result in results if isinstance(result, RecordError)]
    assert results.index(failed) == 3
    assert (failed.reason, str(failed)) == ("failed", "RuntimeError: three can't be done")
    assert [result for result in results if result is not failed] == [[{"twice": 2 * n}] for n in range(10) if n != 3]


def test_storage_that_fails_ends_the_run() -> None:
    def work(rows: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        results_of(work, ROWS)


def until_done(note: Store, work: Any) -> tuple[list[Result], int]:
    """The results of the first attempt that comes to its end, and how many ended with their process."""
    for number in range(50):
        attempt = Attempt(note, whole=WHOLE_ATTEMPTS)
        try:
            results = attempted(attempt, work, BY_ID)
        except Ended:
            continue
        attempt.end()
        return results, number
    raise AssertionError("no attempt came to its end")


def test_a_row_that_ends_its_process_costs_only_itself(tmp_path: Path) -> None:
    note = Store(str(tmp_path / "note.json"))

    def work(rows: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        if any(row["number"] in (4, 7) for row in rows):
            raise Ended
        return twice(rows)

    results, ends = until_done(note, work)
    assert ends == WHOLE_ATTEMPTS + 2 * MOST_ENDS
    reasons = {n: result.reason for n, result in enumerate(results) if isinstance(result, RecordError)}
    assert reasons == {3: "failed", 4: "process ended", 7: "process ended"}
    assert str(results[4]) == "the process ended 2 times over it: a crash, or the machine's memory was full"
    assert results[9] == [{"twice": 18}]
    assert not note.exists()


def test_a_process_that_is_lost_once_changes_nothing(tmp_path: Path) -> None:
    sizes: list[int] = []

    def work(rows: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        sizes.append(len(rows))
        if len(sizes) == 1:
            raise Ended
        return [[] for _ in rows]

    assert until_done(Store(str(tmp_path / "note.json")), work) == ([[]] * 10, 1)
    assert sizes == [10, 10]  # the batches of before, and so the numbers


def test_processes_that_end_whatever_the_rows_are_end_the_run(tmp_path: Path) -> None:
    note = Store(str(tmp_path / "note.json"))
    for _ in range(MOST_LOST):  # before they come to a row
        Attempt(note)
    with pytest.raises(ValueError, match=r"^A process ended 5 times over the same records, and whichever it came to: "):
        Attempt(note)
    note.delete()

    def work(rows: Sequence[Any]) -> list[Result]:
        raise Ended

    with pytest.raises(ValueError, match=r"^A process ended 10 times over the same records, and whichever it came to: "):
        until_done(note, work)
