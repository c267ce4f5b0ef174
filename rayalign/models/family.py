"""What differs between model families, as data: each file of this folder fills one `Family` in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One model family of transformers.

    `model_type` is the `model_type` of its config; `registered` maps the names that --model_type takes to hub ids;
    `attention_projections` are the linears that --lora_target_modules DEFAULT means; `image_token_counts` says, from the
    MODEL's config and the processor's image inputs, how many features each image will yield.
    """

    model_type: str
    registered: Mapping[str, str]
    attention_projections: tuple[str, ...]
    image_token_counts: Callable[[Any, Mapping[str, Any]], list[int]]
