"""A model from its files to a policy that is ready to train: weights, precision, what learns and what is frozen.

`adapters` puts LoRA on; `policy` is what comes out; `worker` calls this once per process.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from rayalign.algorithms import Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.models.family import Family
from rayalign.models.parts import find_parts
from rayalign.models.registry import find_family, load_config, packs_rows
from rayalign.models.source import ModelSource
from rayalign.ops.attention import SHARED_PREFIX
from rayalign.ops.value_head import load_value_head
from rayalign.policy.adapters import add_adapters, merge_adapter, trainable_parts
from rayalign.policy.policy import Policy
from rayalign.policy.tuner_checks import check_attention, check_tuner


def load_policy(
    source: ModelSource,
    *,
    model: ModelConfig,
    tuner: TunerConfig,
    device: torch.device,
    needs: Needs,
    spread_over_gpus: bool = False,
    seed: int = 42,
) -> Policy:
    """Loads the weights and prepares them for training: adapters, or all weights, of the parts that are not frozen.

    What learns is float32; everything else has the type of `model.dtype`. With a value head, that of the source's folder or a
    new one, the output head stays frozen, too. Where all weights learn and a companion's rows need a reference in the step, a
    frozen copy is kept as such. Raises ValueError for models of unknown families, and where the machine lacks what
    quantisation needs.
    """
    full = tuner.sft_type == "full"
    check_tuner(tuner, source, on_gpu=device.type == "cuda")
    check_attention(model, on_gpu=device.type == "cuda")
    dtype: torch.dtype = getattr(torch, model.dtype_on(device.type))
    config = load_config(source.base, trust_remote_code=model.trust_remote_code)
    family = find_family(config.model_type)
    options: dict[str, Any] = {
        # Weights that learn must not be rounded on the way.
        "dtype": torch.float32 if full else dtype,
        "attn_implementation": attention_kernels(family, model),
        "trust_remote_code": model.trust_remote_code,
    }
    if tuner.quant_bits is not None:
        options["quantization_config"] = _quantisation(family, config, model, tuner, dtype)
    base = _load_base(source.base, family, options, None if spread_over_gpus else device)
    base.requires_grad_(False)
    torch.manual_seed(seed)
    if full:
        wrapped = merge_adapter(base, source.adapter) if source.adapter else base
        _let_learn(wrapped, tuner)
    else:
        wrapped = add_adapters(base, source, tuner, family, needs_reference=needs.reference)
    value_head = None
    if needs.head == "value":
        output_head = base.get_output_embeddings().weight
        value_head = load_value_head(Path(source.adapter or source.base), output_head.shape[1]).to(output_head.device)
        if output_head is not base.get_input_embeddings().weight:
            output_head.requires_grad_(False)
    if full:
        _narrow_frozen(base, dtype)
    if not needs.dropout:
        _turn_off_dropout(wrapped)
    start = None
    if full and needs.runs_reference_in_step:
        # In the same types, so that both give the same numbers at the start.
        start = Policy(copy.deepcopy(wrapped).requires_grad_(False), family, dtype=dtype)
    if model.gradient_checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if model.torch_compile:
        for layer in base.get_decoder().layers:
            layer.compile(dynamic=True)  # rows differ in length
    return Policy(wrapped, family, value_head, dtype=dtype, start=start)


def attention_kernels(family: Family, model: ModelConfig) -> Any:
    """transformers' `attn_implementation`: that of the language model; towers choose for themselves, since not each of them has
    both kernels."""
    kernel: str = SHARED_PREFIX if packs_rows(family, model.attn_implementation) else model.attn_implementation
    return kernel if family.text_only else {"text_config": kernel}


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16. (auto does not go by it: the workers of a cluster may have
    different CPUs, and would compute in different types.)"""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _load_base(model: str, family: Family, options: dict[str, Any], device: torch.device | None) -> Any:
    """The model with its weights on a device, or spread over all GPUs where there is none."""
    if device is None:
        return family.auto_class.from_pretrained(model, device_map="auto", **options)
    if "quantization_config" in options:  # weights become 4 bits where they first arrive
        return family.auto_class.from_pretrained(model, device_map={"": device}, **options)
    return family.auto_class.from_pretrained(model, **options).to(device)


def _quantisation(
    family: Family, config: Any, model: ModelConfig, tuner: TunerConfig, dtype: torch.dtype
) -> BitsAndBytesConfig:
    """4 bits for the decoder's linears and for no others."""
    with torch.device("meta"):
        skeleton = family.auto_class.from_config(config, trust_remote_code=model.trust_remote_code)
    quantised = set(find_parts(skeleton).linears(skeleton, "llm"))
    kept = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear) and name not in quantised]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=tuner.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=tuner.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _let_learn(base: Any, tuner: TunerConfig) -> None:
    parts, learning = find_parts(base), trainable_parts(tuner)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(parts.of(name) in learning)


def _narrow_frozen(base: nn.Module, dtype: torch.dtype) -> None:
    for parameter in base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _turn_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention layers keep their rate as a number, which they hand to the attention kernel.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]  # nn.Module types attributes as tensors
