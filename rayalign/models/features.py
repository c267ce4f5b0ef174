"""How many features an image yields, where several families count alike: tiles of one size, and grids of patches."""

from collections.abc import Mapping
from typing import Any

from rayalign.models.compat import best_resolution
from rayalign.models.family import Grid

# Tiles: the tower sees squares of one size (LLaVA, LLaVA-NeXT, LLaVA-OneVision)


def features_per_side(config: Any) -> int:
    """Patches along one side of a tile."""
    side: int = config.vision_config.image_size // config.vision_config.patch_size
    return side


def features_per_tile(config: Any) -> int:
    """Features of one tile; the `default` selection drops the class token."""
    return features_per_side(config) ** 2 + int(config.vision_feature_select_strategy == "full")


def grid_features(config: Any, height: int, width: int) -> Grid:
    """Feature rows and columns of the tiles that a picture is cut into, without the padding."""
    tile, side = config.vision_config.image_size, features_per_side(config)
    canvas_height, canvas_width = best_resolution(height, width, config.image_grid_pinpoints)
    return _without_padding(height, width, canvas_height // tile * side, canvas_width // tile * side)


def _without_padding(height: int, width: int, rows: int, columns: int) -> Grid:
    """The feature rows and columns that the picture covers when it is scaled into the grid with its proportions kept; the
    padding is cut off on both sides alike."""
    if width / height > columns / rows:
        return rows - (rows - int(round(height * (columns / width), 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * (rows / height), 7))) // 2 * 2


# Grids of patches: the tower sees pictures of any size (Qwen2-VL to Qwen3-VL, GLM-4.1V, GLM-4.6V)


def patch_grids(config: Any, inputs: Mapping[str, Any]) -> list[Grid]:
    """Rows and columns of each image's features, from `image_grid_thw` [num_images, 3], its grid of patches."""
    merge = config.vision_config.spatial_merge_size
    return [(int(rows) // merge, int(columns) // merge) for _, rows, columns in inputs["image_grid_thw"]]


def patch_grid_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from the same."""
    return [rows * columns for rows, columns in patch_grids(config, inputs)]
