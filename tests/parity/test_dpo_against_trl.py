"""DPO against TRL's DPOTrainer at its pinned version: same records, weights and adapter; token ids, losses, gradients, weights.

The losses beyond the plain one are in `test_losses_against_trl` and `test_models_against_trl`.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from rayalign.algorithms import DPO
from rayalign.config.sections import OptimizerConfig
from rayalign.policy.adapters import REFERENCE
from rayalign.policy.saving import save_policy
from rayalign.training.loop import Trainer
from rayalign.training.metrics import MetricSums
from tests.parity.conftest import RecordDifference
from tests.parity.trl_models import (
    ALL_KINDS,
    BETA,
    ONE_IMAGE,
    TOLERANCE,
    TRL,
    Pair,
    adapter_of,
    collate,
    differences,
    draw_adapter,
    encode,
    give_adapter,
    make_policy,
    make_trl,
    our_step,
    relative_distance,
    trl_step,
)
from tests.tiny_models import FAMILIES, counts_of, make_batch, save_tiny_model

pytestmark = [
    # TRL and peft still use the older of transformers' two names.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # TRL copies the SFT adapter into a second one beside it, which is what peft warns of.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family with its processor."""
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("one_family"), "llava_next")


@dataclass(frozen=True)
class Trajectory:
    """Five steps of training: the loss of each, and the adapters' weights before and after."""

    losses: list[float]
    start: dict[str, Tensor]
    end: dict[str, Tensor]


# --- the tests


def test_token_ids_of_prompt_and_answers_are_trls(folder: Path, tmp_path: Path) -> None:
    trainer = make_trl(folder, tmp_path, ALL_KINDS)
    batch = collate(trainer, ALL_KINDS)
    real, answer = batch["attention_mask"].bool(), batch["completion_mask"].bool()
    for i, pair in enumerate(encode(folder, ALL_KINDS)):
        for row, response in ((i, pair.chosen_ids), (len(ALL_KINDS) + i, pair.rejected_ids)):
            assert batch["input_ids"][row][real[row] & ~answer[row]].tolist() == pair.prompt_ids
            assert batch["input_ids"][row][answer[row]].tolist() == response


@pytest.mark.parametrize("kind", ["one image each", "mixed"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_loss_and_every_gradient_are_trls(
    folder: Path, tmp_path: Path, kind: str, gradient_checkpointing: bool, record_difference: RecordDifference
) -> None:
    pairs = ONE_IMAGE if kind == "one image each" else ALL_KINDS
    policy = make_policy(folder, gradient_checkpointing=gradient_checkpointing)
    trainer = make_trl(folder, tmp_path, pairs)
    give_adapter(trainer.model, draw_adapter(policy, seed=1))
    encoded = encode(folder, pairs)

    step = our_step(policy, DPO(beta=BETA, rpo_alpha=0), [[make_batch(folder, encoded)]], counts_of(encoded))
    expected = trl_step(trainer, [collate(trainer, pairs)])

    assert abs(expected[0] - math.log(2)) > 0.01  # the adapter makes a difference
    assert step[0] == pytest.approx(expected[0], abs=TOLERANCE)
    assert relative_distance(step[1], expected[1]) < TOLERANCE
    record_difference("dpo, whole model", TRL, **differences(step, expected))


def test_loss_and_gradients_with_the_nll_term_are_trls_with_its_sft_loss_added(
    folder: Path, tmp_path: Path, record_difference: RecordDifference
) -> None:
    policy = make_policy(folder)
    trainer = make_trl(folder, tmp_path, ALL_KINDS, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
    give_adapter(trainer.model, draw_adapter(policy, seed=2))
    encoded = encode(folder, ALL_KINDS)

    step = our_step(policy, DPO(beta=BETA, rpo_alpha=0.3), [[make_batch(folder, encoded)]], counts_of(encoded))
    expected = trl_step(trainer, [collate(trainer, ALL_KINDS)])

    assert step[0] == pytest.approx(expected[0], abs=TOLERANCE)
    assert relative_distance(step[1], expected[1]) < TOLERANCE
    record_difference("dpo, whole model", TRL, **differences(step, expected))


def test_rewards_and_logps_are_trls(llava_next: Path, tmp_path: Path) -> None:
    policy = make_policy(llava_next)
    trainer = make_trl(llava_next, tmp_path, ALL_KINDS)
    give_adapter(trainer.model, draw_adapter(policy, seed=1))
    encoded = encode(llava_next, ALL_KINDS)

    metrics = DPO(beta=BETA).loss(policy, make_batch(llava_next, encoded), counts_of(encoded)).pair_metrics
    trl_step(trainer, [collate(trainer, ALL_KINDS)])

    for name, values in metrics.items():
        (expected,) = trainer._metrics["train"][name]
        # Log-probabilities are of order 100: the tolerance is relative to them, and beta times as much for rewards.
        assert values.mean().item() == pytest.approx(expected, abs=TOLERANCE * metrics["logps/chosen"].abs().max().item()), name


def five_steps(folder: Path, output: Path, faults: dict[str, float]) -> tuple[Trajectory, Trajectory]:
    """Five AdamW steps from the same start, ours and TRL's own training loop; `faults` are settings that only ours gets."""
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0}
    # Adam divides a gradient by its own size, so where an entry is as small as its rounding error, that error alone decides
    # where a whole learning rate goes. With an epsilon above it (1e-6 of gradients up to 0.3), the comparison stays sharp.
    settings["adam_epsilon"] = 1e-3
    policy = make_policy(folder)
    trainer = make_trl(folder, output, ALL_KINDS, max_steps=5, lr_scheduler_type="constant", optim="adamw_torch", **settings)
    start = draw_adapter(policy, seed=1)
    give_adapter(trainer.model, start)
    encoded = encode(folder, ALL_KINDS)

    optimizer = OptimizerConfig(lr_scheduler_type="constant", warmup_ratio=0, **{**settings, **faults})
    ours = Trainer(policy, DPO(beta=BETA, rpo_alpha=0), optimizer, num_steps=5)
    losses, norms = [], []
    for step in range(5):
        # Every second step in two micro-batches, against TRL's one: the update does not depend on the cut.
        cut = [encoded[:2], encoded[2:]] if step % 2 else [encoded]
        result = ours.step(step, [make_batch(folder, pairs) for pairs in cut], counts_of(encoded))
        norms.append(result.grad_norm.item())
        losses.append(MetricSums(result.outputs).reduce(steps=1)["loss"])
    trainer.train()
    assert max(norms) > 1 > min(norms)  # some gradients are clipped, some are not
    return Trajectory(losses, start, adapter_of(policy.model)), Trajectory(trainer.losses, start, adapter_of(trainer.model))


def test_five_optimizer_steps_end_at_the_weights_of_trls_own_training_loop(folder: Path, tmp_path: Path) -> None:
    ours, theirs = five_steps(folder, tmp_path, {})
    assert ours.losses == pytest.approx(theirs.losses, abs=TOLERANCE)
    assert relative_distance(ours.end, theirs.end) < TOLERANCE
    # The weights moved by a tenth of the largest one, so a ten-thousandth of that way would be noticed.
    assert relative_distance(theirs.end, theirs.start) > 0.1


@pytest.mark.parametrize("fault", [{"weight_decay": 0.0}, {"max_grad_norm": 0.0}, {"adam_beta2": 0.99}])
def test_another_optimizer_setting_ends_at_other_weights(llava_next: Path, tmp_path: Path, fault: dict[str, float]) -> None:
    ours, theirs = five_steps(llava_next, tmp_path, fault)
    assert relative_distance(ours.end, theirs.end) > 100 * TOLERANCE


def test_the_reference_of_a_run_that_starts_from_an_adapter_is_that_adapter_as_in_trl(llava_next: Path, tmp_path: Path) -> None:
    sft = make_policy(llava_next)
    draw_adapter(sft, seed=3)
    adapter = tmp_path / "sft"
    save_policy(sft, adapter)
    encoded = encode(llava_next, ALL_KINDS)
    batch, counts = make_batch(llava_next, encoded), counts_of(encoded)
    policy = make_policy(llava_next, adapter=adapter)
    trainer = make_trl(llava_next, tmp_path, ALL_KINDS, adapter=adapter)
    trl_batch = collate(trainer, ALL_KINDS)
    assert REFERENCE in policy.model.peft_config
    assert "ref" in trainer.model.peft_config

    # Policy and reference are both the SFT model: every reward is 0.
    loss, _ = our_step(policy, DPO(beta=BETA, rpo_alpha=0), [[batch]], counts)
    expected_loss, _ = trl_step(trainer, [trl_batch])
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    assert expected_loss == pytest.approx(math.log(2), abs=1e-7)

    # The policy moves on, the reference stays.
    give_adapter(trainer.model, draw_adapter(policy, seed=4))
    loss, gradients = our_step(policy, DPO(beta=BETA, rpo_alpha=0), [[batch]], counts)
    expected_loss, expected = trl_step(trainer, [trl_batch])
    assert loss == pytest.approx(expected_loss, abs=TOLERANCE)
    assert relative_distance(gradients, expected) < TOLERANCE

    # With the adapter off as the reference it would be another loss.
    plain = make_policy(llava_next)
    give_adapter(plain.model, adapter_of(policy.model))
    other_loss, _ = our_step(plain, DPO(beta=BETA, rpo_alpha=0), [[batch]], counts)
    assert abs(other_loss - expected_loss) > 0.01


# --- where we differ on purpose


def test_nll_is_the_mean_over_all_tokens_of_a_step_where_trl_averages_the_means_of_micro_batches(
    llava_next: Path, tmp_path: Path
) -> None:
    policy = make_policy(llava_next)
    trainer = make_trl(llava_next, tmp_path, ONE_IMAGE, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0])
    give_adapter(trainer.model, draw_adapter(policy, seed=2))
    encoded = encode(llava_next, ONE_IMAGE)
    algorithm, counts = DPO(beta=BETA, rpo_alpha=1.0), counts_of(encoded)
    assert len(encoded[0].chosen_ids) != len(encoded[1].chosen_ids)

    whole, _ = our_step(policy, algorithm, [[make_batch(llava_next, encoded)]], counts)
    cut, _ = our_step(policy, algorithm, [[make_batch(llava_next, [pair]) for pair in encoded]], counts)
    trl_whole, _ = trl_step(trainer, [collate(trainer, ONE_IMAGE)])
    trl_cut, _ = trl_step(trainer, [collate(trainer, [pair]) for pair in ONE_IMAGE])

    assert whole == pytest.approx(trl_whole, abs=TOLERANCE)
    assert cut == pytest.approx(whole, abs=TOLERANCE)
    assert abs(trl_cut - trl_whole) > 0.01
    # TRL's figure for the cut step is the mean of what we call two steps of one pair.
    steps = [our_step(policy, algorithm, [[make_batch(llava_next, [pair])]], counts_of([pair]))[0] for pair in encoded]
    assert trl_cut == pytest.approx(sum(steps) / 2, abs=TOLERANCE)


def test_label_smoothing_is_cdpos_where_trl_ignores_it(llava_next: Path, tmp_path: Path) -> None:
    policy = make_policy(llava_next)
    trainer = make_trl(llava_next, tmp_path, ONE_IMAGE, label_smoothing=0.2)
    give_adapter(trainer.model, draw_adapter(policy, seed=1))
    encoded = encode(llava_next, ONE_IMAGE)
    batch, counts = make_batch(llava_next, encoded), counts_of(encoded)

    loss, _ = our_step(policy, DPO(beta=BETA, rpo_alpha=0, label_smoothing=0.2), [[batch]], counts)
    plain, _ = our_step(policy, DPO(beta=BETA, rpo_alpha=0), [[batch]], counts)
    trl_loss, _ = trl_step(trainer, [collate(trainer, ONE_IMAGE)])

    assert trl_loss == pytest.approx(plain, abs=TOLERANCE)
    # -log sigmoid(-m) = m - log sigmoid(m), so smoothing e adds e times the mean margin.
    margins = DPO(beta=BETA).loss(policy, batch, counts).pair_metrics["rewards/margins"]
    assert loss == pytest.approx(plain + 0.2 * margins.mean().item(), abs=TOLERANCE)
    assert abs(loss - trl_loss) > 0.01


# --- the comparison notices what it is there for


@pytest.mark.parametrize("fault", ["another beta", "images swapped", "answers swapped", "another adapter", "an image lost"])
def test_a_fault_is_a_thousand_times_the_tolerance(llava_next: Path, tmp_path: Path, fault: str) -> None:
    first, second = ONE_IMAGE
    faulty = {
        "images swapped": [Pair(first.messages, second.sizes, first.chosen, first.rejected), second],
        "answers swapped": [Pair(first.messages, first.sizes, first.rejected, first.chosen), second],
        "an image lost": [Pair((("user", "Which digit is it?"),), (), first.chosen, first.rejected), second],
    }.get(fault, ONE_IMAGE)
    policy = make_policy(llava_next)
    trainer = make_trl(llava_next, tmp_path, ONE_IMAGE)
    give_adapter(trainer.model, draw_adapter(policy, seed=1))
    if fault == "another adapter":
        draw_adapter(policy, seed=5)
    encoded = encode(llava_next, faulty)
    algorithm = DPO(beta=0.2 if fault == "another beta" else BETA, rpo_alpha=0)

    loss, gradients = our_step(policy, algorithm, [[make_batch(llava_next, encoded)]], counts_of(encoded))
    expected_loss, expected = trl_step(trainer, [collate(trainer, ONE_IMAGE)])

    assert abs(loss - expected_loss) > 1000 * TOLERANCE
    assert relative_distance(gradients, expected) > 1000 * TOLERANCE
