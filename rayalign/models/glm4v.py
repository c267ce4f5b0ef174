"""GLM-4.1V (https://arxiv.org/abs/2507.01006) and GLM-4.6V: images and positions as in Qwen2-VL."""

import dataclasses

from rayalign.models import qwen_vl

GLM4V = dataclasses.replace(
    qwen_vl.QWEN2,
    model_type="glm4v",
    registered={"glm4_1v-9b-thinking": "zai-org/GLM-4.1V-9B-Thinking"},
)
GLM46V = dataclasses.replace(qwen_vl.QWEN2, model_type="glm46v", registered={"glm4_6v-flash": "zai-org/GLM-4.6V-Flash"})
