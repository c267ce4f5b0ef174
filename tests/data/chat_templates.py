"""Chat templates that behave as those of published models do, as small as they can be; and those that come with trl.

Each is written from the model's documented prompt format and from what is known of its template's ways: which form of contents
it takes, where a system message goes, what it writes otherwise once a conversation has a response.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from rayalign.models.paligemma import FAMILY as PALIGEMMA

# LLaVA 1.5: roles in capitals with a colon, images in front of a turn's text; needs parts, and one at least in each message.
LLAVA_1_5 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content[0].text }} {% else %}{{ m.role | upper }}: "
    "{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }} {% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# LLaVA-OneVision: what begins the response ends in a line break, and an answered turn has a blank before it.
LLAVA_ONEVISION = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for p in m.content if p.type == 'image' %}<image>{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ '\n' + p.text }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# GLM-4.1V: parts for questions, plain strings for responses.
GLM_4_1V = (
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}"
    "{% else %}<|{{ m.role }}|>\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Pixtral and Mistral 3: the system message is a string, and stands in the last message while that is a question.
PIXTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}<s>{% for m in rest %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}[IMG]{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}[/INST]"
    "{% else %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}</s>"
    "{% endif %}{% endfor %}"
)

# InternVL: as Qwen, with an image mark and a line break for each picture.
INTERNVL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Aya Vision: turns between marks, the response between two of its own.
AYA_VISION = (
    "<BOS>{% for m in messages %}<TURN><{{ m.role | upper }}>{% if m.role == 'assistant' %}<START_RESPONSE>{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}<END_RESPONSE>{% endif %}<END_TURN>{% endfor %}"
    "{% if add_generation_prompt %}<TURN><ASSISTANT><START_RESPONSE>{% endif %}"
)

# FastVLM: Qwen2's form for plain strings only.
FAST_VLM = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

OWN: dict[str, str] = {
    "LLaVA 1.5": LLAVA_1_5,
    "LLaVA-OneVision": LLAVA_ONEVISION,
    "GLM-4.1V": GLM_4_1V,
    "Pixtral, Mistral 3": PIXTRAL,
    "InternVL": INTERNVL,
    "Aya Vision": AYA_VISION,
    "FastVLM": FAST_VLM,
    "PaliGemma": str(PALIGEMMA.chat_template),
}


def templates_of_trl() -> Mapping[str, str]:
    """The templates that the installed trl holds, by name; without those that differ in marks for training only."""
    package = importlib.util.find_spec("trl")
    assert package is not None
    assert package.origin is not None
    files = sorted((Path(package.origin).parent / "chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text() for file in files if not file.stem.endswith("_training")}
