"""Records as conversations on the page: turns with their pictures at their place, the responses, the model's own answers."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from PIL import Image, ImageOps

from rayalign.formats.records import IMAGE_MARK
from rayalign.report.charts import Colour
from rayalign.report.markup import section

SHOWN_IMAGES = 4
SHOWN_CHARACTERS = 5000
THUMBNAIL_PIXELS = 256
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


@dataclass(frozen=True)
class Conversation:
    """A record to read: `turns` are (role, text) with `<image>` where a picture stands, `images` the pictures in that order,
    compressed, as stored. A response that the record doesn't have is an empty text."""

    turns: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Answers:
    """What the model said by itself, by record: at a step before the training and at one after it. `failed` says why it could
    say nothing; `gave_up` that the run had to start again by that, so that it is not asked any more."""

    before: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
    failed: str = ""
    gave_up: bool = False

    @property
    def records(self) -> tuple[str, ...]:
        """The records that have an answer, in order."""
        return tuple(dict.fromkeys([*self.before, *self.after]))


def answers_section(answers: Answers, conversations: Mapping[str, Conversation]) -> str:
    """The model's own answers beside the responses of the data, in the order of `conversations`; nothing without answers."""
    if answers.failed and not answers.records:
        return section("What the model itself answers", f"It could not be asked: {answers.failed}", "")
    cards = []
    for record, shown in conversations.items():
        if record in answers.records:
            sides: tuple[tuple[str, Colour, str], ...] = (
                ("chosen", "blue", shown.chosen),
                ("rejected", "orange", shown.rejected),
            )
            own = [(name, texts.get(record)) for name, texts in (("before", answers.before), ("after", answers.after))]
            responses = [response(f"{name} training", "grey", _said(text)) for name, text in own]
            responses += [response(name, colour, text_block(text)) for name, colour, text in sides if text]
            cards.append(card(f"<code>{escape(record)}</code>", shown, responses))
    if not cards:
        return ""
    lead = (
        "The likeliest token each time, for a few held-out prompts. Look for answers that got better in the way of the chosen "
        "responses, and that are still whole sentences about the picture."
    )
    if answers.failed:
        lead += f" The last ones could not be made: {answers.failed}"
    return section("What the model itself answers", lead, "".join(cards))


def card(header: str, shown: Conversation, responses: Sequence[str]) -> str:
    """A record: its turns one below the other, then the responses side by side. `header` and `responses` are markup."""
    sides = f'<div class="responses">{"".join(responses)}</div>'
    return f'<article class="pair"><header>{header}</header>{"".join(_turns(shown))}{sides}</article>'


def response(name: str, colour: Colour, content: str, note: str = "") -> str:
    """A response under its name; `content` is markup."""
    return f'<div class="response {colour}"><h4><b>{escape(name)}</b>{escape(note)}</h4>{content}</div>'


def text_block(text: str) -> str:
    """A text as it stands, cut where it is very long."""
    rest = len(text) - SHOWN_CHARACTERS
    more = f' <span class="soft">… and {rest:,} more characters</span>' if rest > 0 else ""
    return f'<div class="words" dir="auto">{escape(text[:SHOWN_CHARACTERS])}{more}</div>'


def thumbnail(content: bytes) -> str | None:
    """A data: URI of the image, at most 256 px wide and high, as JPEG; None where Pillow cannot read it."""
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            image.draft("RGB", (2 * THUMBNAIL_PIXELS, 2 * THUMBNAIL_PIXELS))
            turned = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    turned.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    flat = Image.new("RGB", turned.size, "white")
    flat.paste(turned, mask=turned)
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _said(text: str | None) -> str:
    """An answer; in words where there is none, or an empty one."""
    if text:
        return text_block(text)
    return f'<div class="words soft">{"(not asked)" if text is None else "(nothing: it ends at once)"}</div>'


def _turns(shown: Conversation) -> Iterator[str]:
    """Each turn under its role, its pictures where their marks stand; a mark without a picture stays text."""
    pictures = iter([_picture(content, number, len(shown.images)) for number, content in enumerate(shown.images, start=1)])
    for number, (role, text) in enumerate(shown.turns, start=1):
        first, *others = text.split(IMAGE_MARK)
        pieces = [(None, first), *((next(pictures, escape(IMAGE_MARK)), piece) for piece in others)]
        if number == len(shown.turns):
            pieces += [(picture, "") for picture in pictures]
        parts = []
        for picture, piece in pieces:
            parts.append(f'<div class="picture">{picture}</div>' if picture else "")
            parts.append(text_block(piece.strip("\n")) if piece.strip() else "")
        yield f'<div class="turn {escape(role)}"><h4>{escape(role)}</h4><div class="said">{"".join(parts)}</div></div>'


def _picture(content: bytes, number: int, total: int) -> str:
    name = f"picture {number} of {total}"
    if number > SHOWN_IMAGES:
        return f'<span class="missing">{name} is not shown</span>'
    source = thumbnail(content)
    return f'<img src="{source}" alt="{name}">' if source else f'<span class="missing">{name} cannot be read</span>'
