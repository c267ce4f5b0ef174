"""Aya Vision: tiles and a thumbnail as in InternVL, for a SigLIP tower; four patches a feature."""

from collections.abc import Mapping
from typing import Any

from rayalign.models.family import Family


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `num_patches` [num_images], its tiles; where only `pixel_values` [tiles, 3, H, W] are given,
    of each tile."""
    side = config.vision_config.image_size // config.vision_config.patch_size // config.downsample_factor
    tiles = inputs["num_patches"] if "num_patches" in inputs else [1] * len(inputs["pixel_values"])
    return [int(number) * side * side for number in tiles]


FAMILY = Family(
    model_type="aya_vision",
    registered={
        "aya-vision-8b": "CohereLabs/aya-vision-8b",
        "aya-vision-32b": "CohereLabs/aya-vision-32b",
    },
    image_token_counts=image_token_counts,
)
