"""What the comparisons with TRL share: the pairs, a tiny model's step by our trainer and by TRL's, and how far they are apart.

TRL tokenises and collates for itself, runs chosen and rejected as two plain rows, and optimises with transformers' Trainer;
rayalign shares nothing of that. The tiny models have weights scaled so that every input counts, and the adapters' B matrices
are random: with B = 0 the loss of two policies is that of indifference and the gradient of A zero whatever the code does.
"""

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from rayalign.algorithms import DPO, Algorithm, Needs
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.batch import PairBatch
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.sampler import StepCounts
from rayalign.data.store import EncodedPair
from rayalign.formats.records import Message, build_record
from rayalign.models.parts import find_parts
from rayalign.models.source import ModelSource
from rayalign.policy.adapters import TRAINED
from rayalign.policy.policy import Policy
from rayalign.training.loop import Trainer
from rayalign.training.metrics import MetricSums
from tests import tiny_models

TRL = "TRL 1.16"
"""The oracle's name in the closing table."""

TOLERANCE = 1e-5
"""float32 sums of a few hundred terms in another order (one row of three segments against two rows) differ by about 1e-6 of the
largest term. Losses are compared absolutely (they are of order 1); gradients and weights relative to the largest entry there is
in any adapter's gradient or weight."""

BETA = 0.1

Step = tuple[float, dict[str, Tensor]]
"""The loss and the gradients, by name, of one optimizer step."""


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


def images_of(pair: Pair, *, seed: int = 0) -> list[Image.Image]:
    """Noise, another for every size and seed."""
    return [
        Image.fromarray(np.random.default_rng([seed, *size]).integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in pair.sizes
    ]


# --- our side: records -> encoder -> batch -> policy -> trainer


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


def make_policy(
    folder: Path, *, adapter: Path | None = None, gradient_checkpointing: bool = False, needs: Needs | None = None
) -> Policy:
    """A policy with the adapters that `make_trl` gives TRL's; as DPO needs it, if nothing else is said."""
    return tiny_models.make_policy(
        ModelSource(str(folder), adapter=str(adapter) if adapter else None),
        model=ModelConfig(gradient_checkpointing=gradient_checkpointing),
        tuner=TunerConfig(lora_target_modules=("ALL",), lora_rank=4, lora_alpha=16),
        needs=needs or DPO().needs,
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


def our_step(policy: Any, algorithm: Algorithm, workers: Sequence[Sequence[PairBatch]], counts: StepCounts) -> Step:
    """One optimizer step up to the update, cut into these workers' micro-batches."""
    trainers = [
        Trainer(policy, algorithm, OptimizerConfig(), num_steps=1, rank=rank, gather=lambda mine: statistics)
        for rank in range(len(workers))
    ]
    # What the workers would send each other.
    statistics = [t.statistics(b) for t, b in zip(trainers, workers, strict=True)] if algorithm.needs.statistics else []
    loss, total = 0.0, {name: torch.zeros_like(parameter) for name, parameter in policy.trainable.items()}
    for trainer, batches in zip(trainers, workers, strict=True):
        for parameter in policy.trainable.values():
            parameter.grad = None
        outputs, _ = trainer.gradients(batches, counts)
        loss += MetricSums(outputs).reduce(steps=1)["loss"]
        for name, parameter in policy.trainable.items():
            assert parameter.grad is not None
            total[name] += parameter.grad
    return loss, total


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


def trl_prompt(pair: Pair) -> list[dict[str, Any]]:
    prompt = []
    for role, text in pair.messages:
        content: list[dict[str, str]] = []
        for i, piece in enumerate(text.split("<image>")):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": piece}] if piece else []
        prompt.append({"role": role, "content": content})
    return prompt


def trl_example(pair: Pair, *, seed: int = 0) -> dict[str, Any]:
    answers = {name: [{"role": "assistant", "content": getattr(pair, name)}] for name in ("chosen", "rejected")}
    return {"images": images_of(pair, seed=seed), "prompt": trl_prompt(pair), **answers}


class Examples(Dataset):
    """Examples as they are: Arrow would fill the parts of a message's content up to the same keys."""

    def __init__(self, examples: Sequence[dict[str, Any]]) -> None:
        super().__init__(Dataset.from_dict({"images": [[] for _ in examples]}).data)
        self._examples = examples

    def __getitem__(self, index: Any) -> Any:
        # TRL's collators write into the examples that they get.
        if isinstance(index, int):
            return dict(self._examples[index])
        return [dict(self._examples[i]) for i in index]

    __getitems__ = __getitem__


def trl_settings(output: Path, *, batch_size: int) -> dict[str, Any]:
    """Arguments that all of TRL's trainers take."""
    return {
        "output_dir": str(output),
        "beta": BETA,
        "max_length": None,
        "per_device_train_batch_size": batch_size,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def plain_model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def lora_of(model: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=16, target_modules=find_parts(model).linears(model, "llm"))


def make_trl(
    folder: Path, output: Path, pairs: Sequence[Pair], *, adapter: Path | None = None, **settings: Any
) -> RecordingTrainer:
    model = plain_model(folder)
    lora = lora_of(model)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return RecordingTrainer(
        model=model,
        args=DPOConfig(**{**trl_settings(output, batch_size=len(pairs)), **settings}),
        train_dataset=Examples([trl_example(pair) for pair in pairs]),
        processing_class=AutoProcessor.from_pretrained(folder),
        peft_config=None if adapter else lora,
    )


def bare(kind: type, model: nn.Module, **attributes: Any) -> Any:
    """A TRL trainer with only what its loss reads."""
    trainer = object.__new__(kind)
    common = {
        "model": model,
        "accelerator": Accelerator(cpu=True),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    trainer.__dict__.update(common | attributes)
    return trainer


def give_adapter(model: Any, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == set(weights)
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def collate(trainer: DPOTrainer, pairs: Sequence[Pair], *, seed: int = 0) -> dict[str, Any]:
    return dict(trainer.data_collator([trl_example(pair, seed=seed) for pair in pairs]))


def trl_step(trainer: Any, batches: Sequence[dict[str, Any]]) -> Step:
    """The loss and the gradients of one optimizer step, as transformers' Trainer accumulates: the mean over micro-batches."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = 0.0
    for batch in batches:
        share = trainer.compute_loss(trainer.model, dict(batch)) / len(batches)
        share.backward()
        loss += share.item()
    return loss, gradients_of(trainer.model)


# --- how far they are apart


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Zeros where nothing depends on a weight."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def relative_distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any entry, over the largest entry."""
    assert set(ours) == set(theirs)
    scale = max(t.abs().max().item() for t in theirs.values())
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs) / scale


def differences(ours: Step, theirs: Step) -> dict[str, float]:
    """Of loss and gradient, relative, as `record_difference` takes them."""
    return {"loss": abs(ours[0] - theirs[0]) / abs(theirs[0]), "gradient": relative_distance(ours[1], theirs[1])}
