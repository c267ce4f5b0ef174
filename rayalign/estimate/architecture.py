"""The real model without its weights: modules on the meta device, made from a config, and what a run would train of them."""

import copy
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from rayalign.algorithms import Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.models.family import Family
from rayalign.models.parts import Parts, find_parts
from rayalign.models.registry import find_family, packs_rows
from rayalign.models.source import ModelSource
from rayalign.ops.attention import SHARED_PREFIX, Windows, can_pack, layer_windows
from rayalign.policy.adapters import trainable_parts
from rayalign.policy.prepare import model_options, prepare_model

VISION, ALIGNER, EMBEDDINGS, LANGUAGE, HEAD = "vision tower", "aligner", "embeddings", "language model", "output head"


@dataclass(frozen=True)
class Blueprint:
    """Everything that a model's size, and what is trained of it, depend on."""

    config: Any
    source: ModelSource
    model: ModelConfig
    tuner: TunerConfig
    needs: Needs
    reference_known: bool = False
    """Whether the reference's log-probabilities come with the data."""

    @property
    def family(self) -> Family:
        return find_family(self.config.model_type)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic; `auto` is what it is on a GPU."""
        dtype: torch.dtype = torch.bfloat16 if self.model.dtype == "auto" else getattr(torch, self.model.dtype)
        return dtype

    @property
    def is_mixed(self) -> bool:
        """Whether trainable weights are kept in float32 and rounded where they are used."""
        return self.tuner.sft_type == "full" and self.dtype != torch.float32

    @property
    def rounds_layers(self) -> bool:
        """Whether layers' matrices are rounded before they are used, where they are sharded; see `policy.sharding`."""
        return self.is_mixed and not self.needs.trains_companion

    @property
    def trains_vision(self) -> bool:
        """Whether images' features depend on trainable weights."""
        return not {"vit", "aligner"}.isdisjoint(trainable_parts(self.tuner))

    @property
    def num_layers(self) -> int:
        """Layers of the language model."""
        layers: int = self.config.get_text_config().num_hidden_layers
        return layers

    @cached_property
    def windows(self) -> Windows:
        """The sliding window of each kind of layer of the language model. Raises ValueError for other kinds."""
        return layer_windows(self.config.get_text_config().to_dict())

    def packs(self, length: int) -> bool:
        """Whether rows of at most `length` tokens are packed, as by `Policy`: attention then takes a row's prompt and its
        responses apart."""
        return packs_rows(self.family, self.model.attn_implementation) and can_pack(SHARED_PREFIX, self.windows, length)

    def with_checkpointing(self, *, on: bool) -> "Blueprint":
        return dataclasses.replace(self, model=dataclasses.replace(self.model, gradient_checkpointing=on))

    def build(self, *, layers: int | None = None) -> "Skeleton":
        """The model prepared for training, on the meta device; with fewer `layers` in its language model where they are given.

        Raises ValueError for flags that do not fit the model or its adapter.
        """
        config = copy.deepcopy(self.config)
        if layers is not None:
            _cut(config.get_text_config(), layers)
        options = model_options(self.family, self.model, self.tuner, self.dtype)
        with torch.device("meta"):
            base: Any = self.family.auto_class.from_config(config, **options)
            parts = find_parts(base)
            sizes = _sizes(base, parts)
            prepared = prepare_model(
                base,
                self.source,
                model=self.model,
                tuner=self.tuner,
                family=self.family,
                needs=self.needs,
                dtype=self.dtype,
            )
        return Skeleton(base, prepared, parts, sizes)


@dataclass(frozen=True)
class Skeleton:
    """A model without weights: `base` as transformers made it, `model` as it is trained, `sizes` the parameters of each part,
    without adapters."""

    base: Any
    model: Any
    parts: Parts
    sizes: dict[str, int]

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def head(self) -> torch.Tensor:
        """The output head's weight [V, H]."""
        weight: torch.Tensor = self.base.get_output_embeddings().weight
        return weight

    def linears(self) -> list[nn.Parameter]:
        """The weights of the language model's linear layers, without adapters."""
        modules: dict[str, Any] = dict(self.base.named_modules())
        return [modules[name].weight for name in self.parts.linears(self.base, "llm") if ".lora_" not in name]


def _sizes(base: Any, parts: Parts) -> dict[str, int]:
    """Parameters by part; an output head that shares the embeddings' weight counts there."""
    sizes = dict.fromkeys((VISION, ALIGNER, EMBEDDINGS, LANGUAGE, HEAD), 0)
    embeddings, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    for name, parameter in base.named_parameters():
        if parameter is embeddings:
            part = EMBEDDINGS
        elif parameter is head:
            part = HEAD
        else:
            part = {"vit": VISION, "aligner": ALIGNER, "llm": LANGUAGE}[parts.of(name)]
        sizes[part] += parameter.numel()
    return sizes


def _cut(text_config: Any, layers: int) -> None:
    """Takes the last layers away."""
    text_config.num_hidden_layers = layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]
