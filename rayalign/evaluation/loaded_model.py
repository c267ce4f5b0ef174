"""A model for many rows that is not trained: a model's folder, the model/ folder of a run, an adapter, or a reward model.

Each actor of a pool loads one. Records are read and encoded as for training, and the forward is the training's, so that numbers
are those of a run's own evaluation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayalign.algorithms import Needs
from rayalign.config.config import Config
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.config.yaml_files import flags_of_run
from rayalign.data.batch import PairBatch, assemble
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.rows import Sources, encode_record, record_of
from rayalign.data.store import EncodedPair
from rayalign.formats.records import PreferenceRecord, Responses
from rayalign.models.processors import load_processor, tokenizer_of
from rayalign.models.registry import FAMILIES, REGISTERED_MODELS, load_config
from rayalign.models.source import ModelSource, require_model
from rayalign.ops.logprobs import PairLogps
from rayalign.ops.value_head import find_value_head
from rayalign.policy.forward_check import check_forward
from rayalign.policy.loading import load_policy
from rayalign.policy.policy import Policy
from rayalign.serving.export_folder import CHECKPOINT_NOTE, RUN
from rayalign.storage import Store


@dataclass(frozen=True)
class LoadedModel:
    """A model with what encodes records for it. `reference`: the policy that log-probabilities are compared with; None: this
    model with its adapter off, where it has one."""

    policy: Policy
    encoder: Encoder
    sources: Sources
    source: ModelSource
    reference: Policy | None = None

    @property
    def is_reward_model(self) -> bool:
        """Whether it has a value head: then it gives `values` and no log-probabilities."""
        return self.policy.value_head is not None

    def record(self, row: Mapping[str, Any]) -> PreferenceRecord:
        """The record of a row as `groups.FileRows` reads it; raises RecordError for what is wrong with it."""
        return record_of(row["row"], id=row["id"], sources=self.sources, spec=self.encoder.spec)

    def encode(self, record: PreferenceRecord, folder: str) -> EncodedPair:
        """A record, encoded with its images, whose relative paths start from `folder`; raises RecordError."""
        return encode_record(record, folder=Store(folder), sources=self.sources, encoder=self.encoder).pair

    def batch(self, pairs: Sequence[EncodedPair]) -> PairBatch:
        """Some pairs as one batch on the model's device."""
        spec = self.encoder.spec
        return assemble(pairs, layout=spec.layout, process_images=image_processing(spec)).to(self.policy.device)

    def logps(self, batch: PairBatch) -> PairLogps:
        """Log-probabilities of a batch's responses; a response that a row lacks has 0 tokens."""
        return _logps(self.policy, batch)

    def reference_logps(self, batch: PairBatch) -> PairLogps:
        """The same under the reference."""
        if self.reference is not None:
            return _logps(self.reference, batch.to(self.reference.device))
        with self.policy.reference_weights():
            return _logps(self.policy, batch)

    def values(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """A reward model's scores [B] of the chosen and of the rejected responses; of a response that a row lacks the score has
        no meaning."""
        with torch.no_grad():
            return self.policy.values(batch, self.policy.image_features(batch))


def load_model(config: Config, sources: Sources, *, responses: Responses = "both") -> LoadedModel:
    """Loads the model that `config.model` names, onto the GPU or GPUs of this process where `config.cluster` gives it some.
    `responses`: which responses of a record are encoded ("chosen" leaves the rejected ones out).

    Raises ValueError for a model that is not there or can't be run.
    """
    source = require_model(config.model, REGISTERED_MODELS)
    policy = _load(config, source)
    spec = EncoderSpec(
        source.base,
        responses,
        max_length=config.data.max_length,
        truncation_strategy=config.data.truncation_strategy,
        max_pixels=config.data.max_pixels,
        trust_remote_code=config.model.trust_remote_code,
    )
    if policy.family.model_type not in FAMILIES:
        check_forward(policy, spec)
    return LoadedModel(policy, Encoder(spec), sources, source)


def load_with_reference(
    config: Config, sources: Sources, reference: ModelConfig, *, responses: Responses = "both"
) -> LoadedModel:
    """The same with a reference: the model with its adapter off where that is what `reference` names, else a second model.

    Raises ValueError where their tokens are not the same.
    """
    model = load_model(config, sources, responses=responses)
    start = require_model(reference, REGISTERED_MODELS)
    if start == ModelSource(model.source.base):
        if model.source.adapter is None:
            raise ValueError(f"The model {start.base} is its own reference, so that each reward is 0. Give another reference.")
        return model
    tokens = tokenizer_of(load_processor(start.base, trust_remote_code=config.model.trust_remote_code)).get_vocab()
    if load_config(start.base).model_type != model.policy.family.model_type or tokens != model.encoder.tokenizer.get_vocab():
        raise ValueError(
            f"The reference {start.adapter or start.base} is of another type than the model, or has other tokens, so that its "
            "log-probs are not of the same responses. Give one that was made from the same base model."
        )
    of_reference = dataclasses.replace(config, model=dataclasses.replace(reference, gradient_checkpointing=False))
    return dataclasses.replace(model, reference=_load(of_reference, start))


def flags_around(source: ModelSource) -> dict[str, Any]:
    """The flags of the run that made a model: those that an exported checkpoint notes, else those of the run in whose folder it
    is; empty where nothing tells them. Raises ValueError."""
    place = Store.at(source.adapter or source.base)
    note = place / CHECKPOINT_NOTE
    noted = note.read_json_object().get(RUN) if note.exists() else None
    return noted if isinstance(noted, dict) else flags_of_run(place.parent)


def start_of_run(source: ModelSource, like: ModelConfig) -> ModelConfig | None:
    """The model that the run started from which made this one, which was the run's reference; None where that is not known.
    Of `like` are all other settings."""
    flags = flags_around(source)
    named: dict[str, Any] = {name: flags.get(name) for name in ("model", "model_type", "adapter")}
    if any(named.values()):
        return dataclasses.replace(like, **named)
    return dataclasses.replace(like, model=source.base, model_type=None, adapter=None) if source.adapter else None


def _load(config: Config, source: ModelSource) -> Policy:
    here = source.here()
    head = find_value_head(Path(here.adapter or here.base))
    # A model without an adapter gets a new one, which adds 0: full tuning would keep its weights in float32.
    policy = load_policy(
        source,
        model=dataclasses.replace(config.model, gradient_checkpointing=False),
        tuner=TunerConfig(),
        device=torch.device("cuda" if config.cluster.gpus_per_worker else "cpu"),
        needs=Needs(head="value" if head else "language"),
        spread_over_gpus=config.cluster.spreads_models,
    )
    for parameter in policy.trainable.values():
        parameter.requires_grad_(False)
    if here.adapter is None:
        policy.leave_out_adapters()
    return policy


def _logps(policy: Policy, batch: PairBatch) -> PairLogps:
    with torch.no_grad():
        return policy.logps(batch, policy.image_features(batch))
