"""Log-probabilities of response tokens from hidden states, in chunks: a [rows, length, vocabulary] tensor never exists."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 256


@dataclass(frozen=True)
class SequenceLogps:
    """Log-probabilities of B responses: `total` [B] is the sum over response tokens, `tokens` [B] their number (0 where a row
    has no such response), `shared` [B] the sum over its first tokens, as many as the shorter of the pair's two responses
    has."""

    total: Tensor
    tokens: Tensor
    shared: Tensor

    @property
    def average(self) -> Tensor:
        """[B], per token."""
        return self.total / self.tokens


@dataclass(frozen=True)
class PairLogps:
    """Both responses of B pairs; `rejected` holds no tokens where a batch has chosen responses only."""

    chosen: SequenceLogps
    rejected: SequenceLogps


def sum_by_response(logps: Tensor, sequences: Tensor, num_pairs: int) -> PairLogps:
    """Token log-probabilities [N] summed by response; `sequences` [N] names each token's (`PairBatch.sequences`), and the
    tokens of a response stand together in reading order."""
    # Not by bincount, for which a GPU stops to find the largest number.
    tokens = sequences.new_zeros(2 * num_pairs).index_add(0, sequences, torch.ones_like(sequences))
    place = torch.arange(len(sequences), device=sequences.device)
    first = place.new_full((2 * num_pairs,), len(sequences)).scatter_reduce(0, sequences, place, "amin")
    shorter = torch.minimum(tokens[:num_pairs], tokens[num_pairs:]).repeat(2)
    is_shared = place - first[sequences] < shorter[sequences]
    nothing = logps.new_zeros(2 * num_pairs)
    total = nothing.index_add(0, sequences, logps)
    shared = nothing.index_add(0, sequences, logps * is_shared)
    sides = (slice(num_pairs), slice(num_pairs, None))
    return PairLogps(*(SequenceLogps(total[side], tokens[side], shared[side]) for side in sides))


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None = None) -> Tensor:
    """log p(target) for each row.

    `hidden` [N, H] are the states that predict, `weight` [V, H] is the output head, `targets` [N] are token ids. `softcap`:
    logits l become softcap tanh(l / softcap), as in Gemma 2 (https://arxiv.org/abs/2408.00118, section 2). Returns [N] in
    float32 (float64 for float64 input). At most CHUNK_TOKENS x V logits exist at a time, in the backward pass too; twice that
    with a softcap.
    """
    logps: Tensor = _TokenLogps.apply(hidden, weight, targets, softcap)  # type: ignore[no-untyped-call]  # apply is untyped
    return logps


class _TokenLogps(torch.autograd.Function):
    """d log p / d logits = onehot(target) - softmax(logits), so the gradient of `hidden` can be formed while the chunk's
    logits are at hand, up to the factor that arrives in backward; only a trainable head has its logits computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        keep_gradient = hidden.requires_grad
        gradient = torch.empty_like(hidden) if keep_gradient else None
        chunks = []
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            log_softmax, slope = _chunk_logps(hidden[part], weight, softcap)
            chunks.append(log_softmax.gather(1, targets[part, None]).squeeze(1))
            if gradient is not None:
                gradient[part] = _logits_gradient(log_softmax, targets[part], slope).to(weight.dtype) @ weight
        ctx.trains_head = weight.requires_grad
        ctx.save_for_backward(*([gradient] if keep_gradient else []), *([hidden, weight, targets] if ctx.trains_head else []))
        ctx.keep_gradient, ctx.softcap = keep_gradient, softcap
        if not chunks:
            return hidden.new_zeros(0, dtype=_loss_dtype(hidden.dtype))
        return torch.cat(chunks)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (upstream,) = outputs
        saved = list(ctx.saved_tensors)
        hidden_gradient = None
        if ctx.keep_gradient:
            gradient = saved.pop(0)
            hidden_gradient = (gradient * upstream[:, None]).to(gradient.dtype)
        weight_gradient = None
        if ctx.trains_head:
            hidden, weight, targets = saved
            weight_gradient = torch.zeros_like(weight)
            for start in range(0, len(targets), CHUNK_TOKENS):
                part = slice(start, start + CHUNK_TOKENS)
                log_softmax, slope = _chunk_logps(hidden[part], weight, ctx.softcap)
                scaled = _logits_gradient(log_softmax, targets[part], slope) * upstream[part, None]
                weight_gradient.addmm_(scaled.to(weight.dtype).t(), hidden[part])
        return hidden_gradient, weight_gradient, None, None


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _chunk_logps(hidden: Tensor, weight: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Log-softmax [n, V] of a chunk, and with a softcap d(capped logits) / d(logits) [n, V]."""
    logits = (hidden @ weight.t()).to(_loss_dtype(hidden.dtype))
    slope = None
    if softcap is not None:
        bent = logits.div_(softcap).tanh_()
        slope = 1 - bent.square()
        logits = bent.mul_(softcap)
    logits -= torch.logsumexp(logits, dim=-1, keepdim=True)
    return logits, slope


def _logits_gradient(log_softmax: Tensor, targets: Tensor, slope: Tensor | None) -> Tensor:
    """(onehot - softmax) slope [n, V], made in place of the log-softmax."""
    gradient = log_softmax.exp_().neg_()
    gradient[torch.arange(len(targets), device=targets.device), targets] += 1
    return gradient if slope is None else gradient.mul_(slope)
