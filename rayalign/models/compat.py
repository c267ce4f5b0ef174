"""Private and undocumented names of transformers that models and processors rely on, each behind one small function.

Each says where the name is, in which version it was read, and when the function can go. tests/models/test_compat.py fails when
one of them changes its meaning. Those that a policy relies on are in `rayalign.policy.compat`. Each imports what it needs: a
driver reads configs only, and parts of transformers take seconds to load.
"""

import contextlib
import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

VIDEO_PART = "video_processor"
VIDEO_SETTINGS_FILE = "video_preprocessor_config.json"

# Configs and classes


def config_settings(model: str) -> Mapping[str, Any]:
    """What config.json of a folder or hub id says, before a class is made of it or code that comes with the model is asked for.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/configuration_utils.py
    (`PreTrainedConfig.get_config_dict`), 5.23.0. Can go when AutoConfig tells the model type without running a model's code.
    """
    from transformers import PreTrainedConfig

    settings, _ = PreTrainedConfig.get_config_dict(model)
    return settings


@contextlib.contextmanager
def told_files(model: str) -> Iterator[None]:
    """Raises ValueError where transformers says of a model's files that they are not there, or no JSON: it raises OSErrors
    without a number for these."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"The model {model} can't be read: {' '.join(str(error).split())}") from None


def is_vision_language(model_type: str) -> bool:
    """Whether transformers has a vision-language model of this type.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/auto/modeling_auto.py
    (`MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES`), 5.23.0. Can go when AutoModelForImageTextToText lists its types.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def is_language_model(model_type: str) -> bool:
    """Whether transformers has a causal language model of this type.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/auto/modeling_auto.py
    (`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`), 5.23.0. Can go when AutoModelForCausalLM lists its types.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def headless_class(config: "PreTrainedConfig") -> Any:
    """The class of the model without its output head: `LlavaModel` for a `LlavaConfig`.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/auto/modeling_auto.py (`MODEL_MAPPING`),
    5.23.0. Can go when AutoModel tells the class of a config.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return MODEL_MAPPING[type(config)]


def vision_tower(base: Any) -> "nn.Module | None":
    """The vision tower of a model; None where it has none.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_utils.py (`PreTrainedModel.get_encoder`),
    5.23.0: it gives the model itself, or what holds its decoder, where it finds no tower, and None where the model may have one
    and has not. Can go when it always says None for no tower.
    """
    from torch import nn

    encoder, decoder = base.get_encoder(modality="image"), base.get_decoder()
    if not isinstance(encoder, nn.Module) or any(module is decoder for module in encoder.modules()):
        return None
    return encoder


# Files


def hub_revision(model: str) -> str:
    """The commit of a model of the hub: the name of the cache's folder that its files are in.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/hub.py (`cached_file`), 5.23.0, and
    https://huggingface.co/docs/huggingface_hub/guides/manage-cache (snapshots). Can go when a public function of transformers
    tells the commit of what it loaded.
    """
    from transformers.utils.hub import cached_file

    return Path(str(cached_file(model, "config.json"))).parent.name


def read_optional_json(model: str, name: str) -> Any:
    """The JSON file of this name beside a model, of a folder or hub id; None where there is none.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/hub.py (`cached_file`, and the private
    arguments of `cached_files` by which what is missing is no error), 5.23.0. Can go when a public function reads a file that
    may be missing.
    """
    from transformers.utils.hub import cached_file

    file = cached_file(model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    return json.loads(Path(file).read_text()) if file else None


# Tokenizers


def ids_only(tokenizer: Any) -> Callable[..., list[list[int]]]:
    """`ids_only(tokenizer)(texts, add_special_tokens=...)`: the ids that calling the tokenizer gives, in less time where the
    tokenizers library makes them, as it leaves out the places of tokens in their texts.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/tokenization_utils_tokenizers.py (`_encode_plus`),
    5.23.0. Can go when a tokenizer can be asked for ids alone.
    """
    from transformers import PreTrainedTokenizerBase, TokenizersBackend

    def called(texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def fast(texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        backend = tokenizer.backend_tokenizer
        if backend.truncation is not None or backend.padding is not None:
            return called(texts, add_special_tokens=add_special_tokens)  # which takes both away
        backend.encode_special_tokens = tokenizer.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    kind = type(tokenizer)
    is_usual = (
        isinstance(tokenizer, TokenizersBackend)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is TokenizersBackend._encode_plus
        and not hasattr(tokenizer, "_switch_to_input_mode")
    )
    return fast if is_usual else called


# Processors and images


def processor_class(config: "PreTrainedConfig") -> Any:
    """The class of a config's processor; None where it has none of its own.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/auto/processing_auto.py
    (`PROCESSOR_MAPPING`), 5.23.0. Can go with `without_video_part`.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    return PROCESSOR_MAPPING.get(type(config), None)


def has_video_part(processor: Any) -> bool:
    """Whether processors of this class have a video part.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/processing_utils.py
    (`ProcessorMixin.get_attributes`), 5.23.0. Can go with `without_video_part`.
    """
    return VIDEO_PART in processor.get_attributes()


@functools.cache
def without_video_part(processor_class: Any) -> Any:
    """The processor class without its video part, under the same name; it keeps that part's settings and saves them again.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/processing_utils.py
    (`ProcessorMixin.get_attributes` and `from_args_and_dict`), 5.23.0. Can go when transformers' processors load their video
    part on first use, or without torchvision.
    """

    class ImageProcessor(processor_class):  # type: ignore[misc]  # a class known at run time only
        video_settings: Any = None
        # SmolVLM reads these two when it renders a template, videos or not.
        video_processor = types.SimpleNamespace(num_frames=0, fps=0)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != VIDEO_PART]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: Any, **kwargs: Any) -> Any:
            settings = processor_dict.get(VIDEO_PART)
            processor = super().from_args_and_dict(args, {**processor_dict, VIDEO_PART: None}, **kwargs)
            processor.video_settings = settings
            return processor

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            if processor.video_settings is None:  # older models keep them in a file of their own
                processor.video_settings = read_optional_json(pretrained_model_name_or_path, VIDEO_SETTINGS_FILE)
            return processor

        def to_dict(self) -> dict[str, Any]:
            settings: dict[str, Any] = super().to_dict()
            settings.pop("video_settings", None)
            return {**settings, VIDEO_PART: self.video_settings} if self.video_settings else settings

    ImageProcessor.__name__ = processor_class.__name__
    ImageProcessor.__qualname__ = processor_class.__qualname__
    return ImageProcessor


def image_options(processor: Any) -> Mapping[str, Any]:
    """What a processor passes to its image processor beside a text, by default; the image processor then gives torch's tensors.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/processing_utils.py
    (`ProcessorMixin._merge_kwargs`), 5.23.0. Can go when processors take images without a text.
    """
    options = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors="pt")
    images: Mapping[str, Any] = options["images_kwargs"]
    return images


def best_resolution(height: int, width: int, resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Height and width of the canvas of tiles that LLaVA-NeXT takes for a picture, out of `resolutions` [n, 2] (pixels).

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/image_processing_utils.py
    (`select_best_resolution`, the function that the models themselves call), 5.23.0. Can go when the processor counts an
    image's tokens.
    """
    from transformers.image_processing_utils import select_best_resolution

    best_height, best_width = select_best_resolution((height, width), list(resolutions))
    return best_height, best_width


# What image processors do to a picture's size; of heights and widths in pixels


def number_of_tiles(image_processor: Any, height: int, width: int, options: Mapping[str, Any]) -> int:
    """How many tiles InternVL's and Aya Vision's image processor cuts a picture into, with the whole picture.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/got_ocr2/image_processing_pil_got_ocr2.py
    (`get_number_of_image_patches`), 5.23.0. This and the next three can go when processors write a prompt from images' sizes.
    """
    tiles: int = image_processor.get_number_of_image_patches(height, width, dict(options))
    return tiles


def qwen_resize(height: int, width: int, *, factor: int, frames: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size to which the image processor of Qwen2-VL to Qwen3-VL scales a picture. Raises ValueError for one too long.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/qwen2_vl/image_processing_pil_qwen2_vl.py
    (`smart_resize`), 5.23.0.
    """
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

    resized: tuple[int, int] = image_processing_pil_qwen2_vl.smart_resize(
        height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels
    )
    return resized


def glm_resize(height: int, width: int, *, factor: int, frames: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The same of GLM-4.1V and GLM-4.6V, whose limits are of all `frames` that a picture stands for.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/glm4v/image_processing_pil_glm4v.py
    (`smart_resize`), 5.23.0.
    """
    from transformers.models.glm4v import image_processing_pil_glm4v

    resized: tuple[int, int] = image_processing_pil_glm4v.smart_resize(
        frames, height, width, temporal_factor=frames, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels
    )
    return resized


def idefics_resize(height: int, width: int, longest_side: int) -> tuple[int, int]:
    """The size to which Idefics3's and SmolVLM's image processor scales a picture before it is cut.

    https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/idefics3/image_processing_pil_idefics3.py
    (`get_resize_output_image_size`), 5.23.0.
    """
    import numpy as np
    from transformers.models.idefics3 import image_processing_pil_idefics3

    picture = np.broadcast_to(np.uint8(0), (3, height, width))
    resized: tuple[int, int] = image_processing_pil_idefics3.get_resize_output_image_size(picture, longest_side)
    return resized
