"""Every model family at toy size: config and processor, each built from transformers' own classes; nothing is downloaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rayalign.models.compat import without_video_part

SENTENCES = ["Which digit is it? The digit is two.", "USER ASSISTANT SYSTEM: describe the image. A cat sits on the mat."]

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
TEXT = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
}
MISTRAL = {**TEXT, "model_type": "mistral", "sliding_window": None}
KINDS = ["sliding_attention", "full_attention"]
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
GRID_VISION = {"depth": 2, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def make_tokenizer(names: Mapping[str, str] | None = None, more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences; `names` are the special tokens that a processor finds by name."""
    named = dict(names or {})
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>", *named.values(), *more]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(dict.fromkeys(special)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=named
    )


def chat_template(image_mark: str) -> str:
    """`USER: <mark>\\nquestion` and so on, a line for each turn."""
    return (
        "{% for message in messages %}{{ '<s>' if loop.first else '' }}{{ message['role'] | upper }}: "
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    ).replace("IMAGE", image_mark)


TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' if loop.first else '' }}{{ message['role'] | upper }}: {{ message['content'] }}"
    "{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@dataclass(frozen=True)
class TinyFamily:
    """How a family's toy model and processor are built; `tower` is the vision tower's name in the model."""

    processor: Callable[[], Any]
    config: Callable[[Any, Mapping[str, Any]], Any]
    tower: str = "model.vision_tower"


def token(processor: Any, text: str) -> int:
    number: int = processor.tokenizer.convert_tokens_to_ids(text)
    return number


def _llava_processor() -> Any:
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return transformers.LlavaProcessor(
        images,
        make_tokenizer(),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )


def _llava_next_processor() -> Any:
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
    )
    return transformers.LlavaNextProcessor(
        images,
        make_tokenizer(),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )


def _without_video(name: str) -> Any:
    return without_video_part(getattr(transformers, name))  # what a machine without torchvision gets


def _llava_onevision_processor() -> Any:
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28], *PINPOINTS, [84, 84]]
    )
    return _without_video("LlavaOnevisionProcessor")(
        images,
        make_tokenizer({"video_token": "<video>"}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=chat_template("<image>"),
    )


def _qwen_processor(name: str, patch: int, tokenizer: Callable[..., Any] = make_tokenizer) -> Any:
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=24 * patch * patch, max_pixels=64 * patch * patch, merge_size=2
    )
    return _without_video(name)(
        images, tokenizer(names), chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>")
    )


def _qwen_config(name: str, patch: int, vision: Mapping[str, Any], rope: Mapping[str, Any]) -> Callable[..., Any]:
    def config(processor: Any, text: Mapping[str, Any]) -> Any:
        positions = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, **rope}
        return getattr(transformers, name)(
            vision_config={**GRID_VISION, "patch_size": patch, **vision},
            text_config={**TEXT, "rope_parameters": positions, **text},
            image_token_id=token(processor, "<|image_pad|>"),
            video_token_id=token(processor, "<|video_pad|>"),
            vision_start_token_id=token(processor, "<|vision_start|>"),
            vision_end_token_id=token(processor, "<|vision_end|>"),
        )

    return config


def _glm_processor(name: str) -> Any:
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    images = getattr(transformers, f"{name}ImageProcessorPil")(
        size={"shortest_edge": 24 * 14 * 14 * 2, "longest_edge": 64 * 14 * 14 * 2}
    )
    marks = ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
    template = chat_template("<|begin_of_image|><|image|><|end_of_image|>")
    return _without_video(f"{name}Processor")(images, make_tokenizer(names, marks), chat_template=template)


def _glm_config(name: str) -> Callable[..., Any]:
    def config(processor: Any, text: Mapping[str, Any]) -> Any:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 14, "image_size": 56}
        return getattr(transformers, name)(
            vision_config={**GRID_VISION, **vision, "model_type": "glm4v_vision"},
            text_config={**TEXT, "rope_parameters": rope, **text},
            image_start_token_id=token(processor, "<|begin_of_image|>"),
            image_end_token_id=token(processor, "<|end_of_image|>"),
            image_token_id=token(processor, "<|image|>"),
            video_start_token_id=token(processor, "<|begin_of_video|>"),
            video_end_token_id=token(processor, "<|end_of_video|>"),
            video_token_id=token(processor, "<|video|>"),
        )

    return config


def _internvl_processor(tokenizer: Callable[..., Any] = make_tokenizer) -> Any:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    images = transformers.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    return _without_video("InternVLProcessor")(
        images, tokenizer(names), image_seq_length=4, chat_template=chat_template("<IMG_CONTEXT>")
    )


def _internvl_config(processor: Any, text: Mapping[str, Any]) -> Any:
    return transformers.InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={**TEXT, "model_type": "qwen2", **text},
        image_token_id=token(processor, "<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _idefics_processor(name: str) -> Any:
    marks = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    marks += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    images = getattr(transformers, f"{name}ImageProcessorPil")(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    common = {"image_seq_len": 4, "chat_template": chat_template("<image>")}
    if name == "Idefics3":
        return transformers.Idefics3Processor(images, make_tokenizer(more=marks), **common)
    return _without_video("SmolVLMProcessor")(images, make_tokenizer(more=marks), None, **common)


def _idefics_config(name: str) -> Callable[..., Any]:
    return lambda processor, text: getattr(transformers, name)(
        vision_config=VISION,
        text_config={**TEXT, "model_type": "llama", **text},
        image_token_id=token(processor, "<image>"),
        scale_factor=2,
        pad_token_id=0,
    )


def _gemma3_processor() -> Any:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    images = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    template = chat_template("<start_of_image>")
    return transformers.Gemma3Processor(images, make_tokenizer(names), image_seq_length=4, chat_template=template)


def _gemma3_config(processor: Any, text: Mapping[str, Any]) -> Any:
    layers = {"sliding_window": 12, "query_pre_attn_scalar": 16, "layer_types": KINDS}
    return transformers.Gemma3Config(
        text_config={**TEXT, **layers, **text},
        vision_config=SIGLIP,
        boi_token_index=token(processor, "<start_of_image>"),
        eoi_token_index=token(processor, "<end_of_image>"),
        image_token_index=token(processor, "<image_soft_token>"),
        mm_tokens_per_image=4,
    )


def _paligemma_processor() -> Any:
    images = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    return transformers.PaliGemmaProcessor(images, make_tokenizer())


def _paligemma_config(processor: Any, text: Mapping[str, Any]) -> Any:
    words = len(processor.tokenizer)
    return transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "vocab_size": words, **text},
        vision_config={**SIGLIP, "vocab_size": words},
        projection_dim=64,
        image_token_index=token(processor, "<image>"),
    )


def _aya_processor() -> Any:
    names = {
        "image_token": "<image>",
        "img_patch_token": "<|IMG_PATCH|>",
        "start_of_img_token": "<|START_OF_IMG|>",
        "end_of_img_token": "<|END_OF_IMG|>",
        "tile_token": "TILE",
        "tile_global_token": "TILE_GLOBAL",
    }
    images = transformers.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    return transformers.AyaVisionProcessor(
        images,
        make_tokenizer(more=list(names.values())),
        patch_size=14,
        img_size=28,
        chat_template=chat_template("<image>"),
    )


def _aya_config(processor: Any, text: Mapping[str, Any]) -> Any:
    return transformers.AyaVisionConfig(
        vision_config=SIGLIP,
        text_config={**TEXT, "model_type": "cohere2", "sliding_window": 12, "layer_types": KINDS, **text},
        image_token_id=token(processor, "<|IMG_PATCH|>"),
        downsample_factor=2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        adapter_layer_norm_eps=1e-6,
        alignment_intermediate_size=64,
    )


def _fast_vlm_processor() -> Any:
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return transformers.LlavaProcessor(
        images,
        make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>"),
    )


def _fast_vlm_config(processor: Any, text: Mapping[str, Any]) -> Any:
    """Its published towers are timm's; any convolutional one does."""
    tower = {
        "model_type": "efficientnet",
        "image_size": 32,
        "width_coefficient": 0.025,
        "depth_coefficient": 1.0,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "strides": [2, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 6],
        "hidden_dim": 32,
        "hidden_size": 32,
        "initializer_range": 0.35,  # with the default, features vanish in the tower
    }
    return transformers.FastVlmConfig(
        vision_config=tower,
        text_config={**TEXT, "model_type": "qwen2", **text},
        image_token_index=token(processor, "<image>"),
        image_seq_length=16,
    )


def _text_model(name: str) -> TinyFamily:
    def tokenizer() -> Any:
        words = make_tokenizer()
        words.chat_template = TEXT_TEMPLATE
        return words

    return TinyFamily(tokenizer, lambda words, text: transformers.AutoConfig.for_model(name, **{**TEXT, **text}))


TINY_FAMILIES = {
    "llava": TinyFamily(
        _llava_processor,
        lambda processor, text: transformers.LlavaConfig(
            vision_config=CLIP, text_config={**MISTRAL, **text}, image_token_index=token(processor, "<image>")
        ),
    ),
    "llava_next": TinyFamily(
        _llava_next_processor,
        lambda processor, text: transformers.LlavaNextConfig(
            vision_config=CLIP,
            text_config={**MISTRAL, **text},
            image_token_index=token(processor, "<image>"),
            image_grid_pinpoints=PINPOINTS,
        ),
    ),
    "llava_onevision": TinyFamily(
        _llava_onevision_processor,
        lambda processor, text: transformers.LlavaOnevisionConfig(
            vision_config=SIGLIP,
            text_config={**TEXT, "model_type": "qwen2", **text},
            image_token_index=token(processor, "<image>"),
            video_token_index=token(processor, "<video>"),
            image_grid_pinpoints=[[28, 28], *PINPOINTS, [84, 84]],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_4",
        ),
    ),
    "internvl": TinyFamily(_internvl_processor, _internvl_config),
    "qwen2_vl": TinyFamily(
        lambda: _qwen_processor("Qwen2VLProcessor", 14),
        _qwen_config("Qwen2VLConfig", 14, {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}, {}),
        tower="model.visual",
    ),
    "qwen2_5_vl": TinyFamily(
        lambda: _qwen_processor("Qwen2_5_VLProcessor", 14),
        _qwen_config(
            "Qwen2_5_VLConfig",
            14,
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            {},
        ),
        tower="model.visual",
    ),
    "qwen3_vl": TinyFamily(
        lambda: _qwen_processor("Qwen3VLProcessor", 16),
        _qwen_config(
            "Qwen3VLConfig",
            16,
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            {"mrope_interleaved": True},
        ),
        tower="model.visual",
    ),
    "glm4v": TinyFamily(lambda: _glm_processor("Glm4v"), _glm_config("Glm4vConfig"), tower="model.visual"),
    "glm46v": TinyFamily(lambda: _glm_processor("Glm46V"), _glm_config("Glm46VConfig"), tower="model.visual"),
    "idefics3": TinyFamily(
        lambda: _idefics_processor("Idefics3"), _idefics_config("Idefics3Config"), tower="model.vision_model"
    ),
    "smolvlm": TinyFamily(lambda: _idefics_processor("SmolVLM"), _idefics_config("SmolVLMConfig"), tower="model.vision_model"),
    "paligemma": TinyFamily(_paligemma_processor, _paligemma_config),
    "gemma3": TinyFamily(_gemma3_processor, _gemma3_config),
    "aya_vision": TinyFamily(_aya_processor, _aya_config),
    "fast_vlm": TinyFamily(_fast_vlm_processor, _fast_vlm_config),
}
TINY_TEXT_MODELS = {name: _text_model(name) for name in ("llama", "qwen2", "qwen3", "gemma2", "phi3", "mistral")}


def _vip_llava_config(processor: Any, text: Mapping[str, Any]) -> Any:
    return transformers.VipLlavaConfig(
        vision_config=CLIP,
        text_config={**TEXT, "model_type": "llama", **text},
        image_token_index=token(processor, "<image>"),
        vision_feature_layers=[-2, -1],
    )


NOT_ON_THE_SHELF = TinyFamily(_llava_processor, _vip_llava_config)
"""A vision-language model that no file of the shelf describes."""
