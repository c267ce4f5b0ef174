"""Labels of Ray's nodes: selectors as flags write them, and which nodes they fit. `nodes` asks the cluster for such nodes.

https://docs.ray.io/en/latest/ray-core/scheduling/labels.html
"""

import re
from collections.abc import Mapping, Sequence

NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
LABEL = re.compile(rf"(?:{NAME}/)?{NAME}")
CONDITION = re.compile(rf"!?(?:{NAME}|in\({NAME}(?:,{NAME})*\))")


def parse_selector(flag: str, words: Sequence[str]) -> dict[str, str]:
    """Labels and their conditions, as Ray takes them, from words LABEL=CONDITION; raises ValueError, naming the flag."""
    selector: dict[str, str] = {}
    for word in words:
        label, sign, condition = word.replace(" ", "").partition("=")
        if not (sign and LABEL.fullmatch(label) and CONDITION.fullmatch(condition)):
            raise ValueError(
                f"--{flag} {word}: must be LABEL=VALUE, such as ray.io/market-type=on-demand. In place of VALUE may stand "
                "!VALUE, in(A,B) or !in(A,B), quoted for the shell."
            )
        if label in selector:
            raise ValueError(
                f"--{flag} {word}: the label {label} has a condition already. Join the two, as in {label}=in(A,B)."
            )
        selector[label] = condition
    return selector


def fits_selector(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels fits, as Ray decides it: a label that it lacks fits a condition with `!` only."""
    return all(_fits(labels.get(label), condition) for label, condition in selector.items())


def in_words(selector: Mapping[str, str]) -> str:
    """The selector as its flag is written."""
    return " ".join(f"{label}={condition}" for label, condition in selector.items())


def _fits(value: str | None, condition: str) -> bool:
    named = condition.removeprefix("!")
    values = named[len("in(") : -1].split(",") if named.startswith("in(") else [named]
    return (value in values) != condition.startswith("!")
