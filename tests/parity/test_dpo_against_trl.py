"""DPO against TRL's DPOTrainer at its pinned version: same records, weights and adapter; token ids, losses, gradients, weights.

TRL tokenises and collates for itself, runs chosen and rejected as two plain rows, and optimises with transformers' Trainer;
rayalign shares nothing of that. The tiny models have weights scaled so that every input counts, and the adapters' B matrices
are random: with B = 0 the loss is log 2 and the gradient of A zero whatever the code does.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from rayalign.algorithms import DPO
from rayalign.batch import PairBatch, assemble
from rayalign.config import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.encode import Encoder, EncoderSpec, image_processing
from rayalign.loop import Trainer
from rayalign.metrics import MetricSums
from rayalign.models import ModelSource
from rayalign.plan import StepTotals
from rayalign.policy import REFERENCE, TRAINED, Policy, load_policy, lora_targets
from rayalign.prepared import EncodedPair
from rayalign.records import Message, build_record
from tests.tiny_models import FAMILIES, save_tiny_model

pytestmark = [
    # TRL and peft still use the older of transformers' two names.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # TRL copies the SFT adapter into a second one beside it, which is what peft warns of.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]

TOLERANCE = 1e-5
"""float32 sums of a few hundred terms in another order (one row of three segments against two rows) differ by about 1e-6 of the
largest term. Losses are compared absolutely (they are of order 1); gradients and weights relative to the largest entry there is
in any adapter's gradient or weight."""

BETA = 0.1


@dataclass(frozen=True)
class Pair:
    """A preference pair before anyone encoded it: `messages` are (role, text) with `<image>` marks, `sizes` (height, width)."""

    messages: tuple[tuple[str, str], ...]
    sizes: tuple[tuple[int, int], ...]
    chosen: str
    rejected: str


ONE_IMAGE = [
    Pair((("user", "<image>Which digit is it?"),), ((30, 40),), "The digit is two.", "It is a seven"),
    Pair((("user", "<image>describe the mat."),), ((61, 33),), "A cat sits.", "The digit on the mat is not two, it is six."),
]
TEXT_ONLY = Pair((("user", "Which digit is it?"),), (), "two", "A cat sits on it.")
SEVERAL_IMAGES = Pair(
    (("user", "First <image> then <image>: which digit is it?"),), ((28, 28), (40, 90)), "The first is two.", "six"
)
CONVERSATION = Pair(
    (
        ("system", "describe the image."),
        ("user", "<image>Which digit is it?"),
        ("assistant", "The digit is two."),
        ("user", "And on the mat? <image>"),
    ),
    ((50, 30), (33, 44)),
    "A cat sits on the mat.",
    "It is the digit six.",
)
ALL_KINDS = [*ONE_IMAGE, TEXT_ONLY, SEVERAL_IMAGES, CONVERSATION]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family with its processor."""
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("one_family"), "llava_next")


def images_of(pair: Pair, *, seed: int = 0) -> list[Image.Image]:
    """Noise, another for every size and seed."""
    return [
        Image.fromarray(np.random.default_rng([seed, *size]).integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in pair.sizes
    ]


# --- our side: records -> encoder -> batch -> policy


def encode(folder: Path, pairs: Sequence[Pair]) -> list[EncodedPair]:
    encoder = Encoder(EncoderSpec(str(folder), responses="both"))
    encoded = []
    for i, pair in enumerate(pairs):
        contents = []
        for image in images_of(pair):
            file = io.BytesIO()
            image.save(file, "PNG")
            contents.append(file.getvalue())
        record = build_record(
            id=str(i),
            messages=[Message(role=role, content=text) for role, text in pair.messages],
            images=contents,
            chosen=pair.chosen,
            rejected=pair.rejected,
        )
        encoded.append(encoder.encode(record, contents))
    return encoded


def make_batch(folder: Path, pairs: Sequence[EncodedPair]) -> PairBatch:
    spec = EncoderSpec(str(folder), responses="both")
    pad = spec.processor.tokenizer.pad_token_id
    return assemble(pairs, pad_token_id=pad, process_images=image_processing(spec))


def totals_of(pairs: Sequence[EncodedPair]) -> StepTotals:
    chosen, rejected = (sum(len(getattr(p, name)) for p in pairs) for name in ("chosen_ids", "rejected_ids"))
    return StepTotals(len(pairs), 2 * len(pairs), chosen, rejected)


def make_policy(folder: Path, *, adapter: Path | None = None, gradient_checkpointing: bool = False) -> Policy:
    return load_policy(
        ModelSource(str(folder), adapter=str(adapter) if adapter else None),
        model=ModelConfig(gradient_checkpointing=gradient_checkpointing),
        tuner=TunerConfig(lora_target_modules=("ALL",), lora_rank=4, lora_alpha=16),
        device=torch.device("cpu"),
        needs=DPO().needs,
    )


def draw_adapter(policy: Policy, *, seed: int) -> dict[str, Tensor]:
    """Draws the trained adapter's weights anew, B too, and returns them by name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.normal_(0, 0.1, generator=generator)
    return adapter_of(policy.model)


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".{TRAINED}." in name}


def our_step(
    policy: Policy, algorithm: DPO, batches: Sequence[PairBatch], totals: StepTotals
) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one optimizer step cut into these micro-batches."""
    policy.model.zero_grad()
    loss = 0.0
    for batch in batches:
        share = algorithm.step(policy, batch, totals).loss_share
        share.backward()
        loss += share.item()
    return loss, gradients_of(policy.model)


# --- TRL's side: its own collator, loss and training loop


class RecordingTrainer(DPOTrainer):
    """DPOTrainer that keeps the loss of every micro-batch: its log only has means."""

    def __init__(self, **arguments: Any) -> None:
        self.losses: list[float] = []
        super().__init__(**arguments)

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        loss = super().compute_loss(*arguments, **keywords)
        self.losses.append(loss.item())
        return loss


def trl_example(pair: Pair, *, seed: int = 0) -> dict[str, Any]:
    prompt = []
    for role, text in pair.messages:
        content: list[dict[str, str]] = []
        for i, piece in enumerate(text.split("<image>")):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": piece}] if piece else []
        prompt.append({"role": role, "content": content})
    answers = {name: [{"role": "assistant", "content": getattr(pair, name)}] for name in ("chosen", "rejected")}
    return {"images": images_of(pair, seed=seed), "prompt": prompt, **answers}


class Examples(Dataset):
    """Examples as they are: Arrow would fill the parts of a message's content up to the same keys."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        super().__init__(Dataset.from_dict({"images": [[] for _ in pairs]}).data)
        self._pairs = pairs

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            return trl_example(self._pairs[index])
        return [trl_example(self._pairs[i]) for i in index]

    __getitems__ = __getitem__


def make_trl(
    folder: Path, output: Path, pairs: Sequence[Pair], *, adapter: Path | None = None, **settings: Any
) -> RecordingTrainer:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    targets = lora_targets(model, ("ALL",), family_of(folder))
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=targets)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    defaults = {
        "beta": BETA,
        "max_length": None,
        "per_device_train_batch_size": len(pairs),
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    return RecordingTrainer(
        model=model,
        args=DPOConfig(output_dir=str(output), **{**defaults, **settings}),
        train_dataset=Examples(pairs),
        processing_class=AutoProcessor.from_pretrained(folder),
        peft_config=None if adapter else lora,
    )


def family_of(folder: Path) -> Any:
    return EncoderSpec(str(folder), responses="both").family


def give_adapter(model: Any, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == set(weights)
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def collate(trainer: DPOTrainer, pairs: Sequence[Pair], *, seed: int = 0) -> dict[str, Any]:
    return dict(trainer.data_collator([trl_example(pair, seed=seed) for pair in pairs]))


def trl_step(trainer: DPOTrainer, batches: Sequence[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one optimizer step, as transformers' Trainer accumulates: the mean over micro-batches."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = 0.0
    for batch in batches:
        share = trainer.compute_loss(trainer.model, dict(batch)) / len(batches)
        share.backward()
        loss += share.item()
    return loss, gradients_of(trainer.model)


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def relative_distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any entry, over the largest entry."""
    assert set(ours) == set(theirs)
    scale = max(t.abs().max().item() for t in theirs.values())
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs) / scale


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
def test_loss_and_every_gradient_are_trls(folder: Path, tmp_path: Path, kind: str, gradient_checkpointing: bool) -> None:
    pairs = ONE_IMAGE if kind == "one image each" else ALL_KINDS
    policy = make_policy(folder, gradient_checkpointing=gradient_checkpointing)
    trainer = make_trl(folder, tmp_path, pairs)
    give_adapter(trainer.model, draw_adapter(policy, seed=1))
    encoded = encode(folder, pairs)

    loss, gradients = our_step(policy, DPO(beta=BETA, rpo_alpha=0), [make_batch(folder, encoded)], totals_of(encoded))
    expected_loss, expected = trl_step(trainer, [collate(trainer, pairs)])

    assert abs(expected_loss - math.log(2)) > 0.01  # the adapter makes a difference
    assert loss == pytest.approx(expected_loss, abs=TOLERANCE)
    assert relative_distance(gradients, expected) < TOLERANCE


def test_loss_and_gradients_with_the_nll_term_are_trls_with_its_sft_loss_added(folder: Path, tmp_path: Path) -> None:
    policy = make_policy(folder)
    trainer = make_trl(folder, tmp_path, ALL_KINDS, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
    give_adapter(trainer.model, draw_adapter(policy, seed=2))
    encoded = encode(folder, ALL_KINDS)

    loss, gradients = our_step(policy, DPO(beta=BETA, rpo_alpha=0.3), [make_batch(folder, encoded)], totals_of(encoded))
    expected_loss, expected = trl_step(trainer, [collate(trainer, ALL_KINDS)])

    assert loss == pytest.approx(expected_loss, abs=TOLERANCE)
    assert relative_distance(gradients, expected) < TOLERANCE


def test_rewards_and_logps_are_trls(llava_next: Path, tmp_path: Path) -> None:
    policy = make_policy(llava_next)
    trainer = make_trl(llava_next, tmp_path, ALL_KINDS)
    give_adapter(trainer.model, draw_adapter(policy, seed=1))
    encoded = encode(llava_next, ALL_KINDS)

    metrics = DPO(beta=BETA).step(policy, make_batch(llava_next, encoded), totals_of(encoded)).pair_metrics
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
        norm, _ = ours.step(step, [make_batch(folder, pairs) for pairs in cut], totals_of(encoded))
        norms.append(norm.item())
        losses.append(ours.window.reduce(steps=1)["loss"])
        ours.window = MetricSums()
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
    sft.save(adapter)
    encoded = encode(llava_next, ALL_KINDS)
    batch, totals = make_batch(llava_next, encoded), totals_of(encoded)
    policy = make_policy(llava_next, adapter=adapter)
    trainer = make_trl(llava_next, tmp_path, ALL_KINDS, adapter=adapter)
    trl_batch = collate(trainer, ALL_KINDS)
    assert REFERENCE in policy.model.peft_config
    assert "ref" in trainer.model.peft_config

    # Policy and reference are both the SFT model: every reward is 0.
    loss, _ = our_step(policy, DPO(beta=BETA, rpo_alpha=0), [batch], totals)
    expected_loss, _ = trl_step(trainer, [trl_batch])
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    assert expected_loss == pytest.approx(math.log(2), abs=1e-7)

    # The policy moves on, the reference stays.
    give_adapter(trainer.model, draw_adapter(policy, seed=4))
    loss, gradients = our_step(policy, DPO(beta=BETA, rpo_alpha=0), [batch], totals)
    expected_loss, expected = trl_step(trainer, [trl_batch])
    assert loss == pytest.approx(expected_loss, abs=TOLERANCE)
    assert relative_distance(gradients, expected) < TOLERANCE

    # With the adapter off as the reference it would be another loss.
    plain = make_policy(llava_next)
    give_adapter(plain.model, adapter_of(policy.model))
    other_loss, _ = our_step(plain, DPO(beta=BETA, rpo_alpha=0), [batch], totals)
    assert abs(other_loss - expected_loss) > 0.01


# --- where we differ on purpose


def test_nll_is_the_mean_over_all_tokens_of_a_step_where_trl_averages_the_means_of_micro_batches(
    llava_next: Path, tmp_path: Path
) -> None:
    policy = make_policy(llava_next)
    trainer = make_trl(llava_next, tmp_path, ONE_IMAGE, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0])
    give_adapter(trainer.model, draw_adapter(policy, seed=2))
    encoded = encode(llava_next, ONE_IMAGE)
    algorithm, totals = DPO(beta=BETA, rpo_alpha=1.0), totals_of(encoded)
    assert len(encoded[0].chosen_ids) != len(encoded[1].chosen_ids)

    whole, _ = our_step(policy, algorithm, [make_batch(llava_next, encoded)], totals)
    cut, _ = our_step(policy, algorithm, [make_batch(llava_next, [pair]) for pair in encoded], totals)
    trl_whole, _ = trl_step(trainer, [collate(trainer, ONE_IMAGE)])
    trl_cut, _ = trl_step(trainer, [collate(trainer, [pair]) for pair in ONE_IMAGE])

    assert whole == pytest.approx(trl_whole, abs=TOLERANCE)
    assert cut == pytest.approx(whole, abs=TOLERANCE)
    assert abs(trl_cut - trl_whole) > 0.01
    # TRL's figure for the cut step is the mean of what we call two steps of one pair.
    steps = [our_step(policy, algorithm, [make_batch(llava_next, [pair])], totals_of([pair]))[0] for pair in encoded]
    assert trl_cut == pytest.approx(sum(steps) / 2, abs=TOLERANCE)


def test_label_smoothing_is_cdpos_where_trl_ignores_it(llava_next: Path, tmp_path: Path) -> None:
    policy = make_policy(llava_next)
    trainer = make_trl(llava_next, tmp_path, ONE_IMAGE, label_smoothing=0.2)
    give_adapter(trainer.model, draw_adapter(policy, seed=1))
    encoded = encode(llava_next, ONE_IMAGE)
    batch, totals = make_batch(llava_next, encoded), totals_of(encoded)

    loss, _ = our_step(policy, DPO(beta=BETA, rpo_alpha=0, label_smoothing=0.2), [batch], totals)
    plain, _ = our_step(policy, DPO(beta=BETA, rpo_alpha=0), [batch], totals)
    trl_loss, _ = trl_step(trainer, [collate(trainer, ONE_IMAGE)])

    assert trl_loss == pytest.approx(plain, abs=TOLERANCE)
    # -log sigmoid(-m) = m - log sigmoid(m), so smoothing e adds e times the mean margin.
    margins = DPO(beta=BETA).step(policy, batch, totals).pair_metrics["rewards/margins"]
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

    loss, gradients = our_step(policy, algorithm, [make_batch(llava_next, encoded)], totals_of(encoded))
    expected_loss, expected = trl_step(trainer, [collate(trainer, ONE_IMAGE)])

    assert abs(loss - expected_loss) > 1000 * TOLERANCE
    assert relative_distance(gradients, expected) > 1000 * TOLERANCE
