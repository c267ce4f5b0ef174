"""What a worker holds of a language model that is sharded over workers; `policy.sharding` does it."""

import dataclasses
from collections.abc import Iterable, Set

import torch
from torch import nn

from rayalign.estimate.architecture import Skeleton
from rayalign.estimate.memory import Memory
from rayalign.policy.sharding import sharded_weights

LAYERS_AT_A_TIME = 2
"""The layer that runs, and the one whose weights are on their way to run next."""


def share_of(
    memory: Memory,
    skeleton: Skeleton,
    *,
    num_workers: int,
    below_head: int,
    copied: torch.dtype | None = None,
    quantised: Set[nn.Parameter] = frozenset(),
) -> Memory:
    """The memory of one of some workers over which the language model is sharded. `below_head`: how many bytes fewer it works
    with once the output head's backward is done; `copied` is the type of a frozen copy of the model that is held beside it, if
    there is one; weights that are `quantised` have 4 bits, and scales that are not sharded.

    Whole are, as long as they are used, embeddings and output head, and a layer or two; of trained ones the gradients of output
    head and one layer are, too, until the workers have added them up, once there are any. (Those of embeddings come when
    nothing is kept any more. Of a head that shares their weight, autograd keeps the gradient until then: that is in `working`.)
    """
    weights = set(sharded_weights(skeleton.model, skeleton.base))

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() // 2 if p in quantised else p.numel() * p.element_size() for p in parameters)

    frozen = size(p for p in weights if not p.requires_grad)
    trained = size(p for p in weights if p.requires_grad)
    if copied is not None:
        frozen += sum(p.numel() for p in weights) * torch.finfo(copied).bits // 8
    layers = [[p for p in layer.parameters() if p in weights] for layer in skeleton.base.get_decoder().layers]
    in_layers = {p for layer in layers for p in layer}
    outside, layer = weights - in_layers, max(layers, key=size)
    embeddings = skeleton.base.get_input_embeddings().weight
    added_up = [p for p in (*outside, *layer) if p.requires_grad and p is not embeddings]
    saved = 1 - 1 / num_workers
    return dataclasses.replace(
        memory,
        weights=memory.weights - round(saved * frozen),
        trainable=memory.trainable - round(saved * trained),
        gradients=memory.gradients - round(saved * trained),
        moments=memory.moments - round(saved * 2 * trained),
        working=size([*outside, *(LAYERS_AT_A_TIME * layer)])
        + max(memory.working, memory.working - below_head + size(added_up)),
    )
