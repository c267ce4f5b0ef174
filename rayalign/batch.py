"""From encoded pairs to tensors: one row `[prompt | chosen | rejected]` per pair, each distinct image once.

`encode` makes the pairs, `policy` runs them. The two responses share their prompt's row; the attention mask keeps them apart
(`attention_mask`) and the rejected one's positions start again where the prompt ended.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayalign.prepared import EncodedPair

PAD, PROMPT, CHOSEN, REJECTED = -1, 0, 1, 2


@dataclass(frozen=True)
class PairBatch:
    """B pairs, padded to S tokens.

    `input_ids`, `segment_ids` (PAD, PROMPT, CHOSEN, REJECTED), `position_ids`: [B, S]. For the N response tokens of the batch:
    `predictors` [N] is the flat index into [B * S] of the state that predicts the token, `targets` [N] its id, `sequences` [N]
    the response it belongs to (chosen of pair b: b; rejected of pair b: B + b). `image_inputs` is the processor's output for
    the distinct images; `image_slots` names the distinct image of each image place, in reading order.
    """

    ids: tuple[str, ...]
    input_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    sequences: Tensor
    image_inputs: Mapping[str, Tensor]
    image_slots: tuple[int, ...]
    margins: Tensor

    @property
    def num_pairs(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.segment_ids != PAD).sum())

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on a device; copies from pinned memory overlap with the computation."""
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
        images = {name: value.to(device, non_blocking=True) for name, value in self.image_inputs.items()}
        return dataclasses.replace(self, **moved, image_inputs=images)

    def pin_memory(self) -> "PairBatch":
        """The same batch in page-locked memory."""
        moved = {f.name: getattr(self, f.name).pin_memory() for f in dataclasses.fields(self) if f.type is Tensor}
        return dataclasses.replace(self, **moved, image_inputs={k: v.pin_memory() for k, v in self.image_inputs.items()})


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
    with_rejected: bool,
    pad_token_id: int,
    process_images: Callable[[Sequence[bytes]], Mapping[str, Tensor]],
) -> PairBatch:
    """Builds the batch of some pairs; `process_images` turns the distinct images' bytes into the model's image inputs.

    Without `with_rejected` (SFT) rows are `[prompt | chosen]` and the rejected responses hold no tokens.
    """
    rows, segments, positions = [], [], []
    predictors, targets, sequences = [], [], []
    distinct: dict[str, int] = {}
    contents: list[bytes] = []
    slots: list[int] = []
    lengths = [len(p.prompt_ids) + len(p.chosen_ids) + (len(p.rejected_ids) if with_rejected else 0) for p in pairs]
    longest = max(lengths)
    for b, pair in enumerate(pairs):
        prompt = len(pair.prompt_ids)
        row, segment, position = list(pair.prompt_ids), [PROMPT] * prompt, list(range(prompt))
        responses = [(CHOSEN, pair.chosen_ids)] + ([(REJECTED, pair.rejected_ids)] if with_rejected else [])
        for side, response in responses:
            start = len(row)
            # The last prompt state predicts a response's first token; each later one is predicted by the token before it.
            predictors += [b * longest + prompt - 1, *range(b * longest + start, b * longest + start + len(response) - 1)]
            targets += response
            sequences += [b + (side - CHOSEN) * len(pairs)] * len(response)
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
        image_inputs=dict(process_images(contents)) if contents else {},
        image_slots=tuple(slots),
        margins=torch.tensor([p.margin for p in pairs]),
    )
