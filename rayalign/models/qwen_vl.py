"""Qwen2-VL (https://arxiv.org/abs/2409.12191), Qwen2.5-VL (https://arxiv.org/abs/2502.13923) and Qwen3-VL
(https://arxiv.org/abs/2511.21631): any resolution, four patches a feature, positions in three dimensions (M-RoPE).

Qwen3-VL's tower also feeds the first layers of the language model.
"""

import dataclasses

from rayalign.models.family import Family
from rayalign.models.features import patch_grid_counts, patch_grids

QWEN2 = Family(
    model_type="qwen2_vl",
    registered={
        "qwen2-vl-2b-instruct": "Qwen/Qwen2-VL-2B-Instruct",
        "qwen2-vl-7b-instruct": "Qwen/Qwen2-VL-7B-Instruct",
        "qwen2-vl-72b-instruct": "Qwen/Qwen2-VL-72B-Instruct",
    },
    image_token_counts=patch_grid_counts,
    image_grids=patch_grids,
)
QWEN2_5 = dataclasses.replace(
    QWEN2,
    model_type="qwen2_5_vl",
    registered={
        "qwen2_5-vl-3b-instruct": "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2_5-vl-7b-instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
        "qwen2_5-vl-32b-instruct": "Qwen/Qwen2.5-VL-32B-Instruct",
        "qwen2_5-vl-72b-instruct": "Qwen/Qwen2.5-VL-72B-Instruct",
    },
)
QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3_vl",
    registered={
        "qwen3-vl-2b-instruct": "Qwen/Qwen3-VL-2B-Instruct",
        "qwen3-vl-4b-instruct": "Qwen/Qwen3-VL-4B-Instruct",
        "qwen3-vl-8b-instruct": "Qwen/Qwen3-VL-8B-Instruct",
        "qwen3-vl-32b-instruct": "Qwen/Qwen3-VL-32B-Instruct",
    },
    deepstack=True,
)
