"""A micro-batch's forward and backward, run dry: rayalign's own order of passes through the real layers, with fake tensors,
which have shapes and types and no memory. It says what a real one would hold and compute.

A few layers are run, and the figures carried on to the model's depth: layers are taken to be alike, in pairs at least, since
some models alternate two kinds of attention.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rayalign.estimate.architecture import Blueprint, Skeleton
from rayalign.estimate.meter import Meter, tensors_of
from rayalign.estimate.passes import Pass, passes_of
from rayalign.ops.attention import unpacked
from rayalign.ops.logprobs import token_logps
from rayalign.policy.compat import fake_tensors

FEW, MORE = 1, 2
"""Layers of the two models that are run; what their difference costs is what further layers cost."""


@dataclass(frozen=True)
class RowShape:
    """A micro-batch: its rows, the tokens of each (prompt and both responses), and how many of them are responses'. A
    companion's rows without a rejected response have `prompt_and_chosen` tokens, `chosen` of them the response's."""

    rows: int
    tokens: int
    responses: int
    prompt_and_chosen: int = 0
    chosen: int = 0
    with_images: bool = False


@dataclass(frozen=True)
class Activations:
    """Bytes above what is there before the forward: `kept` for the backward when the last forward is done, and `peak`, or
    `peak_below_head`, as soon as the output head's backward is done."""

    kept: int
    peak: int
    peak_below_head: int


class DryRun:
    """One model as it is trained, run dry with micro-batches of any shape; its few layers are built once. Where it is
    `sharded`, layers' weights may come rounded."""

    def __init__(self, blueprint: Blueprint, *, sharded: bool = False) -> None:
        self.blueprint = blueprint
        depth = blueprint.num_layers
        self._depths = (FEW, MORE) if depth > MORE else (depth, depth)
        self._mode = fake_tensors()
        self._known: dict[RowShape, Activations] = {}
        self._skeletons = {layers: blueprint.build(layers=layers) for layers in set(self._depths)}
        for skeleton in self._skeletons.values():
            rounded = [p for layer in skeleton.base.get_decoder().layers for p in layer.parameters() if p.ndim > 1]
            types = dict.fromkeys(rounded, blueprint.dtype) if sharded and blueprint.rounds_layers else {}
            with self._mode:
                _make_fake(skeleton.model, types)
                for parameter in skeleton.trainable:  # they are there from an earlier micro-batch on
                    parameter.grad = torch.zeros_like(parameter)

    def activations(self, shape: RowShape) -> Activations:
        """What the step's passes over a micro-batch hold; the weights' gradients are there before."""
        if shape not in self._known:
            found = self._carried_on([self._activations(self._skeletons[layers], shape) for layers in self._depths])
            self._known[shape] = Activations(*map(round, found))
        return self._known[shape]

    def flops(self, item: Pass, tokens: int) -> float:
        """Operations of the language model in one pass over one row that is all prompt, without the output head."""
        return self._carried_on([(self._flops(self._skeletons[layers], item, tokens),) for layers in self._depths])[0]

    def _carried_on(self, figures: list[tuple[float, ...]]) -> tuple[float, ...]:
        few, more = figures
        share = (self.blueprint.num_layers - FEW) / (MORE - FEW) if self._depths[0] != self._depths[1] else 0.0
        return tuple(a + share * (b - a) for a, b in zip(few, more, strict=True))

    def _activations(self, skeleton: Skeleton, shape: RowShape) -> tuple[float, ...]:
        _, step = passes_of(self.blueprint.needs, reference_known=self.blueprint.reference_known)
        with self._mode, Meter(tensors_of(skeleton.model)) as meter:
            at_head: list[int] = []
            below_head = functools.partial(_note_peak, meter, at_head)
            losses = [loss for item in step if (loss := self._run(skeleton, item, shape, below_head)) is not None]
            kept = meter.live
            total = torch.stack(losses).sum()
            losses.clear()
            total.backward()
        return kept, max(meter.peak, *at_head), meter.peak

    def _flops(self, skeleton: Skeleton, item: Pass, tokens: int) -> float:
        with self._mode, Meter([]) as meter, torch.set_grad_enabled(item.trains):
            states = self._states(skeleton.base, 1, tokens, prompt=tokens)
            if item.trains:
                states.sum().backward()
        return float(meter.flops)

    def _run(self, skeleton: Skeleton, item: Pass, shape: RowShape, below_head: Callable[[Tensor], None]) -> Tensor | None:
        """One pass: a scalar to go backward from, or None where nothing is trained. `below_head` is called in the backward with
        the gradient of the last states."""
        tokens, responses = shape.tokens, shape.responses
        if item.companion and not item.companion.shares_images and not shape.with_images:
            return None
        if item.companion and not item.companion.has_rejected:
            tokens, responses = shape.prompt_and_chosen, shape.chosen
        with torch.set_grad_enabled(item.trains):
            states = self._states(skeleton.base, shape.rows, tokens, prompt=tokens - responses)
            if states.requires_grad:
                states.register_hook(below_head)
            if self.blueprint.needs.head == "value":
                last = states[torch.zeros(2 * shape.rows, dtype=torch.long)]
                scores: Tensor = nn.functional.linear(last.float(), torch.empty(1, states.shape[1], requires_grad=True))
                return scores.sum() if item.trains else None
            count = shape.rows * responses
            picked = states[torch.zeros(count, dtype=torch.long)]
            del states
            with self._arithmetic():
                logps = token_logps(picked, skeleton.head, torch.zeros(count, dtype=torch.long))
            return logps.sum() if item.trains else None

    def _states(self, base: Any, rows: int, tokens: int, *, prompt: int) -> Tensor:
        """The language model's last states [rows * tokens, H]."""
        packs = {"row_lengths": ((prompt, tokens),) * rows} if self.blueprint.packs(tokens) else {}
        masks: Any = torch.ones(rows, 1, tokens - prompt if packs else tokens, tokens, dtype=torch.bool)
        kinds = set(getattr(base.get_decoder().config, "layer_types", None) or ())
        if "sliding_attention" in kinds:
            masks = {kind: masks.clone() for kind in sorted(kinds)}
        ids = torch.zeros((1, rows * tokens) if packs else (rows, tokens), dtype=torch.long)
        embedded: Tensor = base.get_input_embeddings()(ids)
        if self.blueprint.trains_vision and torch.is_grad_enabled() and not embedded.requires_grad:
            embedded.requires_grad_()
        with self._arithmetic():
            hidden: Tensor = base.get_decoder()(
                inputs_embeds=embedded,
                attention_mask=masks,
                position_ids=ids,
                use_cache=False,
                **packs,
            ).last_hidden_state
            if packs:
                hidden = unpacked(hidden, packs["row_lengths"], tokens)
        return hidden.flatten(0, 1)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", self.blueprint.dtype, enabled=self.blueprint.is_mixed)


@dataclass(frozen=True)
class DryRuns:
    """One model run dry without and with gradient checkpointing, each when it is first asked for; maybe a `sharded` one."""

    blueprint: Blueprint
    sharded: bool = False

    @cached_property
    def plain(self) -> DryRun:
        return DryRun(self.blueprint.with_checkpointing(on=False), sharded=self.sharded)

    @cached_property
    def recomputing(self) -> DryRun:
        return DryRun(self.blueprint.with_checkpointing(on=True), sharded=self.sharded)

    def activations(self, shape: RowShape, recomputed: int) -> Activations:
        """What the step's passes hold where so many of the layers run again, the first ones: they do it when the last ones have
        let go of what they keep, but of a pass before the one whose backward it is, all is still there."""
        depth = self.blueprint.num_layers
        if recomputed in (0, depth):
            return (self.recomputing if recomputed else self.plain).activations(shape)
        plain, recomputing = self.plain.activations(shape), self.recomputing.activations(shape)
        kept = plain.kept + (recomputing.kept - plain.kept) * recomputed // depth
        _, step = passes_of(self.blueprint.needs, reference_known=self.blueprint.reference_known)
        passes = sum(item.trains for item in step)
        earlier = (kept - recomputing.kept) * (passes - 1) // passes
        return Activations(
            kept,
            max(kept + plain.peak - plain.kept, earlier + recomputing.peak),
            max(kept + plain.peak_below_head - plain.kept, earlier + recomputing.peak_below_head),
        )


def _note_peak(meter: Meter, peaks: list[int], gradient: Tensor) -> None:
    """Notes a meter's peak so far, the first time, and lets it look for the one from here on."""
    if not peaks:
        peaks.append(meter.peak)
        meter.peak = meter.live


def _make_fake(model: nn.Module, types: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Puts fake tensors of the CPU in the place of meta ones, which no kernel knows: attention on the meta device would be
    another, with all its weights in memory. Some have other `types` than these."""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            fake = nn.Parameter(
                torch.empty(parameter.shape, dtype=types.get(parameter, parameter.dtype)), parameter.requires_grad
            )
            setattr(module, name, fakes.setdefault(id(parameter), fake))
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
