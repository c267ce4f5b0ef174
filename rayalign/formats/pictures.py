"""What looks like a picture, by a column's name or by its value: such a column must not be left out without a word.

`cells` asks it of messages, and `columns` of the columns that no record format reads.
"""

import re
from collections.abc import Mapping
from typing import Any

SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*")
"""First bytes of the picture formats that are decoded."""

BASE64_SIGNATURES = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")
"""How base64 text of PNG, JPEG, WebP and GIF begins."""

LONGEST_NAME, LONGEST_PATH, SHORTEST_BASE64 = 100, 4096, 64

AFFIXES = r"(?:(?:path|url|uri|file|name|byte|list|link|ref|src|data|local|input|main|base64|b64)s?|\d)*"
PICTURE_NAME = re.compile(rf"{AFFIXES}(?:image|img|picture|pic|photo|screenshot)s?{AFFIXES}")
"""A column's name in small letters, without what stands between its words."""

VIDEO_OR_AUDIO_NAME = re.compile(rf"{AFFIXES}(?:video|audio)s?{AFFIXES}")

PICTURE_PATH = re.compile(
    r"(?:(?:\w+:/)?\.{0,2}/[^\n<>]*|[^\s<>]+)\.(?:png|jpe?g|webp|gif|bmp|tiff?)(?:[?#]\S*)?", re.IGNORECASE
)
"""Where it begins like a path or a URL, with spaces too."""


def looks_like_picture(name: str, value: Any) -> bool:
    """Whether the column or key `name` with this value (of Python's own types) seems to name or hold pictures."""
    if isinstance(value, str):
        value = value.strip()
    if not value or not isinstance(value, (str, bytes, list, Mapping)):
        return False
    if _is_called(PICTURE_NAME, name):
        return True
    return all(map(_is_picture, value)) if isinstance(value, list) else _is_picture(value)


def names_video_or_audio(name: str) -> bool:
    """Whether the column or key `name` seems to name or hold videos or sounds."""
    return _is_called(VIDEO_OR_AUDIO_NAME, name)


def _is_called(pattern: re.Pattern[str], name: str) -> bool:
    words = re.sub(r"[\W_]+", "", name[: LONGEST_NAME + 1].lower())
    return len(words) <= LONGEST_NAME and pattern.fullmatch(words) is not None


def _is_picture(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_is_picture(value.get(key)) for key in ("bytes", "path", "url"))
    if isinstance(value, bytes):
        return value.startswith(SIGNATURES)
    if not isinstance(value, str):
        return False
    if value.startswith("data:image/") or (len(value) > SHORTEST_BASE64 and value.startswith(BASE64_SIGNATURES)):
        return True
    return len(value) <= LONGEST_PATH and PICTURE_PATH.fullmatch(value) is not None
