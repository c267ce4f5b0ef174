"""A model's processor (of a language model: its tokenizer), and images as the model takes them.

Only images are read here, never videos, so a processor works without torchvision, which the video part of some needs.
"""

import functools
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from rayalign.formats.records import RecordError
from rayalign.models.family import Family, ImageInputs

VIDEO_PART = "video_processor"
MAX_RESIZED_PIXELS = 2**24
"""Pixels of one picture after the processor's resize; 200 MB in float32."""


def load_processor(model: str, *, trust_remote_code: bool = False) -> Any:
    """The processor of a folder or hub id; without torchvision one that has no video part, but saves its settings again."""
    if not is_torchvision_available():
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        processor_class: Any = PROCESSOR_MAPPING.get(type(config), None)
        if processor_class is not None and VIDEO_PART in processor_class.get_attributes():
            return _without_video(processor_class).from_pretrained(model)
    return AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a language model's processor is one."""
    return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


def check_resized(processor: Any, width: int, height: int) -> None:
    """Raises RecordError for a picture that the processor would blow up: where only the shorter side is set, the longer one
    grows with it."""
    size = getattr(getattr(processor, "image_processor", None), "size", None) or {}
    shortest = size.get("shortest_edge") if "longest_edge" not in size else None
    if not shortest:
        return
    longest = max(width, height) * shortest // min(width, height)
    if shortest * longest > MAX_RESIZED_PIXELS:
        raise RecordError(
            "image too long",
            f"a picture of {width} x {height} pixels would be resized to {shortest} x {longest}; crop it",
            field="images",
        )


def process_images(
    processor: Any, family: Family, config: Any, images: Sequence[Image.Image], *, alone: Sequence[bool]
) -> ImageInputs:
    """The model's inputs for some images, each processed as the processor does it beside a text.

    `config` is the model's; `alone` says of each image whether its record has no other.
    """
    options = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors="pt")
    samples: list[Any] = list(images)
    if family.one_sample_an_image:
        samples = [[image] for image in images]
    elif family.features_by_company:
        samples = _by_company(images, alone)
    processed = processor.image_processor(samples, **options["images_kwargs"])
    tensors = {name: value for name, value in processed.items() if isinstance(value, torch.Tensor)}
    if family.features_by_company:
        tensors |= {name: tensors[name][: len(images)] for name in ("pixel_values", "image_sizes")}
    return describe_images(family, config, tensors)


def _by_company(images: Sequence[Image.Image], alone: Sequence[bool]) -> list[list[Image.Image]]:
    """A sample of one for each image that is alone, which come first, and one sample of all others. A single one of these is
    there twice, as it is in the record it comes from: its own twin is its company."""
    first = sum(alone)
    assert all(alone[:first]), "images that are alone come first"
    together = list(images[first:])
    samples = [[image] for image in images[:first]]
    return [*samples, together * 2 if len(together) == 1 else together] if together else samples


def describe_images(family: Family, config: Any, tensors: Mapping[str, Any]) -> ImageInputs:
    """The processor's image tensors with what the family knows of each image."""
    lengths = family.image_token_counts(config, tensors) if family.image_token_counts else []
    grids = family.image_grids(config, tensors) if family.image_grids else []
    return ImageInputs(tensors, tuple(lengths), tuple(grids))


@functools.cache
def _without_video(processor_class: Any) -> Any:
    """The processor class without its video part, under the same name."""

    class ImageProcessor(processor_class):  # type: ignore[misc]  # a class known at run time only
        # To go when transformers' processors load their video part on first use, or without torchvision.
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
            if processor.video_settings is None:
                processor.video_settings = _video_settings(pretrained_model_name_or_path)
            return processor

        def to_dict(self) -> dict[str, Any]:
            settings: dict[str, Any] = super().to_dict()
            settings.pop("video_settings", None)
            return {**settings, VIDEO_PART: self.video_settings} if self.video_settings else settings

    ImageProcessor.__name__ = processor_class.__name__
    ImageProcessor.__qualname__ = processor_class.__qualname__
    return ImageProcessor


def _video_settings(model: str) -> Any:
    """The settings of the video part where older models keep them: in a file of their own."""
    file = cached_file(
        model,
        "video_preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return json.loads(Path(file).read_text()) if file else None
