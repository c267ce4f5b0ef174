"""The names of a file's columns: where two are the same, a row could keep the cell of one only."""

from collections import Counter
from collections.abc import Iterable


def require_distinct(names: Iterable[str], location: str) -> None:
    """Raises ValueError where two columns of a file have one name."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{location} has several columns named {repeated[0]}. Give each a name of its own, or take one out.")
