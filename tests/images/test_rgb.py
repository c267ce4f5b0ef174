"""Pictures of every mode as RGB: the same pixels as if the whole picture were changed at once, in less memory."""

import io
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayalign.formats.records import RecordError
from rayalign.images import rgb
from rayalign.images.fetch import open_image
from rayalign.images.rgb import to_rgb
from tests.hostile.pictures import photo, png, sound_pictures


def at_once(image: Image.Image) -> Image.Image:
    """What `to_rgb` does in bands, written down for the whole picture."""
    if image.mode.startswith("I"):
        return Image.fromarray(np.clip(np.asarray(image).astype(np.int32) >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


@pytest.mark.parametrize("name", sound_pictures())
def test_a_picture_changed_in_bands_has_the_pixels_of_one_changed_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rgb, "BAND_PIXELS", 500)  # bands of 10 of the 36 lines
    image = Image.open(io.BytesIO(sound_pictures()[name]))
    assert to_rgb(image).tobytes() == at_once(image).tobytes()


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("RGBA", None), ("LA", None), ("PA", None), ("RGB", (1, 2, 3)), ("L", 3), ("P", 3), ("P", bytes(range(256))), ("I", None)],
)
def test_transparency_is_found_wherever_a_picture_keeps_it(
    mode: str, transparency: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rgb, "BAND_PIXELS", 500)
    image = photo().convert("L").convert(mode) if mode in ("PA", "I") else photo().convert(mode)
    if transparency is not None:
        image.info["transparency"] = transparency
    assert to_rgb(image).tobytes() == at_once(image).tobytes()


def test_sixteen_bits_a_pixel_take_no_memory_beside_the_picture() -> None:
    image = Image.open(io.BytesIO(png(2000, 4000, depth=16)))
    image.load()
    tracemalloc.start()
    to_rgb(image)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 30e6  # of NumPy; the picture at once, in 32 bits, would take 32 MB three times


def test_pixels_without_a_known_range_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point numbers"):
        to_rgb(Image.new("F", (2, 2)))


def tiff(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(values).save(content, "TIFF")
    return content.getvalue()


def of_12_bits() -> bytes:
    """A TIFF of 2 x 1 pixels of 12 bits: 0 and 4095."""
    tags = [
        (256, 4, 2),
        (257, 4, 1),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, 1),
        (279, 4, 3),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 12) + b"\x00\x0f\xff\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("content", [tiff(np.array([[0, 2**31 - 1]], np.int32)), of_12_bits()], ids=["32 bits", "12 bits"])
def test_integers_of_a_tiff_whose_range_is_not_known_are_refused(content: bytes) -> None:
    with pytest.raises(RecordError) as caught:
        open_image(content)
    assert caught.value.words.endswith(
        "pixels are integers, but not of 8 or 16 bits without a sign, so that their range isn't known"
    )


def test_sixteen_bits_of_a_tiff_are_scaled_as_those_of_a_png_are() -> None:
    values = np.array([[0, 2**15, 2**16 - 1]], np.uint16)
    content = io.BytesIO()
    Image.fromarray(values).save(content, "PNG")
    assert open_image(tiff(values)).tobytes() == open_image(content.getvalue()).tobytes()
    assert np.asarray(open_image(tiff(values)))[0, :, 0].tolist() == [0, 128, 255]
