"""A policy that is sharded over workers (torch's FSDP2): each holds a share of every weight, and a layer is whole only while it
runs.

Whole on every worker stay adapters and a value head, whose gradients `training.loop` adds up once a step. Those of sharded
weights are added up in the backward of each micro-batch, so that no worker ever holds all of them, unless a run wants it
otherwise; sums they are, not means, since losses are divided by the counts of the whole step.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from rayalign.algorithms import Needs
from rayalign.models.registry import FAMILIES
from rayalign.policy.fused_norms import fuse_named, fused_names
from rayalign.policy.policy import Policy
from rayalign.policy.quantised import lay_bare


class _Root(nn.Module):
    """Runs a function as its forward, in which the weights of some modules that belong to no layer are whole: a policy runs
    embeddings, decoder and output head apart from each other, and FSDP makes weights whole for one module's forward."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def mesh_of_workers(device: torch.device, group_size: int | None = None) -> DeviceMesh:
    """The workers of a run, each of which has a share of every weight; where `group_size` is given, in groups of so many
    neighbours, each of which has a whole model between them (hybrid sharding, https://arxiv.org/abs/2304.11277, 3.2.2)."""
    group = dist.group.WORLD
    assert group is not None
    if group_size in (None, dist.get_world_size()):
        return DeviceMesh.from_group(group, device.type)
    groups = torch.arange(dist.get_world_size()).view(-1, group_size)
    return DeviceMesh(device.type, groups, mesh_dim_names=("groups", "workers"))


def sharded_weights(model: nn.Module, base: Any) -> list[nn.Parameter]:
    """The weights that are sharded of a model as it is trained and its `base`: all of its modules' matrices, without adapters.
    Vectors (biases, norms) are few, and whole."""
    inside = {p for module in (*_language(base), *vision_modules(base)) for p in module.parameters()}
    return [p for name, p in model.named_parameters() if p in inside and p.ndim > 1 and ".lora_" not in name]


def vision_modules(base: Any) -> list[nn.Module]:
    """The modules that make images' features: tower, aligner, and whatever else holds nothing of the language model."""
    language = set(_language(base))

    def outside(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if child in language:
                continue
            if language.isdisjoint(child.modules()):
                yield child
            else:
                yield from outside(child)

    return list(outside(base))


def vision_layers(base: Any) -> list[nn.Module]:
    """The layers of the vision tower, as transformers knows them for gradient checkpointing. A tower of another kind has none,
    nor has that of a family without a file here, which might run once for each picture: these are whole while they run."""
    if base.config.model_type not in FAMILIES:
        return []
    return [layer for part in vision_modules(base) for layer in part.modules() if isinstance(layer, GradientCheckpointingLayer)]


def layer_matrices(base: Any) -> list[nn.Parameter]:
    """The weights of layers, of the vision tower, too, that the arithmetic rounds where they are used: all but vectors."""
    layers = (*vision_layers(base), *base.get_decoder().layers)
    return [parameter for layer in layers for parameter in layer.parameters() if parameter.ndim > 1]


def _language(base: Any) -> tuple[nn.Module, nn.Module]:
    return base.get_decoder(), base.get_output_embeddings()


def shard_policy(
    policy: Policy,
    mesh: DeviceMesh,
    *,
    device: torch.device,
    needs: Needs,
    scattered: bool = False,
    sync_each_batch: bool = True,
) -> None:
    """Spreads a policy, which has been loaded whole on the CPU or on the device, over the workers of a mesh, layer by layer;
    its `start` is one by itself.

    All of them call it, with the same weights; `scattered`: rank 0 has them, all others have them on the meta device and get
    theirs from it, a tensor at a time. What is computed is what a whole model computes: where the arithmetic rounds weights,
    those of layers travel rounded, unless an algorithm of these `needs` has gradients of two forwards, which would be added up
    in the same type. Of several groups of workers each adds up its own gradients in each backward, or, without
    `sync_each_batch`, keeps them whole; all groups add up theirs in the last one of a step.
    """
    base = policy.base
    lay_bare(base, device, scattered=scattered)
    shares = _take_shares(policy.model, base, mesh, device) if scattered else {}
    sharded_ones = set(sharded_weights(policy.model, base))
    whole = {p for p in policy.model.parameters() if p not in sharded_ones}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    if policy.value_head is not None:
        policy.value_head.to(device)
    # Images' features are made apart from the rows' forwards: each has a root of its own.
    language, vision = _Root(_language(base)), _Root(vision_modules(base))
    as_held = MixedPrecisionPolicy()
    rounded = MixedPrecisionPolicy(param_dtype=policy.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    of_layers = rounded if policy.is_mixed and not needs.trains_companion else as_held
    for unit in (*vision_layers(base), vision, *base.get_decoder().layers, language):
        types = as_held if unit in (vision, language) else of_layers
        # Embeddings and output head stay whole: the backward begins with them.
        again = unit is not language
        sharded: FSDPModule = fully_shard(unit, mesh=mesh, reshard_after_forward=again, mp_policy=types, ignored_params=whole)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        # A worker whose pictures don't pass some module has zeros there: all add up the same tensors.
        sharded.set_reduce_scatter_unused_params(True, recurse=False)
    if scattered:
        _fill((language, vision), policy.model, shares, device)
    if any(parameter.requires_grad for parameter in language.parameters()) and (not sync_each_batch or mesh.ndim > 1):
        # A step's last micro-batch may have no pictures, but it passes all layers of the language model.
        add_up: Any = language
        policy.add_up_shards = add_up.set_requires_all_reduce if sync_each_batch else add_up.set_requires_gradient_sync
    learns = any(parameter.requires_grad for parameter in policy.model.parameters())
    policy.sharded = _runner(language, learns=learns)
    policy.sharded_vision = _runner(vision, learns=policy.trains_vision)
    policy.device = device


def _runner(root: Any, *, learns: bool) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function as a root's forward. FSDP notes the order of forwards, and keeps weights whole, until a backward: where
    none follows, that ends here."""

    def run(function: Callable[[], Any]) -> Any:
        result = root(function)
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            root.reshard()
        if not learns:
            root.reset_iter_state()
        return result

    return run


def _take_shares(model: nn.Module, base: Any, mesh: DeviceMesh, device: torch.device) -> dict[str, Tensor]:
    """This worker's rows of each weight that is sharded, by name, from rank 0. Others than rank 0 have what else its model is
    afterwards, but tensors that are not sharded are empty."""
    types = {name: (tensor.shape, tensor.dtype) for name, tensor in _tensors_of(model).items()}
    known: list[Any] = [types, fused_names(base), base.generation_config]
    dist.broadcast_object_list(known, src=0)
    if dist.get_rank() > 0:
        of_first, norms, base.generation_config = known
        assert {name: shape for name, (shape, _) in types.items()} == {name: shape for name, (shape, _) in of_first.items()}
        for name, tensor in _tensors_of(model).items():
            tensor.data = tensor.data.to(of_first[name][1])
        fuse_named(base, norms)
        _make_empty(model, sharded_weights(model, base), device)
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: _own_rows(p, mesh, device) for p in sharded_weights(model, base)}


def _own_rows(tensor: Tensor, mesh: DeviceMesh, device: torch.device) -> Tensor:
    """This worker's rows of a tensor that rank 0 has."""
    count, number = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    share = -(-len(tensor) // count)
    own = torch.empty(share, *tensor.shape[1:], dtype=tensor.dtype, device=device)
    sent = None
    if dist.get_rank() == 0:
        padded = nn.functional.pad(tensor.detach().to(device), (0, 0) * (tensor.ndim - 1) + (0, share * count - len(tensor)))
        sent = [padded[share * shard :][:share].contiguous() for shard in range(count)] * (dist.get_world_size() // count)
    dist.scatter(own, sent, src=0)
    return own[: max(0, min(share, len(tensor) - share * number))]


def _fill(roots: Iterable[nn.Module], model: nn.Module, shares: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts shares in the place of sharded weights on the meta device, and gives all workers rank 0's other tensors."""
    if dist.get_rank() > 0:
        for root in roots:
            root.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in _tensors_of(model).items():
            if name not in shares:
                dist.broadcast(tensor.data, src=0)
            elif dist.get_rank() > 0:
                assert isinstance(tensor, DTensor)
                tensor.to_local().copy_(shares[name])


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _make_empty(model: nn.Module, but: Collection[nn.Parameter], device: torch.device) -> None:
    """Puts tensors of a device in the place of a model's meta ones, `but` some."""
    made: dict[Tensor, Tensor] = {parameter: parameter for parameter in but}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, torch.empty_like(buffer, device=device))


def agreed(policy: Policy, choice: int) -> int:
    """Rank 0's choice, on which the next forward depends: all workers of a sharded policy run the same ones. Every worker of
    such a one calls it."""
    if policy.sharded is None:
        return choice
    chosen = torch.tensor(choice, device=policy.device)
    dist.broadcast(chosen, src=0)
    return int(chosen)
