"""What train workers do together, in plain torch.distributed: nothing where a process is alone.

Weights and gradients are whole on each worker, or sharded (`DTensor`s).
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from rayalign.policy.policy import Policy

BUCKET_ELEMENTS = 64 * 2**20
"""Elements that are summed over workers at a time; as many are held twice."""


def gather(value: Any, *, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every worker's value, by rank; a small picklable object, and every worker calls it. A `group` is `group_beside`."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def group_beside(*, seconds: float | None = None) -> dist.ProcessGroup | None:
    """All workers once more, for what they exchange beside the training. Every worker calls it. After some `seconds` without
    the others an exchange raises RuntimeError."""
    patience = None if seconds is None else timedelta(seconds=seconds)
    return dist.new_group(backend="gloo", timeout=patience) if dist.is_initialized() else None


def sum_over_workers(tensors: Iterable[Tensor]) -> None:
    """Adds each tensor up over all workers, in place; buckets bound the extra memory."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS or bucket[0].dtype != tensor.dtype):
            _sum_bucket(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1) for t in bucket])
    dist.all_reduce(flat)
    for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(total.view_as(tensor))


def start_alike(policy: "Policy") -> None:
    """Gives every worker rank 0's trainable weights; sharded ones are from the model's files, and the same already."""
    if dist.is_initialized():
        for parameter in policy.trainable.values():
            if not is_sharded(parameter):
                dist.broadcast(parameter.data, src=0)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each worker holds only some of a tensor's rows."""
    return isinstance(tensor, DTensor)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients of all parameters, summed over workers, down to a norm; returns the norm [] that they had. Every
    worker calls it."""
    whole = [p for p in parameters if not is_sharded(p)]
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        return nn.utils.clip_grad_norm_(whole, max_norm)
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in (whole, sharded) if group]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))
    for group in (whole, sharded):
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
