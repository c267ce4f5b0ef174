"""Preference accuracies of held-out pairs: their values by hand, for every algorithm, and with other records' pictures."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rayalign.algorithms import CPO, DPO, KTO, MDPO, ORPO, RM, SFT, Algorithm, SimPO
from rayalign.algorithms.terms import wins
from rayalign.config.sections import OptimizerConfig, RunConfig, TunerConfig
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.shuffled_pictures import with_pictures_of
from rayalign.data.store import EncodedPair
from rayalign.training.best import Best
from rayalign.training.evaluation import image_metrics, response_tokens
from rayalign.training.loop import Trainer
from rayalign.training.metric_names import BY_REWARD_MODEL, BY_SUM, BY_TOKEN, IMPLICIT_REWARD, PAIR_TOKENS
from tests.tiny_models import counts_of, encode_pair, make_batch, make_policy, noise_image, wake_adapters

ALGORITHMS: tuple[Algorithm, ...] = (SFT(), DPO(), MDPO(), CPO(), ORPO(), SimPO(), KTO())
RESPONSES = ("two", "a cat", "yes", "no", "The digit is two.", "A cat sits on the mat.", "the mat")


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[EncodedPair]:
    """Six pairs with a picture each."""
    images = [noise_image(40, 30, seed=seed) for seed in range(6)]
    return [encode_pair(folder, str(i), f"Which {i}?", RESPONSES[i], RESPONSES[i - 1], images=(images[i],)) for i in range(6)]


def trainer_of(folder: Path, algorithm: Algorithm) -> Trainer:
    """With adapters that are no longer zero, so that policy and reference differ."""
    policy = make_policy(folder, needs=algorithm.needs, tuner=TunerConfig(lora_dropout=0.0))
    return Trainer(wake_adapters(policy), algorithm, OptimizerConfig(), num_steps=1)


def evaluated(
    folder: Path, algorithm: Algorithm, pairs: list[EncodedPair]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    needs = dataclasses.replace(algorithm.needs, responses="both")  # held-out batches have both responses
    batches = [make_batch(folder, pairs[start : start + 3], needs=needs) for start in (0, 3)]
    return trainer_of(folder, algorithm).evaluate(lambda: batches, counts_of(pairs))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_every_algorithm_says_how_often_the_chosen_response_is_the_likelier_one(
    folder: Path, pairs: list[EncodedPair], algorithm: Algorithm
) -> None:
    metrics, by_pair = evaluated(folder, algorithm, pairs)
    policy = trainer_of(folder, algorithm).policy
    batch = make_batch(folder, pairs)
    with torch.no_grad():
        logps = policy.logps(batch, policy.image_features(batch))
    by_sum = (logps.chosen.total > logps.rejected.total).float()
    by_token = (logps.chosen.total / logps.chosen.tokens > logps.rejected.total / logps.rejected.tokens).float()
    assert 0 < by_sum.mean() < 1
    assert not torch.equal(by_sum, by_token)
    assert metrics[BY_SUM] == pytest.approx(by_sum.mean().item())
    assert metrics[BY_TOKEN] == pytest.approx(by_token.mean().item())
    assert [by_pair[str(i)][BY_SUM] for i in range(6)] == by_sum.tolist()
    nll = -logps.chosen.total.sum() / logps.chosen.tokens.sum()
    assert metrics["nll_loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert [by_pair[str(i)][name] for i in range(6) for name in PAIR_TOKENS] == [
        len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)
    ]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_every_algorithm_tells_how_likely_the_chosen_responses_are_in_training_too(
    folder: Path, pairs: list[EncodedPair], algorithm: Algorithm
) -> None:
    batch = make_batch(folder, pairs, needs=algorithm.needs)
    (output,), _ = trainer_of(folder, algorithm).gradients([batch], counts_of(pairs))
    assert "nll_loss" in output.mean_metrics


def test_greedy_answers_are_told_from_the_tokens_that_are_the_policys_first_choice(folder: Path) -> None:
    trainer = trainer_of(folder, SFT())
    pair = encode_pair(folder, "greedy", "Which digit?", "two", "a cat")
    answer: list[int] = []
    for _ in range(4):  # by the model's own forward
        with torch.no_grad():
            logits = trainer.policy.model(input_ids=torch.tensor([pair.prompt_ids + answer])).logits
        answer.append(int(logits[0, -1].argmax()))
    other = next(token for token in (5, 6) if token != answer[2])
    given = [
        dataclasses.replace(pair, chosen_ids=answer),
        dataclasses.replace(pair, id="other", chosen_ids=[*answer[:2], other]),
    ]
    metrics, by_pair = trainer.evaluate(lambda: [make_batch(folder, given)], counts_of(given))
    assert [by_pair[name]["exact_match"] for name in ("greedy", "other")] == [1, 0]
    assert metrics["exact_match"] == 0.5
    assert metrics["mean_token_accuracy"] == pytest.approx(6 / 7)


def test_drift_is_how_much_likelier_the_chosen_responses_are_than_under_the_reference(
    folder: Path, pairs: list[EncodedPair]
) -> None:
    metrics, by_pair = evaluated(folder, DPO(beta=0.1), pairs)
    assert metrics["drift"] == pytest.approx(metrics["rewards/chosen"] / 0.1, rel=1e-5)
    assert by_pair["0"]["drift"] != 0
    assert "drift" not in evaluated(folder, SimPO(), pairs)[0]


def test_a_reward_model_is_judged_by_its_head(folder: Path, pairs: list[EncodedPair]) -> None:
    trainer = trainer_of(folder, RM())
    assert trainer.policy.value_head is not None
    torch.nn.init.normal_(trainer.policy.value_head.summary.weight)
    metrics, _ = trainer.evaluate(lambda: [make_batch(folder, pairs)], counts_of(pairs))
    assert metrics[BY_REWARD_MODEL] == metrics["rewards/accuracies"]
    assert 0 < metrics[BY_REWARD_MODEL] < 1
    assert metrics.keys().isdisjoint((BY_SUM, BY_TOKEN, "drift", "nll_loss"))


def test_a_tie_counts_one_half(folder: Path, pairs: list[EncodedPair]) -> None:
    # Before the first step the policy is the reference: no response has a reward yet.
    policy = make_policy(folder, needs=DPO().needs)
    trainer = Trainer(policy, DPO(), OptimizerConfig(), num_steps=1)
    metrics, _ = trainer.evaluate(lambda: [make_batch(folder, pairs)], counts_of(pairs))
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/margins"] == metrics["drift"] == 0


def test_a_policy_whose_scores_are_no_numbers_has_no_accuracy_and_is_never_the_best(
    folder: Path, pairs: list[EncodedPair]
) -> None:
    trainer = trainer_of(folder, DPO())
    with torch.no_grad():
        next(iter(trainer.policy.trainable.values())).fill_(math.nan)
    metrics, _ = trainer.evaluate(lambda: [make_batch(folder, pairs)], counts_of(pairs))
    for name in (BY_SUM, BY_TOKEN, IMPLICIT_REWARD):
        assert math.isnan(metrics[name])
    evaluation = {f"eval_{name}": value for name, value in metrics.items()}
    assert Best().after(5, evaluation, RunConfig()).step is None


def test_a_tie_counts_half_a_win_and_nan_is_no_tie() -> None:
    assert wins(torch.tensor([2.0, -1.0, 0.0, math.inf, -math.inf])).tolist() == [1.0, 0.0, 0.5, 1.0, 0.0]
    assert wins(torch.tensor([math.nan])).isnan().all()


def test_a_single_response_is_compared_with_nothing(folder: Path, pairs: list[EncodedPair]) -> None:
    single = [dataclasses.replace(pairs[0], rejected_ids=[]), dataclasses.replace(pairs[1], chosen_ids=[]), *pairs[2:]]
    metrics, by_pair = evaluated(folder, KTO(), single)
    whole, _ = evaluated(folder, KTO(), pairs[2:])
    assert metrics[BY_SUM] == pytest.approx(sum(by_pair[str(i)][BY_SUM] for i in range(2, 6)) / 4)
    assert {BY_SUM, BY_TOKEN}.isdisjoint(by_pair["0"] | by_pair["1"])
    assert "drift" in by_pair["0"]
    assert "drift" not in by_pair["1"]
    assert all(math.isfinite(value) for value in metrics.values())
    assert response_tokens(make_batch(folder, single[:2])) == ([len(pairs[0].chosen_ids), 0], [0, len(pairs[1].rejected_ids)])
    assert metrics[BY_SUM] == pytest.approx(whole[BY_SUM])


def test_on_shuffled_pictures_the_accuracies_are_those_of_the_pairs_with_the_pictures_of_others(
    folder: Path, pairs: list[EncodedPair]
) -> None:
    trainer = trainer_of(folder, DPO())
    others = pairs[1:] + pairs[:1]
    swapped = [dataclasses.replace(p, images=o.images, image_hashes=o.image_hashes) for p, o in zip(pairs, others, strict=True)]
    spec = EncoderSpec(str(folder), responses="both")
    batch = with_pictures_of(pairs, others, layout=spec.layout, process_images=image_processing(spec), max_pixels=None)
    shuffled = trainer.evaluate_shuffled([batch])
    _, expected = trainer.evaluate(lambda: [make_batch(folder, swapped)], counts_of(pairs))
    for name in (BY_SUM, BY_TOKEN, IMPLICIT_REWARD):
        assert {i: values[name] for i, values in shuffled.items()} == {i: values[name] for i, values in expected.items()}


def test_a_single_response_has_no_accuracy_on_shuffled_pictures_and_a_reward_model_its_own(
    folder: Path, pairs: list[EncodedPair]
) -> None:
    batch = make_batch(folder, [dataclasses.replace(pairs[0], rejected_ids=[]), pairs[1]])
    assert trainer_of(folder, KTO()).evaluate_shuffled([batch]).keys() == {"1"}
    assert trainer_of(folder, RM()).evaluate_shuffled([make_batch(folder, pairs[:1])])["0"].keys() == {BY_REWARD_MODEL}
    assert trainer_of(folder, SFT()).evaluate_shuffled([make_batch(folder, pairs[:1])])["0"].keys() == {BY_SUM, BY_TOKEN}


def test_image_reliance_is_the_fall_of_accuracy_over_the_pairs_that_have_other_pictures() -> None:
    true = {"a": {BY_SUM: 1.0}, "b": {BY_SUM: 1.0}, "c": {BY_SUM: 0.0}, "d": {BY_SUM: 1.0}, "text": {BY_SUM: 0.0}}
    shuffled = {"a": {BY_SUM: 0.0}, "b": {BY_SUM: 1.0}, "c": {BY_SUM: 0.0}, "d": {BY_SUM: 0.5}}
    falls = [1.0, 0.0, 0.0, 0.5]
    assert image_metrics(true, shuffled) == {
        "accuracy/likelihood/shuffled": 0.375,
        "image_reliance": sum(falls) / 4,
        "image_reliance/stderr": pytest.approx(math.sqrt(sum((fall - 0.375) ** 2 for fall in falls) / 4) / 2),
        "image_reliance/pairs": 4,
    }
    assert image_metrics(true, {}) == {}


def test_accuracies_that_are_no_numbers_have_no_reliance() -> None:
    metrics = image_metrics({"a": {BY_SUM: math.nan}, "b": {BY_SUM: 1.0}}, {"a": {BY_SUM: math.nan}, "b": {BY_SUM: 0.5}})
    assert all(
        math.isnan(metrics[name]) for name in ("accuracy/likelihood/shuffled", "image_reliance", "image_reliance/stderr")
    )


def test_reliance_is_that_of_the_implicit_reward_where_it_was_measured() -> None:
    true = {"a": {BY_SUM: 1.0, BY_TOKEN: 1.0, IMPLICIT_REWARD: 1.0}}
    shuffled = {"a": {BY_SUM: 1.0, BY_TOKEN: 1.0, IMPLICIT_REWARD: 0.0}}
    assert image_metrics(true, shuffled)["image_reliance"] == 1.0
