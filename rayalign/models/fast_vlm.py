"""FastVLM (https://arxiv.org/abs/2412.13303): a convolutional tower, one feature per place of its last map, no class token."""

from collections.abc import Mapping
from typing import Any

from rayalign.models.family import Family


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `pixel_values` [num_images, 3, H, W]; all have the size that the model was made for."""
    return [config.image_seq_length] * len(inputs["pixel_values"])


FAMILY = Family(
    model_type="fast_vlm",
    registered={
        "fastvlm-0_5b": "KamilaMila/FastVLM-0.5B",
        "fastvlm-1_5b": "KamilaMila/FastVLM-1.5B",
        "fastvlm-7b": "KamilaMila/FastVLM-7B",
    },
    image_token_counts=image_token_counts,
)
