"""Who sees whom in a shared-prefix row `[prompt | chosen | rejected]`, and the attention over such rows.

`batch` lays the rows out, `policy` hands what is made here to the decoder. On most models a row's attention is cut in two
(`shared_prefix_attention`): its prompt, which is plainly causal, and its responses, whose mask is the only one that is needed.
So what no token may see is mostly not computed, no mask has the square of a row's length, and rows of different lengths need
no padding: the model runs over them one after another (`packed`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayalign.data.batch import PAD, PROMPT, RowLengths

SHARED_PREFIX = "shared_prefix"
"""The name of `shared_prefix_attention` among transformers' attention implementations."""


def attention_mask(
    segment_ids: Tensor, position_in_sequence: Tensor, *, sliding_window: int | None = None, blocks: Tensor | None = None
) -> Tensor:
    """[B, 1, S, S], True where the query may look at the key: causal, prompt and own response only, at most `sliding_window`
    places back; and within a block of `blocks` [B, S] (-1: none) all of it. The diagonal is always on, so that a row of padding
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


def response_mask(segment_ids: Tensor, lengths: RowLengths) -> Tensor:
    """[B, 1, T, S]: the rows of `attention_mask` from each row's first response token on, as many as the longest responses
    have."""
    columns = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    longest = max(tokens - prompt for prompt, tokens in lengths)
    starts = torch.tensor([prompt for prompt, _ in lengths]).to(segment_ids.device, non_blocking=True)
    queries = (starts[:, None] + columns[:longest]).clamp(max=segment_ids.shape[1] - 1)
    own, key = segment_ids.gather(1, queries)[:, :, None], segment_ids[:, None, :]
    return ((columns <= queries[:, :, None]) & ((key == PROMPT) | (key == own)))[:, None]


def block_mask(
    segment_ids: Tensor, position_in_sequence: Tensor, *, sliding_window: int | None = None, blocks: Tensor | None = None
) -> BlockMask:
    """What `attention_mask` says, for flex_attention, which leaves out blocks of tokens in which nothing is seen."""

    def allowed(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_query, of_key = segment_ids[b, query], segment_ids[b, key]
        seen = (key <= query) & (of_key != PAD) & ((of_key == PROMPT) | (of_key == of_query))
        if sliding_window is not None:
            seen = seen & (position_in_sequence[b, query] - position_in_sequence[b, key] < sliding_window)
        if blocks is not None:
            seen = seen | ((blocks[b, query] == blocks[b, key]) & (blocks[b, query] >= 0))
        return seen | (query == key)

    rows, length = segment_ids.shape
    return create_block_mask(allowed, rows, None, length, length, device=str(segment_ids.device))


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: RowLengths | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over packed rows, whose mask is that of their responses (`response_mask`): [1, T, heads, head_dim] from `query`
    [1, heads, T, head_dim], `key` and `value`. Without `row_lengths` it is transformers' own."""
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is not None
    sizes = [tokens for _, tokens in row_lengths]
    rows = (states.split(sizes, dim=2) for states in (query, key, value))
    done = []
    for q, k, v, mask, (prompt, tokens) in zip(*rows, attention_mask.split(1), row_lengths, strict=True):
        of_prompt, of_responses = q.split([prompt, tokens - prompt], dim=2)
        seen_by_prompt = (k[:, :, :prompt], v[:, :, :prompt])
        done.append(sdpa_attention_forward(module, of_prompt, *seen_by_prompt, None, is_causal=True, **options)[0])
        if tokens > prompt:
            mask = mask[:, :, : tokens - prompt, :tokens]
            done.append(sdpa_attention_forward(module, of_responses, k, v, mask, **options)[0])
    return torch.cat(done, dim=1), None


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
# What a model makes of a plain row by itself stays what it is with transformers' own.
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)


def packed(ids: Tensor, row_lengths: RowLengths) -> Tensor:
    """[..., 1, T] from [..., B, S]: the rows one after another, without their padding."""
    rows = zip(ids.unbind(-2), row_lengths, strict=True)
    return torch.cat([row[..., :tokens] for row, (_, tokens) in rows], dim=-1).unsqueeze(-2)


def unpacked(states: Tensor, row_lengths: RowLengths, length: int) -> Tensor:
    """[B, S, H] from [1, T, H]: each of the packed rows by itself again, with zeros up to S, the `length`."""
    rows = states[0].split([tokens for _, tokens in row_lengths])
    return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])


def runs_of(marked: Tensor) -> Tensor:
    """[B, S], numbers the runs of True in each row of `marked` [B, S]; -1 elsewhere."""
    starts = marked & ~torch.nn.functional.pad(marked, (1, 0))[:, :-1]
    return torch.where(marked, starts.long().cumsum(1) - 1, -1)
