"""Lengths and images of a data set's pairs: from encoded records, or, where a model's tokenizer isn't at hand, from the records
themselves, by their characters."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from rayalign.config.config import Config
from rayalign.data.store import PreparedData
from rayalign.data.truncation import count_older_rounds, next_cut, without_oldest_round
from rayalign.estimate.advice import held_out_of
from rayalign.estimate.shapes import DataShapes, PairShape
from rayalign.estimate.vision import ImageLoad, VisionCosts
from rayalign.formats.columns import parse_renames, renamed, require_pictures_read
from rayalign.formats.parse import own_formats, parse_row
from rayalign.formats.records import Message, PreferenceRecord, RecordError, Responses, record_errors, require
from rayalign.images.fetch import check_pixels, fetch_images, image_hash, image_size, open_image
from rayalign.models.family import Family
from rayalign.models.processors import describe_images
from rayalign.sources.files import count_rows, read_rows
from rayalign.sources.several import require_records, resolve_datasets
from rayalign.storage import Store

logger = logging.getLogger(__name__)

LOOKED_AT = 1000
"""Records of a data set that are looked at; more would not change the figures."""
CHARACTERS_PER_TOKEN = 4.0
"""Assumed of Latin text, as is one token for every other character."""
TOKENS_PER_MESSAGE = 6
"""Assumed of chat templates: role and marks around a message."""


class ImageTokensUnknown(ValueError):
    """How many tokens an image becomes can't be told, of whichever record."""


class ImageLook:
    """Tells an image's load from its bytes; only its size matters, so that each size is processed once.

    `process` is the model's image processing. Raises ValueError where the family's features can't be counted beforehand.
    """

    def __init__(
        self,
        process: Callable[[Image.Image], Mapping[str, Tensor]],
        family: Family,
        config: Any,
        costs: VisionCosts,
        *,
        max_pixels: int | None,
    ) -> None:
        self._process, self._family, self._config, self._costs = process, family, config, costs
        self._max_pixels = max_pixels
        self._known: dict[tuple[int, int], ImageLoad] = {}

    def __call__(self, content: bytes) -> ImageLoad:
        size = open_image(content, max_pixels=self._max_pixels).size
        if size not in self._known:
            inputs = self._process(Image.new("RGB", size))
            lengths = describe_images(self._family, self._config, inputs).lengths
            self._known[size] = self._costs.load(inputs, sum(lengths))
        return self._known[size]


def measured(
    training: PreparedData, held_out: int, *, image_token_id: int | None, look: ImageLook | None, looked_at: int = LOOKED_AT
) -> DataShapes:
    """Of encoded records: exact lengths of `looked_at` of them and the longest. `held_out` of them are not trained on."""
    counts = training.token_counts()
    rows = np.unique(np.append(_spread(counts.num_rows, looked_at), counts.row_tokens(np.arange(counts.num_rows)).argmax()))
    table = training.reader().read(rows)
    pairs = []
    for row in table.to_pylist():
        distinct = dict(zip(row["image_hashes"], row["images"], strict=True))
        image_tokens = row["prompt_ids"].count(image_token_id)
        loads = tuple(look(content) for content in distinct.values()) if look else ()
        prompt, chosen, rejected = (len(row[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected"))
        pairs.append(PairShape(prompt, chosen, rejected, image_tokens, loads))
    seen = "" if len(pairs) == counts.num_rows else f"; {len(pairs)} of them looked at, among these the longest"
    return DataShapes(tuple(pairs), counts.num_rows, held_out, held_out, f"encoded with the model's own processor{seen}")


def estimated(config: Config, look: ImageLook | None) -> DataShapes:
    """Of records as they are: lengths of texts by their characters, of images by the processor's rules.

    Raises ValueError where a data set can't be found or holds no usable record.
    """
    parse_renames(config.data.columns, own_formats(config.plugins))
    pairs: list[PairShape] = []
    total, unusable, too_long = 0, 0, 0
    for dataset in resolve_datasets(config.data.dataset):
        counts = [count_rows(file) for file in dataset.files]
        require_records(dataset, sum(counts))
        total += dataset.num_drawn(sum(counts))
        first = 0
        picked = _spread(sum(counts))
        for file, count in zip(dataset.files, counts, strict=True):
            rows = [int(row - first) for row in picked if first <= row < first + count]
            first += count
            for number, content in read_rows(file, None, rows):
                try:
                    pair = _estimate(content, Store(file.location).parent, config, look)
                except RecordError as error:
                    if not unusable:
                        logger.warning(
                            "A record that can't be used: %s, row %d: %s (%s)", file.name, number, error.reason, error
                        )
                    unusable += 1
                    continue
                too_long += pair is None
                pairs += [] if pair is None else [pair]
    if not pairs:
        raise ValueError(
            f"--dataset {' '.join(config.data.dataset)}: none of the records looked at can be used ({unusable} are unusable, "
            f"{too_long} longer than --max_length {config.data.max_length})."
        )
    seen = len(pairs) + unusable + too_long
    left_out = [f"{n} of {seen} left out as {why}" for n, why in ((unusable, "unusable"), (too_long, "too long")) if n]
    origin = (
        f"estimated, since there is no tokenizer: {CHARACTERS_PER_TOKEN:g} Latin characters or 1 other one a token, "
        f"{TOKENS_PER_MESSAGE} tokens around a message; image tokens by the processor's rules"
    )
    total = max(1, round(total * len(pairs) / seen))
    origin = "; ".join([origin, *left_out])
    if not config.data.val_dataset:
        held_out = held_out_of(config, total=total)
        return DataShapes(tuple(pairs), total, held_out, held_out, origin)
    others = resolve_datasets(config.data.val_dataset)
    evaluated = sum(dataset.num_drawn(sum(count_rows(file) for file in dataset.files)) for dataset in others)
    return DataShapes(tuple(pairs), total, 0, evaluated, origin)


def estimated_tokens(text: str) -> int:
    """Tokens of a text, by its characters."""
    latin = sum(ord(character) < 0x250 for character in text)
    return round(latin / CHARACTERS_PER_TOKEN + len(text) - latin)


def _spread(count: int, looked_at: int = LOOKED_AT) -> Any:
    """At most `looked_at` of `count` row numbers, evenly spread."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, looked_at)).round().astype(np.int64)) if count else np.empty(0, np.int64)
    )


def _estimate(row: Any, folder: Store, config: Config, look: ImageLook | None) -> PairShape | None:
    """The pair as --truncation_strategy leaves it; None where it goes. Raises RecordError where it can't be used."""
    if isinstance(row, RecordError):
        raise row
    own = own_formats(config.plugins)
    renames = parse_renames(config.data.columns, own)
    root = Store.at(config.data.image_root) if config.data.image_root else None
    with record_errors(passing=(OSError,)):
        row = renamed(row, renames)
        record = parse_row(row, id="", own=own)
        if look:
            require_pictures_read(row, record, own)
        require(record, config.algorithm.needs.responses)
        contents = fetch_images(record.images, folder=folder, image_root=root, allow_urls=config.data.allow_image_urls)
        check_pixels([image_size(content) for content in contents], max_pixels=config.data.max_pixels)
    messages, limit, strategy = list(record.messages), config.data.max_length, config.data.truncation_strategy
    while True:
        with record_errors(passing=(OSError, ImageTokensUnknown)):  # a processor refuses pictures that it can't resize
            pair = _shape(messages, contents, _responses(record, config.algorithm.needs.responses), look)
        response, rounds = max(pair.chosen, pair.rejected), count_older_rounds(messages)
        match next_cut(pair.prompt, response, older_rounds=rounds, max_length=limit, strategy=strategy):
            case "nothing":
                return pair
            case "oldest round":
                messages, contents = without_oldest_round(messages, contents)
            case "responses":
                room = limit - pair.prompt
                return dataclasses.replace(pair, chosen=min(pair.chosen, room), rejected=min(pair.rejected, room))
            case "record" | "run":
                return None


def _shape(
    messages: Sequence[Message], contents: Sequence[bytes], responses: tuple[int, int], look: ImageLook | None
) -> PairShape:
    """The shape of a pair with these messages, images and numbers of response tokens."""
    loads = {image_hash(content): look(content) for content in contents} if look else {}
    if not all(load.features for load in loads.values()):
        raise ImageTokensUnknown(
            "How many tokens an image becomes is not known of this kind of model without its processor. Give the model's "
            "folder, with its tokenizer."
        )
    image_tokens = sum(loads[image_hash(content)].features for content in contents) if look else 0
    text = sum(estimated_tokens(message.content) + TOKENS_PER_MESSAGE for message in messages)
    return PairShape(text + image_tokens, *responses, image_tokens, tuple(loads.values()))


def _responses(record: PreferenceRecord, responses: Responses) -> tuple[int, int]:
    """Tokens of both responses with their end marks, 0 for one that the row doesn't hold."""
    chosen = estimated_tokens(record.chosen) + 1
    if responses == "chosen" or record.rejected is None:
        return (0, chosen) if responses == "either" and record.label is False else (chosen, 0)
    return chosen, estimated_tokens(record.rejected) + 1
