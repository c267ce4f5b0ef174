"""Gemma 3 (https://arxiv.org/abs/2503.19786): an image is 256 features that all see each other; most layers see a window."""

from collections.abc import Mapping
from typing import Any

from rayalign.models.family import Family


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `num_crops` [num_images] where there are crops (pan and scan); where only `pixel_values`
    [crops, 3, H, W] are given, of each crop."""
    crops = [int(n) + 1 for n in inputs["num_crops"]] if "num_crops" in inputs else [1] * len(inputs["pixel_values"])
    return [number * int(config.mm_tokens_per_image) for number in crops]


FAMILY = Family(
    model_type="gemma3",
    registered={
        "gemma3-4b-it": "google/gemma-3-4b-it",
        "gemma3-12b-it": "google/gemma-3-12b-it",
        "gemma3-27b-it": "google/gemma-3-27b-it",
    },
    image_token_counts=image_token_counts,
    bidirectional="image",
)
