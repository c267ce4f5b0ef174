"""LLaVA-NeXT (1.6): an image becomes a thumbnail and a grid of tiles; padding is cut away and each feature row ends in a
newline."""

from collections.abc import Mapping
from typing import Any

from rayalign.models.family import Family
from rayalign.models.features import features_per_tile, grid_features


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `image_sizes` [num_images, 2] (height, width in pixels)."""
    counts = []
    for height, width in inputs["image_sizes"]:
        rows, columns = grid_features(config, int(height), int(width))
        counts.append(features_per_tile(config) + rows * (columns + 1))
    return counts


FAMILY = Family(
    model_type="llava_next",
    registered={
        "llava1_6-mistral-7b-instruct": "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava1_6-vicuna-7b-instruct": "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava1_6-vicuna-13b-instruct": "llava-hf/llava-v1.6-vicuna-13b-hf",
        "llava1_6-yi-34b-instruct": "llava-hf/llava-v1.6-34b-hf",
        "llama3-llava-next-8b": "llava-hf/llama3-llava-next-8b-hf",
    },
    image_token_counts=image_token_counts,
)
