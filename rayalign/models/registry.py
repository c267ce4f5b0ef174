"""The shelf of model families: one file each, holding only what differs from the common path."""

from typing import Any

from rayalign.downloads import model_folder
from rayalign.models import (
    aya_vision,
    fast_vlm,
    gemma3,
    glm4v,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    mistral3,
    paligemma,
    qwen_vl,
)
from rayalign.models.compat import config_settings, is_language_model, is_vision_language, told_files
from rayalign.models.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llava.FAMILY,
        llava_next.FAMILY,
        llava_onevision.FAMILY,
        internvl.FAMILY,
        qwen_vl.QWEN2,
        qwen_vl.QWEN2_5,
        qwen_vl.QWEN3,
        glm4v.GLM4V,
        glm4v.GLM46V,
        idefics3.IDEFICS3,
        idefics3.SMOLVLM,
        paligemma.FAMILY,
        gemma3.FAMILY,
        mistral3.FAMILY,
        aya_vision.FAMILY,
        fast_vlm.FAMILY,
    )
}
REGISTERED_MODELS: dict[str, str] = {name: hub_id for f in FAMILIES.values() for name, hub_id in f.registered.items()}

ORIGINAL_FORMATS = {
    "internvl_chat": "InternVL's own format. transformers has a port (`internvl`): take a model whose id ends in -hf, such as "
    "OpenGVLab/InternVL3-2B-hf, or convert this one with convert_internvl_weights_to_hf.py of transformers' repository and "
    "pass the folder as --model",
    "llava_qwen2": "LLaVA's own format. Take its conversion to transformers, such as KamilaMila/FastVLM-0.5B",
    "llava_llama": "LLaVA's own format. Take its conversion to transformers, such as llava-hf/llava-1.5-7b-hf",
    "llava_mistral": "LLaVA's own format. Take its conversion to transformers, such as llava-hf/llava-v1.6-mistral-7b-hf",
}
"""Model types of code outside transformers that have a counterpart in it."""


def packs_rows(family: Family, attn_implementation: str) -> bool:
    """Whether a language model runs over rows one after another, without padding: it does by a kernel that takes prompts to be
    causal, and whose layers are told of the rows. Models that are not on the shelf may not hand that on."""
    return attn_implementation == "sdpa" and family.bidirectional == "none" and family.model_type in FAMILIES


def find_family(model_type: str) -> Family:
    """The family of a transformers config's `model_type`: one of the shelf, or the common path without knowledge of its own,
    for a vision-language or a language model of transformers.

    Raises ValueError for what is neither.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if is_vision_language(model_type):
        return Family(model_type)
    if is_language_model(model_type):
        return Family(model_type, text_only=True)
    if model_type in ORIGINAL_FORMATS:
        raise ValueError(f"Models of type {model_type!r} can't be trained: it is {ORIGINAL_FORMATS[model_type]}.")
    raise ValueError(
        f"Models of type {model_type!r} can't be trained: transformers knows them neither as vision-language models nor as "
        f"language models. Supported for certain: {', '.join(sorted(FAMILIES))}."
    )


def load_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder, URL or hub id. Raises ValueError for one that can't be read, and for a model type
    that can't be trained, before any code that comes with the model is asked for."""
    from transformers import AutoConfig

    model = model_folder(model, weights=False)
    with told_files(model):
        find_family(str(config_settings(model).get("model_type")))
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
