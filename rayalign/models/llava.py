"""LLaVA 1.5 (https://arxiv.org/abs/2310.03744): one square image, one feature per patch of the vision tower."""

from collections.abc import Mapping
from typing import Any

from rayalign.models.family import Family
from rayalign.models.features import features_per_tile


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `pixel_values` [num_images, 3, H, W]; a Pixtral tower takes pictures of any size, given by
    `image_sizes` [num_images, 2] (height, width in pixels)."""
    if "image_sizes" in inputs:
        patch = config.vision_config.patch_size
        return [int(height) // patch * (int(width) // patch) for height, width in inputs["image_sizes"]]
    return [features_per_tile(config)] * len(inputs["pixel_values"])


FAMILY = Family(
    model_type="llava",
    registered={
        "llava1_5-7b-instruct": "llava-hf/llava-1.5-7b-hf",
        "llava1_5-13b-instruct": "llava-hf/llava-1.5-13b-hf",
        "pixtral-12b": "mistral-community/pixtral-12b",
    },
    image_token_counts=image_token_counts,
)
