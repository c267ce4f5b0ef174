"""From encoded pairs to tensors: one row `[prompt | chosen | rejected]` per pair, each distinct image once.

`encode` makes the pairs, `policy` runs them. The two responses share their prompt's row; the attention mask keeps them apart
(`attention_mask`) and the rejected one's positions start again where the prompt ended. Objectives that compare the pairs with
other ones (`mismatched`, `damaged`) find them in the batch's companion.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rayalign.prepared import EncodedPair

PAD, PROMPT, CHOSEN, REJECTED = -1, 0, 1, 2

CompanionKind = Literal["none", "mismatched", "damaged"]
"""Which companion a batch has: `with_mismatched`'s, `with_damaged`'s, or none."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs, padded to S tokens.

    `input_ids`, `segment_ids` (PAD, PROMPT, CHOSEN, REJECTED), `position_ids`: [B, S]. For the N response tokens of the batch:
    `predictors` [N] is the flat index into [B * S] of the state that predicts the token, `targets` [N] its id, `sequences` [N]
    the response it belongs to (chosen of pair b: b; rejected of pair b: B + b). `ends` [2B] is the flat index of each
    response's last token (of the prompt's, where there is no such response). `image_inputs` is the processor's output for the
    distinct images; `image_slots` names the distinct image of each image place, in reading order.
    """

    ids: tuple[str, ...]
    input_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    sequences: Tensor
    ends: Tensor
    image_inputs: Mapping[str, Tensor]
    image_slots: tuple[int, ...]
    margins: Tensor
    companion: "Companion | None" = None

    @property
    def num_pairs(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding, the companion's included."""
        others = self.companion.batch.num_tokens if self.companion else 0
        return int((self.segment_ids != PAD).sum()) + others

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on a device; copies from pinned memory overlap with the computation."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PairBatch":
        """The same batch in page-locked memory."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, move: Callable[[Tensor], Tensor]) -> "PairBatch":
        moved: dict[str, Any] = {f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self) if f.type is Tensor}
        images = {name: move(value) for name, value in self.image_inputs.items()}
        companion = self.companion
        if companion is not None:
            companion = Companion(companion.batch._map_tensors(move), move(companion.rows))
        return dataclasses.replace(self, **moved, image_inputs=images, companion=companion)


@dataclass(frozen=True)
class Companion:
    """Other rows that an objective compares a batch's pairs with; row i of `batch` belongs to pair `rows[i]`."""

    batch: PairBatch
    rows: Tensor


def attention_mask(segment_ids: Tensor, position_ids: Tensor, *, sliding_window: int | None = None) -> Tensor:
    """[B, 1, S, S], True where the query may look at the key: causal, prompt and own response only, at most `sliding_window`
    positions back. The diagonal is always on, so that a row of padding is never empty (softmax over nothing is NaN)."""
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    allowed = causal & (key != PAD) & ((key == PROMPT) | (key == query))
    if sliding_window is not None:
        allowed &= position_ids[:, :, None] - position_ids[:, None, :] < sliding_window
    allowed |= torch.eye(length, dtype=torch.bool, device=segment_ids.device)
    return allowed[:, None]


def assemble(
    pairs: Sequence[EncodedPair],
    *,
    pad_token_id: int,
    process_images: Callable[[Sequence[bytes]], Mapping[str, Tensor]],
) -> PairBatch:
    """Builds the batch of some pairs; `process_images` turns the distinct images' bytes into the model's image inputs.

    A response without tokens takes no place in its row: SFT's rows are `[prompt | chosen]`.
    """
    rows, segments, positions = [], [], []
    predictors, targets, sequences = [], [], []
    ends = [0] * (2 * len(pairs))
    distinct: dict[str, int] = {}
    contents: list[bytes] = []
    slots: list[int] = []
    longest = max(pair.num_tokens for pair in pairs)
    for b, pair in enumerate(pairs):
        prompt = len(pair.prompt_ids)
        row, segment, position = list(pair.prompt_ids), [PROMPT] * prompt, list(range(prompt))
        for side, response in ((CHOSEN, pair.chosen_ids), (REJECTED, pair.rejected_ids)):
            sequence, start = b + (side - CHOSEN) * len(pairs), len(row)
            ends[sequence] = b * longest + (start + len(response) if response else prompt) - 1
            if not response:
                continue
            # The last prompt state predicts a response's first token; each later one is predicted by the token before it.
            predictors += [b * longest + prompt - 1, *range(b * longest + start, b * longest + start + len(response) - 1)]
            targets += response
            sequences += [sequence] * len(response)
            row += response
            segment += [side] * len(response)
            position += range(prompt, prompt + len(response))
        padding = longest - len(row)
        rows.append(row + [pad_token_id] * padding)
        segments.append(segment + [PAD] * padding)
        positions.append(position + [0] * padding)
        for content, digest in zip(pair.images, pair.image_hashes, strict=True):
            if digest not in distinct:
                distinct[digest] = len(contents)
                contents.append(content)
            slots.append(distinct[digest])
    return PairBatch(
        ids=tuple(p.id for p in pairs),
        input_ids=torch.tensor(rows),
        segment_ids=torch.tensor(segments),
        position_ids=torch.tensor(positions),
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        sequences=torch.tensor(sequences),
        ends=torch.tensor(ends),
        image_inputs=dict(process_images(contents)) if contents else {},
        image_slots=tuple(slots),
        margins=torch.tensor([p.margin for p in pairs]),
    )


def with_mismatched(
    batch: PairBatch, pairs: Sequence[EncodedPair], others: Sequence[EncodedPair], *, pad_token_id: int
) -> PairBatch:
    """The batch of `pairs` with a companion: each prompt followed by the responses to another one (`others`, in the same
    order), which KTO estimates a KL divergence from. The images are the batch's own: its `image_features` serve both."""
    crossed = [
        dataclasses.replace(pair, chosen_ids=other.chosen_ids, rejected_ids=other.rejected_ids, images=[], image_hashes=[])
        for pair, other in zip(pairs, others, strict=True)
    ]
    rows = assemble(crossed, pad_token_id=pad_token_id, process_images=lambda contents: {})
    rows = dataclasses.replace(rows, image_slots=batch.image_slots)
    return dataclasses.replace(batch, companion=Companion(rows, torch.arange(len(pairs))))


def with_damaged(
    batch: PairBatch,
    pairs: Sequence[EncodedPair],
    *,
    pad_token_id: int,
    process_damaged: Callable[[Sequence[bytes], Sequence[str]], Mapping[str, Tensor]],
) -> PairBatch:
    """The batch of `pairs` with a companion: those pairs that have images, as `[prompt | chosen]` with damaged images, which
    mDPO prefers the true ones to. `process_damaged` takes the images' bytes and a seed for each, made of the pair's id."""
    rows = [row for row, pair in enumerate(pairs) if pair.images]
    if not rows:
        return batch
    # Every image of every pair is damaged in its own way, so that none is shared.
    seeds = [[f"{pairs[row].id}/{i}" for i in range(len(pairs[row].images))] for row in rows]
    damaged = [dataclasses.replace(pairs[row], rejected_ids=[], image_hashes=own) for row, own in zip(rows, seeds, strict=True)]
    every_seed = [seed for own in seeds for seed in own]
    companion = assemble(
        damaged, pad_token_id=pad_token_id, process_images=lambda contents: process_damaged(contents, every_seed)
    )
    return dataclasses.replace(batch, companion=Companion(companion, torch.tensor(rows)))
