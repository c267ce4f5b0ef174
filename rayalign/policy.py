"""The model under training and its reference: the pair forward and what is saved. `loading` makes it.

The reference is the same weights seen differently: adapters off, or, where training continues from an SFT adapter, that adapter
kept frozen beside the one that learns. So it costs no second model, and rewards at step 0 are exactly 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from rayalign.batch import PairBatch, attention_mask
from rayalign.logprobs import PairLogps, sum_by_response, token_logps
from rayalign.models import Family
from rayalign.value_head import ValueHead, save_value_head

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


def _place_images(images: tuple[Tensor, ...], slots: tuple[int, ...]) -> dict[str, Any] | None:
    """The distinct images' features, repeated for each place where an image stands, in reading order."""
    if not slots:
        return None
    # The annotation says one tensor; LLaVA's own forward passes a list, one entry per image.
    placed: Any = [images[slot] for slot in slots]
    return {"image": BaseModelOutputWithPooling(pooler_output=placed)}
