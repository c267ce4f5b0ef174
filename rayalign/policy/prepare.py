"""A model made ready for training: adapters, what is trainable and in which type, dropout, modes, gradient checkpointing.

`loading` calls it for a model with its weights, the estimate for one on the meta device, so that both train the same.
"""

from typing import Any

import torch
from torch import nn

from rayalign.algorithms import Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.models.family import Family
from rayalign.models.parts import find_parts
from rayalign.models.registry import packs_rows
from rayalign.models.source import ModelSource
from rayalign.ops.attention import SHARED_PREFIX
from rayalign.policy.adapters import add_adapters, merge_adapter, trainable_parts
from rayalign.policy.compat import register_shared_prefix, without_peft_warnings


def model_options(family: Family, model: ModelConfig, tuner: TunerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The options that `from_pretrained` and `from_config` share, for arithmetic in `dtype`."""
    return {
        # Trainable weights must not be rounded on the way.
        "dtype": torch.float32 if tuner.sft_type == "full" else dtype,
        "attn_implementation": attention_kernels(family, model),
        "trust_remote_code": model.trust_remote_code,
    }


def attention_kernels(family: Family, model: ModelConfig) -> Any:
    """transformers' `attn_implementation`: that of the language model; towers choose for themselves, since not each of them has
    both kernels."""
    kernel: str = model.attn_implementation
    if packs_rows(family, kernel):
        register_shared_prefix()
        kernel = SHARED_PREFIX
    return kernel if family.text_only else {"text_config": kernel}


def prepare_model(
    base: Any, source: ModelSource, *, model: ModelConfig, tuner: TunerConfig, family: Family, needs: Needs, dtype: torch.dtype
) -> Any:
    """The model as it is trained, made of `base` with its adapter: a `PeftModel`, or with --sft_type full `base` itself.

    Trainable weights are float32; of a fully trained model all others get `dtype`. With a value head the output head is frozen,
    unless it is the embeddings' weight. Raises ValueError for flags that do not fit the model or its adapter.
    """
    base.requires_grad_(False)
    full = tuner.sft_type == "full"
    with without_peft_warnings():
        if not full:
            prepared = add_adapters(base, source, tuner, family, needs_reference=needs.reference)
        else:
            prepared = merge_adapter(base, source.adapter) if source.adapter else base
            parts, trainable = find_parts(prepared), trainable_parts(tuner)
            for name, parameter in prepared.named_parameters():
                parameter.requires_grad_(parts.of(name) in trainable)
    if needs.head == "value":
        _freeze_output_head(base)
    if full:
        _set_types(prepared, dtype)
    if not needs.dropout:
        _turn_off_dropout(prepared)
    set_modes(base)
    if model.gradient_checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return prepared


def needs_start(tuner: TunerConfig, needs: Needs) -> bool:
    """Whether a frozen copy of the model at the start is held beside it, as reference."""
    return tuner.sft_type == "full" and needs.runs_reference_in_step


def recompute_layers(base: Any, count: int) -> None:
    """Lets the first so many layers of a language model with gradient checkpointing run again in the backward, and no others:
    the last ones let go of what they keep before the first ones run again."""
    for number, layer in enumerate(base.get_decoder().layers):
        layer.gradient_checkpointing = number < count


def set_modes(base: Any) -> None:
    """The language model is in training mode (dropout, gradient checkpointing), all else in evaluation mode."""
    base.eval()
    base.get_decoder().train()


def _freeze_output_head(base: Any) -> None:
    weight = base.get_output_embeddings().weight
    if weight is not base.get_input_embeddings().weight:
        weight.requires_grad_(False)


def _set_types(model: nn.Module, frozen: torch.dtype) -> None:
    """Makes trainable weights float32, and gives all others the type `frozen`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)
    for module in model.modules():
        # Its kernel takes statistics of no other type than its weights'.
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and not module.weight.requires_grad:
            module.to(frozen)


def _turn_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention layers keep their rate as a number, which they hand to the attention kernel.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]  # nn.Module types attributes as tensors
