"""Chat templates of models that are not in the README's table, written as those of `chat_templates` are: from the documented
prompt format and from what is known of the template's ways, as small as they can be.
"""

PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
"""A message's contents in either form."""

# Phi-3.5-vision: plain strings only.
PHI_3_5_VISION = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'assistant' %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Phi-4-multimodal: ends a finished conversation with a mark of its own.
PHI_4_MULTIMODAL = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}"
)

# Molmo: turns on one line, with blanks between them; no system message.
MOLMO = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ m.role | capitalize + ': ' + m.content }}{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %} Assistant:{% endif %}"
)

# Llama 3.2 Vision as first published: no pictures beside a system message, whose place else has the date in it.
LLAMA_3_2_VISION = (
    "<|begin_of_text|>{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0].content if messages[0].content is string else messages[0].content[0].text %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% set seen = namespace(picture=false) %}"
    "{% for m in rest if m.content is not string %}{% for p in m.content if p.type == 'image' %}{% set seen.picture = true %}"
    "{% endfor %}{% endfor %}{% if seen.picture and system %}"
    "{{ raise_exception('Prompting with images is incompatible with system messages.') }}{% endif %}"
    "{% if not seen.picture %}<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n{{ system }}<|eot_id|>"
    "{% endif %}{% for m in rest %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    + PARTS.replace("IMAGE", "<|image|>")
    + "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# Llama 4: takes the white space off each text.
LLAMA_4 = (
    "<|begin_of_text|>{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n"
    + PARTS.replace("IMAGE", "<|image|>").replace("p.text", "p.text | trim")
    + "<|eot|>{% endfor %}{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)

# Idefics2: a blank behind the role, unless a picture comes first.
IDEFICS2 = (
    "{% for m in messages %}{{ m.role | capitalize }}:{% if m.content[0].type != 'image' %} {% endif %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

# Kimi-VL: a system message of its own where there is none.
KIMI_VL = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>{% endif %}"
    "<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>"
    + PARTS.replace("IMAGE", "<|media_start|>image<|media_content|><|media_pad|><|media_end|>")
    + "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)

# Qwen3-VL Thinking: opens a thought, and writes the response with its thought, which may be empty.
QWEN3_VL_THINKING = (
    "{% macro text_of(m) %}" + PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>") + "{% endmacro %}"
    "{% for m in messages %}{% set text = text_of(m) %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] if '</think>' in text else '' %}"
    "{% if loop.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ text.split('</think>')[-1].lstrip('\n') }}{% else %}{{ text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

# MiniCPM-V 2.6: Qwen2's, for plain strings only, with Qwen2's system message.
MINICPM_V_2_6 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# MiniCPM-V 4.5: an empty thought closed in the prompt, so that no response with a thought of its own can follow.
MINICPM_V_4_5 = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)

# Ovis 2: a picture is a mark and a line break.
OVIS_2 = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    + PARTS.replace("IMAGE", "<image>\n")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# DeepSeek-VL2: the system message bare in front; a blank behind each colon, none where the response begins.
DEEPSEEK_VL2 = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    + PARTS
    + "{{ '\n\n' }}{% elif m.role == 'user' %}{{ '<|User|>: ' }}"
    + PARTS.replace("IMAGE", "<image>\n")
    + "{{ '\n\n' }}{% else %}{{ '<|Assistant|>: ' }}"
    + PARTS
    + "<｜end▁of▁sentence｜>{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)

# Janus: a blank in front of a text that comes first, a line break behind a picture.
JANUS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content[0].text + '\n\n' }}{% else %}{{ m.role | capitalize }}:"
    "{% for p in m.content %}{% if p.type == 'image' %}{{ '<image_placeholder>\n' }}{% else %}"
    "{{ (' ' if loop.first else '') + p.text }}{% endif %}{% endfor %}{{ '\n\n' if m.role == 'user' else '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

# Step3: opens a thought, and writes responses as they are.
STEP3 = (
    "{% for m in messages %}{{ '<|BOT|>' + ('human' if m.role == 'user' else m.role) + '\n' }}"
    + PARTS.replace("IMAGE", "<im_patch>")
    + "<|EOT|>{% endfor %}{% if add_generation_prompt %}{{ '<|BOT|>assistant\n<think>\n' }}{% endif %}"
)

# GLM-4.5V: an empty thought in front of a response without one.
GLM_4_5V = (
    "{% macro text_of(m) %}" + PARTS.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>") + "{% endmacro %}"
    "[gMASK]<sop>{% for m in messages %}{% set text = text_of(m) %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] if '</think>' in text and loop.last else '' %}"
    "{{ '<think>' + thought.strip() + '</think>\n' + text.split('</think>')[-1].strip() }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + text }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Mistral Small 3.1: a system message of its own where there is none, as a string or as one part.
MISTRAL_SMALL_3_1 = (
    "<s>{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0].content if messages[0].content is string else messages[0].content[0].text %}"
    "{% else %}{% set rest = messages %}{% set system = 'You are a model.' %}{% endif %}"
    "[SYSTEM_PROMPT]{{ system }}[/SYSTEM_PROMPT]{% for m in rest %}{% if m.role == 'user' %}[INST]"
    + PARTS.replace("IMAGE", "[IMG]")
    + "[/INST]{% else %}"
    + PARTS
    + "</s>{% endif %}{% endfor %}"
)

# Emu3: pictures in front of a turn's text, whatever their places.
EMU3 = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper + ': ' }}{% endif %}"
    "{% for p in m.content if p.type == 'image' %}<image>{% endfor %}{% for p in m.content if p.type == 'text' %}"
    "{{ p.text + ('</s>' if m.role == 'assistant' else ' ') }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# Granite Vision: a system message of its own where there is none.
GRANITE_VISION = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set system = 'A chat between a user and an assistant.' %}{% endif %}"
    "{{ '<|system|>\n' + (system if system is string else system[0].text) + '\n' }}{% for m in rest %}"
    "{{ '<|' + m.role + '|>\n' }}" + PARTS.replace("IMAGE", "<image>\n") + "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

MORE: dict[str, str] = {
    "Phi-3.5-vision": PHI_3_5_VISION,
    "Phi-4-multimodal": PHI_4_MULTIMODAL,
    "Molmo": MOLMO,
    "Llama 3.2 Vision": LLAMA_3_2_VISION,
    "Llama 4": LLAMA_4,
    "Idefics2": IDEFICS2,
    "Kimi-VL": KIMI_VL,
    "Qwen3-VL Thinking": QWEN3_VL_THINKING,
    "MiniCPM-V 2.6": MINICPM_V_2_6,
    "MiniCPM-V 4.5": MINICPM_V_4_5,
    "Ovis 2": OVIS_2,
    "DeepSeek-VL2": DEEPSEEK_VL2,
    "Janus": JANUS,
    "Step3": STEP3,
    "GLM-4.5V": GLM_4_5V,
    "Mistral Small 3.1": MISTRAL_SMALL_3_1,
    "Emu3": EMU3,
    "Granite Vision": GRANITE_VISION,
}
