"""Every algorithm against its paper's formula in NumPy float64 (`formulas`): loss and gradient, from hidden states to the loss
of a step, for several cuts into workers and micro-batches. `test_formulas_extremes` does so for log-probs of every size."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayalign.algorithms import ALGORITHMS, CPO, DPO, KTO, MDPO, ORPO, RM, SFT, Algorithm, SimPO
from rayalign.algorithms.dpo import LossType
from rayalign.algorithms.dpo_losses import Divergence
from rayalign.config.flags import flags_of
from rayalign.config.sections import OptimizerConfig
from rayalign.data.batch import ImageChange, PairBatch, assemble
from rayalign.data.companions import Damaged, Mismatched, with_companion
from rayalign.data.sampler import StepCounts
from rayalign.data.store import EncodedPair, TokenCounts
from rayalign.models.family import ImageInputs, RowLayout
from rayalign.ops.logprobs import PairLogps, sum_by_response, token_logps
from rayalign.ops.rows import PAD
from rayalign.ops.value_head import ValueHead
from rayalign.training.loop import Trainer
from rayalign.training.metrics import MetricSums
from tests.parity import formulas
from tests.parity.conftest import RecordDifference
from tests.parity.formulas import EXACT, Array, Expected, PairRows, Row

DIFFERENTIATED = 1e-6
"""Central differences with a step of 1e-5: an error of about 1e-10 (the step squared) by the method, and of 1e-15 / 1e-5 by
rounding, in slopes of 0.01 and more."""

NOTICED = 1e-7
"""What a thousandth of a setting changes at least, relatively, in either of loss and gradient: about a ten-thousandth for most,
a millionth for the weight of the few tokens that --ld_alpha is about. EXACT lets through 100 000 times less."""

HIDDEN, VOCABULARY = 6, 11


# --- the step: five pairs

PAIRS = [
    # Margins are exact in float32, which batches hold them in.
    EncodedPair("long", [1, 4, 5], [6, 7, 2], [8, 9, 9, 3, 2], [b"one"], ["1"], margin=0.5),
    EncodedPair("short", [1], [10, 2], [2], [], []),
    EncodedPair("one token", [1, 4, 5, 3, 4, 4, 4], [6], [7], [b"one", b"two"], ["1", "2"], margin=2.0),
    EncodedPair("chosen is longer", [1, 9], [3, 3, 8, 10, 2], [5, 2], [], [], margin=0.25),
    EncodedPair("as long", [1, 4], [7, 7, 2], [7, 6, 2], [b"two"], ["2"]),
]

CUTS: dict[str, list[list[list[int]]]] = {
    "all in one": [[[0, 1, 2, 3, 4]]],
    "one by one": [[[0], [1], [2], [3], [4]]],
    "another order": [[[4, 2], [0, 3, 1]]],
    "two workers": [[[0, 1, 2]], [[3, 4]]],
    "two workers with uneven micro-batches": [[[3], [0, 4]], [[1], [2]]],
    "one of three workers is idle": [[[1, 0]], [], [[2], [4, 3]]],
}
"""For each worker its micro-batches, lists of pair numbers."""


@dataclass(frozen=True)
class Case:
    """An algorithm on a step; `seed` draws the states, and the policy's lie `drift` from its reference's."""

    algorithm: Algorithm
    pairs: tuple[EncodedPair, ...] = tuple(PAIRS)
    seed: int = 0
    drift: float = 0.3


def sides_of(*kinds: str) -> tuple[EncodedPair, ...]:
    """PAIRS with both responses, or only one of them."""
    kept = {"both": {}, "good": {"rejected_ids": []}, "bad": {"chosen_ids": []}}
    return tuple(dataclasses.replace(pair, **kept[kind]) for pair, kind in zip(PAIRS, kinds, strict=True))


SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")
"""Losses with label smoothing in their paper."""
SEEN_THROUGH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
"""Losses of pi / pi_ref by way of the difference of chosen and rejected, in which f-DPO's unknown constant cancels."""


def dpo(*losses: str, **flags: Any) -> DPO:
    """DPO without the likelihood term, unless told otherwise; at a beta that leaves no loss saturated."""
    return DPO(**{"beta": 0.5, "loss_type": losses, "rpo_alpha": 0.0, **flags})


def dpo_cases() -> Iterator[tuple[str, Algorithm]]:
    yield "rpo", DPO(beta=0.1, rpo_alpha=1.0)
    yield "rpo, smoothed", DPO(beta=2.0, rpo_alpha=0.1, label_smoothing=0.1)
    for loss in get_args(LossType):
        if loss != "exo_pair":  # which has no meaning without smoothing
            yield loss, dpo(loss)
        if loss in SMOOTHED:
            yield f"{loss}, smoothed", dpo(loss, label_smoothing=0.1)
        if loss in SEEN_THROUGH_DIVERGENCE:
            smoothing = 0.1 if loss in SMOOTHED else 0.0
            for divergence in get_args(Divergence):
                if divergence != "reverse_kl":
                    through = {"f_divergence_type": divergence}
                    through |= {"f_alpha_divergence_coef": 0.3} if divergence == "alpha_divergence" else {}
                    yield f"{loss}, {divergence}", dpo(loss, label_smoothing=smoothing, **through)
    for coefficient in (1.0, 2.0):
        through = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coefficient}
        yield f"sigmoid, alpha_divergence of {coefficient:g}", dpo("sigmoid", **through)
    for loss in ("sigmoid", "sigmoid_norm", "bco_pair", "aot", "aot_unpaired"):
        yield f"{loss}, length-desensitised", dpo(loss, ld_alpha=0.3, rpo_alpha=0.2)
        if loss != "bco_pair":  # which holds each log-ratio against 0
            yield f"{loss}, reference-free", dpo(loss, beta=0.1, reference_free=True)
    yield "length-desensitised at 0", dpo("sigmoid", ld_alpha=0.0)
    yield "length-desensitised at 1", dpo("sigmoid", ld_alpha=1.0)
    yield "mpo", DPO(beta=0.1, rpo_alpha=0.0, loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0))
    yield "list, smoothed", dpo("sigmoid", "robust", "ipo", loss_weights=(0.5, 2.0, 0.0), label_smoothing=0.2, rpo_alpha=1.0)
    yield "list without weights", dpo("aot", "hinge", "apo_zero")
    through = {"f_divergence_type": "js_divergence", "ld_alpha": 0.5, "reference_free": True}
    yield "list, everything", dpo("sigmoid", "exo_pair", "sft", loss_weights=(1.0, 0.3, 0.1), label_smoothing=0.2, **through)


CASES: dict[str, Case] = {
    "sft": Case(SFT()),
    # At 0.3 log-ratios are of order 1; AOT's need a policy that ranks the pairs unlike the reference.
    **{f"dpo {name}": Case(algorithm, drift=1.5 if "aot" in name else 0.3) for name, algorithm in dpo_cases()},
    "mdpo": Case(MDPO()),
    "mdpo, weighted": Case(MDPO(beta=0.7, conditional_weight=0.6, anchor_weight=1.7, anchor_delta=0.4)),
    "mdpo, preference only": Case(MDPO(conditional_weight=0.0, anchor_weight=0.0)),
    "rm": Case(RM()),
    "rm, centred": Case(RM(center_rewards_coefficient=0.1)),
    "cpo": Case(CPO()),
    "cpo, smoothed": Case(CPO(beta=0.3, label_smoothing=0.2, cpo_alpha=0.5)),
    "cpo, preference only": Case(CPO(cpo_alpha=0.0)),
    "simpo": Case(SimPO()),
    "simpo, the paper's": Case(SimPO(cpo_alpha=0.0, beta=2.5, simpo_gamma=1.4)),
    "orpo": Case(ORPO()),
    "orpo, large lambda": Case(ORPO(beta=1.5)),
    "orpo, likelihood only": Case(ORPO(beta=0.0)),
    "kto": Case(KTO()),
    "kto, weighted": Case(KTO(beta=0.4, desirable_weight=0.7, undesirable_weight=1.5)),
    "kto, mixed rows": Case(
        KTO(beta=0.4, desirable_weight=1.3, undesirable_weight=0.6), sides_of("both", "good", "bad", "both", "good")
    ),
    "kto, good responses only": Case(KTO(), sides_of("good", "good", "good", "good", "good"), seed=2),
    "kto, one bad response": Case(KTO(undesirable_weight=2.0), sides_of("good", "good", "bad", "good", "good"), seed=2),
    "kto, negative KL": Case(KTO(beta=0.4), seed=45),
    "kto, mixed rows and negative KL": Case(KTO(), sides_of("bad", "both", "good", "bad", "both"), seed=5),
}


def prepared(case: Case) -> list[EncodedPair]:
    """The pairs as the algorithm's rows hold them."""
    if case.algorithm.needs.responses == "chosen":
        return [dataclasses.replace(pair, rejected_ids=[]) for pair in case.pairs]
    return list(case.pairs)


def partner(pairs: Sequence[EncodedPair], i: int) -> EncodedPair:
    """Whose responses are put to the prompt of pair i, whatever the cut."""
    return pairs[(i + 1) % len(pairs)]


@functools.cache
def step_of(name: str) -> tuple[list[PairRows], Array, Array]:
    """A case's rows with drawn states, the output head [VOCABULARY, HIDDEN] and the value head [HIDDEN]."""
    case = CASES[name]
    generator = np.random.default_rng(case.seed)

    def row(kind: str, pair: EncodedPair, chosen: list[int], rejected: list[int]) -> Row:
        states = generator.normal(size=(len(pair.prompt_ids) + len(chosen) + len(rejected), HIDDEN))
        reference = states + case.drift * generator.normal(size=states.shape)
        return Row(f"{pair.id}, {kind}", len(pair.prompt_ids), tuple(chosen), tuple(rejected), states, reference)

    def rows(i: int, pair: EncodedPair) -> PairRows:
        own = row("own", pair, pair.chosen_ids, pair.rejected_ids)
        companion, other = case.algorithm.needs.companion, partner(pairs, i)
        damaged = row("damaged", pair, pair.chosen_ids, []) if companion == Damaged() and pair.images else None
        strange = row("strange", pair, other.chosen_ids, other.rejected_ids) if companion == Mismatched() else None
        return PairRows(own, damaged, strange, pair.margin)

    pairs = prepared(case)
    step = [rows(i, pair) for i, pair in enumerate(pairs)]
    return step, generator.normal(size=(VOCABULARY, HIDDEN)), generator.normal(size=HIDDEN)


@functools.cache
def expected_of(name: str) -> Expected:
    step, head, value_head = step_of(name)
    algorithm = CASES[name].algorithm
    if algorithm.name == "rm":
        return formulas.expected_of_values(step, value_head, vars(algorithm))
    return formulas.expected_of_logps(formulas.FORMULAS[algorithm.name], step, head, vars(algorithm))


# --- our side


class GivenStates:
    """A policy whose hidden states are given, row by row. Padding is NaN: one look at it, and everything is."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, name: str) -> None:
        step, head, value_head = step_of(name)
        pairs = prepared(CASES[name])
        self.states = {row.name: nn.Parameter(torch.tensor(row.states)) for row in formulas.rows_of(step)}
        self.reference = {row.name: torch.tensor(row.reference_states) for row in formulas.rows_of(step)}
        self.head = torch.tensor(head)
        self.value_head = ValueHead(HIDDEN).double()
        with torch.no_grad():
            self.value_head.summary.weight.copy_(torch.tensor(value_head)[None])
        # A row is told by its pair and its tokens: companions keep the ids of the pairs they belong to.
        self.names: dict[tuple[str, tuple[int, ...]], str] = {}
        for pair, rows in zip(pairs, step, strict=True):
            for row in formulas.rows_of([rows]):
                self.names[pair.id, (*pair.prompt_ids, *row.chosen, *row.rejected)] = row.name
        assert len(self.names) == len(self.states)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {**self.states, "value head": self.value_head.summary.weight}

    def image_features(self, batch: PairBatch) -> tuple[Tensor, ...]:
        return ()

    def logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        return self._logps(batch, self.states)

    def reference_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        return self._logps(batch, self.reference)

    def values(self, batch: PairBatch, images: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.value_head(self._table(batch, self.states)[batch.last_token]).chunk(2)
        return chosen, rejected

    def _logps(self, batch: PairBatch, states: dict[str, Any]) -> PairLogps:
        logps = token_logps(self._table(batch, states)[batch.predictors], self.head, batch.targets)
        return sum_by_response(logps, batch.response_ids, batch.num_pairs)

    def _table(self, batch: PairBatch, states: dict[str, Any]) -> Tensor:
        """[B * S, HIDDEN]."""
        rows = []
        for pair_id, ids, segments in zip(batch.ids, batch.input_ids, batch.segment_ids, strict=True):
            own = states[self.names[pair_id, tuple(ids[segments != PAD].tolist())]]
            rows.append(F.pad(own, (0, 0, 0, len(ids) - len(own)), value=float("nan")))
        return torch.cat(rows)


@dataclass(frozen=True)
class Found:
    """What our step gave: its loss, the gradient by each row's states, and the metrics of each worker."""

    loss: float
    gradients: dict[str, Array]
    metrics: list[dict[str, float]]


def run(name: str, cut: str, algorithm: Algorithm | None = None) -> Found:
    """The step of a case in a cut; `algorithm` takes the place of the case's own."""
    algorithm = algorithm or CASES[name].algorithm
    policy, pairs = GivenStates(name), prepared(CASES[name])
    layout = RowLayout(pad_token_id=0)

    def no_images(contents: Sequence[bytes], alone: Sequence[bool], change: ImageChange | None = None) -> ImageInputs:
        return ImageInputs()

    def batch_of(numbers: Sequence[int]) -> PairBatch:
        some, partners = [pairs[i] for i in numbers], [partner(pairs, i) for i in numbers]
        batch = assemble(some, layout=layout, process_images=no_images)
        return with_companion(batch, algorithm.needs.companion, some, partners, layout=layout, process_images=no_images)

    counts = StepCounts.of(TokenCounts.of(pairs))
    workers = [[batch_of(numbers) for numbers in batches] for batches in CUTS[cut]]
    trainers = [
        Trainer(policy, algorithm, OptimizerConfig(), num_steps=1, rank=rank, gather=lambda mine: statistics)
        for rank in range(len(workers))
    ]
    # What the workers would send each other.
    statistics = [t.statistics(b) for t, b in zip(trainers, workers, strict=True)] if algorithm.needs.statistics else []
    metrics = []
    for trainer, batches in zip(trainers, workers, strict=True):
        outputs, _ = trainer.gradients(batches, counts)  # adds to what the others left
        metrics.append(MetricSums(outputs).reduce(steps=1))
    gradients = {key: parameter.grad.numpy() for key, parameter in policy.trainable.items() if parameter.grad is not None}
    return Found(sum(m["loss"] for m in metrics), gradients, metrics)


def differences(found: Found, expected: Expected) -> tuple[float, float]:
    """Relative ones of the loss, and of the gradient in terms of its largest entry."""
    theirs = dict(expected.gradients)
    nothing = np.zeros((1, HIDDEN))
    theirs["value head"] = nothing if expected.value_head is None else expected.value_head[None]
    assert found.gradients.keys() == theirs.keys()
    # NumPy's maximum is NaN where one is.
    largest = float(np.max([np.abs(gradient).max() for gradient in theirs.values()]))
    apart = float(np.max([np.abs(found.gradients[key] - theirs[key]).max() for key in theirs]))
    return abs(found.loss - expected.loss) / abs(expected.loss), apart / largest


# --- the tests


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_a_step_are_the_papers(name: str, cut: str, record_difference: RecordDifference) -> None:
    loss, gradient = differences(run(name, cut), expected_of(name))
    record_difference(name, "NumPy float64", loss=loss, gradient=gradient)
    assert loss < EXACT
    assert gradient < EXACT


def test_every_algorithm_every_loss_and_every_divergence_is_compared() -> None:
    algorithms = [case.algorithm for case in CASES.values()]
    assert {algorithm.name for algorithm in algorithms} == set(ALGORITHMS)
    of_dpo = [algorithm for algorithm in algorithms if isinstance(algorithm, DPO)]
    assert {algorithm.loss_type for algorithm in of_dpo} >= {(loss,) for loss in get_args(LossType)}
    assert {algorithm.f_divergence_type for algorithm in of_dpo} == set(get_args(Divergence))


@pytest.mark.parametrize(
    "name", ["dpo aot", "dpo aot, length-desensitised", "dpo aot_unpaired", "dpo aot_unpaired, length-desensitised"]
)
def test_aot_compares_some_pairs_with_another_one(name: str) -> None:
    step, head, _ = step_of(name)
    pairs, alpha = formulas.pairs_of(step, head), CASES[name].algorithm.ld_alpha
    pairs = [formulas.length_desensitised(pair, 1.0 if alpha is None else alpha) for pair in pairs]
    if "unpaired" in name:
        one, other = [formulas.log_ratio(p.chosen) for p in pairs], [formulas.log_ratio(p.rejected) for p in pairs]
    else:
        one = [p.chosen.policy.sum() - p.rejected.policy.sum() for p in pairs]
        other = [p.chosen.reference.sum() - p.rejected.reference.sum() for p in pairs]
    assert (np.argsort(one) != np.argsort(other)).any()


@pytest.mark.parametrize("name", CASES)
def test_the_formulas_gradient_is_the_numeric_one_along_any_direction(name: str) -> None:
    (step, head, value_head), expected, algorithm = step_of(name), expected_of(name), CASES[name].algorithm
    generator = np.random.default_rng(0)
    for _ in range(3):
        # KTO's estimate z, which the mismatched rows make, isn't differentiated, but differences would see it move.
        directions = {
            row.name: generator.normal(size=row.states.shape) * (not row.name.endswith("strange"))
            for row in formulas.rows_of(step)
        }

        def loss(by: float, directions: dict[str, Array] = directions) -> float:
            moved = formulas.moved(step, {key: by * direction for key, direction in directions.items()})
            if algorithm.name == "rm":
                return formulas.loss_of_values(moved, value_head, vars(algorithm))
            return formulas.FORMULAS[algorithm.name](formulas.pairs_of(moved, head), vars(algorithm))

        numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
        terms = np.concatenate([(expected.gradients[key] * direction).ravel() for key, direction in directions.items()])
        assert np.abs(terms).sum() > 0.01
        assert terms.sum() == pytest.approx(numeric, rel=0, abs=DIFFERENTIATED * np.abs(terms).sum())


def test_the_complex_step_gives_the_gradient_of_dpo_derived_by_hand() -> None:
    """-beta sigmoid(beta (r_rejected - r_chosen)) for each log-prob of the chosen response, its negative for the rejected:
    section 4 of https://arxiv.org/abs/2305.18290."""
    name, beta = "dpo sigmoid", 0.5
    step, head, _ = step_of(name)
    pairs, by_hand = formulas.pairs_of(step, head), []
    for pair in pairs:
        ratios = [float(response.policy.sum() - response.reference.sum()) for response in (pair.chosen, pair.rejected)]
        weight = beta / (1 + np.exp(beta * (ratios[0] - ratios[1]))) / len(pairs)
        by_hand += [-weight] * len(pair.chosen.policy) + [weight] * len(pair.rejected.policy)
    by_complex_step = formulas.slopes_by_logps(formulas.dpo, pairs, vars(CASES[name].algorithm))
    np.testing.assert_allclose(by_complex_step, by_hand, rtol=EXACT)


# --- settings

SENSITIVE = [
    *((f"dpo {loss}", "beta") for loss in get_args(LossType) if loss not in ("sft", "exo_pair")),
    *((f"dpo {loss}, smoothed", flag) for loss in SMOOTHED for flag in ("beta", "label_smoothing")),
    ("dpo rpo", "rpo_alpha"),
    ("dpo mpo", "beta"),
    ("dpo mpo", "loss_weights"),
    *((f"dpo {loss}, alpha_divergence", "f_alpha_divergence_coef") for loss in SEEN_THROUGH_DIVERGENCE),
    ("dpo discopop", "discopop_tau"),
    *((f"dpo {loss}, length-desensitised", "ld_alpha") for loss in ("sigmoid", "sigmoid_norm", "bco_pair", "aot")),
    *(("mdpo, weighted", flag) for flag in ("beta", "conditional_weight", "anchor_weight", "anchor_delta")),
    ("rm, centred", "center_rewards_coefficient"),
    *(("cpo, smoothed", flag) for flag in ("beta", "cpo_alpha", "label_smoothing")),
    *(("simpo", flag) for flag in ("beta", "simpo_gamma", "cpo_alpha")),
    ("orpo", "beta"),
    *(("kto, mixed rows", flag) for flag in ("beta", "desirable_weight", "undesirable_weight")),
]


def is_numeric(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, tuple) and all(isinstance(number, float) for number in value))


def test_the_settings_that_are_tried_are_all_numbers_that_algorithms_take() -> None:
    tried = {(CASES[name].algorithm.name, flag) for name, flag in SENSITIVE}
    words = {("dpo", flag) for flag in ("loss_type", "f_divergence_type", "reference_free")}
    assert tried == {(name, flag.name) for name in ALGORITHMS for flag in flags_of(ALGORITHMS[name])} - words


@pytest.mark.parametrize(("name", "flag"), SENSITIVE)
def test_a_thousandth_of_any_setting_is_noticed(name: str, flag: str) -> None:
    algorithm = CASES[name].algorithm
    value = getattr(algorithm, flag)
    assert is_numeric(value)
    numbers = value if isinstance(value, tuple) else (value,)
    for i, number in enumerate(numbers):
        changed = (*numbers[:i], number * 1.001, *numbers[i + 1 :])
        other = dataclasses.replace(algorithm, **{flag: changed if isinstance(value, tuple) else changed[0]})
        assert other != algorithm
        loss, gradient = differences(run(name, "all in one", other), expected_of(name))
        assert loss > NOTICED
        assert gradient > NOTICED


# --- KTO's KL estimate

KTO_CASES = [name for name, case in CASES.items() if isinstance(case.algorithm, KTO)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", KTO_CASES)
def test_the_kl_metric_is_the_mean_over_all_mismatched_responses_of_the_step_but_no_less_than_zero(name: str, cut: str) -> None:
    step, head, _ = step_of(name)
    strangers = [response for pair in formulas.pairs_of(step, head) for response in pair.strangers]
    mean = np.mean([response.policy.sum() - response.reference.sum() for response in strangers])
    assert abs(mean) > 0.01
    assert (mean < 0) == ("negative KL" in name)
    kls = [metrics["kl"] for metrics in run(name, cut).metrics if "kl" in metrics]
    assert kls == pytest.approx([max(0.0, mean)] * len(kls), rel=EXACT)
    assert len(kls) == len([worker for worker in CUTS[cut] if worker])


@pytest.mark.parametrize("name", KTO_CASES)
def test_no_gradient_flows_through_the_kl_estimate(name: str) -> None:
    found = run(name, "two workers")
    strange = {key: gradient for key, gradient in found.gradients.items() if key.endswith("strange")}
    assert len(strange) == len(PAIRS)
    assert not any(gradient.any() for gradient in strange.values())
