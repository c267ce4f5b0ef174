"""Pictures of every mode as RGB, some lines at a time: beside the picture and the result, nothing is as large as they are."""

from collections.abc import Callable

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

BAND_PIXELS = 2**20

ALWAYS_RGB = ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Modes that every picture of can be converted."""


def require_rgb(image: Image.Image) -> None:
    """Raises what `to_rgb` would for a decoded picture."""
    if image.mode not in ALWAYS_RGB or "transparency" in image.info:
        to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB: on white where it is transparent, 16 bits a pixel scaled to 8. Raises ValueError for pixels without a
    known range."""
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, whose range isn't known")
    if isinstance(image, TiffImageFile) and image.mode.startswith("I") and not _has_16_bits(image):
        raise ValueError("pixels are integers, but not of 8 or 16 bits without a sign, so that their range isn't known")
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip instead of scaling
        return _by_bands(image, "L", _upper_byte).convert("RGB")
    if image.has_transparency_data:
        return _by_bands(image, "RGB", _on_white)
    return image.convert("RGB")


def _has_16_bits(image: TiffImageFile) -> bool:
    """Whether these pixels lie between 0 and 65535; mode I holds 32 bits and signs, and I;16 holds 12 bits as they are, too."""
    return image.mode != "I" and image.tag_v2.get(BITSPERSAMPLE) == (16,)


def _by_bands(image: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A picture made of what `change` makes of each band of lines."""
    whole = Image.new(mode, image.size)
    height = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, height):
        band = image.crop((0, top, image.width, min(top + height, image.height)))
        band.info = image.info  # a palette's or a colour's transparency stands there
        whole.paste(change(band), (0, top))
    return whole


def _upper_byte(band: Image.Image) -> Image.Image:
    return Image.fromarray(np.clip(np.asarray(band).astype(np.int32) >> 8, 0, 255).astype(np.uint8))


def _on_white(band: Image.Image) -> Image.Image:
    rgba = band.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
