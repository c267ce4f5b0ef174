"""The columns of scored pairs: what `pair_scores` writes in the actors and what metrics are made of."""

from collections.abc import Iterable
from typing import Literal

import pyarrow as pa

View = Literal["shuffled", "ablated"]
"""Wrong pictures: those of another record, or damaged ones."""

VIEWS: tuple[View, ...] = ("shuffled", "ablated")
SIDES = ("chosen", "rejected")
ASKS, SCORES = "asks", "scores"
"""Keys of a row beside those of `groups.FileRows`: the most tokens that the model is to write (0: none), and what is scored:
`pair`, `options` (responses without the end that they share), or nothing."""

_VIEWS = ("", *(f"{view}_" for view in VIEWS))
_FLOATS = [f"{whose}{view}{side}" for view in _VIEWS for whose in ("", "reference_") for side in SIDES]
SCHEMA = pa.schema(
    [
        *((name, pa.float64()) for name in (*_FLOATS, "kl")),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("num_images", pa.int32()),
        ("text", pa.string()),
        ("is_reward_model", pa.bool_()),
    ]
)
"""A line for each record. `chosen` and `rejected`: summed log-probs, or a reward model's scores; `reference_...`: the same
under the reference; `...shuffled_...`, `...ablated_...`: with wrong pictures; null where there are none. `kl`: log p - log p of
the reference of a response that the model itself gave. `text`: what the model writes."""

_SEPARATOR = "/"


def scored_schema(scorers: Iterable[str]) -> pa.Schema:
    """A line for each record that scorers of --scorer scored, and no model: the score of each and what judges wrote, by side,
    and the lengths of the responses."""
    scores = [(scored_column(name, side), pa.float64()) for name in scorers for side in SIDES]
    lengths = [(f"{side}_characters", pa.int32()) for side in SIDES]
    said = [(f"{side}_judgements", pa.list_(pa.string())) for side in SIDES]
    return pa.schema([*scores, *lengths, ("num_images", pa.int32()), *said])


def scored_column(scorer: str, side: str) -> str:
    """The column of the scores of a scorer of --scorer."""
    return f"{scorer}{_SEPARATOR}{side}"


def scorers_in(schema: pa.Schema) -> tuple[str, ...]:
    """The scorers of a `scored_schema`; none of SCHEMA."""
    ends = _SEPARATOR + SIDES[0]
    return tuple(name.removesuffix(ends) for name in schema.names if name.endswith(ends))
