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

from rayalign.algorithms import ALGORITHMS, DPO, Algorithm
from rayalign.algorithms.dpo import dpo_loss
from rayalign.batch import PAD, PairBatch
from rayalign.cli import to_yaml
from rayalign.config import Config, ModelConfig, OptimizerConfig, TunerConfig, config_from_mapping, flags_of
from rayalign.logprobs import PairLogps, SequenceLogps
from rayalign.loop import Trainer
from rayalign.plan import StepTotals
from rayalign.policy import ModelSource, Policy
from rayalign.prepared import EncodedPair
from tests.tiny_models import encode_pair, in_float64, make_batch, make_policy, noise_image, wake_adapters

# float64 sums of the same terms in another order.
FLOAT64 = 1e-12

COMPARING = [name for name, algorithm in ALGORITHMS.items() if algorithm.with_rejected]
REFERRING = [name for name, algorithm in ALGORITHMS.items() if algorithm.needs_reference]
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


def totals_of(pairs: Sequence[EncodedPair]) -> StepTotals:
    return StepTotals(len(pairs), sum(len(p.chosen_ids) for p in pairs), sum(len(p.rejected_ids) for p in pairs))


def gradients_of(policy: Policy, algorithm: Algorithm, batches: Sequence[PairBatch], totals: StepTotals) -> Gradients:
    """What one worker adds to the step's gradients."""
    policy.model.zero_grad(set_to_none=True)
    Trainer(policy, algorithm, OptimizerConfig(), num_steps=1).gradients(batches, totals)
    return {name: p.grad.clone() for name, p in policy.trainable.items() if p.grad is not None}


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
        position_ids=F.pad(batch.position_ids, (0, more)),
        predictors=batch.predictors + more * (batch.predictors // length),
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_update_is_the_same_for_any_cut_any_workers_any_order_and_any_padding(folder: Path, name: str) -> None:
    algorithm = ALGORITHMS[name]()
    pairs = pairs_of_a_step(folder)
    totals = totals_of(pairs)
    policy = wake_adapters(
        in_float64(make_policy(folder, tuner=NO_DROPOUT, needs_reference=algorithm.needs_reference)), scale=0.3
    )

    def run(*workers: Sequence[Sequence[int]]) -> Gradients:
        """Each worker has its micro-batches, lists of pair numbers; their gradients are summed."""
        each = [
            gradients_of(policy, algorithm, [batch([pairs[i] for i in cut]) for cut in micro_batches], totals)
            for micro_batches in workers
        ]
        return {name: torch.stack([gradients[name] for gradients in each]).sum(0) for name in each[0]}

    def batch(some: Sequence[EncodedPair]) -> PairBatch:
        return make_batch(folder, some, with_rejected=algorithm.with_rejected)

    whole = run([[0, 1, 2, 3, 4, 5]])
    for micro_batches in ([[0], [1], [2], [3], [4], [5]], [[0, 1], [2, 3, 4, 5]], [[5, 3, 1], [4, 2, 0]], [[5, 4, 3, 2, 1, 0]]):
        assert_same(run(micro_batches), whole)
    assert_same(run([[0, 5]], [[1], [2]], [[3, 4]]), whole)
    assert_same(run([[0, 1, 2, 3, 4]], [[5]], []), whole)  # the third worker is idle
    assert_same(gradients_of(policy, algorithm, [padded(batch(pairs), 13)], totals), whole)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_shares_and_metrics_add_up_over_micro_batches(folder: Path, name: str) -> None:
    algorithm = ALGORITHMS[name]()
    pairs = pairs_of_a_step(folder)
    policy = wake_adapters(in_float64(make_policy(folder, tuner=NO_DROPOUT, needs_reference=algorithm.needs_reference)))

    def metrics(*cut: slice) -> dict[str, float]:
        batches = [make_batch(folder, pairs[part], with_rejected=algorithm.with_rejected) for part in cut]
        return Trainer(policy, algorithm, OptimizerConfig(), num_steps=1).evaluate(batches, totals_of(pairs))[0]

    whole = metrics(slice(0, 6))
    assert metrics(slice(0, 1), slice(1, 6)) == pytest.approx(whole, rel=FLOAT64)
    assert not any(math.isnan(value) for value in whole.values())


@pytest.mark.parametrize("name", COMPARING)
def test_swapping_chosen_and_rejected_negates_the_margins(folder: Path, name: str) -> None:
    algorithm = ALGORITHMS[name]()
    pairs = pairs_of_a_step(folder)
    swapped = [dataclasses.replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in pairs]
    policy = wake_adapters(in_float64(make_policy(folder, needs_reference=algorithm.needs_reference)))
    with torch.no_grad():
        one, other = (algorithm.step(policy, make_batch(folder, p), totals_of(p)).pair_metrics for p in (pairs, swapped))
    torch.testing.assert_close(other["rewards/margins"], -one["rewards/margins"], atol=1e-11, rtol=0)  # of numbers near 10
    assert torch.equal(other["rewards/accuracies"], 1 - one["rewards/accuracies"])
    assert one["rewards/margins"].abs().min() > 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reference", ["adapters off", "the SFT adapter"])
@pytest.mark.parametrize("name", REFERRING)
def test_training_starts_with_rewards_of_exactly_zero_and_a_loss_of_log_2(
    folder: Path, tmp_path: Path, name: str, reference: str, checkpointing: bool
) -> None:
    source = ModelSource(str(folder))
    if reference == "the SFT adapter":
        wake_adapters(make_policy(folder)).save(tmp_path)
        source = ModelSource(str(folder), adapter=str(tmp_path))
    policy = make_policy(source, needs_reference=True, model=ModelConfig(gradient_checkpointing=checkpointing))
    pairs = pairs_of_a_step(folder)
    algorithm = ALGORITHMS[name](**({"rpo_alpha": 0.0} if name == "dpo" else {}))
    output = algorithm.step(policy, make_batch(folder, pairs), totals_of(pairs))
    for reward in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert output.pair_metrics[reward].tolist() == [0.0] * len(pairs)
    assert float(output.loss_share.detach()) == pytest.approx(math.log(2), rel=1e-6)  # float32


@pytest.mark.parametrize("reference", ["adapters off", "the SFT adapter"])
def test_the_reference_does_not_move_when_the_policy_does(folder: Path, tmp_path: Path, reference: str) -> None:
    batch = make_batch(folder, pairs_of_a_step(folder))
    start = make_policy(folder)
    source = ModelSource(str(folder))
    if reference == "the SFT adapter":
        wake_adapters(start).save(tmp_path)
        source = ModelSource(str(folder), adapter=str(tmp_path))
    policy = wake_adapters(make_policy(source, needs_reference=True), seed=5)
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
    policy = wake_adapters(make_policy(folder, needs_reference=True))
    batch = make_batch(folder, pairs_of_a_step(folder)[:2])
    images = policy.image_features(batch)
    before = policy.logps(batch, images).chosen.total
    with pytest.raises(KeyError), policy.reference_weights():
        raise KeyError
    assert torch.equal(policy.logps(batch, images).chosen.total, before)


def test_a_reference_without_an_adapter_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError) as caught:
        make_policy(folder, tuner=TunerConfig(sft_type="full"), needs_reference=True)
    assert str(caught.value) == (
        "--sft_type full: this algorithm compares with a reference, which is the model without its adapter. Use lora."
    )


def as_pairs(chosen: Tensor, rejected: Tensor) -> PairLogps:
    tokens = torch.full_like(chosen, 3, dtype=torch.long)
    return PairLogps(SequenceLogps(chosen, tokens), SequenceLogps(rejected, tokens))


def dpo_of_totals(label_smoothing: float) -> LossOfTotals:
    reference = as_pairs(torch.tensor([-20.0, -5.0, -9.0]).double(), torch.tensor([-18.0, -6.0, -30.0]).double())
    return lambda chosen, rejected: dpo_loss(as_pairs(chosen, rejected), reference, beta=0.3, label_smoothing=label_smoothing)


LOSSES: dict[str, LossOfTotals] = {"dpo": dpo_of_totals(0.0), "dpo, smoothed": dpo_of_totals(0.2)}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradcheck_of_the_loss(loss: LossOfTotals) -> None:
    chosen = torch.tensor([-15.0, -7.0, -400.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-25.0, -6.5, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (chosen, rejected))


def test_dpo_on_a_pair_worked_out_by_hand() -> None:
    # beta 0.5, policy - reference: chosen +2, rejected -1, so d = 3 and the loss is log(1 + e^-1.5).
    policy = as_pairs(torch.tensor([-4.0]), torch.tensor([-8.0]))
    reference = as_pairs(torch.tensor([-6.0]), torch.tensor([-7.0]))
    right, wrong = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    for smoothing, expected in ((0.0, right), (0.1, 0.9 * right + 0.1 * wrong)):
        loss = dpo_loss(policy, reference, beta=0.5, label_smoothing=smoothing)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_twenty_steps_learn_pairs_that_only_the_images_decide(folder: Path, name: str) -> None:
    algorithm = ALGORITHMS[name]()
    red, blue = noise_image(40, 30, seed=1), noise_image(40, 30, seed=2)
    pairs = [
        encode_pair(folder, "red", "Which?", "two", "cat", images=[red]),
        encode_pair(folder, "blue", "Which?", "cat", "two", images=[blue]),
    ]
    tuner = TunerConfig(lora_target_modules=("ALL",))
    policy = make_policy(folder, tuner=tuner, uses_dropout=algorithm.uses_dropout, needs_reference=algorithm.needs_reference)
    config = OptimizerConfig(learning_rate=1e-2, lr_scheduler_type="constant", warmup_ratio=0)
    trainer = Trainer(policy, algorithm, config, num_steps=20)
    batch = make_batch(folder, pairs, with_rejected=algorithm.with_rejected)
    before, _ = trainer.evaluate([batch], totals_of(pairs))
    for step in range(20):
        trainer.step(step, [batch], totals_of(pairs))
    after, _ = trainer.evaluate([batch], totals_of(pairs))
    assert after["loss"] < 0.2 * before["loss"]
    assert after["logps/chosen"] > before["logps/chosen"]
    if algorithm.with_rejected:
        assert after["rewards/accuracies"] == 1.0


def another_value(flag: Any) -> Any:
    if flag.choices:
        return next(choice for choice in flag.choices if choice != flag.default)
    return flag.default + 0.125 if isinstance(flag.default, float) else flag.default


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_survives_pickle_and_yaml(name: str) -> None:
    algorithm = ALGORITHMS[name](**{flag.name: another_value(flag) for flag in flags_of(ALGORITHMS[name])})
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
    assert algorithm.head in ("language", "value")
    assert not (algorithm.needs_reference and algorithm.uses_dropout)


def test_bounds_are_checked_where_an_algorithm_is_made() -> None:
    with pytest.raises(ValueError) as caught:
        DPO(beta=0.0)
    assert str(caught.value) == "--beta 0.0: must be above 0."
