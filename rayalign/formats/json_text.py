"""JSON text as values, in which no key hides another: Python's own parser keeps the last one of a name."""

import json
from typing import Any


class RepeatedKey(ValueError):
    """An object of the text has two keys of one name."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"an object has several keys {repeated[:60]!r}; keep one of them")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_LAST_KEY_WINS = json.JSONDecoder()


def parse_json(text: str) -> Any:
    """Parses JSON; raises ValueError for whatever can't be parsed, RepeatedKey among it."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_start(text: str, position: int) -> tuple[Any, int]:
    """The value that begins at a place of the text, and where it ends; the RepeatedKey in place of one that has any. Raises
    ValueError where none begins, and RecursionError."""
    try:
        return _DECODER.raw_decode(text, position)
    except RepeatedKey as error:
        return error, _LAST_KEY_WINS.raw_decode(text, position)[1]
