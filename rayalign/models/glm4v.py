"""GLM-4.1V (https://arxiv.org/abs/2507.01006) and GLM-4.6V: images and positions as in Qwen2-VL."""

import dataclasses

from rayalign.models.family import Family
from rayalign.models.features import patch_grid_counts, patch_grids

GLM4V = Family(
    model_type="glm4v",
    registered={"glm4_1v-9b-thinking": "zai-org/GLM-4.1V-9B-Thinking"},
    image_token_counts=patch_grid_counts,
    image_grids=patch_grids,
)
GLM46V = dataclasses.replace(GLM4V, model_type="glm46v", registered={"glm4_6v-flash": "zai-org/GLM-4.6V-Flash"})
