"""PaliGemma (https://arxiv.org/abs/2407.07726): the whole prompt sees the whole prompt, only the response is causal.

Its prompts are an image and a line of text. The processor puts the start mark behind the images and ends the line; it takes no
prompt without images, for which the same is done here.
"""

from collections.abc import Mapping
from typing import Any

from rayalign.models.family import Family


def image_token_counts(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Features of each image, from `pixel_values` [num_images, 3, H, W]: one for each patch."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [side * side] * len(inputs["pixel_values"])


def text_prompt(prompt: str, tokenizer: Any) -> str:
    """A prompt without images, between the marks that the processor sets."""
    return f"{tokenizer.bos_token}{prompt}\n"


FAMILY = Family(
    model_type="paligemma",
    registered={
        "paligemma-3b-pt-224": "google/paligemma-3b-pt-224",
        "paligemma-3b-pt-448": "google/paligemma-3b-pt-448",
        "paligemma-3b-mix-224": "google/paligemma-3b-mix-224",
        "paligemma-3b-mix-448": "google/paligemma-3b-mix-448",
    },
    image_token_counts=image_token_counts,
    bidirectional="prompt",
    first_position=1,
    # Images first, then the text of the turns on one line; the response follows the line's end.
    chat_template=(
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% endif %}{% endfor %}{% endfor %}"
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{% if message['role'] != 'assistant' and not loop.last "
        "and messages[loop.index]['role'] != 'assistant' or message['role'] == 'assistant' and not loop.last %} {% endif %}"
        "{% endfor %}"
    ),
    text_prompt=text_prompt,
)
