"""A model's processor (of a language model: its tokenizer), and images as the model takes them.

Only images are read here, never videos, so a processor is loaded without its video part, which may need torchvision or a file
that the model's folder lacks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase

from rayalign.downloads import model_folder
from rayalign.formats.records import RecordError
from rayalign.models.compat import has_video_part, image_options, processor_class, told_files, without_video_part
from rayalign.models.family import Family, ImageInputs

MAX_RESIZED_PIXELS = 2**24
"""Pixels of one picture after the processor's resize; 200 MB in float32."""


def load_processor(model: str, *, folder: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of a folder, URL or hub id without its video part, whose settings it saves again. Its files may lie in
    another `folder` than the model's. Raises ValueError where they are not there, or are damaged."""
    model = model_folder(model, weights=False)
    with told_files(folder or model):
        own_class = processor_class(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code))
        if own_class is not None and has_video_part(own_class):
            return without_video_part(own_class).from_pretrained(folder or model)
        return AutoProcessor.from_pretrained(folder or model, trust_remote_code=trust_remote_code)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a language model's processor is one."""
    return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


def check_resized(processor: Any, width: int, height: int) -> None:
    """Raises RecordError for a picture that the processor, or image processor, would blow up: where only the shorter side is
    set, the longer one grows with it."""
    size = getattr(getattr(processor, "image_processor", processor), "size", None) or {}
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
    samples: list[Any] = list(images)
    if family.one_sample_an_image:
        samples = [[image] for image in images]
    elif family.features_by_company:
        samples = _by_company(images, alone)
    processed = processor.image_processor(samples, **image_options(processor))
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
