"""A model from its files to a policy that is ready to train: weights, adapters, what learns and what is frozen.

`policy` is what comes out; `worker` calls this once per process.
"""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText

from rayalign.algorithms import Needs
from rayalign.config import ModelConfig, TunerConfig
from rayalign.models import Family, ModelSource, find_family
from rayalign.policy import REFERENCE, TRAINED, Policy
from rayalign.value_head import load_value_head


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
    """Loads the weights and prepares them for training.

    Only the language model learns: adapters on its linears, or all its weights; vision tower and projector are frozen. With a
    value head, that of the source's folder or a new one, the output head stays frozen, too.
    Raises ValueError for models of unknown families and for a reference that `sft_type` cannot provide.
    """
    if needs.reference and tuner.sft_type == "full":
        raise ValueError(
            "--sft_type full: this algorithm compares with a reference, which is the model without its adapter. Use lora."
        )
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(model.dtype) or getattr(torch, model.dtype)
    placement = {"device_map": "auto"} if spread_over_gpus else {}
    base: Any = AutoModelForImageTextToText.from_pretrained(
        source.base,
        dtype=dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        **placement,
    )
    if not spread_over_gpus:
        base.to(device)
    family = find_family(base.config.model_type)
    base.requires_grad_(False)
    torch.manual_seed(seed)
    wrapped = _add_adapter(base, source, tuner, family, needs_reference=needs.reference)
    value_head = None
    if needs.head == "value":
        output_head = base.get_output_embeddings().weight
        value_head = load_value_head(Path(source.adapter or source.base), output_head.shape[1]).to(output_head.device)
        if output_head is not base.get_input_embeddings().weight:
            output_head.requires_grad_(False)
    if not needs.dropout:
        _turn_off_dropout(wrapped)
    if model.gradient_checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return Policy(wrapped, family, value_head)


def lora_targets(base: Any, modules: tuple[str, ...], family: Family) -> list[str]:
    """The full names of the linears that --lora_target_modules means, all inside the language model.

    DEFAULT: attention q, k, v; ALL: every linear; otherwise module names (`q_proj`) or one regular expression over full names.
    Raises ValueError where one of them matches nothing, with the names there are.
    """
    decoder = base.get_decoder()
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    linears = [f"{prefix}.{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    if modules == ("ALL",):
        return linears
    wanted = family.attention_projections if modules == ("DEFAULT",) else modules
    chosen = [name for name in linears if name.rsplit(".", 1)[-1] in wanted]
    if not chosen and len(modules) == 1:
        try:
            chosen = [name for name in linears if re.fullmatch(modules[0], name)]
        except re.error as error:
            raise ValueError(f"--lora_target_modules {modules[0]!r} is no valid regular expression: {error}.") from None
    names = sorted({name.rsplit(".", 1)[-1] for name in linears})
    unmatched = [module for module in modules if module not in names] if len(modules) > 1 or not chosen else []
    if unmatched:
        raise ValueError(
            f"--lora_target_modules {' '.join(unmatched)} matches no linear of the language model. "
            f"Its linears: {', '.join(names)}."
        )
    return chosen


def _add_adapter(base: Any, source: ModelSource, tuner: TunerConfig, family: Family, *, needs_reference: bool) -> Any:
    if tuner.sft_type == "full":
        if source.adapter:
            raise ValueError(f"--sft_type full can't continue from the adapter {source.adapter}: merge it first, or use lora.")
        base.get_decoder().requires_grad_(True)
        base.get_output_embeddings().requires_grad_(True)
        return base
    if source.adapter:
        model = PeftModel.from_pretrained(base, source.adapter, adapter_name=TRAINED, is_trainable=True)
        if needs_reference:
            model.load_adapter(source.adapter, adapter_name=REFERENCE, is_trainable=False)
        return model
    lora = LoraConfig(
        r=tuner.lora_rank,
        lora_alpha=tuner.lora_alpha,  # type: ignore[arg-type]  # peft annotates int, its arithmetic takes fractions
        lora_dropout=tuner.lora_dropout,
        target_modules=lora_targets(base, tuner.lora_target_modules, family),
    )
    return get_peft_model(base, lora, adapter_name=TRAINED)


def _turn_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention layers keep their rate as a number, which they hand to the attention kernel.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]  # nn.Module types attributes as tensors
