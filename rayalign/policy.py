"""The model under training and its reference: loading, adapters, heads, freezing, and the pair forward.

The reference is the same weights seen differently: adapters off, or, where training continues from an SFT adapter, that adapter
kept frozen beside the one that learns. So it costs no second model, and rewards at step 0 are exactly 0.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from rayalign.algorithms import Needs
from rayalign.batch import PairBatch, attention_mask
from rayalign.config import ModelConfig, TunerConfig
from rayalign.logprobs import PairLogps, sum_by_response, token_logps
from rayalign.models import Family, ModelSource, find_family
from rayalign.value_head import ValueHead, load_value_head, save_value_head

TRAINED, REFERENCE = "default", "reference"


class Policy:
    """A VLM under training. `model` is the PEFT-wrapped (LoRA) or plain (full) transformers model; a reward model has a
    `value_head`, too."""

    def __init__(self, model: Any, family: Family, value_head: ValueHead | None = None) -> None:
        self.model: Any = model
        self.value_head = value_head
        self.base: Any = self.model.get_base_model() if isinstance(model, PeftModel) else model
        self.family = family
        self.device: torch.device = self.base.get_input_embeddings().weight.device
        self._tuner_layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        has_reference = isinstance(model, PeftModel) and REFERENCE in self.model.peft_config
        self._reference_adapters = [REFERENCE] if has_reference else []
        self.base.eval()
        self.base.get_decoder().train()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        named = dict(self.model.named_parameters())
        if self.value_head is not None:
            named |= {f"v_head.{name}": p for name, p in self.value_head.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def image_features(self, batch: PairBatch) -> tuple[Tensor, ...]:
        """Projected features [tokens, H] of each distinct image; the tower is frozen, so no graph is kept."""
        if not batch.image_inputs:
            return ()
        inputs = dict(batch.image_inputs)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.base.dtype)
        with torch.no_grad():
            return tuple(self.base.get_image_features(**inputs, return_dict=True).pooler_output)

    def logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        """Log-probabilities of both responses of each pair, by the weights under training."""
        head = self.base.get_output_embeddings().weight
        states = self._states(batch, images, batch.predictors).to(head.device)
        logps = token_logps(states, head, batch.targets.to(head.device))
        return sum_by_response(logps, batch.sequences.to(head.device), batch.num_pairs)

    def values(self, batch: PairBatch, images: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Scores [B] of the chosen and of the rejected responses by the value head, each at the response's last token."""
        assert self.value_head is not None
        device = self.value_head.summary.weight.device
        chosen, rejected = self.value_head(self._states(batch, images, batch.ends).to(device)).chunk(2)
        return chosen, rejected

    def _states(self, batch: PairBatch, images: tuple[Tensor, ...], positions: Tensor) -> Tensor:
        """The language model's last hidden states [n, H] at flat positions [n] of the rows."""
        hidden = self.base.model(
            input_ids=batch.input_ids,
            attention_mask=self._mask(batch),
            position_ids=batch.position_ids,
            mm_encoder_outputs=_place_images(images, batch.image_slots),
            use_cache=False,
        ).last_hidden_state
        states: Tensor = hidden.flatten(0, 1)[positions.to(hidden.device)]
        return states

    def reference_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        """The same by the reference policy, without a graph."""
        if not self._tuner_layers:
            raise ValueError(
                "The reference is the model without its adapter, and --sft_type full trains no adapter: use --sft_type lora."
            )
        with torch.no_grad(), self.reference_weights():
            return self.logps(batch, images)

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Within it, the model is the reference policy."""
        # peft's own switches (disable_adapter, set_adapter) also flip requires_grad, which the running step relies on.
        for layer in self._tuner_layers:
            layer._active_adapter = self._reference_adapters
        try:
            yield
        finally:
            for layer in self._tuner_layers:
                layer._active_adapter = [TRAINED]

    def save(self, folder: Path, *, safe_serialization: bool = True) -> None:
        """Writes the result: the adapter, or the full weights, in safetensors, and a value head in the format of choice."""
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder), selected_adapters=[TRAINED])
        else:
            self.model.save_pretrained(str(folder))
        if self.value_head is not None:
            save_value_head(self.value_head, folder, safe_serialization=safe_serialization)

    def _mask(self, batch: PairBatch) -> Tensor:
        text_config = self.base.config.get_text_config()
        window = text_config.to_dict().get("sliding_window")
        allowed = attention_mask(batch.segment_ids, batch.position_ids, sliding_window=window)
        if self.base.get_decoder().config._attn_implementation == "eager":
            dtype = self.base.dtype
            return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
        return allowed


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


def _place_images(images: tuple[Tensor, ...], slots: tuple[int, ...]) -> dict[str, Any] | None:
    """The distinct images' features, repeated for each place where an image stands, in reading order."""
    if not slots:
        return None
    # The annotation says one tensor; LLaVA's own forward passes a list, one entry per image.
    placed: Any = [images[slot] for slot in slots]
    return {"image": BaseModelOutputWithPooling(pooler_output=placed)}
