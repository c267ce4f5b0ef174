"""The columns of scored pairs: what `pair_scores` writes in the actors and what metrics are made of."""

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
