"""Pictures of every kind that a data set may hold: sound ones of odd kinds, and those that are broken, lie about their size, or
grow when they are decoded.
"""

import functools
import io
import random
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from PIL import Image, PngImagePlugin

LARGEST_SIDE = 8000
"""Of a square picture just below the limit of pixels."""


def written(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def zeros(num_bytes: int) -> bytes:
    """As many zeros, compressed; they are never in memory together."""
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    parts = [packer.compress(block) for _ in range(num_bytes // 2**20)]
    return b"".join([*parts, packer.compress(bytes(num_bytes % 2**20)), packer.flush()])


def png(width: int, height: int, *, depth: int = 1, colour: int = 0, extra: bytes = b"", data: bytes | None = None) -> bytes:
    """A PNG file of zeros with this head; `colour` is the colour type of the format."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    line = 1 + (width * depth * samples + 7) // 8
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(3 * 2 ** min(depth, 8))) if colour == 3 else b""
    content = zeros(line * height) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + head + palette + extra + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def tiff(*tags: tuple[int, int, int, int], data: bytes = b"", next_directory: int = 0) -> bytes:
    """A TIFF file with one directory of (tag, type, count, value), behind which `data` stands."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_directory) + data


def tiff_of(width: int, height: int, *, compression: int = 1, data: bytes = bytes(64), **changes: int) -> bytes:
    """An 8-bit grey TIFF file whose pixels are `data`, whatever its head says."""
    start = 8 + 2 + 9 * 12 + 4
    tags = {
        256: (4, width),
        257: (4, height),
        258: (3, 8),
        259: (3, compression),
        262: (3, 1),
        273: (4, start),
        277: (3, 1),
        278: (4, height),
        279: (4, changes.get("strip_bytes", len(data))),
    }
    return tiff(*((tag, kind, 1, value) for tag, (kind, value) in tags.items()), data=data)


def bmp(width: int, height: int, *, bits: int = 24, compression: int = 0, data: bytes = bytes(64)) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 1, 1, 0, 0)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(data), 0, 0, 14 + len(head)) + head + data


def gif(width: int, height: int, frame: tuple[int, int] | None = None) -> bytes:
    """A GIF file with a screen of one size, and a frame of another."""
    inner = frame or (width, height)
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF0, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, *inner, 0) + b"\x02\x03\x4c\x01\x00\x00;"


def photo(width: int = 48, height: int = 36, *, seed: int = 0) -> Image.Image:
    draw = random.Random(seed)
    return Image.frombytes("RGB", (width, height), draw.randbytes(3 * width * height))


def jpeg_of_many_scans(scans: int) -> bytes:
    """A progressive JPEG file whose last scan comes again and again: each is decoded over the whole picture."""
    content = written(Image.new("L", (2000, 2000), 128), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def sound_pictures() -> Mapping[str, bytes]:
    """Pictures that can be trained on, of every kind that is read."""
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = image.convert("P")
    frames = [photo(seed=seed) for seed in range(3)]
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 5000, zip=True)
    grey16 = Image.frombytes("I;16", (48, 36), random.Random(1).randbytes(2 * 48 * 36))
    return {
        "rgb.png": written(image, "PNG"),
        "grey.png": written(image.convert("L"), "PNG"),
        "bits.png": written(image.convert("1"), "PNG"),
        "palette.png": written(palette, "PNG"),
        "palette_transparent.png": written(palette, "PNG", transparency=bytes(range(256))),
        "one_transparent.png": written(image, "PNG", transparency=(1, 2, 3)),
        "rgba.png": written(image.convert("RGBA"), "PNG"),
        "grey_alpha.png": written(image.convert("LA"), "PNG"),
        "grey16.png": written(grey16, "PNG"),
        "commented.png": written(image, "PNG", pnginfo=text),
        "animated.png": written(image, "PNG", save_all=True, append_images=frames),
        "photo.jpg": written(image, "JPEG"),
        "progressive.jpg": written(image, "JPEG", progressive=True),
        "grey.jpg": written(image.convert("L"), "JPEG"),
        "cmyk.jpg": written(image.convert("CMYK"), "JPEG"),
        "turned.jpg": written(image, "JPEG", exif=exif),
        "two.mpo.jpg": written(image, "MPO", save_all=True, append_images=frames[:1]),
        "photo.webp": written(image, "WEBP"),
        "animated.webp": written(image, "WEBP", save_all=True, append_images=frames),
        "transparent.webp": written(image.convert("RGBA"), "WEBP", lossless=True),
        "palette.gif": written(palette, "GIF"),
        "animated.gif": written(image, "GIF", save_all=True, append_images=frames),
        "photo.bmp": written(image, "BMP"),
        "palette.bmp": written(palette, "BMP"),
        "photo.tiff": written(image, "TIFF"),
        "packed.tiff": written(image, "TIFF", compression="tiff_lzw"),
        "cmyk.tiff": written(image.convert("CMYK"), "TIFF"),
        "grey16.tiff": written(grey16, "TIFF"),
        "lab.tiff": written(image.convert("L"), "TIFF", compression="jpeg"),
        "pages.tiff": written(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "a_png_called.jpg": written(image, "PNG"),
        "no_suffix": written(image, "JPEG"),
        "trailing_bytes.png": written(image, "PNG") + b"x" * 5000,
        "Größe 图 🍎.png": written(image, "PNG"),
    }


def hostile_pictures() -> Mapping[str, bytes]:
    """Pictures that can't be used: broken, empty, of other formats, or with more pixels than any limit allows."""
    image = photo()
    whole = {suffix: written(image, format) for suffix, format in (("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"))}
    cut = {
        f"cut_{part}.{suffix}": content[: len(content) * part // 8] for suffix, content in whole.items() for part in (1, 2, 4)
    }
    wrong = {f"magic.{suffix}": b"\0\0\0\0" + content[4:] for suffix, content in whole.items()}
    return {
        **cut,
        **wrong,
        "empty.png": b"",
        "one_byte.png": b"\x89",
        "text.png": b"not a picture",
        "html.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "page.pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "photo.ppm": b"P6 100000 100000 255\n" + bytes(64),
        "photo.ico": written(image, "ICO"),
        "photo.tga": written(image, "TGA"),
        "photo.jp2": written(image, "JPEG2000"),
        "photo.avif": written(image, "AVIF"),
        "no_width.png": png(0, 9, data=zeros(9)),
        "no_height.png": png(9, 0, data=zeros(9)),
        "too_many_pixels.png": png(9000, 9000),
        "huge_head.png": png(2**31 - 1, 2**31 - 1, data=zeros(64)),
        "no_pixels.png": png(500, 500, data=b""),
        "garbled_pixels.png": png(500, 500, data=b"\x78\x9c" + bytes(range(256))),
        "wrong_depth.png": png(9, 9, depth=1).replace(b"\x01\x00\x00\x00\x00", b"\x07\x00\x00\x00\x00", 1),
        "line.png": png(1, 60_000),
        "row.png": png(60_000, 1),
        "no_frame.gif": b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b";",
        "huge_screen.gif": gif(65_535, 65_535),
        "huge.bmp": bmp(2**30, 2**30),
        "negative.bmp": bmp(-9, -(2**31)),
        "runs.bmp": bmp(9000, 9000, bits=8, compression=1, data=b"\xff\x00" * 64),
        "huge.tiff": tiff_of(2**31, 2**31),
        "many_pixels.tiff": tiff_of(9000, 9000),
        "looped.tiff": tiff((256, 4, 1, 9), (257, 4, 1, 9), next_directory=8),
        "huge_tag.tiff": tiff((256, 4, 1, 9), (257, 4, 1, 9), (700, 1, 2**31 - 1, 8)),
        "float.tiff": written(Image.new("F", (9, 9)), "TIFF"),
        "profile_bomb.jpg": whole["jpg"][:2] + b"\xff\xe1" + struct.pack(">H", 65_535) + b"Exif\0\0" + bytes(64),
        "scans.jpg": jpeg_of_many_scans(3000),
        "riff.webp": b"RIFF" + struct.pack("<I", 2**31) + b"WEBPVP8 " + struct.pack("<I", 2**31) + bytes(64),
        "huge.webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xff" * 6,
        "long_comment.png": png(9, 9, extra=chunk(b"zTXt", b"a\0\0" + zeros(2**26))),
    }


@functools.cache
def large_pictures(side: int) -> Mapping[str, bytes]:
    """Small files that are large once they are decoded, and still within the limits, or with more in them than their pixels."""
    return {
        "bits.png": png(side, side),
        "grey16.png": png(side, side, depth=16),
        "rgb.png": png(side, side, depth=8, colour=2),
        "rgb16.png": png(side, side, depth=16, colour=2),
        "rgba.png": png(side, side, depth=8, colour=6),
        "grey_alpha.png": png(side, side, depth=8, colour=4),
        "palette_transparent.png": png(side, side, depth=1, colour=3, extra=chunk(b"tRNS", b"\0")),
        "profile.png": png(9, 9, extra=chunk(b"iCCP", b"a\0\0" + zeros(2**26))),
        "many_chunks.png": png(9, 9, extra=chunk(b"tEXt", b"a\0b") * 20_000),
        "behind_its_pixels.png": png(9, 9, data=zeros(2**26)),
        "white.jpg": written(Image.new("RGB", (side, side), "white"), "JPEG"),
        "progressive.jpg": written(Image.new("RGB", (side, side), "white"), "JPEG", progressive=True),
        "cmyk.jpg": written(Image.new("CMYK", (side, side)), "JPEG"),
        "white.webp": written(Image.new("RGB", (side, side), "white"), "WEBP", lossless=True),
        "white.gif": written(Image.new("P", (side, side)), "GIF"),
        "frame_beyond.gif": gif(9, 9, (side, side)),
        "many_frames.gif": written(
            Image.new("P", (500, 500)),
            "GIF",
            save_all=True,
            append_images=[Image.new("P", (500, 500), i) for i in range(1, 60)],
        ),
        "grey16.tiff": written(Image.new("I;16", (side, side)), "TIFF", compression="tiff_lzw"),
        "grey32.tiff": written(Image.new("I", (side, side)), "TIFF", compression="tiff_lzw"),
        "rgba.tiff": written(Image.new("RGBA", (side, side)), "TIFF", compression="tiff_lzw"),
        "long.png": png(200, 2000),
    }
