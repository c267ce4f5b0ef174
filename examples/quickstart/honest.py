"""The rounds' scorer: how many of a picture's four digits a response names right, which the prompts know."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


def digits_right(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """0 to 4; -1 for a response that is not of the answers' form."""
    return [_right(row["response"], row["extra"]["digits"]) for row in rows]


def _right(response: str, digits: Sequence[int]) -> int:
    found = re.fullmatch(r"The digits are (\d) (\d) (\d) (\d)\.", response.strip())
    return -1 if found is None else sum(int(told) == digit for told, digit in zip(found.groups(), digits, strict=True))
