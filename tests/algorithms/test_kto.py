"""KTO's estimate of the KL divergence: whose responses it sees, and what it is."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rayalign.algorithms import KTO
from rayalign.algorithms.algorithm import StepStatistics
from rayalign.config.sections import OptimizerConfig, TunerConfig
from rayalign.data.store import EncodedPair
from rayalign.policy.policy import Policy
from rayalign.training.loop import Trainer
from tests.tiny_models import counts_of, encode_pair, in_float64, make_batch, make_policy, noise_image, wake_adapters

NEEDS = KTO().needs


@pytest.fixture
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


@pytest.fixture
def policy(folder: Path) -> Policy:
    return wake_adapters(in_float64(make_policy(folder, needs=NEEDS)))


@pytest.fixture
def pairs(folder: Path) -> list[EncodedPair]:
    red = noise_image(40, 30, seed=1)
    return [
        encode_pair(folder, "a", "Which digit is it?", "two", "a cat", images=[red]),
        encode_pair(folder, "b", "describe the image.", "The digit is two.", "no"),
        encode_pair(folder, "c", "it", "yes", "A cat sits on the mat."),
    ]


def statistics(folder: Path, policy: Policy, pairs: list[EncodedPair], partners: list[EncodedPair]) -> Tensor:
    with torch.no_grad():
        return KTO().statistics(policy, make_batch(folder, pairs, needs=NEEDS, partners=partners))


def test_the_estimate_does_not_see_a_pairs_own_responses(folder: Path, policy: Policy, pairs: list[EncodedPair]) -> None:
    partners = [pairs[1], pairs[2], pairs[0]]
    before = statistics(folder, policy, pairs, partners)
    other = encode_pair(folder, "other", "?", "the mat", "It is a digit.")
    changed = [
        dataclasses.replace(pairs[0], chosen_ids=other.chosen_ids, rejected_ids=other.rejected_ids),
        *pairs[1:],
    ]
    # The same partners: nothing changes, although the first pair has other responses.
    torch.testing.assert_close(statistics(folder, policy, changed, partners), before, atol=1e-12, rtol=0)  # float64
    # Its responses are seen where it is the partner: after the third pair's prompt.
    after = statistics(folder, policy, pairs, [pairs[1], pairs[2], changed[0]])
    torch.testing.assert_close(after[:2], before[:2], atol=1e-12, rtol=0)  # float64
    assert (after[2, 0] - before[2, 0]).abs() > 1e-3


def test_the_estimate_sees_a_pairs_own_prompt_and_images(folder: Path, policy: Policy, pairs: list[EncodedPair]) -> None:
    partners = [pairs[1], pairs[2], pairs[0]]
    before = statistics(folder, policy, pairs, partners)
    recoloured = encode_pair(folder, "a", "Which digit is it?", "two", "a cat", images=[noise_image(40, 30, seed=5)])
    after = statistics(folder, policy, [recoloured, *pairs[1:]], partners)
    assert (after[0, 0] - before[0, 0]).abs() > 1e-3
    # Another padding changes the order of float64 sums.
    torch.testing.assert_close(after[1:], before[1:], atol=1e-12, rtol=0)


def test_each_response_of_a_partner_counts_once(folder: Path, policy: Policy, pairs: list[EncodedPair]) -> None:
    good, bad = dataclasses.replace(pairs[1], rejected_ids=[]), dataclasses.replace(pairs[1], chosen_ids=[])
    both, chosen, rejected = (statistics(folder, policy, [pairs[0]], [partner])[0] for partner in (pairs[1], good, bad))
    assert [line[1].item() for line in (both, chosen, rejected)] == [2.0, 1.0, 1.0]
    assert both[0].item() == pytest.approx((chosen[0] + rejected[0]).item(), abs=1e-12)  # float64
    assert chosen[0].abs() > 1e-3


@pytest.mark.parametrize(("lines", "kl"), [([[3.0, 2.0], [-1.0, 1.0], [2.5, 1.0]], 4.5 / 4), ([[-3.0, 2.0], [1.0, 1.0]], 0.0)])
def test_the_estimate_is_the_mean_over_the_responses_of_the_whole_step_and_never_below_zero(
    folder: Path, policy: Policy, pairs: list[EncodedPair], lines: list[list[float]], kl: float
) -> None:
    batch = make_batch(folder, pairs[:1], needs=NEEDS, partners=pairs[1:2])
    output = KTO().loss(policy, batch, counts_of(pairs[:1]), StepStatistics(torch.tensor(lines), 0))
    total, count = output.mean_metrics["kl"]
    assert (total / count).item() == pytest.approx(kl)
    assert not total.requires_grad


def test_a_single_response_has_no_values_of_the_other_side(folder: Path, policy: Policy, pairs: list[EncodedPair]) -> None:
    step = [pairs[0], dataclasses.replace(pairs[1], rejected_ids=[]), dataclasses.replace(pairs[2], chosen_ids=[])]
    batch = make_batch(folder, step, needs=NEEDS)
    output = KTO().loss(policy, batch, counts_of(step), StepStatistics(torch.tensor([[0.0, 4.0]]), 0))
    missing = {name: value.tolist() for name, value in output.missing.items()}
    assert missing == {
        "rewards/chosen": [False, False, True],
        "logps/chosen": [False, False, True],
        "rewards/rejected": [False, True, False],
        "logps/rejected": [False, True, False],
        "rewards/margins": [False, True, True],
        "rewards/accuracies": [False, True, True],
    }
    assert set(missing) == set(output.pair_metrics)


def test_mismatched_rows_find_their_images_where_the_vision_tower_learns(folder: Path, pairs: list[EncodedPair]) -> None:
    tuner = TunerConfig(freeze_vit=False, lora_dropout=0)
    policy = in_float64(make_policy(folder, tuner=tuner, needs=NEEDS))
    start = KTO().statistics(policy, make_batch(folder, pairs, needs=NEEDS))
    assert start[:, 0].tolist() == [0.0] * 3  # policy and reference are one
    trained = KTO().statistics(wake_adapters(policy), make_batch(folder, pairs, needs=NEEDS))
    assert trained[:, 0].abs().min() > 1e-6


@pytest.mark.parametrize(("frozen", "runs"), [(True, 2), (False, 8)])
def test_a_frozen_tower_runs_once_for_statistics_and_loss(
    folder: Path, pairs: list[EncodedPair], frozen: bool, runs: int
) -> None:
    """Two micro-batches with images; one that is trained runs in each of both, for policy and reference."""
    pairs[1] = encode_pair(folder, "b", "describe the image.", "The digit is two.", "no", images=[noise_image(30, 40, seed=2)])
    batches = [
        make_batch(folder, pairs[:1], needs=NEEDS, partners=pairs[1:2]),
        make_batch(folder, pairs[1:], needs=NEEDS, partners=[pairs[2], pairs[0]]),
    ]
    tuner = TunerConfig(freeze_vit=frozen)
    trainer = Trainer(make_policy(folder, tuner=tuner, needs=NEEDS), KTO(), OptimizerConfig(), num_steps=1)
    seen = []
    trainer.policy.base.model.vision_tower.register_forward_hook(lambda *arguments: seen.append(1))
    trainer.gradients(batches, counts_of(pairs))
    assert len(seen) == runs
