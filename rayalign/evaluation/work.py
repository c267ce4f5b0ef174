"""The work on some rows, and what becomes of each one: its results, or why there are none, whatever goes wrong with it.

A row that makes the work fail costs only itself. So does one over which the process ends (`data.attempts`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rayalign.data.attempts import Attempt
from rayalign.evaluation.groups import Row
from rayalign.formats.records import RecordError, is_failure
from rayalign.retries import StorageFailed

Result = Sequence[Mapping[str, Any]] | RecordError
"""What becomes of a row: some lines of the results, or why there are none."""

Work = Callable[[Sequence[Row]], Sequence[Result]]
"""The work on some rows of a group, in their order: one `Result` for each. Whatever it raises drops rows, after it was tried on
fewer and fewer of them: only StorageFailed, other OSErrors, and what `ends_process` finds end the run."""

WHOLE_ATTEMPTS = 2
"""So often a group is worked on as a whole, which gives the numbers of a run that loses no process."""


def attempted(attempt: Attempt, work: Work, rows: Mapping[str, Row]) -> list[Result]:
    """What the work makes of some rows, by their ids, in an attempt at them."""
    if not attempt.is_by_row:
        return results_of(work, list(rows.values()))
    results: list[Result] = []
    for key, row in rows.items():
        try:
            attempt.begin(key)
        except RecordError as error:
            results.append(error)
        else:
            results += results_of(work, [row])
    return results


def results_of(work: Work, rows: Sequence[Row]) -> list[Result]:
    """What the work makes of some rows. Where it fails it is tried on each half of them, so that one bad row costs only itself,
    and rows that are too much for a GPU's memory together are done apart."""
    if not rows:
        return []
    try:
        results = list(work(rows))
    except (StorageFailed, OSError):  # with which no other row fares better
        raise
    except BaseException as error:
        if not is_failure(error) or ends_process(error):
            raise
        if len(rows) == 1:
            words = " ".join(str(error).split())
            return [error if isinstance(error, RecordError) else RecordError("failed", f"{type(error).__name__}: {words}")]
        del error
    else:
        assert len(results) == len(rows), f"the work made {len(results)} results of {len(rows)} rows"
        return results
    middle = len(rows) // 2
    return [*results_of(work, rows[:middle]), *results_of(work, rows[middle:])]


def ends_process(error: BaseException) -> bool:
    """Whether no further row can be computed in this process: a GPU that failed takes no more work."""
    return type(error).__name__ == "AcceleratorError"
