"""Idefics3 (https://arxiv.org/abs/2408.12637) and SmolVLM (https://arxiv.org/abs/2504.05299): rows of tiles and the whole
picture, several patches a feature."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from rayalign.models.family import Family


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `pixel_values` [num_images, most tiles, 3, H, W]; tiles that are all zero are padding."""
    side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
    tiles = (torch.as_tensor(inputs["pixel_values"]) != 0).flatten(2).any(2).sum(1)
    return [int(number) * side * side for number in tiles]


IDEFICS3 = Family(
    model_type="idefics3",
    registered={"idefics3-8b-llama3": "HuggingFaceM4/Idefics3-8B-Llama3"},
    image_token_counts=image_token_counts,
    one_sample_an_image=True,
)
SMOLVLM = dataclasses.replace(
    IDEFICS3,
    model_type="smolvlm",
    registered={
        "smolvlm-256m-instruct": "HuggingFaceTB/SmolVLM-256M-Instruct",
        "smolvlm-500m-instruct": "HuggingFaceTB/SmolVLM-500M-Instruct",
        "smolvlm2-256m-video-instruct": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        "smolvlm2-500m-video-instruct": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "smolvlm2-2_2b-instruct": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    },
)
