"""From encoded pairs to tensors: one row `[prompt | chosen | rejected]` per pair, each distinct image once.

`encode` makes the pairs, `policy` runs the batches. The two responses share their prompt's row; `ops.attention` keeps them
apart, and the rejected one's positions start again where the prompt ended. Algorithms that compare the pairs with other rows
find these in the batch's companion, which `companions` makes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from rayalign.data.store import EncodedPair
from rayalign.models.family import Grid, ImageInputs, RowLayout
from rayalign.ops.rows import CHOSEN, PAD, PROMPT, REJECTED, RowLengths

ImageChange = Callable[[Sequence[Image.Image]], Sequence[Image.Image]]
"""What is done to opened images before the model's image processor sees them."""


class ImageProcessing(Protocol):
    """Turns images' bytes into the model's image inputs."""

    def __call__(self, contents: Sequence[bytes], alone: Sequence[bool], change: ImageChange | None = None) -> ImageInputs:
        """`alone` says of each image whether it is the only one of its record; `change` is applied to the opened images."""
        ...


@dataclass(frozen=True)
class PairBatch:
    """B pairs, padded to S tokens.

    Of the rows, [B, S] each: `input_ids`; `segment_ids` (PAD, PROMPT, CHOSEN, REJECTED); `position_in_sequence`, of the token
    in the conversation that it belongs to: prompt and one response; `position_ids`, or [3, B, S] where images have rows and
    columns (M-RoPE). `row_lengths`: of each row the prompt's tokens, and all.

    Of the N response tokens: `predictors` [N] is the flat index into [B * S] of the state that predicts the token, `targets`
    [N] its id, `response_ids` [N] the response it belongs to (chosen of pair b: b; rejected of pair b: B + b);
    `reference_logps` [N], float32, its log-probability under the reference, where that was computed beforehand. `last_token`
    [2B] is the flat index of each response's last token (of the prompt's, where there is no such response).

    Of the distinct images: `image_inputs`, the processor's output; `image_lengths`, how many features each has; `image_grids`
    (`ImageInputs`); `image_features`, [tokens, H] each, where they were made beforehand. `image_slots` says of each image of
    the prompts, in reading order, which of the distinct ones it is.
    """

    ids: tuple[str, ...]
    input_ids: Tensor
    segment_ids: Tensor
    position_in_sequence: Tensor
    row_lengths: RowLengths
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    response_ids: Tensor
    last_token: Tensor
    image_inputs: Mapping[str, Tensor]
    image_lengths: tuple[int, ...]
    image_grids: tuple[Grid, ...]
    image_slots: tuple[int, ...]
    margins: Tensor
    image_features: tuple[Tensor, ...] | None = None
    reference_logps: Tensor | None = None
    companion: "CompanionRows | None" = None

    @property
    def num_pairs(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding, the companion's included."""
        others = self.companion.batch.num_tokens if self.companion else 0
        return sum(tokens for _, tokens in self.row_lengths) + others

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on a device. Copies to a GPU from pinned memory have a stream of their own, and so run beside the
        computation of earlier batches."""
        if device.type != "cuda":
            return self._map_tensors(functools.cache(lambda tensor: tensor.to(device)))
        computing, copying = torch.cuda.current_stream(device), _copy_stream(device)

        def copy(tensor: Tensor) -> Tensor:
            with torch.cuda.stream(copying):
                copied = tensor.to(device, non_blocking=True)
            copied.record_stream(computing)  # its memory is free again when the computation is done with it
            return copied

        moved = self._map_tensors(functools.cache(copy))
        computing.wait_stream(copying)
        return moved

    def pin_memory(self) -> "PairBatch":
        """The same batch in page-locked memory."""
        return self._map_tensors(functools.cache(Tensor.pin_memory))

    def _map_tensors(self, move: Callable[[Tensor], Tensor]) -> "PairBatch":
        """`move` is cached: what a batch shares with its companion is moved once, and shared again."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: move(value) for name, value in values.items() if isinstance(value, Tensor)}
        images = {name: move(value) for name, value in self.image_inputs.items()}
        companion = self.companion
        if companion is not None:
            companion = CompanionRows(companion.batch._map_tensors(move), move(companion.rows))
        return dataclasses.replace(self, **moved, image_inputs=images, companion=companion)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class CompanionRows:
    """Other rows that an algorithm compares a batch's pairs with; row i of `batch` belongs to pair `rows[i]`."""

    batch: PairBatch
    rows: Tensor


def assemble(
    pairs: Sequence[EncodedPair],
    *,
    layout: RowLayout,
    process_images: Callable[[Sequence[bytes], Sequence[bool]], ImageInputs],
) -> PairBatch:
    """Builds the batch of some pairs; `process_images` is an `ImageProcessing`, which is given each distinct image once.

    A response without tokens has none in its row: SFT's rows are `[prompt | chosen]`. Raises ValueError where a prompt has
    other image tokens than its images have features.
    """
    contents, alone, slots = _distinct_images(pairs, by_company=layout.features_by_company)
    images = process_images(contents, alone) if contents else ImageInputs()
    _require_agreement(pairs, [images.lengths[slot] for slot in slots] if images.lengths else None, layout)
    rows, segments, in_sequence, positions = [], [], [], []
    predictors, targets, response_ids = [], [], []
    reference: list[float] = []
    last_token = [0] * (2 * len(pairs))
    longest = max(pair.num_tokens for pair in pairs)
    grids = iter([images.grids[slot] for slot in slots]) if images.grids else None
    for b, pair in enumerate(pairs):
        prompt = len(pair.prompt_ids)
        own_grids = None if grids is None else [next(grids) for _ in pair.image_hashes]
        row, segment, position = list(pair.prompt_ids), [PROMPT] * prompt, list(range(prompt))
        axes, after = _prompt_positions(pair.prompt_ids, own_grids, layout)
        for side, response in ((CHOSEN, pair.chosen_ids), (REJECTED, pair.rejected_ids)):
            response_id, start = b + (side - CHOSEN) * len(pairs), len(row)
            last_token[response_id] = b * longest + (start + len(response) if response else prompt) - 1
            if not response:
                continue
            # The last prompt state predicts a response's first token; each later one is predicted by the token before it.
            predictors += [b * longest + prompt - 1, *range(b * longest + start, b * longest + start + len(response) - 1)]
            targets += response
            response_ids += [response_id] * len(response)
            row += response
            segment += [side] * len(response)
            position += range(prompt, prompt + len(response))
            for axis in axes:
                axis += range(after, after + len(response))
        if pair.reference is not None:
            reference += [*pair.reference.chosen, *pair.reference.rejected]
        padding = longest - len(row)
        rows.append(row + [layout.pad_token_id] * padding)
        segments.append(segment + [PAD] * padding)
        in_sequence.append(position + [0] * padding)
        positions.append([axis + [0] * padding for axis in axes])
    position_ids = torch.tensor(positions).transpose(0, 1).contiguous()
    return PairBatch(
        ids=tuple(p.id for p in pairs),
        input_ids=torch.tensor(rows),
        segment_ids=torch.tensor(segments),
        position_in_sequence=torch.tensor(in_sequence),
        row_lengths=tuple((len(p.prompt_ids), p.num_tokens) for p in pairs),
        position_ids=position_ids.squeeze(0),
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        response_ids=torch.tensor(response_ids),
        last_token=torch.tensor(last_token),
        image_inputs=images.tensors,
        image_lengths=images.lengths,
        image_grids=images.grids,
        image_slots=tuple(slots),
        margins=torch.tensor([p.margin for p in pairs]),
        reference_logps=_aligned(reference, pairs),
    )


def assemble_changed(
    pairs: Sequence[EncodedPair],
    change: Callable[[Image.Image, int, int], Image.Image],
    *,
    layout: RowLayout,
    process_images: ImageProcessing,
) -> PairBatch:
    """The batch of some pairs, each of whose images is changed in its own way, so that none is shared: `change` gets an opened
    image, the number of its pair, and its number in that pair."""
    alone_each = [
        dataclasses.replace(pair, image_hashes=[f"{b}/{i}" for i in range(len(pair.images))]) for b, pair in enumerate(pairs)
    ]
    uses = [(b, i) for b, pair in enumerate(pairs) for i in range(len(pair.images))]
    _, _, slots = _distinct_images(alone_each, by_company=layout.features_by_company)
    use_of_slot = dict(zip(slots, uses, strict=True))

    def change_all(images: Sequence[Image.Image]) -> list[Image.Image]:
        return [change(image, *use_of_slot[slot]) for slot, image in enumerate(images)]

    return assemble(
        alone_each, layout=layout, process_images=lambda contents, alone: process_images(contents, alone, change_all)
    )


def _require_agreement(pairs: Sequence[EncodedPair], lengths: Sequence[int] | None, layout: RowLayout) -> None:
    """Compares each prompt's image tokens, which the encoder counted by the sizes of its images, with the features that the
    pixels become. `lengths`: of each image of the prompts; None where they aren't known beforehand."""
    if lengths is None or layout.image_token_id is None:
        return
    left = iter(lengths)
    for pair in pairs:
        expected = sum(next(left) for _ in pair.image_hashes)
        found = pair.prompt_ids.count(layout.image_token_id)
        if found != expected:
            raise ValueError(
                f"Record {pair.id}: its prompt has {found} image tokens, and its {len(pair.images)} images become "
                f"{expected} features. It seems encoded by other versions of transformers or of the processor: start with an "
                "empty --cache_dir, and with the same versions on all machines."
            )


def _aligned(reference: list[float], pairs: Sequence[EncodedPair]) -> Tensor | None:
    """The reference's log-probabilities of all response tokens of some pairs, which have them all or none."""
    if all(pair.reference is None for pair in pairs):
        return None
    for pair in pairs:
        assert pair.reference is not None, f"{pair.id} has no reference log-probs, and others have"
        found = len(pair.reference.chosen), len(pair.reference.rejected)
        expected = len(pair.chosen_ids), len(pair.rejected_ids)
        assert found == expected, f"{pair.id} has {found} reference log-probs for {expected} tokens"
    return torch.tensor(reference, dtype=torch.float32)


def _distinct_images(pairs: Sequence[EncodedPair], *, by_company: bool) -> tuple[list[bytes], list[bool], list[int]]:
    """The distinct images of some pairs, whether each is alone in its record, and which one each image of the prompts is.

    `by_company`: an image that is alone is another one than the same beside others; those that are alone come first.
    """
    uses = [
        (digest, len(pair.images) == 1 or not by_company, content)
        for pair in pairs
        for content, digest in zip(pair.images, pair.image_hashes, strict=True)
    ]
    distinct = {(digest, is_alone): content for digest, is_alone, content in uses}
    order = sorted(distinct, key=lambda use: not use[1])
    number = {use: i for i, use in enumerate(order)}
    slots = [number[digest, is_alone] for digest, is_alone, _ in uses]
    return [distinct[use] for use in order], [is_alone for _, is_alone in order], slots


def _prompt_positions(
    prompt_ids: Sequence[int], grids: Sequence[Grid] | None, layout: RowLayout
) -> tuple[list[list[int]], int]:
    """The positions of a prompt's tokens along each axis, and the one that comes after them.

    With `grids`, one for each image, there are three axes: time, row and column, which are the same for text; an image takes as
    many positions as its longer side (Wang et al. 2024, https://arxiv.org/abs/2409.12191, section 2.1).
    """
    first = layout.first_position
    if grids is None:
        return [list(range(first, first + len(prompt_ids)))], first + len(prompt_ids)
    times: list[int] = []
    rows: list[int] = []
    columns: list[int] = []
    waiting = iter(grids)
    token, after = 0, first
    while token < len(prompt_ids):
        height, width = next(waiting) if prompt_ids[token] == layout.image_token_id else (1, 1)
        times += [after] * (height * width)
        rows += [after + row for row in range(height) for _ in range(width)]
        columns += [after + column for _ in range(height) for column in range(width)]
        token, after = token + height * width, after + max(height, width)
    return [times, rows, columns], after
