"""Rows over which a process ends, by a crash in a library or because the machine's memory is full: a note of what a process is
at outlives it, and the next one finds the row.

Ray starts a process anew as often as it ends, over the same rows, so that such a row would be tried for ever. It is dropped, as
any other bad row.
"""

from collections import Counter

from rayalign.formats.records import RecordError
from rayalign.storage import Store

MOST_ENDS = 2
"""A row is dropped when processes ended over it so often."""

MOST_LOST, MOST_ROWS = 5, 3
"""It is no row's fault when processes ended so often over some rows but none of them, or over more of them than so many."""


class Attempt:
    """A process's attempt at some rows. Its `note` is there while it lasts, and longer only where the process ends; without one
    each attempt is the first."""

    def __init__(self, note: Store | None = None, *, whole: int = 0) -> None:
        """The first `whole` attempts are at all rows together, since a machine may have been lost; later ones are row by row.

        Raises ValueError where processes end whatever the rows are.
        """
        self._note = note
        known = note.read_json_object() if note is not None and note.exists() else {}
        self._number = known.get("attempt", 0) + 1
        self.is_by_row = self._number > whole
        self._ended: Counter[str] = Counter(known.get("ended", {}))
        if known.get("row") is not None:
            self._ended[known["row"]] += 1
        lost, over_one = self._number - 1 - self._ended.total(), sum(ends >= MOST_ENDS for ends in self._ended.values())
        if lost >= MOST_LOST or over_one > MOST_ROWS:
            raise ValueError(
                f"A process ended {self._number - 1} times over the same records, and whichever it came to: a model, scorer or "
                "plugin may end it, or its machine lacks memory, of which fewer workers on a machine and a smaller "
                "--batch_size need less."
            )
        self._write(None)

    def begin(self, row: str) -> None:
        """Notes the row that the process is at, in an attempt row by row. Raises RecordError where processes ended over it."""
        if self._ended[row] >= MOST_ENDS:
            words = f"the process ended {self._ended[row]} times over it: a crash, or the machine's memory was full"
            raise RecordError("process ended", words)
        if self.is_by_row:
            self._write(row)

    def end(self) -> None:
        """The rows' results are written."""
        if self._note is not None:
            self._note.delete()

    def _write(self, row: str | None) -> None:
        if self._note is not None:
            self._note.write_json({"attempt": self._number, "row": row, "ended": self._ended})
