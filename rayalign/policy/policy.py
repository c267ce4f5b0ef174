"""The model under training and its reference: the pair forward. `loading` makes it, `saving` writes it.

The reference is the same weights seen differently: adapters off, or, where training continues from an SFT adapter, that adapter
kept frozen beside or below the trained one. So it costs no second model, and rewards at step 0 are exactly 0. Where all
weights are trained, it is the model at the start, whose log-probabilities come with the batches; only for rows that are not
known before their step (a companion's that differ from epoch to epoch) there is a frozen copy.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache

from rayalign.data.batch import PairBatch
from rayalign.models.family import Family
from rayalign.models.parts import Part, find_parts
from rayalign.ops.attention import (
    bidirectional_blocks,
    by_kind,
    can_pack,
    decoder_mask,
    layer_windows,
    packed,
    response_mask,
    unpacked,
)
from rayalign.ops.logprobs import PairLogps, score_tokens, sum_by_response
from rayalign.ops.value_head import ValueHead
from rayalign.policy.adapters import AdapterSwitch
from rayalign.policy.compat import attention_kernel, image_arguments, name_in_base
from rayalign.policy.prepare import set_modes

T = TypeVar("T")
_Runner = Callable[[Callable[[], Any]], Any]

VALUE_HEAD = "v_head."
"""The names of a value head's parameters begin so."""


class Policy:
    """A VLM under training. `model` is the PEFT-wrapped (LoRA) or plain (full) transformers model; a reward model has a
    `value_head`, too. `dtype` is the type of the arithmetic, whatever the type of the trainable weights; `start` is a frozen
    copy as reference. Where `sharding` has put the weights on several workers, `sharded` runs a function with the embeddings
    and the output head whole, and `sharded_vision` one that makes images' features; every worker must then run the same
    forwards in the same order. `add_up_shards` says whether the next backward adds up, over the workers, what those before it
    left to it."""

    def __init__(
        self,
        model: Any,
        family: Family,
        value_head: ValueHead | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        start: "Policy | None" = None,
    ) -> None:
        self.model: Any = model
        self.value_head = value_head
        self.start = start
        self.sharded: _Runner | None = None
        self.sharded_vision: _Runner | None = None
        self.add_up_shards: Callable[[bool], None] = lambda now: None
        self.base: Any = self.model.get_base_model() if isinstance(model, PeftModel) else model
        self.family = family
        self.image_token_id: int | None = None if family.text_only else self.base.config.image_token_id
        self._windows = layer_windows(self.base.get_decoder().config.to_dict())
        self._softcap: float | None = self.base.config.get_text_config().to_dict().get("final_logit_softcapping")
        self.trains_vision = _trains_outside_language(self.base)
        self.device: torch.device = self.base.get_input_embeddings().weight.device
        self.dtype = dtype
        self._adapters = AdapterSwitch(self.model)
        set_modes(self.base)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, by name."""
        named = dict(self.model.named_parameters())
        if self.value_head is not None:
            named |= {f"{VALUE_HEAD}{name}": p for name, p in self.value_head.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def parts_of(self, names: Iterable[str]) -> dict[str, Part]:
        """The part of the model that each of some trainable parameters belongs to, by name; a value head stands for the output
        head."""
        parts = find_parts(self.base)
        return {name: "llm" if name.startswith(VALUE_HEAD) else parts.of(name_in_base(name)) for name in names}

    def image_features(self, batch: PairBatch) -> tuple[Tensor, ...]:
        """Projected features [tokens, H] of each distinct image; no graph is kept where tower and projector are frozen.

        Families whose tower also feeds later layers have these features beside them: [tokens, H + layers x H].
        """
        if batch.image_features is not None:
            return batch.image_features
        if not batch.image_inputs:
            return ()
        arguments = image_arguments(self.base)
        inputs = {name: value for name, value in batch.image_inputs.items() if name in arguments}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.base.dtype)

        def make() -> tuple[Tensor, ...]:
            with self._arithmetic():
                output = self.base.get_image_features(**inputs, return_dict=True)
            kinds = (output.pooler_output, *(output.deepstack_features if self.family.deepstack else ()))
            if batch.image_lengths:
                kinds = tuple([torch.cat([part.flatten(0, -2) for part in features])] for features in kinds)
            return tuple(torch.cat(parts, dim=-1) for parts in zip(*kinds, strict=True))

        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_vision):
            features = _run(self.sharded_vision, make)
        # Without known lengths those of each image come apart already.
        return features[0].split(batch.image_lengths) if batch.image_lengths else features

    def logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        """Log-probabilities of both responses of each pair, by the weights under training."""
        logps, is_first_choice = self._score_tokens(batch, images)
        return _by_response(logps, batch, is_first_choice)

    def token_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> Tensor:
        """The log-probability of each of the batch's targets [N]."""
        return self._score_tokens(batch, images)[0]

    def _score_tokens(self, batch: PairBatch, images: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Of each of the batch's targets [N] the log-probability, and whether no other token is likelier."""

        def score() -> tuple[Tensor, Tensor]:
            head = self.base.get_output_embeddings().weight
            states = self._states(batch, images, batch.predictors).to(head.device)
            with self._arithmetic():
                return score_tokens(states, head, batch.targets.to(head.device), softcap=self._softcap)

        return _run(self.sharded, score)

    def values(self, batch: PairBatch, images: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Scores [B] of the chosen and of the rejected responses by the value head, each at the response's last token."""
        assert self.value_head is not None
        device = self.value_head.summary.weight.device
        states = _run(self.sharded, lambda: self._states(batch, images, batch.last_token))
        chosen, rejected = self.value_head(states.to(device)).chunk(2)
        return chosen, rejected

    def logits_behind_prompt(self, batch: PairBatch, images: tuple[Tensor, ...], cache: Cache) -> Tensor:
        """The logits [V] of what follows the one prompt of a batch, whose keys and values `cache` keeps."""

        def behind() -> Tensor:
            embedded = self._embedded(batch.input_ids, [images[slot] for slot in batch.image_slots])
            return self._next_logits(**embedded, **self._masks(batch), position_ids=batch.position_ids, past_key_values=cache)

        return _run(self.sharded, behind)[0]

    def logits_behind_tokens(
        self, tokens: Tensor, position_ids: Tensor, cache: Cache, is_token: Tensor | None = None
    ) -> Tensor:
        """The same [R, V] of what follows one more token of each of R rows [R, 1], at its position [R, 1] or [3, R, 1], behind
        what `cache` keeps. `is_token` [R, K]: False where a row's cache holds padding, in front of it; None: nowhere."""
        mask = {} if is_token is None else {"attention_mask": is_token.long()}
        return _run(
            self.sharded,
            lambda: self._next_logits(**self._embedded(tokens, ()), **mask, position_ids=position_ids, past_key_values=cache),
        )

    def _next_logits(self, **inputs: Any) -> Tensor:
        head = self.base.get_output_embeddings()
        with self._arithmetic():
            hidden = self.base.get_decoder()(**inputs, use_cache=True).last_hidden_state[:, -1]
            logits: Tensor = head(hidden.to(head.weight.device))
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _arithmetic(self) -> AbstractContextManager[None]:
        """Within it, trainable weights, which are kept in float32, are rounded to `dtype` where they are used. Adapters do this
        themselves."""
        # Each weight is used once in a forward: a cache of rounded weights would only take memory.
        return torch.autocast(self.device.type, self.dtype, enabled=self.is_mixed, cache_enabled=False)

    @property
    def is_mixed(self) -> bool:
        """Whether trainable weights are kept in float32 and rounded where they are used."""
        return not isinstance(self.model, PeftModel) and self.dtype in (torch.bfloat16, torch.float16)

    def _states(self, batch: PairBatch, images: tuple[Tensor, ...], positions: Tensor) -> Tensor:
        """The language model's last hidden states [n, H] at flat positions [n] of the rows."""
        packs = self._packs(batch)
        input_ids, position_ids = batch.input_ids, batch.position_ids
        if packs:
            input_ids, position_ids = (packed(ids, batch.row_lengths) for ids in (input_ids, position_ids))
        embedded = self._embedded(input_ids, [images[slot] for slot in batch.image_slots])
        if images and not batch.image_slots:
            # A filler of another worker's picture: the tower's backward runs on all of them, or on none.
            embedded["inputs_embeds"] = embedded["inputs_embeds"] + 0 * sum(features.flatten()[0] for features in images)
        with self._arithmetic():
            hidden = self.base.get_decoder()(
                **embedded,
                **self._masks(batch),
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state
        if packs:
            hidden = unpacked(hidden, batch.row_lengths, batch.input_ids.shape[1])
        states: Tensor = hidden.flatten(0, 1)[positions.to(hidden.device)]
        return states

    def reference_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        """The same by the reference policy, without a graph: computed now where they do not come with the batch."""
        if batch.reference_logps is not None:
            return _by_response(batch.reference_logps.to(self.base.get_output_embeddings().weight.device), batch)
        assert self.can_run_reference, "the weights of the reference are gone"
        with torch.no_grad(), self.reference_weights():
            frozen = self.start or self
            return frozen.logps(batch, frozen.image_features(batch) if self.trains_vision else images)

    @property
    def can_run_reference(self) -> bool:
        """Whether the reference's weights are at hand: under adapters, or as a copy."""
        return bool(self._adapters.layers or self.start)

    def reference_weights(self) -> AbstractContextManager[None]:
        """Within it, the model is the reference policy."""
        return self._adapters.reference()

    def leave_out_adapters(self) -> None:
        """From now on the model is the reference policy, at the cost of a model without adapters."""
        self._adapters.leave_out()

    def _embedded(self, input_ids: Tensor, images: Sequence[Tensor]) -> dict[str, Any]:
        """The decoder's inputs: the tokens' embeddings [B, S, H] with each image's features where the image stands."""
        embed = self.base.get_input_embeddings()
        if not images:
            return {"inputs_embeds": embed(input_ids)}
        is_image = self._is_image(input_ids)
        # The image token may lie outside the vocabulary, as in Gemma.
        embedded = embed(input_ids.masked_fill(is_image, 0))
        features = torch.cat(list(images)).to(embedded)
        size = embedded.shape[-1]
        inputs: dict[str, Any] = {"inputs_embeds": embedded.masked_scatter(is_image[:, :, None], features[:, :size])}
        if self.family.deepstack:
            inputs["visual_pos_masks"] = is_image
            inputs["deepstack_visual_embeds"] = list(features[:, size:].split(size, dim=1))
        return inputs

    def _is_image(self, input_ids: Tensor) -> Tensor:
        """True where an image's feature stands."""
        return torch.eq(input_ids, self.image_token_id)  # type: ignore[arg-type]  # never None where it is called

    def num_tokens_with_padding(self, batch: PairBatch) -> int:
        """Tokens that the language model runs over, padding and the companion included."""
        own = sum(tokens for _, tokens in batch.row_lengths) if self._packs(batch) else batch.input_ids.numel()
        return own + (self.num_tokens_with_padding(batch.companion.batch) if batch.companion else 0)

    def _packs(self, batch: PairBatch) -> bool:
        """Whether the language model runs over the batch's rows one after another, without padding."""
        return can_pack(self._kernel, self._windows, batch.input_ids.shape[1])

    def _masks(self, batch: PairBatch) -> dict[str, Any]:
        """The decoder's arguments that say who sees whom."""
        if self._packs(batch):
            masks = dict.fromkeys(self._windows, response_mask(batch.segment_ids, batch.row_lengths))
            return {"attention_mask": by_kind(masks), "row_lengths": batch.row_lengths}
        kind = self.family.bidirectional
        is_image = self._is_image(batch.input_ids) if kind == "image" else None
        mask = decoder_mask(
            batch.segment_ids,
            batch.position_in_sequence,
            kernel=self._kernel,
            windows=self._windows,
            blocks=bidirectional_blocks(kind, batch.segment_ids, is_image),
            dtype=self.base.dtype,
        )
        return {"attention_mask": mask}

    @property
    def _kernel(self) -> str:
        return attention_kernel(self.base.get_decoder())


def _by_response(logps: Tensor, batch: PairBatch, is_first_choice: Tensor | None = None) -> PairLogps:
    response_ids = batch.response_ids.to(logps.device)
    return sum_by_response(logps, response_ids, batch.num_pairs, is_first_choice=is_first_choice)


def _trains_outside_language(base: Any) -> bool:
    """Whether weights of the vision tower or the projector are trainable, on which images' features depend."""
    language = [*base.get_decoder().parameters(), base.get_output_embeddings().weight]
    inside = {id(parameter) for parameter in language}
    return any(p.requires_grad and id(p) not in inside for p in base.parameters())


def _run(whole: _Runner | None, forward: Callable[[], T]) -> T:
    """What a forward gives; where the modules that it runs are sharded, they are whole within it."""
    return forward() if whole is None else whole(forward)
