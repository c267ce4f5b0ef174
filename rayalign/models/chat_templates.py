"""Chat templates for models that bring none: of those that TRL packages, the one for the kind of model and its tokenizer.

The files are read where TRL is installed; importing it would costs each process 0.7 s.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class ChatTemplate(NamedTuple):
    """The name of a template's file, without its ending, and what is in it."""

    name: str
    text: str


@dataclass(frozen=True)
class Fit:
    """Which models a template fits: what it writes must be `special_tokens` of the tokenizer; `text_type`: the `model_type`
    of the language model inside, where the kind of model doesn't decide it."""

    name: str
    special_tokens: tuple[str, ...]
    text_type: str | None = None


TURNS_OF_QWEN = ("<|im_start|>", "<|im_end|>")
IMAGES_OF_QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
TURNS_OF_GEMMA = ("<start_of_turn>", "<end_of_turn>")

PACKAGED: dict[str, Fit] = {
    "gemma": Fit("gemma", TURNS_OF_GEMMA),
    "gemma2": Fit("gemma", TURNS_OF_GEMMA),
    "gemma3": Fit("gemma3", (*TURNS_OF_GEMMA, "<start_of_image>")),
    "gemma3_text": Fit("gemma3", TURNS_OF_GEMMA),
    "idefics3": Fit("idefics3", ("<|begin_of_text|>", "<end_of_utterance>", "<image>")),
    "llama": Fit("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "llava_next": Fit("llava_next", ("<image>",), text_type="mistral"),
    "qwen2": Fit("qwen2_5", TURNS_OF_QWEN),
    "qwen2_vl": Fit("qwen2_5_vl", (*TURNS_OF_QWEN, *IMAGES_OF_QWEN)),
    "qwen2_5_vl": Fit("qwen2_5_vl", (*TURNS_OF_QWEN, *IMAGES_OF_QWEN)),
    "qwen3_vl": Fit("qwen3_vl", (*TURNS_OF_QWEN, *IMAGES_OF_QWEN)),
    "smolvlm": Fit("smolvlm", ("<|im_start|>", "<end_of_utterance>", "<image>")),
}
"""By the `model_type` of a config. TRL has more, for models that always bring their own or that think before they respond."""


def packaged_template(tokenizer: Any, config: "PreTrainedConfig") -> ChatTemplate | None:
    """The template that fits a model of this config and tokenizer; None where none does."""
    fit = PACKAGED.get(config.model_type)
    if fit is None or fit.text_type not in (None, config.get_text_config().model_type):
        return None
    if any(tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id) for token in fit.special_tokens):
        return None
    found = importlib.util.find_spec("trl")
    folders = [Path(folder) for folder in (found and found.submodule_search_locations) or ()]
    files = [file for folder in folders if (file := folder / "chat_templates" / f"{fit.name}.jinja").is_file()]
    return ChatTemplate(fit.name, files[0].read_text(encoding="utf-8")) if files else None
