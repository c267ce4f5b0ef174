"""Every objective that TRL has, against TRL's own code at its pinned version: loss and gradients in float64.

A bigram model takes the place of the network, so that nothing but the objective is compared: TRL's trainers run it on plain
rows `[prompt | response]` in one batch, ours on rows `[prompt | chosen | rejected]` cut into micro-batches and workers. The
trainers are TRL's classes without their constructors: `test_dpo_against_trl` and `test_models_against_trl` have whole ones.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from rayalign.algorithms import CPO, DPO, KTO, ORPO, RM, Algorithm, SimPO
from rayalign.algorithms.dpo_losses import BY_DIVERGENCE, PAIR_LOSSES, SFT_LOSS
from rayalign.data.batch import ImageChange, PairBatch, assemble
from rayalign.data.companions import with_companion
from rayalign.data.store import EncodedPair
from rayalign.models.family import ImageInputs, RowLayout
from rayalign.ops.logprobs import PairLogps, sum_by_response, token_logps
from tests.parity.conftest import RecordDifference
from tests.parity.trl_models import TRL, Step, bare, differences, gradients_of, our_step
from tests.tiny_models import counts_of

EXACT = 1e-12
"""Both sides compute in float64 in another order of operations, relative to the loss and to the gradient's largest entry."""

FLOAT32_INSIDE = 1e-6
"""TRL takes the logarithms of EXO's labels and all of ORPO's odds in float32, whose steps are 6e-8 of a number near 1."""

FLOAT32 = 1e-5
"""Both sides in float32: some hundred terms that each may be off by 6e-8 of the largest."""


def pair(name: str, prompt: list[int], chosen: list[int], rejected: list[int], margin: float = 0.0) -> EncodedPair:
    return EncodedPair(name, prompt, chosen, rejected, [], [], margin)


PAIRS = [
    pair("longer rejected", [1, 4, 5], [6, 7, 8, 2], [9, 10, 11, 12, 2], margin=0.5),
    pair("short", [3], [13, 2], [2]),
    pair("one token each", [1, 4, 5, 3, 4, 4, 4], [6], [7], margin=0.25),
    pair("much longer chosen", [14, 15], [16, 17, 18, 19, 20, 21, 2], [22, 2]),
    pair("much longer rejected", [1, 23], [24, 2], [25, 26, 27, 28, 29, 24, 25, 2], margin=2.0),
    pair("alike for long", [30, 31], [32, 33, 34, 2], [32, 33, 34, 35, 2]),
]

CUTS: dict[str, list[list[list[int]]]] = {
    "one batch": [[[0, 1, 2, 3, 4, 5]]],
    "a batch for each pair": [[[0], [1], [2], [3], [4], [5]]],
    "three workers, one idle": [[[5, 3], [1]], [], [[4, 0, 2]]],
}
"""Workers have micro-batches, which are lists of pair numbers."""

cuts = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)


# --- the model


class Bigram(nn.Module):
    """A language model whose next token depends on the last one only: `states` [V, H] by token id, `head` [V, H]; `score` [H]
    makes a reward model of it."""

    is_gradient_checkpointing = False  # what TRL asks of a model

    def __init__(self, *, seed: int = 0, vocabulary: int = 36, hidden: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.states, self.head, self.score = (
            nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
            for shape in ((vocabulary, hidden), (vocabulary, hidden), (hidden,))
        )

    def moved(self, *, by: float) -> "Bigram":
        """Another one, whose states differ by this much."""
        other = Bigram()
        other.load_state_dict(self.state_dict())
        with torch.no_grad():
            other.states.add_(Bigram(seed=1).states, alpha=by)
        return other

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        fused_lm_head: bool = False,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """What TRL's trainers run: logits [B, S, V], or log-probs [B, S - 1] of the labels, which are 0 where there is none."""
        assert not use_cache
        logits = self.states[input_ids] @ self.head.t()
        if not fused_lm_head:
            return SimpleNamespace(logits=logits)
        assert labels is not None
        labels, counts = labels[:, 1:].clamp(min=0), labels[:, 1:] >= 0
        log_probs = logits[:, :-1].log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1) * counts
        nothing = torch.zeros_like(log_probs)  # what TRL logs beside the loss
        return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


class Scorer(nn.Module):
    """A bigram reward model: the score [B, 1] of each row's last real token."""

    def __init__(self, model: Bigram) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, margin: Tensor, use_cache: bool) -> SimpleNamespace:
        last = input_ids.gather(1, attention_mask.sum(1, keepdim=True) - 1)
        return SimpleNamespace(logits=self.model.states[last] @ self.model.score)


class Indifferent(nn.Module):
    """A reference by which every token is certain: the uniform one, up to a constant that no loss can see."""

    def forward(self, input_ids: Tensor, **others: Any) -> SimpleNamespace:
        return SimpleNamespace(log_probs=torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1, dtype=torch.float64))


@dataclasses.dataclass(frozen=True)
class BigramPolicy:
    """The bigram model as our algorithms see a policy."""

    model: Bigram
    reference: Bigram

    device, dtype = torch.device("cpu"), torch.float64

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def image_features(self, batch: PairBatch) -> tuple[Tensor, ...]:
        return ()

    def logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        states = self.model.states[batch.input_ids.flatten()[batch.predictors]]
        logps = token_logps(states, self.model.head, batch.targets)
        return sum_by_response(logps, batch.response_ids, batch.num_pairs)

    def reference_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        with torch.no_grad():
            return BigramPolicy(self.reference, self.reference).logps(batch, images)

    def values(self, batch: PairBatch, images: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        chosen, rejected = (self.model.states[batch.input_ids.flatten()[batch.last_token]] @ self.model.score).chunk(2)
        return chosen, rejected


MODEL = Bigram()
REFERENCE = MODEL.moved(by=0.3)
POLICY = BigramPolicy(MODEL, REFERENCE)


# --- our side


def ours(
    algorithm: Algorithm,
    cut: Sequence[Sequence[Sequence[int]]] = CUTS["one batch"],
    *,
    pairs: Sequence[EncodedPair] = PAIRS,
    policy: BigramPolicy = POLICY,
) -> Step:
    layout = RowLayout(pad_token_id=0)

    def no_images(contents: Sequence[bytes], alone: Sequence[bool], change: ImageChange | None = None) -> ImageInputs:
        return ImageInputs()

    def batch_of(numbers: Sequence[int]) -> PairBatch:
        own, partners = [pairs[i] for i in numbers], [pairs[i - 1] for i in numbers]
        batch = assemble(own, layout=layout, process_images=no_images)
        return with_companion(batch, algorithm.needs.companion, own, partners, layout=layout, process_images=no_images)

    workers = [[batch_of(numbers) for numbers in batches] for batches in cut]
    return our_step(policy, algorithm, workers, counts_of([pairs[i] for batches in cut for part in batches for i in part]))


# --- TRL's side


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def plain_rows(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> dict[str, Tensor]:
    """Rows `[prompt | response]`, padded on the right, with TRL's masks."""
    both = list(zip(prompts, responses, strict=True))
    return {
        "input_ids": padded([prompt + response for prompt, response in both], 0),
        "attention_mask": padded([[1] * (len(prompt) + len(response)) for prompt, response in both], 0),
        "completion_mask": padded([[0] * len(prompt) + [1] * len(response) for prompt, response in both], 0),
    }


def chosen_then_rejected(pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
    return plain_rows([p.prompt_ids for p in pairs] * 2, [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs])


def with_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value.item(), gradients_of(model)


def trl_dpo(
    algorithm: DPO,
    *,
    pairs: Sequence[EncodedPair] = PAIRS,
    policy: BigramPolicy = POLICY,
) -> Step:
    """TRL's DPO with our flags; what ours calls rpo_alpha is a loss more there."""
    losses = dict(zip(algorithm.loss_type, algorithm.loss_weights or [1.0] * len(algorithm.loss_type), strict=True))
    if algorithm.rpo_alpha:
        losses["sft"] = algorithm.rpo_alpha
    trainer = bare(
        DPOTrainer,
        policy.model,
        ref_model=Indifferent() if algorithm.reference_free else policy.reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=algorithm.discopop_tau),
        precompute_ref_logps=False,
        use_weighting=False,
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        beta=algorithm.beta,
        label_smoothing=algorithm.label_smoothing,
        ld_alpha=algorithm.ld_alpha,
        f_divergence_type=algorithm.f_divergence_type,
        f_alpha_divergence_coef=algorithm.f_alpha_divergence_coef,
    )
    return with_gradients(policy.model, lambda: trainer.compute_loss(policy.model, chosen_then_rejected(pairs)))


def labelled_rows(pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
    """As `CPOTrainer.tokenize_row` and its collator leave them: both sides apart, the prompts' labels hidden."""
    batch = {}
    for side in ("chosen", "rejected"):
        rows = plain_rows([p.prompt_ids for p in pairs], [getattr(p, f"{side}_ids") for p in pairs])
        rows["labels"] = rows["input_ids"].masked_fill(rows.pop("completion_mask") == 0, -100)
        batch |= {f"{side}_{name}": value for name, value in rows.items()}
    return batch


def trl_cpo(algorithm: CPO | SimPO, *, pairs: Sequence[EncodedPair] = PAIRS) -> Step:
    is_simpo = isinstance(algorithm, SimPO)
    trainer = bare(
        CPOTrainer,
        MODEL,
        is_encoder_decoder=False,
        pad_token_id=0,
        alpha=0.0,
        loss_type="simpo" if is_simpo else "sigmoid",
        beta=algorithm.beta,
        cpo_alpha=algorithm.cpo_alpha,
        label_smoothing=0.0 if is_simpo else algorithm.label_smoothing,
        simpo_gamma=algorithm.simpo_gamma if is_simpo else None,
    )
    return with_gradients(MODEL, lambda: trainer.get_batch_loss_metrics(MODEL, labelled_rows(pairs))[0])


def trl_orpo(algorithm: ORPO, *, nll_of_prompts: bool) -> Step:
    """TRL's NLL counts every token that its attention mask lets through, so hiding the prompts there (which a bigram model
    does not notice) makes it ours."""
    batch = labelled_rows(PAIRS)
    if not nll_of_prompts:
        batch["chosen_attention_mask"] = (batch["chosen_labels"] != -100).long()
    trainer = bare(ORPOTrainer, MODEL, is_encoder_decoder=False, padding_value=0, beta=algorithm.beta)
    return with_gradients(MODEL, lambda: trainer.get_batch_loss_metrics(MODEL, batch)[0])


def labelled_responses(pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
    """Each response by itself with its label, and the mismatched rows: each prompt with the responses of the pair before it."""
    good, bad = [p for p in pairs if p.chosen_ids], [p for p in pairs if p.rejected_ids]
    batch = plain_rows([p.prompt_ids for p in good + bad], [p.chosen_ids for p in good] + [p.rejected_ids for p in bad])
    crossed = [
        (own.prompt_ids, response)
        for own, other in zip(pairs, [pairs[-1], *pairs[:-1]], strict=True)
        for response in (other.chosen_ids, other.rejected_ids)
        if response
    ]
    mismatched = plain_rows(*zip(*crossed, strict=True))
    return (
        batch | {f"KL_{name}": rows for name, rows in mismatched.items()} | {"label": torch.arange(len(good + bad)) < len(good)}
    )


def trl_kto(algorithm: KTO, *, pairs: Sequence[EncodedPair] = PAIRS, policy: BigramPolicy = POLICY) -> tuple[Step, float]:
    """The step and the KL estimate in it."""
    trainer = bare(
        KTOTrainer,
        policy.model,
        ref_model=policy.reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        precompute_ref_logps=False,
        calculate_KL=True,
        loss_type="kto",
        beta=algorithm.beta,
        desirable_weight=algorithm.desirable_weight,
        undesirable_weight=algorithm.undesirable_weight,
    )
    step = with_gradients(policy.model, lambda: trainer.compute_loss(policy.model, labelled_responses(pairs)))
    (kl,) = trainer._metrics["train"]["kl"]
    return step, kl


def trl_rm(algorithm: RM) -> Step:
    scorer = Scorer(MODEL)
    trainer = bare(
        RewardTrainer, scorer, args=SimpleNamespace(center_rewards_coefficient=algorithm.center_rewards_coefficient or None)
    )
    batch = chosen_then_rejected(PAIRS)
    del batch["completion_mask"]
    batch["margin"] = torch.tensor([p.margin for p in PAIRS], dtype=torch.float64)
    return with_gradients(MODEL, lambda: trainer.compute_loss(scorer, batch))


def assert_same(step: Step, expected: Step, *, within: float) -> dict[str, float]:
    """Compares loss and gradients, and returns how far they are apart."""
    found = differences(step, expected)
    assert found["loss"] < within
    assert found["gradient"] < within
    assert max(gradient.abs().max().item() for gradient in expected[1].values()) > 1e-3
    return found


# --- the tests

LOSSES = (*PAIR_LOSSES, SFT_LOSS)
DIVERGING = sorted(BY_DIVERGENCE - {SFT_LOSS})


def dpo(*losses: str, **settings: Any) -> DPO:
    smoothing = 0.125 if "exo_pair" in losses else 0.0  # it divides by it
    return DPO(**{"loss_type": losses, "beta": 0.5, "rpo_alpha": 0.0, "label_smoothing": smoothing, **settings})


DPOS: Mapping[str, DPO] = {
    **{loss: dpo(loss) for loss in LOSSES},
    **{f"{loss}, beta 2": dpo(loss, beta=2.0) for loss in LOSSES},
    **{
        f"{loss}, smoothing {smoothing}": dpo(loss, label_smoothing=smoothing)
        for loss, smoothing in (("exo_pair", 0.5), ("robust", 0.25), ("aot", 0.25), ("aot", 0.5), ("aot_unpaired", 0.25))
    },
    **{
        f"{loss}, {divergence}": dpo(loss, f_divergence_type=divergence)
        for loss in DIVERGING
        for divergence in ("forward_kl", "js_divergence")
    },
    "alpha divergence at alpha 1": dpo("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    **{f"{loss}, length-desensitised": dpo(loss, ld_alpha=0.4) for loss in LOSSES},
    "ld_alpha 0": dpo("sigmoid", ld_alpha=0.0),
    "ld_alpha 1": dpo("sigmoid", ld_alpha=1.0),
    "js and length-desensitised": dpo("sigmoid", "ipo", f_divergence_type="js_divergence", ld_alpha=0.3),
    "discopop, another temperature": dpo("discopop", discopop_tau=0.7),
    "the default NLL term": DPO(),
    "MPO": dpo("sigmoid", "bco_pair", "sft", loss_weights=(0.8, 0.2, 1.0)),
    "two without weights": dpo("hinge", "apo_down"),
    # Beside exo_pair, which needs label smoothing, ours smooths sigmoid too and TRL does not: see the end of this file.
    "all losses but sigmoid": dpo(*LOSSES[1:], loss_weights=tuple(0.1 * i for i in range(1, 15))),
    "reference-free": dpo("sigmoid", reference_free=True, beta=0.1),
}


@cuts
@pytest.mark.parametrize("name", DPOS)
def test_loss_and_gradients_of_dpo_are_trls(name: str, cut: list[list[list[int]]], record_difference: RecordDifference) -> None:
    algorithm = DPOS[name]
    within = FLOAT32_INSIDE if "exo_pair" in algorithm.loss_type else EXACT
    found = assert_same(ours(algorithm, cut), trl_dpo(algorithm), within=within)
    subject = algorithm.loss_type[0] if len(algorithm.loss_type) == 1 else "several losses"
    record_difference(f"dpo {subject}", TRL, **found)


@cuts
@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("loss", DIVERGING)
def test_loss_and_gradients_of_dpo_by_an_alpha_divergence_are_trls(
    loss: str, alpha: float, cut: list[list[list[int]]], record_difference: RecordDifference
) -> None:
    # TRL knows this divergence in float32 and less only.
    model = MODEL.moved(by=0.0).float()
    policy = BigramPolicy(model, REFERENCE.moved(by=0.0).float())
    algorithm = dpo(loss, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
    found = assert_same(ours(algorithm, cut, policy=policy), trl_dpo(algorithm, policy=policy), within=FLOAT32)
    record_difference("dpo alpha_divergence, float32", TRL, **found)


@cuts
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_and_gradients_of_cpo_are_trls(
    alpha: float, smoothing: float, cut: list[list[list[int]]], record_difference: RecordDifference
) -> None:
    algorithm = CPO(beta=0.2, cpo_alpha=alpha, label_smoothing=smoothing)
    record_difference("cpo", TRL, **assert_same(ours(algorithm, cut), trl_cpo(algorithm), within=EXACT))


@cuts
@pytest.mark.parametrize("algorithm", [SimPO(cpo_alpha=0.0), SimPO(), SimPO(beta=0.7, simpo_gamma=0.0, cpo_alpha=0.3)], ids=str)
def test_loss_and_gradients_of_simpo_are_trls(
    algorithm: SimPO, cut: list[list[list[int]]], record_difference: RecordDifference
) -> None:
    record_difference("simpo", TRL, **assert_same(ours(algorithm, cut), trl_cpo(algorithm), within=EXACT))


@cuts
@pytest.mark.parametrize("beta", [0.0, 0.1, 3.0])
def test_loss_and_gradients_of_orpo_are_trls_with_the_prompts_out_of_its_nll(
    beta: float, cut: list[list[list[int]]], record_difference: RecordDifference
) -> None:
    algorithm = ORPO(beta=beta)
    found = assert_same(ours(algorithm, cut), trl_orpo(algorithm, nll_of_prompts=False), within=FLOAT32_INSIDE)
    record_difference("orpo", TRL, **found)


SINGLE_REPLIES = [
    dataclasses.replace(p, **{f"{without}_ids": []})
    for p, without in zip(PAIRS, ["rejected", "chosen", "chosen", "rejected", "chosen", "rejected"], strict=True)
]
SOME_PAIRS = [PAIRS[0], *SINGLE_REPLIES[1:4], *PAIRS[4:]]
ONLY_GOOD = [dataclasses.replace(p, rejected_ids=[]) for p in PAIRS]


@cuts
@pytest.mark.parametrize("is_clamped", [False, True])
@pytest.mark.parametrize("algorithm", [KTO(beta=0.5), KTO(desirable_weight=0.7, undesirable_weight=1.5)], ids=str)
@pytest.mark.parametrize(
    "pairs", [PAIRS, SINGLE_REPLIES, SOME_PAIRS, ONLY_GOOD], ids=["pairs", "single responses", "both", "good ones only"]
)
def test_loss_and_gradients_of_kto_are_trls(
    pairs: list[EncodedPair],
    algorithm: KTO,
    is_clamped: bool,
    cut: list[list[list[int]]],
    record_difference: RecordDifference,
) -> None:
    policy = BigramPolicy(REFERENCE, MODEL) if is_clamped else POLICY
    expected, kl = trl_kto(algorithm, pairs=pairs, policy=policy)
    assert kl == 0 if is_clamped else kl > 0.1
    record_difference("kto", TRL, **assert_same(ours(algorithm, cut, pairs=pairs, policy=policy), expected, within=EXACT))


@cuts
@pytest.mark.parametrize("coefficient", [0.0, 0.01, 1.0])
def test_loss_and_gradients_of_a_reward_model_are_trls(
    coefficient: float, cut: list[list[list[int]]], record_difference: RecordDifference
) -> None:
    algorithm = RM(center_rewards_coefficient=coefficient)
    record_difference("rm", TRL, **assert_same(ours(algorithm, cut), trl_rm(algorithm), within=EXACT))


# --- where we differ on purpose


def mixed(*parts: tuple[float, Step]) -> Step:
    """A weighted sum of steps."""
    gradients = {name: sum(weight * step[1][name] for weight, step in parts) for name in parts[0][1][1]}
    return sum(weight * loss for weight, (loss, _) in parts), gradients


def test_label_smoothing_of_the_sigmoid_loss_is_cdpos_where_trl_ignores_it() -> None:
    swapped = [dataclasses.replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in PAIRS]
    plain, smoothed = dpo("sigmoid"), dpo("sigmoid", label_smoothing=0.2)
    assert trl_dpo(smoothed)[0] == trl_dpo(plain)[0]
    assert abs(ours(smoothed)[0] - trl_dpo(smoothed)[0]) > 0.01
    # A label that is wrong with probability 0.2 is a pair that stands the other way round with that probability.
    expected = mixed((0.8, trl_dpo(plain)), (0.2, trl_dpo(plain, pairs=swapped)))
    assert_same(ours(smoothed), expected, within=EXACT)


def test_the_nll_of_orpo_is_of_the_responses_where_trl_counts_the_prompts_too() -> None:
    algorithm = ORPO(beta=0.1)

    def token_mean(*, of_prompts: bool) -> Step:
        def nll() -> Tensor:
            rows = plain_rows([p.prompt_ids for p in PAIRS], [p.chosen_ids for p in PAIRS])
            of_responses = rows.pop("completion_mask")
            counts = rows["attention_mask"] if of_prompts else of_responses
            labels = rows["input_ids"].masked_fill(counts == 0, -100)
            return -MODEL(**rows, labels=labels, fused_lm_head=True).log_probs.sum() / counts[:, 1:].sum()

        return with_gradients(MODEL, nll)

    theirs = trl_orpo(algorithm, nll_of_prompts=True)
    assert abs(ours(algorithm)[0] - theirs[0]) > 0.01
    expected = mixed((1, theirs), (1, token_mean(of_prompts=False)), (-1, token_mean(of_prompts=True)))
    assert_same(ours(algorithm), expected, within=FLOAT32_INSIDE)


def orpo_step(algorithm: ORPO) -> Step:
    return trl_orpo(algorithm, nll_of_prompts=False)


def kto_step(algorithm: KTO, *, pairs: Sequence[EncodedPair] = PAIRS) -> Step:
    return trl_kto(algorithm, pairs=pairs)[0]


@pytest.mark.parametrize(
    ("algorithm", "theirs"),
    [
        (dpo("sigmoid"), trl_dpo),  # means over pairs, of parts that are not equally large
        (dpo("sft"), trl_dpo),  # means over tokens
        (dpo("aot"), trl_dpo),  # ranks among all pairs
        (dpo("aot_unpaired"), trl_dpo),
        (CPO(), trl_cpo),
        (KTO(), kto_step),  # one KL estimate for all
    ],
    ids=["uneven parts", "sft", "aot", "aot_unpaired", "cpo", "kto"],
)
def test_the_loss_is_the_whole_steps_where_trl_averages_its_micro_batches(
    algorithm: Algorithm, theirs: Callable[..., Step]
) -> None:
    parts = [PAIRS[:2], PAIRS[2:]]
    whole = theirs(algorithm, pairs=PAIRS)
    cut = mixed(*((0.5, theirs(algorithm, pairs=part)) for part in parts))
    assert differences(cut, whole)["loss"] > 1e-3
    assert_same(ours(algorithm, [[[0, 1], [2, 3, 4, 5]]]), whole, within=EXACT)
    # What TRL gets is the mean of two of our steps.
    steps = mixed(*((0.5, ours(algorithm, [[list(range(len(part)))]], pairs=part)) for part in parts))
    assert_same(steps, cut, within=EXACT)


# --- the comparisons notice what they are there for


@pytest.mark.parametrize(
    ("algorithm", "setting", "theirs"),
    [
        *((dpo(loss), "beta", trl_dpo) for loss in LOSSES if loss != "sft"),
        *(
            (dpo(loss, label_smoothing=0.125), "label_smoothing", trl_dpo)
            for loss in ("exo_pair", "robust", "aot", "aot_unpaired")
        ),
        (dpo("discopop"), "discopop_tau", trl_dpo),
        (dpo("ipo", ld_alpha=0.5), "ld_alpha", trl_dpo),
        (DPO(), "rpo_alpha", trl_dpo),
        (CPO(), "beta", trl_cpo),
        (CPO(), "cpo_alpha", trl_cpo),
        (CPO(label_smoothing=0.1), "label_smoothing", trl_cpo),
        (SimPO(), "beta", trl_cpo),
        (SimPO(), "simpo_gamma", trl_cpo),
        (SimPO(), "cpo_alpha", trl_cpo),
        (ORPO(), "beta", orpo_step),
        (KTO(), "beta", kto_step),
        (KTO(), "desirable_weight", kto_step),
        (KTO(), "undesirable_weight", kto_step),
        (RM(center_rewards_coefficient=0.1), "center_rewards_coefficient", trl_rm),
    ],
    ids=lambda value: "TRL" if callable(value) else str(value),
)
def test_a_hundredth_more_of_a_setting_is_a_hundred_times_what_may_differ(
    algorithm: Any, setting: str, theirs: Callable[[Any], Step]
) -> None:
    other = dataclasses.replace(algorithm, **{setting: getattr(algorithm, setting) * 1.01})
    found = differences(ours(other), theirs(algorithm))
    inside = isinstance(algorithm, ORPO) or "exo_pair" in getattr(algorithm, "loss_type", ())
    assert min(found.values()) > 100 * (FLOAT32_INSIDE if inside else EXACT)
