"""Mistral Small 3.1 and its like: pictures of any size by the Pixtral tower (https://arxiv.org/abs/2410.07073), patches merged
before the projector. Pixtral itself is a LLaVA to transformers."""

from collections.abc import Mapping
from typing import Any

from rayalign.models.family import Family


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `image_sizes` [num_images, 2] (height, width in pixels after the processor)."""
    side = config.vision_config.patch_size * config.spatial_merge_size
    return [int(height) // side * (int(width) // side) for height, width in inputs["image_sizes"]]


FAMILY = Family(
    model_type="mistral3",
    registered={
        "mistral-small-3_1-24b-instruct": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "mistral-small-3_2-24b-instruct": "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
    },
    image_token_counts=image_token_counts,
)
