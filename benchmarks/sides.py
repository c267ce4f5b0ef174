"""The ways to compute one preference step that step.py compares: ours, ours with a stored reference, and TRL's.

Each gets the same `Job` and goes its own way from there: its own encoder, collator, forward and loss.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from synthetic import RawPair
from torch import Tensor

BETA = 0.1
LORA_RANK, LORA_ALPHA = 8, 16
LANGUAGE_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

AlgorithmName = Literal["dpo", "cpo", "orpo"]


@dataclass(frozen=True)
class Job:
    """What a step is computed of; `dtype` is the type of the model's weights, adapters are float32."""

    model: Path
    pairs: Sequence[RawPair]
    algorithm: AlgorithmName
    gradient_checkpointing: bool
    dtype: torch.dtype
    device: torch.device


class Side(Protocol):
    """A way to compute the step. `model` holds the adapter under the same names on all sides."""

    @property
    def model(self) -> Any: ...

    def step(self) -> Tensor:
        """Loss [] of the batch; gradients are added to the adapter's."""
        ...


# Each side imports what it needs when it is made, so that memory is measured without the other's packages.


class Rayalign:
    """Encoder, batch, policy and the algorithm's step, as a train worker runs them."""

    def __init__(self, job: Job) -> None:
        from rayalign.algorithms import CPO, DPO, ORPO, Algorithm
        from rayalign.config.sections import ModelConfig, TunerConfig
        from rayalign.data.batch import assemble
        from rayalign.data.encode import Encoder, EncoderSpec, image_processing
        from rayalign.data.sampler import StepCounts
        from rayalign.formats.records import Message, build_record
        from rayalign.models.source import ModelSource
        from rayalign.policy.loading import load_policy

        algorithms: dict[AlgorithmName, Algorithm] = {
            "dpo": DPO(beta=BETA, rpo_alpha=0.0),
            "cpo": CPO(beta=BETA),
            "orpo": ORPO(beta=BETA),
        }
        self.algorithm = algorithms[job.algorithm]
        spec = EncoderSpec(str(job.model), responses="both")
        encoder = Encoder(spec)
        self.encoded = []
        for i, pair in enumerate(job.pairs):
            images = [pair.image_bytes()]
            question = [Message(role="user", content=pair.question)]
            record = build_record(id=str(i), messages=question, images=images, chosen=pair.chosen, rejected=pair.rejected)
            self.encoded.append(encoder.encode(record, images))
        self.batch = assemble(self.encoded, layout=spec.layout, process_images=image_processing(spec)).to(job.device)
        self.counts = StepCounts(
            pairs=len(self.encoded),
            responses=2 * len(self.encoded),
            chosen_tokens=sum(len(p.chosen_ids) for p in self.encoded),
            rejected_tokens=sum(len(p.rejected_ids) for p in self.encoded),
        )
        self.policy = load_policy(
            ModelSource(str(job.model)),
            model=ModelConfig(
                dtype="bfloat16" if job.dtype == torch.bfloat16 else "float32",
                gradient_checkpointing=job.gradient_checkpointing,
            ),
            tuner=TunerConfig(lora_target_modules=("ALL",), lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA),
            device=job.device,
            needs=self.algorithm.needs,
        )
        self.model = self.policy.model

    def with_stored_reference(self) -> "Rayalign":
        """The same step of the same model, its batch bringing the reference's log-probabilities along."""
        from rayalign.reference.precompute import score

        logps = score(self.policy, self.encoded, self.batch)
        flat = [logp for pair in logps for logp in (*pair.chosen, *pair.rejected)]
        other = copy.copy(self)
        other.batch = replace(self.batch, reference_logps=torch.tensor(flat, device=self.policy.device))
        return other

    def step(self) -> Tensor:
        loss = self.algorithm.loss(self.policy, self.batch, self.counts).loss
        loss.backward()
        return loss.detach()


class TRL:
    """DPOTrainer's own collator and loss."""

    def __init__(self, job: Job) -> None:
        from datasets import Dataset  # type: ignore[import-untyped]
        from transformers import AutoProcessor
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        trainer = DPOTrainer(
            model=_plain_model(job),
            args=DPOConfig(**_settings(job), max_length=None),
            train_dataset=Dataset.from_list(_examples(job.pairs)),
            processing_class=AutoProcessor.from_pretrained(job.model),
            peft_config=_lora(),
        )
        self.model = _ready(trainer, job)
        self._compute_loss: Callable[..., Tensor] = trainer.compute_loss
        self._batch = _collate(job)

    def step(self) -> Tensor:
        loss = self._compute_loss(self.model, dict(self._batch))
        loss.backward()
        return loss.detach()


class TRLText:
    """CPOTrainer's or ORPOTrainer's own batch of whole rows, chosen then rejected, forward and loss.

    Both know text only. Their rows are those of DPOTrainer's collator, and each row's image goes along where they call the
    model. ORPOTrainer takes the likelihood of all tokens that it has an attention mask for, prompts included; here it gets the
    mask of the responses, which are what we and CPOTrainer count, and the model gets that of the rows. This leaves its work as
    it is.
    """

    def __init__(self, job: Job) -> None:
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        kinds: dict[str, tuple[Any, Any]] = {"cpo": (CPOTrainer, CPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}
        kind, config = kinds[job.algorithm]
        trainer = kind(
            model=_plain_model(job),
            args=config(**_settings(job), max_length=512),  # of the rows of its dataset, which are not used
            train_dataset=Dataset.from_list([{"prompt": p.question, "chosen": " a", "rejected": " b"} for p in job.pairs]),
            processing_class=AutoTokenizer.from_pretrained(job.model),
            peft_config=_lora(),
        )
        self.model = _ready(trainer, job)
        self._compute_loss: Callable[..., Tensor] = trainer.compute_loss
        self._others = _collate(job)
        ids, of_responses = self._others.pop("input_ids"), self._others.pop("completion_mask")
        rows = {
            "input_ids": ids.chunk(2),
            "attention_mask": of_responses.chunk(2),
            "labels": ids.masked_fill(of_responses == 0, -100).chunk(2),
        }
        self._batch = {f"{side}_{name}": rows[name][i] for i, side in enumerate(("chosen", "rejected")) for name in rows}

    def step(self) -> Tensor:
        loss = self._compute_loss(self._forward, dict(self._batch))
        loss.backward()
        return loss.detach()

    def _forward(self, input_ids: Tensor, *, attention_mask: Tensor, use_cache: bool) -> Any:
        """The model as the trainer calls it, with the rows' attention mask and the images."""
        return self.model(input_ids, use_cache=use_cache, **self._others)


def make_side(name: str, job: Job) -> Side:
    """One of `sides_of`."""
    match name:
        case "rayalign":
            return Rayalign(job)
        case "rayalign-stored":
            return Rayalign(job).with_stored_reference()
        case _:
            return TRL(job) if job.algorithm == "dpo" else TRLText(job)


def sides_of(algorithm: AlgorithmName) -> tuple[str, ...]:
    """The names of the sides that there are of an algorithm: TRL's and ours; only DPO has a reference to store."""
    return ("trl", "rayalign", "rayalign-stored") if algorithm == "dpo" else ("trl", "rayalign")


def _examples(pairs: Sequence[RawPair]) -> list[dict[str, Any]]:
    return [
        {
            "images": [pair.image],
            "prompt": [{"role": "user", "content": pair.question}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs
    ]


def _collate(job: Job) -> dict[str, Tensor]:
    """The pairs as DPOTrainer's collator makes them: [2B, S] and each image twice."""
    from transformers import AutoProcessor
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    collator = DataCollatorForVisionPreference(AutoProcessor.from_pretrained(job.model), max_length=None)
    return {name: value.to(job.device) for name, value in collator(_examples(job.pairs)).items()}


def _plain_model(job: Job) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(job.model, dtype=job.dtype, attn_implementation="sdpa")


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=LANGUAGE_LINEARS)


def _settings(job: Job) -> dict[str, Any]:
    return {
        "output_dir": str(job.model / "trl"),
        "beta": BETA,
        "per_device_train_batch_size": len(job.pairs),
        "gradient_checkpointing": job.gradient_checkpointing,
        "bf16": False,  # autocast; the weights have their type already, as on the other side
        "use_cpu": job.device.type == "cpu",
        "remove_unused_columns": False,
        "report_to": [],
        "save_strategy": "no",
    }


def _ready(trainer: Any, job: Job) -> Any:
    """The trainer's model as it is when training starts."""
    model = trainer.model.to(job.device)
    if job.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=None)  # what transformers' Trainer does
    return model.train()
