"""Memory of one worker, by part, for the largest micro-batch of a run."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from rayalign.estimate.architecture import Blueprint, Skeleton
from rayalign.estimate.dry_run import Activations, RowShape
from rayalign.estimate.shapes import PairShape
from rayalign.estimate.vision import VisionCosts
from rayalign.policy.adapters import trainable_parts
from rayalign.policy.prepare import needs_start
from rayalign.policy.sharding import layer_matrices

GB = 2**30
OVERHEAD_BYTES = 3 * GB // 2
"""Assumed for the CUDA context, libraries and their workspaces."""
FRAGMENTATION = 0.05
"""Assumed share of the tensors' memory that the allocator holds and can't use."""

QUANTISED_BITS = {True: 4 + 8 / 64 + 32 / (64 * 256), False: 4 + 32 / 64}
"""Bits per weight: four, and a scale for each 64 weights, of 32 bits; with double quantisation of 8, and 32 for 256 scales."""

QUANTISED_FROM = 4096
"""Elements from which on bitsandbytes keeps a tensor's moments in 8 bits."""


@dataclass(frozen=True)
class Memory:
    """Bytes. `weights` are the frozen ones, `trainable` the others; `kept` is for the backward; `working` comes and goes (a
    layer that runs again, logits of the output head, the reference's forward, the tower's); `images` are pixels and features,
    and what a trainable tower keeps."""

    weights: int
    trainable: int
    gradients: int
    moments: int
    kept: int
    working: int
    images: int

    @property
    def tensors(self) -> int:
        return self.weights + self.trainable + self.gradients + self.moments + self.kept + self.working + self.images

    @property
    def overhead(self) -> int:
        return OVERHEAD_BYTES + round(FRAGMENTATION * self.tensors)

    @property
    def total(self) -> int:
        return self.tensors + self.overhead


@dataclass(frozen=True)
class MicroBatch:
    """What of the data decides on memory: rows at a time, the longest pair, and the one with the largest images."""

    rows: int
    longest: PairShape
    fullest: PairShape

    def shape(self) -> RowShape:
        pair = self.longest
        return RowShape(
            rows=self.rows,
            tokens=pair.prompt + pair.chosen + pair.rejected,
            responses=pair.chosen + pair.rejected,
            with_images=bool(self.fullest.images),
            prompt_and_chosen=pair.prompt + pair.chosen,
            chosen=pair.chosen,
        )

    def scaled(self, factor: float) -> "MicroBatch":
        """The same with a longest row `factor` times as long; its images stay."""
        pair = self.longest
        prompt, chosen, rejected = (max(1, round(factor * n)) if n else 0 for n in (pair.prompt, pair.chosen, pair.rejected))
        return MicroBatch(self.rows, PairShape(prompt, chosen, rejected, pair.image_tokens, pair.images), self.fullest)


def memory_of(
    blueprint: Blueprint,
    skeleton: Skeleton,
    activations: Activations,
    vision: VisionCosts | None,
    batch: MicroBatch,
    *,
    optim: str = "adamw_torch",
) -> Memory:
    """Of a worker that holds the whole model; `activations` are those of the micro-batch, `optim` is --optim."""
    trainable = _bytes(skeleton.trainable)
    frozen = _bytes([p for p in skeleton.model.parameters() if not p.requires_grad])
    working = 0
    if blueprint.tuner.quant_bits is not None:
        frozen, working = _quantised(skeleton, frozen, double=blueprint.tuner.bnb_4bit_use_double_quant)
    if needs_start(blueprint.tuner, blueprint.needs):
        # Weights that aren't trained are held once.
        frozen += bytes_at_start(blueprint, skeleton, skeleton.trainable)
    working += activations.peak - activations.kept
    images = 0
    if vision is not None:
        images = _image_bytes(skeleton, vision, batch, blueprint)
        # The tower is done before the language model keeps anything.
        working = max(working, tower_bytes(vision, batch, blueprint) - activations.kept)
    return Memory(
        weights=frozen,
        trainable=trainable,
        gradients=trainable,
        moments=moment_bytes(skeleton.trainable, optim),
        kept=activations.kept,
        working=working,
        images=images,
    )


def bytes_at_start(blueprint: Blueprint, skeleton: Skeleton, parameters: Iterable[torch.nn.Parameter]) -> int:
    """Of some weights in the frozen copy of the model at the start, which holds layers' matrices rounded."""
    rounded = set(layer_matrices(skeleton.base)) if blueprint.is_mixed else set()
    return sum(p.numel() * (blueprint.dtype if p in rounded else p.dtype).itemsize for p in parameters)


def _bytes(tensors: list[torch.nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moment_bytes(trainable: Collection[torch.nn.Parameter], optim: str) -> int:
    """Of AdamW's two moments of some weights by an --optim: those of 8 bits have a scale of 32 bits for each 256, and small
    tensors' stay float32."""
    if optim != "adamw_8bit":
        return 2 * sum(weight.nbytes for weight in trainable)
    quantised = sum(weight.numel() for weight in trainable if weight.numel() >= QUANTISED_FROM)
    return round(2 * (quantised * (1 + 4 / 256) + 4 * (sum(weight.numel() for weight in trainable) - quantised)))


def _quantised(skeleton: Skeleton, frozen: int, *, double: bool) -> tuple[int, int]:
    """Bytes of the frozen weights with the language model's linears in 4 bits, and of the largest of these when it is used."""
    weights = skeleton.linears()
    packed = sum(math.ceil(weight.numel() * QUANTISED_BITS[double] / 8) for weight in weights)
    return frozen - _bytes(weights) + packed, max(weight.numel() * weight.element_size() for weight in weights)


def _image_bytes(skeleton: Skeleton, vision: VisionCosts, batch: MicroBatch, blueprint: Blueprint) -> int:
    """Of the pixels and features that a micro-batch brings along, and of what a trainable tower and aligner keep.

    The features lie there once by themselves and once in the rows.
    """
    loads = batch.fullest.images
    size = torch.finfo(blueprint.dtype).bits // 8
    width = skeleton.head.shape[1]
    held = sum(load.pixel_bytes + 2 * load.features * width * size for load in loads)
    if "vit" in trainable_parts(blueprint.tuner):
        per_token = vision.kept_per_patch(full=blueprint.tuner.sft_type == "full")
        held += sum(load.patches for load in loads) * per_token * size
    return (batch.rows * held + _rounded_bytes(skeleton, blueprint)) * (2 if blueprint.needs.brings_images else 1)


def _rounded_bytes(skeleton: Skeleton, blueprint: Blueprint) -> int:
    """Of the rounded copies of a trainable tower's and aligner's weights, which are kept for the backward."""
    if not blueprint.is_mixed:
        return 0
    named = skeleton.model.named_parameters()
    trained = [p for name, p in named if p.requires_grad and p.ndim > 1 and skeleton.parts.of(name) != "llm"]
    return sum(p.numel() * blueprint.dtype.itemsize for p in trained)


def tower_bytes(vision: VisionCosts, batch: MicroBatch, blueprint: Blueprint) -> int:
    """What the tower's forward over a micro-batch's images takes while it runs: one layer's tensors, by rule of thumb."""
    size = torch.finfo(blueprint.dtype).bits // 8
    patches = batch.rows * sum(load.patches for load in batch.fullest.images)
    return patches * (4 * vision.hidden + 2 * vision.widest) * size
