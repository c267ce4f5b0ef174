"""The contract of every algorithm, run over all of `ALGORITHMS`."""

import dataclasses
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from rayalign.algorithms import ALGORITHMS, DPO, KTO, MDPO, RM, Algorithm, AlgorithmWithStatistics
from rayalign.algorithms.cpo import cpo_loss
from rayalign.algorithms.dpo_losses import PAIR_LOSSES, RANKED, SMOOTHED, LossSettings
from rayalign.algorithms.kto import kto_losses
from rayalign.algorithms.mdpo import anchor_loss, conditional_loss
from rayalign.algorithms.orpo import log_odds_ratio
from rayalign.algorithms.rm import reward_loss
from rayalign.algorithms.simpo import simpo_loss
from rayalign.config.config import Config, config_from_mapping
from rayalign.config.flags import flags_of
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.config.yaml_files import to_yaml
from rayalign.data.batch import PairBatch
from rayalign.data.sampler import StepCounts
from rayalign.data.store import EncodedPair
from rayalign.models.source import ModelSource
from rayalign.ops.logprobs import PairLogps, SequenceLogps
from rayalign.ops.rows import PAD
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.training.loop import Trainer
from tests.tiny_models import REFERRED, counts_of, encode_pair, in_float64, make_batch, make_policy, noise_image, wake_adapters

# float64 sums of the same terms in another order.
FLOAT64 = 1e-12

VARIANTS: dict[str, Algorithm] = {
    **{name: algorithm() for name, algorithm in ALGORITHMS.items()},
    **{
        f"dpo {loss}": DPO(loss_type=(loss,), rpo_alpha=0.0, label_smoothing=0.1 if loss in SMOOTHED else 0.0)
        for loss in (*PAIR_LOSSES, "sft")
        if loss != "sigmoid"
    },
    "dpo, aot and reference-free": DPO(loss_type=("aot", "aot_unpaired"), loss_weights=(0.5, 2.0), reference_free=True),
    "dpo, mpo": DPO(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0), rpo_alpha=0.0),
    "dpo, js and length-desensitised": DPO(f_divergence_type="js_divergence", ld_alpha=0.3),
    "rm, centred": RM(center_rewards_coefficient=0.1),
    "kto, weighted": KTO(desirable_weight=0.7, undesirable_weight=1.5),
}
"""What the contract holds for: every algorithm with its defaults, and every way in which a flag changes the formula."""

COMPARING = [name for name, algorithm in VARIANTS.items() if algorithm.needs.responses != "chosen"]
REFERRING = [name for name, algorithm in ALGORITHMS.items() if algorithm().needs.reference]
NO_DROPOUT = TunerConfig(lora_dropout=0.0)  # SFT draws a dropout mask for each micro-batch, which no cut can keep


Gradients = dict[str, Tensor]
LossOfTotals = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava_next")


def pairs_of_a_step(folder: Path) -> list[EncodedPair]:
    """Six pairs of different lengths, with 0 to 2 images."""
    red, blue = noise_image(40, 30, seed=1), noise_image(20, 60, seed=2)
    texts = [
        ("Which digit is it?", "The digit is two.", "a cat", (red,)),
        ("two?", "A cat sits on the mat.", "yes", ()),
        ("describe the image.", "It", "The digit is two, the cat sits.", (blue, red)),
        ("Is it a cat on the mat or the digit two?", "no", "A cat, it is on the mat.", (red,)),
        ("the image", "A digit.", "The mat.", (blue,)),
        ("it", "a", "The digit is not a cat on a mat, the digit is two.", ()),
    ]
    return [encode_pair(folder, str(i), *three, images=images) for i, (*three, images) in enumerate(texts)]


def gradients_of(policy: Policy, algorithm: Algorithm, workers: Sequence[Sequence[PairBatch]], counts: StepCounts) -> Gradients:
    """The gradients of a step, summed over workers that each have their micro-batches."""
    trainers = [
        Trainer(policy, algorithm, OptimizerConfig(), num_steps=1, rank=rank, gather=lambda mine: statistics)
        for rank in range(len(workers))
    ]
    # What the workers would send each other.
    statistics = [t.statistics(b) for t, b in zip(trainers, workers, strict=True)] if algorithm.needs.statistics else []
    total: Gradients = {}
    for trainer, batches in zip(trainers, workers, strict=True):
        for parameter in policy.trainable.values():
            parameter.grad = None
        trainer.gradients(batches, counts)
        for name, parameter in policy.trainable.items():
            assert parameter.grad is not None
            total[name] = total.get(name, 0.0) + parameter.grad
    return total


def assert_same(ours: Gradients, expected: Gradients) -> None:
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-4
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=FLOAT64 * largest, rtol=0, msg=name)


def padded(batch: PairBatch, more: int) -> PairBatch:
    """The same batch with longer padding."""
    length = batch.input_ids.shape[1]
    return dataclasses.replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, more), value=7),
        segment_ids=F.pad(batch.segment_ids, (0, more), value=PAD),
        position_in_sequence=F.pad(batch.position_in_sequence, (0, more)),
        position_ids=F.pad(batch.position_ids, (0, more)),
        predictors=batch.predictors + more * (batch.predictors // length),
        last_token=batch.last_token + more * (batch.last_token // length),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_update_is_the_same_for_any_cut_any_workers_any_order_and_any_padding(folder: Path, name: str) -> None:
    algorithm = VARIANTS[name]
    pairs = pairs_of_a_step(folder)
    if algorithm.needs.responses == "either":  # a step of pairs, good responses and bad ones
        pairs[1] = dataclasses.replace(pairs[1], rejected_ids=[])
        pairs[3] = dataclasses.replace(pairs[3], chosen_ids=[])
    counts = counts_of(pairs)
    policy = wake_adapters(in_float64(make_policy(folder, tuner=NO_DROPOUT, needs=algorithm.needs)), scale=0.3)

    def run(*workers: Sequence[Sequence[int]]) -> Gradients:
        """Each worker has its micro-batches, lists of pair numbers."""
        return gradients_of(policy, algorithm, [[batch(cut) for cut in cuts] for cuts in workers], counts)

    def batch(numbers: Sequence[int]) -> PairBatch:
        partners = [pairs[(i + 1) % len(pairs)] for i in numbers]  # whatever the cut
        return make_batch(folder, [pairs[i] for i in numbers], needs=algorithm.needs, partners=partners)

    whole = run([[0, 1, 2, 3, 4, 5]])
    for micro_batches in ([[0], [1], [2], [3], [4], [5]], [[0, 1], [2, 3, 4, 5]], [[5, 3, 1], [4, 2, 0]], [[5, 4, 3, 2, 1, 0]]):
        assert_same(run(micro_batches), whole)
    assert_same(run([[0, 5]], [[1], [2]], [[3, 4]]), whole)
    assert_same(run([[0, 1, 2, 3, 4]], [[5]], []), whole)  # the third worker is idle
    assert_same(gradients_of(policy, algorithm, [[padded(batch(range(6)), 13)]], counts), whole)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_shares_and_metrics_add_up_over_micro_batches(folder: Path, name: str) -> None:
    algorithm = VARIANTS[name]
    pairs = pairs_of_a_step(folder)
    policy = wake_adapters(in_float64(make_policy(folder, tuner=NO_DROPOUT, needs=algorithm.needs)))

    def metrics(*cut: slice) -> dict[str, float]:
        others = [*pairs[1:], pairs[0]]
        batches = [make_batch(folder, pairs[part], needs=algorithm.needs, partners=others[part]) for part in cut]
        return Trainer(policy, algorithm, OptimizerConfig(), num_steps=1).evaluate(lambda: batches, counts_of(pairs))[0]

    whole = metrics(slice(0, 6))
    assert metrics(slice(0, 1), slice(1, 6)) == pytest.approx(whole, rel=FLOAT64)
    assert not any(math.isnan(value) for value in whole.values())


@pytest.mark.parametrize("name", COMPARING)
def test_swapping_chosen_and_rejected_negates_the_margins(folder: Path, name: str) -> None:
    algorithm = VARIANTS[name]
    pairs = pairs_of_a_step(folder)
    swapped = [dataclasses.replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in pairs]
    policy = wake_adapters(in_float64(make_policy(folder, needs=algorithm.needs)))
    trainer = Trainer(policy, algorithm, OptimizerConfig(), num_steps=1)
    (_, one), (_, other) = (
        trainer.evaluate(lambda some=some: [make_batch(folder, some, needs=algorithm.needs)], counts_of(some))
        for some in (pairs, swapped)
    )
    for pair_id, metrics in one.items():
        margin = metrics["rewards/margins"]
        assert other[pair_id]["rewards/margins"] == pytest.approx(-margin, abs=1e-9)  # of numbers near 1000
        assert other[pair_id]["rewards/accuracies"] == 1 - metrics["rewards/accuracies"]
        assert abs(margin) > 1e-6


AT_START: dict[str, tuple[Algorithm, float]] = {
    "dpo": (DPO(rpo_alpha=0.0), math.log(2)),
    # Preference and anchor for each of six pairs, the conditional preference for the four that have images.
    "mdpo": (MDPO(), math.log(2) * (2 + 4 / 6)),
    "kto": (KTO(), 0.5),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reference", ["adapters off", "the SFT adapter"])
@pytest.mark.parametrize("name", REFERRING)
def test_training_starts_with_rewards_of_exactly_zero_and_the_loss_of_indifference(
    folder: Path, tmp_path: Path, name: str, reference: str, checkpointing: bool
) -> None:
    source = ModelSource(str(folder))
    if reference == "the SFT adapter":
        save_policy(wake_adapters(make_policy(folder)), tmp_path)
        source = ModelSource(str(folder), adapter=str(tmp_path))
    policy = make_policy(source, needs=REFERRED, model=ModelConfig(gradient_checkpointing=checkpointing))
    pairs = pairs_of_a_step(folder)
    algorithm, loss = AT_START[name]
    trainer = Trainer(policy, algorithm, OptimizerConfig(), num_steps=1)
    metrics, by_pair = trainer.evaluate(lambda: [make_batch(folder, pairs, needs=algorithm.needs)], counts_of(pairs))
    for values in by_pair.values():
        assert [values[f"rewards/{kind}"] for kind in ("chosen", "rejected", "margins")] == [0.0] * 3
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)  # float32


@pytest.mark.parametrize("reference", ["adapters off", "the SFT adapter"])
def test_the_reference_does_not_move_when_the_policy_does(folder: Path, tmp_path: Path, reference: str) -> None:
    batch = make_batch(folder, pairs_of_a_step(folder))
    start = make_policy(folder)
    source = ModelSource(str(folder))
    if reference == "the SFT adapter":
        save_policy(wake_adapters(start), tmp_path)
        source = ModelSource(str(folder), adapter=str(tmp_path))
    policy = wake_adapters(make_policy(source, needs=REFERRED), seed=5)
    trainable = list(policy.trainable)
    with torch.no_grad():
        at_start = start.logps(batch, start.image_features(batch))
        images = policy.image_features(batch)
        now = policy.logps(batch, images)
    frozen = policy.reference_logps(batch, images)
    assert torch.equal(frozen.chosen.total, at_start.chosen.total)
    assert torch.equal(frozen.rejected.total, at_start.rejected.total)
    assert not frozen.chosen.total.requires_grad
    assert (now.chosen.total - frozen.chosen.total).abs().min() > 1e-3
    # Afterwards the policy is itself again, and trains what it trained before.
    assert list(policy.trainable) == trainable
    assert not any(".reference." in name for name in trainable)
    assert torch.equal(policy.logps(batch, images).chosen.total, now.chosen.total)


def test_the_policy_is_itself_again_after_an_error_in_the_reference(folder: Path) -> None:
    policy = wake_adapters(make_policy(folder, needs=REFERRED))
    batch = make_batch(folder, pairs_of_a_step(folder)[:2])
    images = policy.image_features(batch)
    before = policy.logps(batch, images).chosen.total
    with pytest.raises(KeyError), policy.reference_weights():
        raise KeyError
    assert torch.equal(policy.logps(batch, images).chosen.total, before)


def as_pairs(chosen: Tensor, rejected: Tensor) -> PairLogps:
    tokens = torch.full_like(chosen, 3, dtype=torch.long)
    return PairLogps(SequenceLogps(chosen, tokens, chosen / 2), SequenceLogps(rejected, tokens, rejected / 2))


def dpo_of_totals(loss: str, **settings: Any) -> LossOfTotals:
    reference = (torch.tensor([-20.0, -5.0, -9.0]).double(), torch.tensor([-18.0, -6.0, -30.0]).double())
    algorithm = DPO(loss_type=(loss,), rpo_alpha=0.0, **settings)

    def of_totals(chosen: Tensor, rejected: Tensor) -> Tensor:
        scores = algorithm.scores(as_pairs(chosen, rejected), reference)
        return PAIR_LOSSES[loss](scores, LossSettings(algorithm.beta, algorithm.label_smoothing, algorithm.discopop_tau))

    return of_totals


def kto_of_totals(chosen: Tensor, rejected: Tensor) -> Tensor:
    return torch.cat(kto_losses(chosen + 20, rejected + 20, torch.tensor(0.7).double(), beta=0.3))


MARGINS = torch.tensor([0.5, 0.0, 2.0]).double()
LOSSES: dict[str, LossOfTotals] = {
    **{
        f"dpo {loss}": dpo_of_totals(loss, beta=0.3, label_smoothing=0.2 if loss in SMOOTHED else 0.0)
        for loss in sorted(set(PAIR_LOSSES) - RANKED)
    },
    **{
        f"dpo {divergence}": dpo_of_totals("sigmoid", f_divergence_type=divergence, ld_alpha=0.4)
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "cpo": lambda chosen, rejected: cpo_loss(chosen, rejected, beta=0.3, label_smoothing=0.2),
    "simpo": lambda chosen, rejected: simpo_loss(chosen / 9, rejected / 9, beta=2.0, gamma=1.0),
    "orpo": lambda chosen, rejected: log_odds_ratio(chosen / 9, rejected / 9),
    "rm": lambda chosen, rejected: reward_loss(chosen, rejected, MARGINS, center_rewards_coefficient=0.1),
    "kto": kto_of_totals,
    "mdpo": lambda chosen, rejected: (
        conditional_loss(chosen, rejected, beta=0.3) + anchor_loss(chosen + 20, beta=0.3, delta=0.1)
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradcheck_of_the_loss(loss: LossOfTotals) -> None:
    chosen = torch.tensor([-15.0, -7.0, -40.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-25.0, -6.5, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (chosen, rejected))


def test_dpo_on_a_pair_worked_out_by_hand() -> None:
    # beta 0.5, policy - reference: chosen +2, rejected -1, so d = 3 and the loss is log(1 + e^-1.5).
    policy = as_pairs(torch.tensor([-4.0]), torch.tensor([-8.0]))
    reference = (torch.tensor([-6.0]), torch.tensor([-7.0]))
    right, wrong = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    for smoothing, expected in ((0.0, right), (0.1, 0.9 * right + 0.1 * wrong)):
        algorithm = DPO(beta=0.5, label_smoothing=smoothing)
        loss = PAIR_LOSSES["sigmoid"](algorithm.scores(policy, reference), LossSettings(0.5, smoothing, 0.05))
        assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_twenty_steps_learn_pairs_that_only_the_images_decide(folder: Path, name: str) -> None:
    algorithm = VARIANTS[name]
    red, blue = noise_image(40, 30, seed=1), noise_image(40, 30, seed=2)
    pairs = [
        encode_pair(folder, "red", "Which?", "two", "cat", images=[red]),
        encode_pair(folder, "blue", "Which?", "cat", "two", images=[blue]),
    ]
    tuner = TunerConfig(lora_target_modules=("ALL",))
    policy = make_policy(folder, tuner=tuner, needs=algorithm.needs)
    config = OptimizerConfig(learning_rate=1e-2, lr_scheduler_type="constant", warmup_ratio=0)
    trainer = Trainer(policy, algorithm, config, num_steps=20)
    batch = make_batch(folder, pairs, needs=algorithm.needs)
    before, _ = trainer.evaluate(lambda: [batch], counts_of(pairs))
    for step in range(20):
        trainer.step(step, [batch], counts_of(pairs))
    after, _ = trainer.evaluate(lambda: [batch], counts_of(pairs))
    assert after["loss"] < before["loss"]
    if algorithm.needs.responses != "chosen":
        assert after["rewards/accuracies"] == 1.0
        assert after["rewards/margins"] > before["rewards/margins"]


def another_value(flag: Any) -> Any:
    if flag.choices:
        choice = next(
            choice for choice in flag.choices if choice not in (flag.default, *(flag.default if flag.is_list else ()))
        )
        return (choice,) if flag.is_list else choice
    return flag.default + 0.125 if isinstance(flag.default, float) else flag.default


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_survives_pickle_and_yaml(name: str) -> None:
    values = {flag.name: another_value(flag) for flag in flags_of(ALGORITHMS[name])}
    if name == "dpo":
        values |= {"loss_type": ("discopop",), "loss_weights": (0.5,), "f_divergence_type": "alpha_divergence"}
        values["label_smoothing"] = 0.0  # which this loss does not use
    algorithm = ALGORITHMS[name](**values)
    assert pickle.loads(pickle.dumps(algorithm)) == algorithm
    config = Config(algorithm=algorithm)
    values = yaml.safe_load(to_yaml(config))
    assert values.pop("rlhf_type") == name
    assert config_from_mapping(ALGORITHMS[name], values) == config


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_field_has_help_and_the_class_says_what_it_needs(name: str) -> None:
    algorithm = ALGORITHMS[name]
    for flag in flags_of(algorithm):
        assert len(flag.help) > 10
        assert flag.help.endswith(".")
    assert algorithm.name == name
    needs = algorithm().needs
    assert not (needs.reference and needs.dropout)
    assert needs.statistics <= isinstance(algorithm(), AlgorithmWithStatistics)


def test_bounds_are_checked_where_an_algorithm_is_made() -> None:
    with pytest.raises(ValueError) as caught:
        DPO(beta=0.0)
    assert str(caught.value) == "--beta 0.0: must be above 0."
