"""LLaVA-OneVision (https://arxiv.org/abs/2408.03326): as LLaVA-NeXT, with large grids scaled down; an image that has others
beside it is a thumbnail alone."""

import math
from collections.abc import Mapping
from typing import Any

from rayalign.models.family import Family
from rayalign.models.features import features_per_side, grid_features

SHRINK_FROM = 1.1
"""Grids are scaled down where they are larger than allowed by this factor, squared."""


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `image_sizes` [num_images, 2] (height, width in pixels) and `batch_num_images`, the number
    of images of each sample."""
    side = features_per_side(config)
    alone = [int(size) == 1 for size in inputs["batch_num_images"] for _ in range(int(size))]
    most_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    counts = []
    for (height, width), is_alone in zip(inputs["image_sizes"], alone, strict=False):
        if not is_alone:
            counts.append(side * side + 1)
            continue
        rows, columns = grid_features(config, int(height), int(width))
        ratio = math.sqrt(rows * columns / (most_tiles * side * side))
        if ratio > SHRINK_FROM:
            rows, columns = int(rows // ratio), int(columns // ratio)
        counts.append(side * side + rows * (columns + 1))
    return counts


FAMILY = Family(
    model_type="llava_onevision",
    registered={
        "llava-onevision-qwen2-0_5b-ov": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-onevision-qwen2-7b-ov": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-onevision-qwen2-72b-ov": "llava-hf/llava-onevision-qwen2-72b-ov-hf",
    },
    image_token_counts=image_token_counts,
    features_by_company=True,
)
