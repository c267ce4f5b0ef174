"""LLaVA-NeXT (1.6): an image becomes a thumbnail and a grid of tiles; padding is cut away and each feature row ends in a
newline."""

from collections.abc import Mapping
from typing import Any

from transformers.image_processing_utils import select_best_resolution

from rayalign.models.family import Family
from rayalign.models.llava import features_per_tile


def features_per_side(config: Any) -> int:
    """Patches along one side of a tile."""
    side: int = config.vision_config.image_size // config.vision_config.patch_size
    return side


def grid_features(config: Any, height: int, width: int) -> tuple[int, int]:
    """Feature rows and columns of the tiles that a picture is cut into, without the padding."""
    tile, side = config.vision_config.image_size, features_per_side(config)
    canvas_height, canvas_width = select_best_resolution((height, width), config.image_grid_pinpoints)
    return _without_padding(height, width, canvas_height // tile * side, canvas_width // tile * side)


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `image_sizes` [num_images, 2] (height, width in pixels)."""
    counts = []
    for height, width in inputs["image_sizes"]:
        rows, columns = grid_features(config, int(height), int(width))
        counts.append(features_per_tile(config) + rows * (columns + 1))
    return counts


def _without_padding(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """The feature rows and columns that the picture covers when it is scaled into the grid with its proportions kept; the
    padding is cut off on both sides alike."""
    if width / height > columns / rows:
        return rows - (rows - int(round(height * (columns / width), 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * (rows / height), 7))) // 2 * 2


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
