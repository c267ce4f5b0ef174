"""A model from its files to a policy that is ready to train.

`prepare` puts adapters on and says what is trainable; `policy` is what comes out; `saving` writes it; `worker` calls this once
per process.
"""

import copy
import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from rayalign.algorithms import Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.models.family import Family
from rayalign.models.parts import find_parts
from rayalign.models.registry import find_family, load_config
from rayalign.models.source import ModelSource
from rayalign.ops.value_head import load_value_head
from rayalign.policy.compat import quantise_skeleton
from rayalign.policy.fused_norms import fuse_norms
from rayalign.policy.kept_base import KeptBase
from rayalign.policy.policy import Policy
from rayalign.policy.prepare import model_options, needs_start, prepare_model
from rayalign.policy.quantised import keep_as_they_are, shape_as_quantised
from rayalign.policy.sharding import layer_matrices
from rayalign.policy.tuner_checks import check_attention, check_tuner
from rayalign.policy.weights import load_weights

NO_SUCH_KERNEL = "does not support an attention implementation"
"""In transformers' error for a model that lacks the kernel, which it finds out while it makes the model."""


def load_policy(
    source: ModelSource,
    *,
    model: ModelConfig,
    tuner: TunerConfig,
    device: torch.device,
    needs: Needs,
    spread_over_gpus: bool = False,
    stay_on_cpu: bool = False,
    without_weights: bool = False,
    with_start: bool = True,
    seed: int = 42,
    kept: KeptBase | None = None,
) -> Policy:
    """Loads the weights and prepares them for training: adapters, or all weights, of the parts that are not frozen.

    Trainable weights are float32; all others have the type of `model.dtype`. A value head is that of the source's folder, or a
    new one. Where all weights are trained and rows need a reference in the step, a frozen copy is kept as such, but not
    without `with_start`. With `stay_on_cpu` the weights wait there for `sharding` to put them on the device, share by share;
    `without_weights` they are on the meta device, and `sharding` gets them from a worker that has them. Where a policy trains
    nothing of its base model, that may be the one that this process has `kept`.
    On a GPU, cuDNN's attention is switched off in this process. Raises ValueError for models of unknown families, for weights
    and adapters that are not whole or do not fit, for flags that do not fit the model or its adapter, and where the machine
    lacks what quantisation or the attention kernel needs.
    """
    check_tuner(tuner, source, on_gpu=device.type == "cuda")
    check_attention(model, on_gpu=device.type == "cuda")
    if device.type == "cuda":
        # cuDNN's kernels, torch's choice on Hopper, are built anew, in tenths of a second, for each length that was not there
        # yet: for nearly each row, and for each token that an answer grows by. The other kernels take any length.
        torch.backends.cuda.enable_cudnn_sdp(False)
    dtype: torch.dtype = getattr(torch, model.dtype_on(device.type))
    named, source = source.base, source.here()
    config = load_config(source.base, trust_remote_code=model.trust_remote_code)
    family = find_family(config.model_type)
    options = model_options(family, model, tuner, dtype)
    if tuner.quant_bits is not None:
        options["quantization_config"] = _quantisation(family, config, model, tuner, dtype)
    torch.manual_seed(seed)  # all workers', before anything that may draw
    place = torch.device("cpu") if stay_on_cpu else None if spread_over_gpus else device
    needs_output_head = needs.head != "value"
    load = functools.partial(_load_base, source.base, family, options, place, needs_output_head=needs_output_head)
    is_shared = tuner.sft_type == "lora" and tuner.quant_bits is None and not spread_over_gpus and not stay_on_cpu
    with torch.device("meta") if without_weights else nullcontext():
        if without_weights:
            quantisation = options.pop("quantization_config", None)
            base = family.auto_class.from_config(config, **options)
            if quantisation is not None:
                quantise_skeleton(base, quantisation)
                shape_as_quantised(base)
        elif kept is not None and is_shared:
            base = kept.get((source.base, str(options), str(place), needs_output_head), load)
        else:
            base = load()
        keep_as_they_are(base)
        torch.manual_seed(seed)
        prepared = prepare_model(base, source, model=model, tuner=tuner, family=family, needs=needs, dtype=dtype)
    if device.type == "cuda" and not without_weights:
        fuse_norms(base)
    if named != source.base:
        _note_name(prepared, base, named)
    value_head = None
    if needs.head == "value":
        output_head = base.get_output_embeddings().weight
        value_head = load_value_head(Path(source.adapter or source.base), output_head.shape[1])
        value_head.to(device if without_weights else output_head.device)
    start = None
    if with_start and needs_start(tuner, needs):
        shared = {id(p): p for p in prepared.parameters() if not p.requires_grad}
        start = frozen_start(copy.deepcopy(prepared, shared), family, dtype)
    if model.torch_compile:
        for layer in base.get_decoder().layers:
            layer.compile(dynamic=True)  # rows differ in length
    return Policy(prepared, family, value_head, dtype=dtype, start=start)


def frozen_start(model: Any, family: Family, dtype: torch.dtype) -> Policy:
    """The reference, of a model of its own as `load_policy` loads it to train all weights. Layers' matrices are held as the
    arithmetic would round them: the same numbers, of half the bytes."""
    start = Policy(model.requires_grad_(False), family, dtype=dtype)
    start.base.activation_checkpointing_disable()
    if start.is_mixed:
        for matrix in layer_matrices(start.base):
            matrix.data = matrix.data.to(dtype)
    return start


def _note_name(prepared: Any, base: Any, named: str) -> None:
    """Lets what is saved name the model by its URL, and not by this machine's copy."""
    base.config.name_or_path = named
    for adapter in prepared.peft_config.values() if isinstance(prepared, PeftModel) else ():
        if adapter.base_model_name_or_path == base.name_or_path:
            adapter.base_model_name_or_path = named


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16. (auto does not go by it: the workers of a cluster may have
    different CPUs, and would compute in different types.)"""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _load_base(
    model: str, family: Family, options: dict[str, Any], device: torch.device | None, *, needs_output_head: bool
) -> Any:
    """The model with its weights on a device, or spread over all GPUs where there is none."""
    if device is None:
        options = {**options, "device_map": "auto"}
    elif "quantization_config" in options:  # weights become 4 bits where they first arrive
        options = {**options, "device_map": {"": device}}
    try:
        loaded = load_weights(family.auto_class, model, needs_output_head=needs_output_head, **options)
    except ValueError as error:
        if NO_SUCH_KERNEL not in str(error):
            raise
        raise ValueError(
            f"--attn_implementation: transformers' {family.model_type} can't be run with it. Leave the flag out; sdpa, the "
            f"default, fits all models. (transformers says: {str(error).partition('. ')[0]}.)"
        ) from None
    return loaded if "device_map" in options else loaded.to(device)


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
