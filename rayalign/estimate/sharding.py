"""What a worker holds of a model that is sharded over workers; `policy.sharding` does it."""

import dataclasses
from collections.abc import Iterable, Set

from torch import nn

from rayalign.estimate.architecture import Blueprint, Skeleton
from rayalign.estimate.memory import Memory, bytes_at_start, moment_bytes
from rayalign.policy.prepare import needs_start
from rayalign.policy.sharding import sharded_weights, vision_layers, vision_modules

LAYERS_AT_A_TIME = 2
"""In a backward, where the language model takes the most: the layer that runs, and the one whose weights are on their way to
run next."""
LAYERS_IN_A_FORWARD = 3
"""The layer that runs next, the bytes that it is copied out of, and those of the layer before."""


def share_of(
    memory: Memory,
    skeleton: Skeleton,
    blueprint: Blueprint,
    *,
    num_workers: int,
    below_head: int,
    optim: str = "adamw_torch",
    sync_each_batch: bool = True,
    tower: int | None = None,
    quantised: Set[nn.Parameter] = frozenset(),
) -> Memory:
    """The memory of one of some workers over which the model is sharded.

    `below_head`: how many bytes fewer it works with once the output head's backward is done; `tower`: those that the vision
    tower works with, where it runs. Without `sync_each_batch` it has whole gradients of the language model. Weights that are
    `quantised` have 4 bits, and scales that are not sharded.

    Whole are, as long as they are used, embeddings and output head, and a layer or two; of trained ones the gradients of output
    head and one layer are, too, until the workers have added them up, once there are any. (Those of embeddings come when
    nothing is kept any more. Of a head that shares their weight, autograd keeps the gradient until then: that is in `working`.)
    The vision tower runs before the language model keeps anything, and its backward behind that, when embeddings and output
    head are still whole.
    """
    weights = set(sharded_weights(skeleton.model, skeleton.base))
    rounded = blueprint.dtype if blueprint.rounds_layers else None

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() // 2 if p in quantised else p.numel() * p.element_size() for p in parameters)

    def gathered(layer: Iterable[nn.Parameter]) -> int:
        return size(layer) if rounded is None else sum(p.numel() * rounded.itemsize for p in layer)

    def at_a_time(modules: Iterable[nn.Module], layers: Iterable[nn.Module]) -> tuple[set[nn.Parameter], list[nn.Parameter]]:
        """The weights of some modules that belong to no layer, and those of their largest layer."""
        in_layers = [[p for p in layer.parameters() if p in weights] for layer in layers]
        outside = {p for module in modules for p in module.parameters() if p in weights}.difference(*in_layers)
        return outside, max(in_layers, key=size, default=[])

    frozen = size(p for p in weights if not p.requires_grad)
    trained = size(p for p in weights if p.requires_grad)
    in_tower = {p for module in vision_modules(skeleton.base) for p in module.parameters()}
    shared = trained if sync_each_batch else size(p for p in weights if p.requires_grad and p in in_tower)
    held = memory.weights
    if needs_start(blueprint.tuner, blueprint.needs):
        # Of a copy that is sharded, what isn't trained is held, too.
        held += bytes_at_start(blueprint, skeleton, (p for p in weights if not p.requires_grad))
        frozen += bytes_at_start(blueprint, skeleton, weights)
    base = skeleton.base
    outside, layer = at_a_time([base.get_decoder(), base.get_output_embeddings()], base.get_decoder().layers)
    embeddings = base.get_input_embeddings().weight
    added_up = [p for p in (*outside, *layer) if p.requires_grad and p is not embeddings]
    working = size(outside) + LAYERS_AT_A_TIME * gathered(layer)
    working += max(memory.working, memory.working - below_head + size(added_up))
    if tower is not None:
        seeing, seeing_layer = at_a_time(vision_modules(base), vision_layers(base))
        # The bytes that weights are copied out of stay until those of the next layer are there.
        first, later = 2 * size(seeing) + gathered(seeing_layer), size(seeing) + LAYERS_IN_A_FORWARD * gathered(seeing_layer)
        seen = tower + max(first, later)
        if trains_vision := [p for p in (*seeing, *seeing_layer) if p.requires_grad]:
            seen += size([*outside, *trains_vision, *(p for p in outside if p.requires_grad)])
            if rounded is not None:
                seen += gathered(seeing_layer)  # whose gradients are rounded, too, before they are added up
        working = max(working, seen - memory.kept)
    images = memory.images
    if tower is not None and rounded is not None:  # rounded copies of layers' weights are gathered again, and not kept
        kept = [p for layer in vision_layers(base) for p in layer.parameters() if p.requires_grad and p in weights]
        images -= sum(p.numel() for p in kept) * rounded.itemsize
    saved = 1 - 1 / num_workers
    return dataclasses.replace(
        memory,
        weights=held - round(saved * frozen),
        trainable=memory.trainable - round(saved * trained),
        gradients=memory.gradients - round(saved * shared),
        moments=memory.moments - round(saved * moment_bytes([p for p in weights if p.requires_grad], optim)),
        working=working,
        images=images,
    )
