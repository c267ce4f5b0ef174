"""A policy whose language model is sharded over workers (torch's FSDP2): each holds a share of every weight, and a layer is
whole only while it runs.

Whole on every worker stay adapters, a value head, vision tower and aligner, whose gradients `training.loop` adds up once a
step. Those of sharded weights are added up in the backward of each micro-batch, so that no worker ever holds all of them; sums
they are, not means, since losses are divided by the counts of the whole step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from rayalign.policy.policy import Policy


class _Root(nn.Module):
    """Runs a function as its forward, in which the weights that belong to no layer are whole: a policy runs embeddings,
    decoder and output head apart from each other, and FSDP makes weights whole for one module's forward."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def all_workers(device: torch.device) -> DeviceMesh:
    """The workers of a run, each of which has a share of every weight."""
    group = dist.group.WORLD
    assert group is not None
    return DeviceMesh.from_group(group, device.type)


def sharded_weights(model: nn.Module, base: Any) -> list[nn.Parameter]:
    """The weights that are sharded of a model as it is trained and its `base`: the language model's and the output head's,
    without adapters."""
    language = {*base.get_decoder().parameters(), *base.get_output_embeddings().parameters()}
    return [p for name, p in model.named_parameters() if p in language and ".lora_" not in name]


def shard_policy(policy: Policy, mesh: DeviceMesh, *, device: torch.device) -> None:
    """Spreads a policy, which has been loaded whole on the CPU or on the device, over the workers of a mesh, layer by layer.

    All of them call it, with the same weights. Weights keep their types: what is computed is what a whole model computes.
    """
    if policy.start is not None:
        shard_policy(policy.start, mesh, device=device)
    base = policy.base
    layers = base.get_decoder().layers
    sharded_ones = set(sharded_weights(policy.model, base))
    whole = {p for p in policy.model.parameters() if p not in sharded_ones}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    if policy.value_head is not None:
        policy.value_head.to(device)
    root = _Root(base)
    for unit in (*layers, root):
        sharded: FSDPModule = fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    policy.sharded = root
    policy.device = device


def agreed(policy: Policy, choice: int) -> int:
    """Rank 0's choice, on which the next forward depends: all workers of a sharded policy run the same ones. Every worker of
    such a one calls it."""
    if policy.sharded is None:
        return choice
    chosen = torch.tensor(choice, device=policy.device)
    dist.broadcast(chosen, src=0)
    return int(chosen)
