"""DPO and SFT against their papers' formulas in NumPy float64: loss and gradient, from hidden states to the loss share.

The NumPy side works on plain lists of pairs and knows nothing of batches, masks or autograd. Its gradients are derived by hand
and are themselves checked by numeric differentiation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayalign.algorithms import DPO, SFT, Algorithm
from rayalign.algorithms.dpo import dpo_loss
from rayalign.batch import PairBatch, assemble
from rayalign.logprobs import PairLogps, SequenceLogps, token_logps
from rayalign.plan import StepTotals
from rayalign.prepared import EncodedPair

Array = NDArray[np.float64]

EXACT = 1e-12
"""Both sides compute in float64 in another order of operations; values and gradients are of order 1 to 100."""

DIFFERENTIATED = 1e-6
"""Central differences with a step of 1e-5: the method's own error is about 1e-10 (step squared), rounding adds 1e-15 / 1e-5."""

HIDDEN, VOCABULARY = 6, 11


# --- the formulas


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def dpo(chosen: Array, rejected: Array, *, beta: float, smoothing: float) -> Array:
    """Equation 7 of https://arxiv.org/abs/2305.18290 with conservative labels, on the log-ratios of policy to reference."""
    z = beta * (chosen - rejected)
    return (1 - smoothing) * np.logaddexp(0, -z) + smoothing * np.logaddexp(0, z)


def dpo_slope(chosen: Array, rejected: Array, *, beta: float, smoothing: float) -> Array:
    """Its derivative by the chosen log-ratio; by the rejected one it is the negative. With e = 0 this is the weight
    -beta sigmoid(r_rejected - r_chosen) that the paper's gradient gives to a pair."""
    z = beta * (chosen - rejected)
    return beta * (smoothing * sigmoid(z) - (1 - smoothing) * sigmoid(-z))


@dataclass(frozen=True)
class Scored:
    """One response: the states [n, HIDDEN] that predict its tokens, and the tokens."""

    states: Array
    tokens: list[int]

    def logp(self, head: Array) -> float:
        logits = self.states @ head.T
        log_softmax = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return float(sum(log_softmax[i, token] for i, token in enumerate(self.tokens)))

    def logp_slope(self, head: Array) -> Array:
        """d logp / d states [n, HIDDEN]."""
        logits = self.states @ head.T
        softmax = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        return (np.eye(VOCABULARY)[self.tokens] - softmax) @ head


# --- our side: a policy whose hidden states are given


@dataclass(frozen=True)
class GivenStates:
    """A policy and its reference that look their states up: `states` [B * S, HIDDEN] by position in the batch."""

    states: Tensor
    reference_states: Tensor
    head: Tensor

    def image_features(self, batch: PairBatch) -> tuple[Tensor, ...]:
        return ()

    def logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        return self._logps(batch, self.states)

    def reference_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        with torch.no_grad():
            return self._logps(batch, self.reference_states)

    def _logps(self, batch: PairBatch, states: Tensor) -> PairLogps:
        logps, pairs = token_logps(states[batch.predictors], self.head, batch.targets), batch.num_pairs
        total = logps.new_zeros(2 * pairs).index_add(0, batch.sequences, logps)
        tokens = torch.bincount(batch.sequences, minlength=2 * pairs)
        return PairLogps(SequenceLogps(total[:pairs], tokens[:pairs]), SequenceLogps(total[pairs:], tokens[pairs:]))


PAIRS = [
    EncodedPair("long", [1, 4, 5], [6, 7, 2], [8, 9, 9, 3, 2], [], []),
    EncodedPair("short", [1], [10, 2], [2], [], []),
    EncodedPair("one token", [1, 4, 5, 3, 4, 4, 4], [6], [7], [], []),
]
TOTALS = StepTotals(pairs=5, chosen_tokens=13, rejected_tokens=17)
"""Counts of a whole step of which PAIRS are one micro-batch."""


def batch_of(*, with_rejected: bool) -> PairBatch:
    return assemble(PAIRS, with_rejected=with_rejected, pad_token_id=0, process_images=lambda contents: {})


def draw(batch: PairBatch, seed: int = 0) -> GivenStates:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    positions = batch.input_ids.numel()
    return GivenStates(normal(positions, HIDDEN).requires_grad_(), normal(positions, HIDDEN), normal(VOCABULARY, HIDDEN))


def positions_of(batch: PairBatch, *, with_rejected: bool) -> list[tuple[list[int], list[int]]]:
    """For each pair, where in [B * S] the states stand that predict the chosen and the rejected response's tokens.

    A response's first token is predicted at the prompt's end, each later one at the token before it.
    """
    length, found = batch.input_ids.shape[1], []
    for b, pair in enumerate(PAIRS):
        end = b * length + len(pair.prompt_ids)
        chosen = [end - 1, *range(end, end + len(pair.chosen_ids) - 1)]
        after = end + len(pair.chosen_ids)
        rejected = [end - 1, *range(after, after + len(pair.rejected_ids) - 1)] if with_rejected else []
        found.append((chosen, rejected))
    return found


def expected_dpo(
    states: Array, reference: Array, head: Array, positions: Sequence[tuple[list[int], list[int]]], algorithm: DPO
) -> tuple[float, Array]:
    """The micro-batch's share of the step's loss, and its gradient by every state [B * S, HIDDEN]."""
    loss, gradient = 0.0, np.zeros_like(states)
    terms = {"beta": algorithm.beta, "smoothing": algorithm.label_smoothing}
    for pair, (at_chosen, at_rejected) in zip(PAIRS, positions, strict=True):
        chosen, rejected = Scored(states[at_chosen], pair.chosen_ids), Scored(states[at_rejected], pair.rejected_ids)
        ratios = [
            np.array(scored.logp(head) - Scored(reference[at], scored.tokens).logp(head))
            for scored, at in ((chosen, at_chosen), (rejected, at_rejected))
        ]
        slope = float(dpo_slope(*ratios, **terms)) / TOTALS.pairs
        nll_weight = algorithm.rpo_alpha / TOTALS.chosen_tokens
        loss += float(dpo(*ratios, **terms)) / TOTALS.pairs - nll_weight * chosen.logp(head)
        np.add.at(gradient, at_chosen, (slope - nll_weight) * chosen.logp_slope(head))
        np.add.at(gradient, at_rejected, -slope * rejected.logp_slope(head))
    return loss, gradient


def our_share(algorithm: Algorithm, policy: GivenStates, batch: PairBatch) -> tuple[float, Array]:
    share = algorithm.step(policy, batch, TOTALS).loss_share
    (gradient,) = torch.autograd.grad(share, policy.states)
    return share.item(), gradient.numpy()


# --- the tests

DPOS = [
    DPO(beta=0.1, rpo_alpha=0),
    DPO(beta=0.1, rpo_alpha=1.0),
    DPO(beta=0.5, rpo_alpha=0.1, label_smoothing=0.1),
    DPO(beta=2.0, rpo_alpha=0, label_smoothing=0.5),
]


@pytest.mark.parametrize("algorithm", DPOS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_dpo_share_and_its_gradient_are_the_papers(algorithm: DPO, seed: int) -> None:
    batch = batch_of(with_rejected=True)
    policy = draw(batch, seed)
    loss, gradient = our_share(algorithm, policy, batch)
    states, reference, head = (t.detach().numpy() for t in (policy.states, policy.reference_states, policy.head))
    expected_loss, expected = expected_dpo(states, reference, head, positions_of(batch, with_rejected=True), algorithm)
    assert loss == pytest.approx(expected_loss, rel=EXACT)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=EXACT)
    assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize("algorithm", DPOS, ids=str)
def test_the_hand_derived_gradient_is_the_numeric_one(algorithm: DPO) -> None:
    batch = batch_of(with_rejected=True)
    policy = draw(batch)
    states, reference, head = (t.detach().numpy() for t in (policy.states, policy.reference_states, policy.head))
    positions = positions_of(batch, with_rejected=True)
    _, gradient = expected_dpo(states, reference, head, positions, algorithm)
    step = 1e-5
    for index in np.ndindex(*states.shape):
        up, down = states.copy(), states.copy()
        up[index] += step
        down[index] -= step
        losses = [expected_dpo(moved, reference, head, positions, algorithm)[0] for moved in (up, down)]
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient[index], abs=DIFFERENTIATED)


def test_sft_share_and_its_gradient_are_the_token_mean_cross_entropy() -> None:
    batch = batch_of(with_rejected=False)
    policy = draw(batch)
    loss, gradient = our_share(SFT(), policy, batch)
    states, head = policy.states.detach().numpy(), policy.head.numpy()
    expected_loss, expected = 0.0, np.zeros_like(states)
    for pair, (at_chosen, _) in zip(PAIRS, positions_of(batch, with_rejected=False), strict=True):
        chosen = Scored(states[at_chosen], pair.chosen_ids)
        expected_loss -= chosen.logp(head) / TOTALS.chosen_tokens
        np.add.at(expected, at_chosen, -chosen.logp_slope(head) / TOTALS.chosen_tokens)
    assert loss == pytest.approx(expected_loss, rel=EXACT)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=EXACT)
    assert np.abs(expected).max() > 0.01


def pair_logps(chosen: Sequence[float], rejected: Sequence[float]) -> PairLogps:
    tokens = torch.ones(len(chosen), dtype=torch.int64)
    sides = [torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in (chosen, rejected)]
    return PairLogps(SequenceLogps(sides[0], tokens), SequenceLogps(sides[1], tokens))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.1, 0.5, 5.0])
def test_dpo_loss_is_the_papers_for_margins_of_every_size(beta: float, smoothing: float) -> None:
    policy = pair_logps(
        # as the reference; a little and far better; a little and far worse; a hopeless pair
        [-10.0, -9.0, -10.0, -12.0, -900.0, -1000.0],
        [-20.0, -21.0, -900.0, -19.0, -20.0, -1000.0],
    )
    reference = pair_logps([-10.0, -10.0, -10.0, -10.0, -10.0, -10.0], [-20.0, -20.0, -20.0, -20.0, -20.0, -20.0])
    losses = dpo_loss(policy, reference, beta=beta, label_smoothing=smoothing)
    chosen, rejected = policy.chosen.total, policy.rejected.total
    slopes = torch.autograd.grad(losses.sum(), [chosen, rejected])

    ratios = (chosen.detach().numpy() + 10, rejected.detach().numpy() + 20)
    terms = {"beta": beta, "smoothing": smoothing}
    np.testing.assert_allclose(losses.detach().numpy(), dpo(*ratios, **terms), rtol=EXACT)
    np.testing.assert_allclose(slopes[0].numpy(), dpo_slope(*ratios, **terms), rtol=0, atol=EXACT)
    np.testing.assert_allclose(slopes[1].numpy(), -dpo_slope(*ratios, **terms), rtol=0, atol=EXACT)
    assert losses[0].item() == pytest.approx(np.log(2), rel=EXACT)


@pytest.mark.parametrize(
    "other",
    [
        DPO(beta=0.1001, rpo_alpha=1.0),
        DPO(beta=0.1, rpo_alpha=1.001),
        DPO(beta=0.1, rpo_alpha=1.0, label_smoothing=0.001),
    ],
    ids=str,
)
def test_a_thousandth_of_any_setting_is_noticed(other: DPO) -> None:
    batch = batch_of(with_rejected=True)
    policy = draw(batch)
    loss, gradient = our_share(other, policy, batch)
    states, reference, head = (t.detach().numpy() for t in (policy.states, policy.reference_states, policy.head))
    positions = positions_of(batch, with_rejected=True)
    expected_loss, expected = expected_dpo(states, reference, head, positions, DPO(beta=0.1, rpo_alpha=1.0))
    assert abs(loss - expected_loss) > 1e-6
    assert np.abs(gradient - expected).max() > 1e-6
