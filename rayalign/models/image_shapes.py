"""What a processor writes in the place of images, told from their sizes: no pixel is resized for it.

A processor asks its image processor for pixels and for their shape, and writes by the shape alone. Here something else answers
in the image processor's place, by a rule for each kind of image processor that transformers has; everything about the text
stays the processor's own. Processors with other parts, or with settings that a rule does not know, are left as they are.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayalign.models.compat import glm_resize, idefics_resize, ids_only, number_of_tiles, qwen_resize

Size = tuple[int, int]
"""Height and width in pixels."""

Settings = Callable[[str], Any]
"""The image processor's setting of a name, as it holds for one call."""

Rule = Callable[[Any, Settings, Sequence[Size]], Mapping[str, Any]]
"""What an image processor gives for the images of one sample, in their sizes; pixels where their shape is read, all alike."""

TRIED_SIZES: tuple[Size, ...] = ((96, 64), (40, 150))
"""One near a square, and a long one."""

WITHOUT_EFFECT = {"add_special_tokens", "padding", "padding_side", "return_tensors", "return_token_type_ids"}
"""Options of processors to their tokenizer; but for the first, they change nothing in the ids of a single text."""


class ShapesOnly:
    """Stands in for an image processor within a processor, and answers by a rule from the sizes of images."""

    def __init__(self, image_processor: Any, rule: Rule) -> None:
        self._image_processor, self._rule = image_processor, rule

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)

    def __call__(self, images: Any, **options: Any) -> Mapping[str, Any]:
        def setting(name: str) -> Any:
            return options[name] if options.get(name) is not None else getattr(self._image_processor, name)

        return self._rule(self._image_processor, setting, _sizes_of(images))


class IdsOnly:
    """Stands in for a tokenizer within a processor that needs nothing but the ids of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids_of = ids_only(tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        if len(text) == 1 and not options.get("return_token_type_ids") and options.keys() <= WITHOUT_EFFECT:
            return {"input_ids": self._ids_of(text, add_special_tokens=options["add_special_tokens"])}
        inputs: Mapping[str, Any] = self._tokenizer(text, **options)
        return inputs


class ShapeProcessor:
    """A processor for prompts with images of given sizes."""

    def __init__(self, processor: Any, rule: Rule, tokenizer: Any) -> None:
        self._processor = copy.copy(processor)
        self._processor.tokenizer = tokenizer
        self._processor.image_processor = ShapesOnly(processor.image_processor, rule)

    def __call__(self, prompt: str, sizes: Sequence[Size], *, add_special_tokens: bool) -> Mapping[str, Any]:
        """The processor's output for a prompt with its images, as arrays [1, ...]; instead of pixels there is at most an array
        of their shape."""
        images = [_blank(size) for size in sizes]
        inputs: Mapping[str, Any] = self._processor(
            text=[prompt], images=[images], add_special_tokens=add_special_tokens, return_tensors="np"
        )
        return inputs


def shape_processor(processor: Any, image_mark: str) -> ShapeProcessor | None:
    """What writes prompts as `processor` does, from sizes alone; None where that isn't known for this processor, or where it
    turns out wrong for a trial. `image_mark` stands for an image in a prompt."""
    kind = type(getattr(processor, "image_processor", None))
    rule = RULES.get(kind.__name__.removesuffix("Fast").removesuffix("Pil"))
    if rule is None or not kind.__module__.startswith("transformers."):
        return None
    own = processor.tokenizer
    tried = (ShapeProcessor(processor, rule, tokenizer) for tokenizer in (IdsOnly(own), own))
    return next((by_shape for by_shape in tried if _writes_the_same(by_shape, processor, image_mark)), None)


def _writes_the_same(by_shape: ShapeProcessor, processor: Any, image_mark: str) -> bool:
    """Whether a trial gives the same ids as the processor itself."""
    try:
        for height, width in TRIED_SIZES:
            image = np.zeros((height, width, 3), np.uint8)
            true = processor(text=[image_mark], images=[[image]], add_special_tokens=False, return_tensors="np")
            told = by_shape(image_mark, [(height, width)], add_special_tokens=False)
            if not np.array_equal(true["input_ids"], told["input_ids"]):
                return False
    except Exception:  # noqa: BLE001 - settings that no rule knows; what the processor itself refuses it will refuse again
        return False
    return True


def _sizes_of(images: Any) -> list[Size]:
    """Of images in a list, or in lists of such."""
    if isinstance(images, np.ndarray):
        return [(images.shape[0], images.shape[1])]
    return [size for image in images for size in _sizes_of(image)]


def _blank(size: Size) -> NDArray[np.uint8]:
    """A black picture [height, width, 3] of a single byte."""
    return np.broadcast_to(np.uint8(0), (*size, 3))


def _pixels(*shape: int) -> NDArray[np.float32]:
    """As many pixels as the shape says, all ones, in the place of one."""
    return np.broadcast_to(np.float32(1), shape)


# The rules


def _one_square(images: Any, setting: Settings, sizes: Sequence[Size]) -> Mapping[str, Any]:
    return {"pixel_values": _pixels(len(sizes), 3, *_output_size(images, setting))}


def _llava_next(images: Any, setting: Settings, sizes: Sequence[Size]) -> Mapping[str, Any]:
    tiles = _pixels(len(sizes), 1, 3, *_output_size(images, setting))
    return {"pixel_values": tiles, "image_sizes": np.array(sizes)}


def _llava_onevision(images: Any, setting: Settings, sizes: Sequence[Size]) -> Mapping[str, Any]:
    return {**_llava_next(images, setting, sizes), "batch_num_images": np.array([len(sizes)])}


def _output_size(images: Any, setting: Settings) -> Size:
    """Of every picture, whatever its own size: where it is cropped, or resized to a height and a width. Raises KeyError where
    its proportions are kept."""
    if getattr(images, "do_center_crop", None):
        size = setting("crop_size")
        return size["height"], size["width"]
    size = dict(setting("size"))
    return size["height"], size["width"]


def _tiles(images: Any, setting: Settings, sizes: Sequence[Size]) -> Mapping[str, Any]:
    options = {name: setting(name) for name in ("crop_to_patches", "min_patches", "max_patches")}
    tiles = [number_of_tiles(images, height, width, options) for height, width in sizes]
    return {"pixel_values": _pixels(sum(tiles), 1, 1, 1), "num_patches": np.array(tiles)}


def _patch_grid(resize: Callable[..., Size]) -> Rule:
    """Of image processors whose pictures keep about their proportions and size; `resize` rounds them to whole patches."""

    def rule(images: Any, setting: Settings, sizes: Sequence[Size]) -> Mapping[str, Any]:
        patch, limits, frames = setting("patch_size"), setting("size"), setting("temporal_patch_size")
        pixels = {"min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}
        grids = []
        for size in sizes:
            height, width = resize(*size, factor=patch * setting("merge_size"), frames=frames, **pixels)
            grids.append([1, height // patch, width // patch])
        return {"image_grid_thw": np.array(grids)}

    return rule


def _rows_and_columns(images: Any, setting: Settings, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """Idefics3's and SmolVLM's: scaled to one longest side, then up to whole tiles, of which a picture in one piece has no
    rows."""
    tile, longest = setting("max_image_size")["longest_edge"], setting("size")["longest_edge"]
    rows, columns = [], []
    for size in sizes:
        lines, across = _whole_tiles(idefics_resize(*size, longest), tile) if setting("do_image_splitting") else (1, 1)
        is_cut = lines * across > 1
        rows.append(lines if is_cut else 0)
        columns.append(across if is_cut else 0)
    tiles = sum(lines * across + 1 for lines, across in zip(rows, columns, strict=True))
    return {"pixel_values": np.ones((1, tiles, 1, 1, 1), np.float32), "rows": [rows], "cols": [columns]}


def _whole_tiles(size: Size, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles that a picture is scaled up to: along its longer side first, the other one with it."""
    height, width = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = int(width / ratio)
    else:
        height = math.ceil(height / tile) * tile
        width = int(height * ratio)
    return math.ceil(height / tile), math.ceil(width / tile)


def _whole_picture(images: Any, setting: Settings, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """Gemma 3's: its processor asks for no crops (pan and scan)."""
    return {"pixel_values": _pixels(len(sizes), 1, 1, 1), "num_crops": np.zeros(len(sizes), int)}


RULES: Mapping[str, Rule] = {
    "CLIPImageProcessor": _one_square,
    "SiglipImageProcessor": _one_square,
    "LlavaNextImageProcessor": _llava_next,
    "LlavaOnevisionImageProcessor": _llava_onevision,
    "GotOcr2ImageProcessor": _tiles,
    "Qwen2VLImageProcessor": _patch_grid(qwen_resize),
    "Glm4vImageProcessor": _patch_grid(glm_resize),
    "Glm46VImageProcessor": _patch_grid(glm_resize),
    "Idefics3ImageProcessor": _rows_and_columns,
    "SmolVLMImageProcessor": _rows_and_columns,
    "Gemma3ImageProcessor": _whole_picture,
}
"""By the name of transformers' image processor, whichever library it resizes with."""
