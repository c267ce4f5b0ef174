"""The ways to compute one preference step: ours, ours with a stored reference, and TRL's.

Each gets the same `Job` and goes its own way from there: its own encoder, collator, forward and loss. Each imports what it
needs when it is made, so that memory is measured without the other's packages.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from measuring import DTYPES
from synthetic import RawPair, Shape, draw_pairs, read_pairs, save_model, write_pairs
from torch import Tensor

if TYPE_CHECKING:
    from rayalign.data.batch import PairBatch
    from rayalign.policy.policy import Policy

BETA = 0.1
LORA_RANK, LORA_ALPHA = 8, 16
LANGUAGE_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

AlgorithmName = Literal["dpo", "cpo", "orpo"]
Row = dict[str, list[int]]
"""Token ids of a `prompt` and its `response`."""


@dataclass(frozen=True)
class Job:
    """What a step is computed of. `folder` holds the `model` and the pairs; `dtype` is the type of the model's weights, that of
    adapters is float32."""

    folder: str
    algorithm: AlgorithmName = "dpo"
    gradient_checkpointing: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    @property
    def model(self) -> Path:
        return Path(self.folder) / "model"

    @property
    def image_token(self) -> int:
        token: int = json.loads((self.model / "config.json").read_text())["image_token_index"]
        return token

    @cached_property
    def pairs(self) -> list[RawPair]:
        return read_pairs(Path(self.folder))


@dataclass(frozen=True)
class Case:
    """A model, and the responses of one batch in words (chosen, rejected) of each pair."""

    shape: Shape
    responses: tuple[tuple[int, int], ...]
    gradient_checkpointing: bool = False

    def job(self, folder: Path, **settings: Any) -> Job:
        """What each side computes a step of; model and pairs are written to the folder."""
        save_model(folder / "model", self.shape)
        write_pairs(folder, draw_pairs(self.shape.image_size, self.responses))
        return Job(str(folder), gradient_checkpointing=self.gradient_checkpointing, **settings)


class Side(Protocol):
    """A way to compute the step. `model` holds the adapter under the same names on all sides."""

    @property
    def model(self) -> Any: ...

    def step(self) -> Tensor:
        """Loss [] of the batch; gradients are added to the adapter's."""
        ...


def adapter_of(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def draw_adapter(model: Any) -> None:
    """Gives the adapter weights that make policy and reference differ, the same on all sides; with a fresh one they agree and
    every loss is log 2."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(adapter_of(model).items()):
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=generator))


class Encoded:
    """Some pairs in a batch, as a train worker gets it, on the host."""

    def __init__(self, model: Path, raw: Sequence[RawPair]) -> None:
        from rayalign.data.batch import assemble
        from rayalign.data.encode import Encoder
        from rayalign.data.encoder_spec import EncoderSpec, image_processing
        from rayalign.data.sampler import StepCounts
        from rayalign.formats.records import Message, build_record

        self.spec = EncoderSpec(str(model), responses="both")
        encoder = Encoder(self.spec)
        self.pairs = []
        for i, pair in enumerate(raw):
            question = [Message(role="user", content=pair.question)]
            record = build_record(id=str(i), messages=question, images=[pair.png], chosen=pair.chosen, rejected=pair.rejected)
            self.pairs.append(encoder.encode(record, [pair.png]))
        self.process_images = image_processing(self.spec)
        self.batch = assemble(self.pairs, layout=self.spec.layout, process_images=self.process_images)
        tokens = (sum(map(len, ids)) for ids in ([p.chosen_ids for p in self.pairs], [p.rejected_ids for p in self.pairs]))
        self.counts = StepCounts(len(self.pairs), 2 * len(self.pairs), *tokens)

    def rows(self) -> list[Row]:
        """The chosen rows of all pairs, then the rejected ones."""
        chosen = [{"prompt": list(p.prompt_ids), "response": list(p.chosen_ids)} for p in self.pairs]
        return chosen + [{"prompt": list(p.prompt_ids), "response": list(p.rejected_ids)} for p in self.pairs]


def batch_facts(rows: Sequence[Row], image_token: int) -> dict[str, Any]:
    """What a report says of a batch, by the rows of `Encoded.rows`."""
    chosen, rejected = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return {
        "pairs": len(chosen),
        "prompt_tokens": [len(row["prompt"]) for row in chosen],
        "image_tokens": [row["prompt"].count(image_token) for row in chosen],
        "chosen_tokens": [len(row["response"]) for row in chosen],
        "rejected_tokens": [len(row["response"]) for row in rejected],
    }


def with_reference(policy: "Policy", batch: "PairBatch") -> "PairBatch":
    """The batch with the reference's log-probabilities."""
    with torch.no_grad(), policy.reference_weights():
        return replace(batch, reference_logps=policy.token_logps(batch, policy.image_features(batch)))


class Rayalign:
    """Encoder, batch, policy and the algorithm's step, as a train worker runs them."""

    def __init__(self, job: Job) -> None:
        from rayalign.algorithms import CPO, DPO, ORPO, Algorithm
        from rayalign.config.sections import ModelConfig, TunerConfig
        from rayalign.models.source import ModelSource
        from rayalign.policy.loading import load_policy

        algorithms: dict[AlgorithmName, Algorithm] = {
            "dpo": DPO(beta=BETA, rpo_alpha=0.0),
            "cpo": CPO(beta=BETA),
            "orpo": ORPO(beta=BETA),
        }
        self.algorithm = algorithms[job.algorithm]
        self.encoded = Encoded(job.model, job.pairs)
        self.rows = self.encoded.rows
        self.batch = self.encoded.batch.to(torch.device(job.device))
        self.policy = load_policy(
            ModelSource(str(job.model)),
            model=ModelConfig(
                dtype=job.dtype,  # type: ignore[arg-type]  # one of DTYPES
                gradient_checkpointing=job.gradient_checkpointing,
            ),
            tuner=TunerConfig(lora_target_modules=("ALL",), lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA),
            device=torch.device(job.device),
            needs=self.algorithm.needs,
        )
        self.model = self.policy.model

    def with_stored_reference(self) -> "Rayalign":
        """The same step of the same model, its batch bringing the reference's log-probabilities along."""
        other = copy.copy(self)
        other.batch = with_reference(self.policy, self.batch)
        return other

    def step(self) -> Tensor:
        loss = self.algorithm.loss(self.policy, self.batch, self.encoded.counts).loss
        loss.backward()
        return loss.detach()


class TRL:
    """DPOTrainer's own collator and loss."""

    def __init__(self, job: Job) -> None:
        trainer = dpo_trainer(job, _plain_model(job), peft_config=_lora())
        self.model = _ready(trainer, job)
        self._compute_loss: Callable[..., Tensor] = trainer.compute_loss
        self._batch = collate(job)

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
        from datasets import Dataset  # type: ignore[import-untyped]
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
        self._others = collate(job)
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
    if name == "trl":
        return TRL(job) if job.algorithm == "dpo" else TRLText(job)
    ours = Rayalign(job)
    return ours if name == "rayalign" else ours.with_stored_reference()


def sides_of(algorithm: AlgorithmName) -> tuple[str, ...]:
    """The names of the sides that there are of an algorithm: TRL's and ours; only DPO has a reference to store."""
    return ("trl", "rayalign", "rayalign-stored") if algorithm == "dpo" else ("trl", "rayalign")


def dpo_trainer(job: Job, model: Any, *, peft_config: Any = None) -> Any:
    """TRL's, whose step is taken apart from its loop."""
    from datasets import Dataset
    from transformers import AutoProcessor
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    return DPOTrainer(
        model=model,
        args=DPOConfig(**_settings(job), max_length=None),
        train_dataset=Dataset.from_list(_examples(job.pairs)),
        processing_class=AutoProcessor.from_pretrained(job.model),
        peft_config=peft_config,
    )


def collate(job: Job) -> dict[str, Tensor]:
    """The pairs as DPOTrainer's collator makes them: [2B, S] and each image twice."""
    from transformers import AutoProcessor
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    collator = DataCollatorForVisionPreference(AutoProcessor.from_pretrained(job.model), max_length=None)
    return {name: value.to(job.device) for name, value in collator(_examples(job.pairs)).items()}


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


def _plain_model(job: Job) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(job.model, dtype=DTYPES[job.dtype], attn_implementation="sdpa")


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
        "use_cpu": job.device == "cpu",
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
