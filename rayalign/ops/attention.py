"""Who sees whom in a shared-prefix row `[prompt | chosen | rejected]`, and the attention over such rows.

`data` lays the rows out (`rows`), `policy` hands what is made here to the decoder. On most models a row's attention is cut in
two (`shared_prefix_attention`): its prompt, which is plainly causal, and its responses, whose mask is the only one that is
needed. So what no token may see is mostly not computed, no mask has the square of a row's length, and rows of different lengths
need no padding: the model runs over them one after another (`packed`).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rayalign.ops.rows import PAD, PROMPT, RowLengths

SHARED_PREFIX = "shared_prefix"
"""The name of `shared_prefix_attention` among the attention kernels."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names for the kinds of layers."""

Windows = dict[str, int | None]
"""The sliding window of each kind of layer that a language model has; None: no limit."""


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Plain attention: [1, T, heads, head_dim] from query [1, heads, T, head_dim], key, value, and a mask (None: causal)."""


# Masks


def layer_windows(settings: Mapping[str, Any]) -> Windows:
    """The windows of a language model, from its config's settings.

    Raises ValueError for layers in which a token doesn't see others by attention with a mask.
    """
    window = settings.get("sliding_window")
    kinds = set(settings.get("layer_types") or ())
    if not kinds:
        return {FULL: window}
    if odd := sorted(kinds - {FULL, SLIDING}):
        raise ValueError(
            f"The language model has layers of type {', '.join(odd)}, in which two responses in one row can't be kept apart. "
            f"Models whose layers are {FULL} or {SLIDING} can be trained."
        )
    return {kind: window if kind == SLIDING else None for kind in sorted(kinds)}


def by_kind(masks: Mapping[str, Any]) -> Any:
    """The masks by kind of layer, as a decoder takes them: the only one where no layer has a window."""
    return masks if len(masks) > 1 or SLIDING in masks else masks[FULL]


def decoder_mask(
    segment_ids: Tensor,
    position_in_sequence: Tensor,
    *,
    kernel: str,
    windows: Windows,
    blocks: Tensor | None,
    dtype: torch.dtype,
) -> Any:
    """`attention_mask` by kind of layer, in the form that a kernel of transformers takes; `dtype` is that of the scores, to
    which eager attention adds its mask."""

    def of_window(window: int | None) -> Tensor | BlockMask:
        if kernel == "flex_attention":
            return block_mask(segment_ids, position_in_sequence, sliding_window=window, blocks=blocks)
        allowed = attention_mask(segment_ids, position_in_sequence, sliding_window=window, blocks=blocks)
        if kernel == "eager":
            return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
        return allowed

    return by_kind({kind: of_window(window) for kind, window in windows.items()})


def attention_mask(
    segment_ids: Tensor, position_in_sequence: Tensor, *, sliding_window: int | None = None, blocks: Tensor | None = None
) -> Tensor:
    """[B, 1, S, S], True where the query may look at the key: causal, prompt and own response only, at most `sliding_window`
    tokens back; and within a block of `blocks` [B, S] (-1: none) all of it. The diagonal is always on, so that a row of padding
    is never empty (softmax over nothing is NaN)."""
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    allowed = causal & (key != PAD) & ((key == PROMPT) | (key == query))
    if sliding_window is not None:
        allowed &= position_in_sequence[:, :, None] - position_in_sequence[:, None, :] < sliding_window
    if blocks is not None:
        allowed |= (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0)
    allowed |= torch.eye(length, dtype=torch.bool, device=segment_ids.device)
    return allowed[:, None]


def block_mask(
    segment_ids: Tensor, position_in_sequence: Tensor, *, sliding_window: int | None = None, blocks: Tensor | None = None
) -> BlockMask:
    """The same for flex_attention, which leaves out blocks of tokens in which nothing is seen."""

    def allowed(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_segment, key_segment = segment_ids[b, query], segment_ids[b, key]
        seen = (key <= query) & (key_segment != PAD) & ((key_segment == PROMPT) | (key_segment == query_segment))
        if sliding_window is not None:
            seen = seen & (position_in_sequence[b, query] - position_in_sequence[b, key] < sliding_window)
        if blocks is not None:
            seen = seen | ((blocks[b, query] == blocks[b, key]) & (blocks[b, query] >= 0))
        return seen | (query == key)

    rows, length = segment_ids.shape
    return create_block_mask(allowed, rows, None, length, length, device=str(segment_ids.device))


def bidirectional_blocks(
    kind: Literal["none", "image", "prompt"], segment_ids: Tensor, is_image: Tensor | None
) -> Tensor | None:
    """The `blocks` [B, S] whose tokens all see each other: none, each image, or the prompt. `is_image` [B, S] is True where an
    image's feature stands; only "image" needs it."""
    match kind:
        case "none":
            return None
        case "image":
            assert is_image is not None
            return runs_of(is_image)
        case "prompt":
            return torch.where(segment_ids == PROMPT, 0, -1)


def runs_of(marked: Tensor) -> Tensor:
    """[B, S], numbers the runs of True in each row of `marked` [B, S]; -1 elsewhere."""
    starts = marked & ~torch.nn.functional.pad(marked, (1, 0))[:, :-1]
    return torch.where(marked, starts.long().cumsum(1) - 1, -1)


# Packed rows


def can_pack(kernel: str, windows: Windows, length: int) -> bool:
    """Whether a language model can run over rows of at most `length` tokens one after another, without padding: by the kernel
    that is made for it, and where no row is longer than a sliding window."""
    return kernel == SHARED_PREFIX and all(window is None or length <= window for window in windows.values())


def packed(ids: Tensor, row_lengths: RowLengths) -> Tensor:
    """[..., 1, T] from [..., B, S]: the rows one after another, without their padding."""
    rows = zip(ids.unbind(-2), row_lengths, strict=True)
    return torch.cat([row[..., :tokens] for row, (_, tokens) in rows], dim=-1).unsqueeze(-2)


def unpacked(states: Tensor, row_lengths: RowLengths, length: int) -> Tensor:
    """[B, S, H] from [1, T, H]: each of the packed rows by itself again, with zeros up to S, the `length`."""
    rows = states[0].split([tokens for _, tokens in row_lengths])
    return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])


def response_mask(segment_ids: Tensor, row_lengths: RowLengths) -> Tensor:
    """[B, 1, T, S]: the rows of `attention_mask` from each row's first response token on, as many as the longest responses
    have."""
    columns = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    longest = max(tokens - prompt for prompt, tokens in row_lengths)
    starts = torch.tensor([prompt for prompt, _ in row_lengths]).to(segment_ids.device, non_blocking=True)
    queries = (starts[:, None] + columns[:longest]).clamp(max=segment_ids.shape[1] - 1)
    own, key = segment_ids.gather(1, queries)[:, :, None], segment_ids[:, None, :]
    return ((columns <= queries[:, :, None]) & ((key == PROMPT) | (key == own)))[:, None]


def shared_prefix_attention(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, row_lengths: RowLengths
) -> Tensor:
    """Attention over packed rows, by plain attention over parts of them; `mask` is that of their responses (`response_mask`).
    [1, T, heads, head_dim] from `query` [1, heads, T, head_dim], `key` and `value`."""
    sizes = [tokens for _, tokens in row_lengths]
    rows = (states.split(sizes, dim=2) for states in (query, key, value))
    outputs = []
    for q, k, v, row_mask, (prompt, tokens) in zip(*rows, mask.split(1), row_lengths, strict=True):
        q_prompt, q_responses = q.split([prompt, tokens - prompt], dim=2)
        outputs.append(attend(q_prompt, k[:, :, :prompt], v[:, :, :prompt], None))
        if tokens > prompt:
            outputs.append(attend(q_responses, k, v, row_mask[:, :, : tokens - prompt, :tokens]))
    return torch.cat(outputs, dim=1)
