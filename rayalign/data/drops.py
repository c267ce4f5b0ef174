"""How many records of each data set a preparation has dropped, for which reasons, and whether that is too many. `prepare` asks
of what it encodes, and of what was encoded before.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rayalign.data.remarks import unread_pictures

logger = logging.getLogger(__name__)


class TooManyDropped(ValueError):
    """More records are unusable than allowed; `dropped` lists them."""

    def __init__(self, message: str, dropped: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(message)
        self.dropped = list(dropped)


def check_drops(
    dropped: Sequence[Mapping[str, Any]],
    num_rows: Mapping[str, int],
    *,
    limit: float,
    advice: str = "",
    say: Callable[..., None] = logger.warning,
) -> None:
    """Says what was dropped, a line for each data set. Raises TooManyDropped where that is more than this fraction of a data
    set, or all of one; `num_rows` are those of each, and `advice` is what else there is to do."""
    words = unread_pictures(dropped, num_rows, limit=limit)
    if words is not None:
        raise TooManyDropped(f"{words} {advice}".rstrip(), dropped)
    counts = Counter(line["dataset"] for line in dropped)
    over = next((name for name, total in num_rows.items() if counts[name] > limit * total or counts[name] == total > 0), None)
    if over is not None:
        is_lost = counts[over] == num_rows[over]
        verdict = (
            f"Nothing is left of {over}" if is_lost else f"That is more of {over} than --max_dropped_fraction {limit:g} allows"
        )
        remedy = "leave this data set out" if is_lost else "raise the limit"
        first = next(line for line in dropped if line["dataset"] == over)
        raise TooManyDropped(
            f"{_table(dropped, num_rows)}\n{verdict}. First: {_in_words(first)}. Fix the data, or {remedy}. {advice}".rstrip(),
            dropped,
        )
    for head, reasons in _by_dataset(dropped, num_rows):
        say("Data: %s %s", head, ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()))


def _table(dropped: Iterable[Mapping[str, Any]], num_rows: Mapping[str, int]) -> str:
    lines: list[str] = []
    for head, reasons in _by_dataset(dropped, num_rows):
        lines += [head, *(f"  {count:>8}  {reason}" for reason, count in reasons.most_common())]
    return "\n".join(lines)


def _by_dataset(dropped: Iterable[Mapping[str, Any]], num_rows: Mapping[str, int]) -> Iterator[tuple[str, Counter[str]]]:
    """How many records of each data set were dropped, in words, and how many for which reason; of those that lost some."""
    reasons: dict[str, Counter[str]] = {dataset: Counter() for dataset in num_rows}
    for line in dropped:
        reasons[line["dataset"]][line["reason"]] += 1
    for dataset, own in reasons.items():
        if own:
            total = num_rows[dataset]
            yield f"{dataset}: {own.total()} of {total} records dropped ({own.total() / total:.1%}):", own


def _in_words(line: Mapping[str, Any]) -> str:
    return "{file}, row {row}: {reason} ({detail})".format(**line)
