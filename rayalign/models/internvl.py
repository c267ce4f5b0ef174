"""InternVL 2 to 3.5 (https://arxiv.org/abs/2404.16821) in transformers' port: tiles and a thumbnail, four patches a feature.

The vision tower sees tiles of one size; the image processor says how many of them are an image's.
"""

from collections.abc import Mapping
from typing import Any

from rayalign.models.family import Family


def features_per_tile(config: Any) -> int:
    """Features of one tile after the pixel shuffle."""
    height, width = (
        int(size // patch * config.downsample_ratio)
        for size, patch in zip(config.vision_config.image_size, config.vision_config.patch_size, strict=True)
    )
    return height * width


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `num_patches` [num_images], its tiles; where only `pixel_values` [tiles, 3, H, W] are given,
    of each tile."""
    tiles = inputs["num_patches"] if "num_patches" in inputs else [1] * len(inputs["pixel_values"])
    return [int(number) * features_per_tile(config) for number in tiles]


FAMILY = Family(
    model_type="internvl",
    registered={
        # In InternVL's own format, which has to be converted first (`find_family` says how).
        "internvl2-2b": "OpenGVLab/InternVL2-2B",
        "internvl2_5-8b-mpo": "OpenGVLab/InternVL2_5-8B-MPO-hf",
        "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
        "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
        "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
        "internvl3-14b": "OpenGVLab/InternVL3-14B-hf",
        "internvl3-38b": "OpenGVLab/InternVL3-38B-hf",
        "internvl3-78b": "OpenGVLab/InternVL3-78B-hf",
        "internvl3_5-1b": "OpenGVLab/InternVL3_5-1B-HF",
        "internvl3_5-2b": "OpenGVLab/InternVL3_5-2B-HF",
        "internvl3_5-4b": "OpenGVLab/InternVL3_5-4B-HF",
        "internvl3_5-8b": "OpenGVLab/InternVL3_5-8B-HF",
    },
    image_token_counts=image_token_counts,
)
