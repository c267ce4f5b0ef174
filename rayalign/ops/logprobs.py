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
    has. `first_choices` [B]: how many of its tokens are the policy's own first choice behind those before them; a response of
    nothing else is the greedy answer."""

    total: Tensor
    tokens: Tensor
    shared: Tensor
    first_choices: Tensor | None = None

    @property
    def average(self) -> Tensor:
        """[B], per token."""
        return self.total / self.tokens


@dataclass(frozen=True)
class PairLogps:
    """Both responses of B pairs; `rejected` holds no tokens where a batch has chosen responses only."""

    chosen: SequenceLogps
    rejected: SequenceLogps


def sum_by_response(logps: Tensor, response_ids: Tensor, num_pairs: int, *, is_first_choice: Tensor | None = None) -> PairLogps:
    """Token log-probabilities [N] summed by response; `response_ids` [N] names each token's (`PairBatch.response_ids`), and the
    tokens of a response stand together in reading order. `is_first_choice` [N] is counted, if given."""
    # Not by bincount, for which a GPU stops to find the largest number.
    tokens = response_ids.new_zeros(2 * num_pairs).index_add(0, response_ids, torch.ones_like(response_ids))
    index = torch.arange(len(response_ids), device=response_ids.device)
    first = index.new_full((2 * num_pairs,), len(response_ids)).scatter_reduce(0, response_ids, index, "amin")
    shorter = torch.minimum(tokens[:num_pairs], tokens[num_pairs:]).repeat(2)
    is_shared = index - first[response_ids] < shorter[response_ids]
    nothing = logps.new_zeros(2 * num_pairs)
    total = nothing.index_add(0, response_ids, logps)
    shared = nothing.index_add(0, response_ids, logps * is_shared)
    choices = (
        None
        if is_first_choice is None
        else tokens.new_zeros(2 * num_pairs).index_add(0, response_ids, is_first_choice.to(tokens))
    )

    def of(side: slice) -> SequenceLogps:
        return SequenceLogps(total[side], tokens[side], shared[side], None if choices is None else choices[side])

    return PairLogps(of(slice(num_pairs)), of(slice(num_pairs, None)))


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None = None) -> Tensor:
    """log p(target) for each row: the first of what `score_tokens` gives."""
    return score_tokens(hidden, weight, targets, softcap=softcap)[0]


def score_tokens(hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """log p(target) for each row, and whether no other token is likelier.

    `hidden` [N, H] are the states that predict, `weight` [V, H] is the output head, `targets` [N] are token ids. `softcap`:
    logits l become softcap tanh(l / softcap), as in Gemma 2 (https://arxiv.org/abs/2408.00118, section 2). Returns [N] in
    float32 (float64 for float64 input), and [N] of bool. Products are computed in the type of autocast, or of `hidden`. At most
    CHUNK_TOKENS x V logits and as many probabilities exist at a time, in the backward pass too; half as much again with a
    softcap.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    scored: tuple[Tensor, Tensor] = _TokenLogps.apply(hidden, weight, targets, softcap, dtype)  # type: ignore[no-untyped-call]  # apply is untyped
    return scored


class _TokenLogps(torch.autograd.Function):
    """d log p / d logits = onehot(target) - softmax(logits), so the gradient of `hidden` can be formed while the chunk's
    probabilities are at hand, up to the factor that arrives in backward; a trainable head has its logits computed again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        keep_gradient = hidden.requires_grad
        gradient = torch.empty_like(hidden) if keep_gradient else None
        head = weight.to(dtype)
        chunks = []
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logps, choices, probabilities, softcap_grad = _chunk(hidden[part].to(dtype), head, targets[part], softcap)
            chunks.append((logps, choices))
            if gradient is not None:
                own = head[targets[part]]
                if softcap_grad is not None:
                    own *= softcap_grad.gather(1, targets[part, None])
                    probabilities *= softcap_grad
                gradient[part] = own.to(dtype).addmm_(probabilities.to(dtype), head, alpha=-1)
        ctx.trains_head = weight.requires_grad
        ctx.save_for_backward(*([gradient] if keep_gradient else []), *([hidden, weight, targets] if ctx.trains_head else []))
        ctx.keep_gradient, ctx.softcap, ctx.dtype = keep_gradient, softcap, dtype
        nothing = hidden.new_zeros(0, dtype=_loss_dtype(dtype)), hidden.new_zeros(0, dtype=torch.bool)
        logps, is_first_choice = map(torch.cat, zip(*chunks, strict=True)) if chunks else nothing
        ctx.mark_non_differentiable(is_first_choice)
        return logps, is_first_choice

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_output = outputs[0]
        saved = list(ctx.saved_tensors)
        grad_hidden = None
        if ctx.keep_gradient:
            gradient = saved.pop(0)
            grad_hidden = (gradient * grad_output[:, None]).to(gradient.dtype)
        grad_weight = None
        if ctx.trains_head:
            hidden, weight, targets = saved
            head, grad_weight = weight.to(ctx.dtype), torch.zeros_like(weight)
            for start in range(0, len(targets), CHUNK_TOKENS):
                part = slice(start, start + CHUNK_TOKENS)
                states = hidden[part].to(ctx.dtype)
                _, _, probabilities, softcap_grad = _chunk(states, head, targets[part], ctx.softcap)
                grad_logits = probabilities.neg_()
                grad_logits[torch.arange(len(states), device=states.device), targets[part]] += 1
                if softcap_grad is not None:
                    grad_logits *= softcap_grad
                grad_logits *= grad_output[part, None]
                grad_weight += grad_logits.to(ctx.dtype).t() @ states
        return grad_hidden, grad_weight, None, None, None


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """log p(target) [n] of a chunk, whether no other token is likelier [n], all its probabilities [n, V], and with a softcap
    d(capped logits) / d(logits) [n, V]."""
    logits = hidden @ weight.t()
    softcap_grad = None
    if softcap is not None:
        bent = logits.to(_loss_dtype(logits.dtype)).div_(softcap).tanh_()
        softcap_grad = 1 - bent.square()
        logits = bent.mul_(softcap)
    probabilities = torch.softmax(logits, dim=-1, dtype=_loss_dtype(logits.dtype))
    # The largest probability is at least 1 / V, so that its logarithm is exact enough to tell the normaliser by; to sum the
    # exponentials for it once more would take as long as the softmax.
    largest, index = logits.max(dim=-1, keepdim=True)
    normaliser = largest.to(probabilities.dtype) - probabilities.gather(1, index).log()
    logps = logits.gather(1, targets[:, None]).to(probabilities.dtype) - normaliser
    return logps.squeeze(1), index.squeeze(1) == targets, probabilities, softcap_grad
