"""The losses of a pair against their papers' formulas (`formulas`) for log-probs of every size, and ORPO's against 400-digit
arithmetic where a probability is 1 or all but 1. `test_formulas` compares whole steps."""

from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from rayalign.algorithms import CPO, DPO, KTO, MDPO, ORPO, Algorithm, AlgorithmWithStatistics, SimPO, StepStatistics
from rayalign.algorithms.dpo import LossType
from rayalign.algorithms.dpo_losses import BY_DIVERGENCE
from rayalign.algorithms.orpo import log1mexp
from rayalign.data.batch import PairBatch, assemble
from rayalign.data.sampler import StepCounts
from rayalign.data.store import EncodedPair
from rayalign.models.family import ImageInputs, RowLayout
from rayalign.ops.logprobs import PairLogps, SequenceLogps, sum_by_response, token_logps
from tests.parity import formulas
from tests.parity.conftest import RecordDifference
from tests.parity.formulas import EXACT, Pair, Response

CHOSEN_TOKENS, REJECTED_TOKENS = 4, 8
"""Powers of two, so that averages are exact."""


@dataclass(frozen=True)
class GivenLogps:
    """A policy whose responses' log-probs are given."""

    own: PairLogps
    reference: PairLogps

    def image_features(self, batch: PairBatch) -> tuple[Tensor, ...]:
        return ()

    def logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        return self.own

    def reference_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        return self.reference


def given_logps(chosen: float, rejected: float, dtype: torch.dtype = torch.float64) -> PairLogps:
    """Summed log-probs of one pair, leaves of the graph."""

    def side(total: float, tokens: int) -> SequenceLogps:
        leaf = torch.tensor([total], dtype=dtype, requires_grad=True)
        return SequenceLogps(leaf, torch.tensor([tokens]), torch.zeros_like(leaf))

    return PairLogps(side(chosen, CHOSEN_TOKENS), side(rejected, REJECTED_TOKENS))


ONE = EncodedPair("one", [1], [2] * CHOSEN_TOKENS, [3] * REJECTED_TOKENS, [], [])
TOTALS = StepCounts(pairs=1, responses=2, chosen_tokens=CHOSEN_TOKENS, rejected_tokens=REJECTED_TOKENS)


def batch_of_one() -> PairBatch:
    return assemble([ONE], layout=RowLayout(pad_token_id=0), process_images=lambda contents, alone: ImageInputs())


def loss_and_slopes(
    algorithm: Algorithm, own: PairLogps, reference: PairLogps, statistics: StepStatistics | None = None
) -> tuple[float, list[float]]:
    """A step of one pair, and its derivatives by the summed log-probs of chosen and rejected."""
    policy, batch = GivenLogps(own, reference), batch_of_one()
    if statistics is None and algorithm.needs.statistics:
        assert isinstance(algorithm, AlgorithmWithStatistics)
        statistics = StepStatistics(algorithm.statistics(policy, batch).detach(), 0)
    loss = algorithm.loss(policy, batch, TOTALS, statistics).loss
    leaves = [own.chosen.total, own.rejected.total]
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.item(), [slope.item() for slope in slopes]


# --- every algorithm with log-probs

KL = 2.5
SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")
ALGORITHMS: dict[str, Algorithm] = {
    **{
        f"dpo {loss}": DPO(beta=0.1, loss_type=(loss,), rpo_alpha=0.0, label_smoothing=0.2 if loss in SMOOTHED else 0.0)
        for loss in get_args(LossType)
    },
    "dpo, js_divergence": DPO(beta=0.1, rpo_alpha=0.0, f_divergence_type="js_divergence"),
    "dpo, reference-free": DPO(beta=0.1, reference_free=True),
    "mdpo": MDPO(anchor_delta=0.5),
    "cpo": CPO(),
    "simpo": SimPO(),
    "orpo": ORPO(beta=1.0),
    "kto": KTO(),
}

SIZES = {  # (policy, reference) of the chosen, then of the rejected response
    "as the reference": ((-10.0, -10.0), (-20.0, -20.0)),
    "a little better": ((-9.0, -10.0), (-21.0, -20.0)),
    "a little worse": ((-12.0, -10.0), (-19.0, -20.0)),
    "far better": ((-10.0, -10.0), (-900.0, -20.0)),
    "far worse": ((-900.0, -10.0), (-20.0, -20.0)),
    "hopeless both": ((-950.0, -10.0), (-1000.0, -20.0)),
    "nearly certain both": ((-0.01, -300.0), (-0.02, -400.0)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_loss_of_a_pair_is_the_papers_for_log_probs_of_every_size(name: str, size: str) -> None:
    algorithm, (chosen, rejected) = ALGORITHMS[name], SIZES[size]
    statistics = StepStatistics(torch.tensor([[2 * KL, 2.0]], dtype=torch.float64), 0) if algorithm.name == "kto" else None
    own, reference = (given_logps(chosen[i], rejected[i]) for i in (0, 1))
    loss, slopes = loss_and_slopes(algorithm, own, reference, statistics)

    def response(totals: tuple[float, float], tokens: int) -> Response:
        return Response(*(np.full(tokens, total / tokens) for total in totals))

    stranger = Response(np.array([KL]), np.zeros(1))
    pairs = [Pair(response(chosen, CHOSEN_TOKENS), response(rejected, REJECTED_TOKENS), strangers=(stranger,))]
    formula, flags = formulas.FORMULAS[algorithm.name], vars(algorithm)
    by_token = formulas.slopes_by_logps(formula, pairs, flags)
    # The tokens of a response have the same slope, since a sum doesn't care which of them moves.
    expected = [by_token[0], by_token[CHOSEN_TOKENS]]
    # Absolute where a loss is 0 but for the tail of an exponential.
    assert loss == pytest.approx(formula(pairs, flags), rel=EXACT, abs=EXACT)
    assert slopes == pytest.approx(expected, rel=EXACT, abs=EXACT)


DIVERGENT = {
    f"dpo {loss}, {divergence}": DPO(
        beta=0.1,
        loss_type=(loss,),
        rpo_alpha=0.0,
        label_smoothing=0.2 if loss in SMOOTHED else 0.0,
        f_divergence_type=divergence,
    )
    for loss in sorted(BY_DIVERGENCE)
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*ALGORITHMS, *DIVERGENT])
def test_no_pair_is_so_far_off_that_its_loss_overflows_in_float32(name: str, size: str) -> None:
    algorithm, (chosen, rejected) = {**ALGORITHMS, **DIVERGENT}[name], SIZES[size]
    statistics = StepStatistics(torch.tensor([[2 * KL, 2.0]]), 0) if algorithm.name == "kto" else None
    own, reference = (given_logps(chosen[i], rejected[i], torch.float32) for i in (0, 1))
    loss, slopes = loss_and_slopes(algorithm, own, reference, statistics)
    assert np.isfinite([loss, *slopes]).all()


# --- ORPO where 1 - p is next to nothing

DTYPES = {"float32": torch.float32, "float64": torch.float64}
EDGES = (0.0, -1e-9, -1e-3, -50.0, -800.0)
"""Log-probs per token: certain; certain in float32; nearly certain; hopeless; hopeless and 0 as a probability."""


@dataclass(frozen=True)
class Exact:
    """Log(1 - e^x) and its derivative, of a type's x: to 400 digits, of which 1 - e^-800 needs 350."""

    value: Decimal
    slope: Decimal


def exact_log1mexp(x: float, dtype: torch.dtype) -> Exact:
    """`x` as the type rounds it; a probability of 1 counts as 1 less the type's smallest step."""
    info = torch.finfo(dtype)
    with localcontext(prec=400):
        probability = Decimal(min(torch.tensor(x, dtype=dtype).item(), -info.eps)).exp()
        return Exact((1 - probability).ln(), -probability / (1 - probability))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("x", [*EDGES, -1e-7, -1e-5, -0.1, -0.5, -0.6931, -0.6932, -1.0, -3.0, -20.0, -80.0])
def test_log1mexp_and_its_slope_are_right_to_the_last_digits(x: float, dtype: torch.dtype) -> None:
    leaf = torch.tensor(x, dtype=dtype, requires_grad=True)
    value = log1mexp(leaf)
    value.backward()
    expected, info = exact_log1mexp(x, dtype), torch.finfo(dtype)
    # Three roundings: of the exponential, of its difference to 1, and of the logarithm. What is no normal number may be 0.
    rounding = {"rel": 4 * info.eps, "abs": info.tiny}
    assert value.item() == pytest.approx(float(expected.value), **rounding)
    assert leaf.grad is not None
    assert leaf.grad.item() == pytest.approx(float(expected.slope), **rounding)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rejected", EDGES)
@pytest.mark.parametrize("chosen", EDGES)
def test_orpo_is_finite_and_right_for_responses_from_certain_to_hopeless(
    chosen: float, rejected: float, dtype: torch.dtype, record_difference: RecordDifference
) -> None:
    own = given_logps(CHOSEN_TOKENS * chosen, REJECTED_TOKENS * rejected, dtype)
    beta = 0.5
    loss, slopes = loss_and_slopes(ORPO(beta=beta), own, own)
    assert np.isfinite([loss, *slopes]).all()

    good, bad = (exact_log1mexp(x, dtype) for x in (chosen, rejected))
    with localcontext(prec=400):
        c, r = (Decimal(torch.tensor(x, dtype=dtype).item()) for x in (chosen, rejected))
        odds_ratio = (c - r - good.value + bad.value).exp()
        expected_loss = -c + Decimal(beta) * (1 + 1 / odds_ratio).ln()
        wrong = Decimal(beta) / (1 + odds_ratio)
        expected_slopes = [float((-1 - wrong * (1 - good.slope)) / CHOSEN_TOKENS)]
        expected_slopes += [float(wrong * (1 - bad.slope) / REJECTED_TOKENS)]
        # The log odds round as their largest term does, and the sigmoid's relative error is their absolute one.
        largest = max(1.0, *(float(abs(term)) for term in (c, r, good.value, bad.value)))
    rounding = {"rel": 4 * torch.finfo(dtype).eps * largest, "abs": torch.finfo(dtype).tiny}
    apart, steepest = max(abs(a - b) for a, b in zip(slopes, expected_slopes, strict=True)), max(map(abs, expected_slopes))
    record_difference(
        f"orpo, certain to hopeless in {dtype}".replace("torch.", ""),
        "400 digits",
        loss=abs(loss - float(expected_loss)) / float(max(expected_loss, Decimal(torch.finfo(dtype).tiny))),
        gradient=apart / steepest,
    )
    assert loss == pytest.approx(float(expected_loss), **rounding)
    assert slopes == pytest.approx(expected_slopes, **rounding)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("certain", ["chosen", "rejected", "both"])
def test_orpo_does_not_pull_at_the_states_of_a_certain_response_and_none_of_its_gradients_is_nan(
    certain: str, dtype: torch.dtype
) -> None:
    # The head is the identity: a state is its logits. A lead of 1000 is a probability of exactly 1 in either type.
    sure, unsure = [1000.0, 0.0, 0.0], [1.0, 0.0, -1.0]
    rows = [sure if certain in (side, "both") else unsure for side in ("chosen", "rejected")]
    states = torch.tensor(rows, dtype=dtype, requires_grad=True)
    logps = sum_by_response(token_logps(states, torch.eye(3, dtype=dtype), torch.tensor([0, 0])), torch.tensor([0, 1]), 1)
    policy = GivenLogps(logps, logps)
    loss = ORPO().loss(policy, batch_of_one(), StepCounts(1, 2, 1, 1)).loss
    loss.backward()
    assert loss.isfinite()
    assert states.grad is not None
    assert states.grad.isfinite().all()
    is_certain = torch.tensor([row is sure for row in rows])
    assert not states.grad[is_certain].any()
    assert logps.chosen.total.item() == (0.0 if is_certain[0] else pytest.approx(-0.4076, abs=1e-4))
