"""LLaVA-NeXT (1.6): an image becomes a thumbnail and a grid of tiles; padding is cut away and each feature row ends in a
newline."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from rayalign.models.family import Family
from rayalign.models.llava import features_per_tile


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `image_sizes` [num_images, 2] (height, width in pixels)."""
    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    counts = []
    for size in torch.as_tensor(inputs["image_sizes"]).tolist():
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile)
        grid = torch.empty(1, rows * side, columns * side, device="meta")
        height, width = unpad_image(grid, size).shape[1:]
        counts.append(features_per_tile(config) + height * (width + 1))
    return counts


FAMILY = Family(
    model_type="llava_next",
    registered={
        "llava1_6-mistral-7b-instruct": "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava1_6-vicuna-7b-instruct": "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava1_6-vicuna-13b-instruct": "llava-hf/llava-v1.6-vicuna-13b-hf",
    },
    attention_projections=("q_proj", "k_proj", "v_proj"),
    image_token_counts=image_token_counts,
)
