"""Counts what tensors cost while code runs: bytes of live storages, their peak, and floating-point operations.

It measures real steps, and steps of models that are nowhere in memory, whose tensors are fake; the two can be compared.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from rayalign.policy.compat import storage_key

aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Within it, `live` and `peak` are the bytes of the storages made since, and `flops` the operations of matrix products,
    convolutions and attention. Tensors that were `there_before` don't count, nor does what kernels take for themselves inside a
    call.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_python_dispatch.py (`TorchDispatchMode`, of a private module),
    2.13.0.
    """

    def __init__(self, there_before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.live = self.peak = self.flops = 0
        self._storages = {storage_key(tensor): 0 for tensor in there_before}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = FLOPS.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self._add(value)
        self.peak = max(self.peak, self.live)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key not in self._storages:
            self._storages[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._storages.pop(key, 0)


def _product_flops(left: Sequence[int], right: Sequence[int]) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention_flops(query: Sequence[int], key: Sequence[int]) -> int:
    """Every query with every key, [B, heads, S, head_dim] each: a dense mask saves nothing."""
    return 4 * math.prod(query) * key[2]


def _attention_backward_flops(query: Sequence[int], key: Sequence[int]) -> int:
    """Five products for the forward's two: fused kernels compute the weights again."""
    return 10 * math.prod(query) * key[2]


MORE_FLOPS: dict[Any, Callable[..., int]] = {
    # Their forms on a GPU that name the result's type end torch's own counts.
    aten.mm: lambda left, right, *_, **__: _product_flops(left, right),
    aten.addmm: lambda added, left, right, *_, **__: _product_flops(left, right),
    aten.addmm_: lambda added, left, right, **_: _product_flops(left, right),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: _attention_flops(q, k),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda out, q, k, *_, **__: _attention_backward_flops(q, k),
    # torch 2.11's own counts refuse fewer heads of keys than of queries.
    **dict.fromkeys(
        (
            aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_cudnn_attention,
        ),
        lambda q, k, *_, **__: _attention_flops(q, k),
    ),
    **dict.fromkeys(
        (
            aten._scaled_dot_product_flash_attention_backward,
            aten._scaled_dot_product_efficient_attention_backward,
            aten._scaled_dot_product_cudnn_attention_backward,
        ),
        lambda out, q, k, *_, **__: _attention_backward_flops(q, k),
    ),
}
"""What torch's own table lacks: operations of these kernels, from their arguments' shapes. The table and `shape_wrapper` are
not documented: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/flop_counter.py, 2.13.0."""

FLOPS: dict[Any, Callable[..., int]] = {**flop_registry, **{op: shape_wrapper(count) for op, count in MORE_FLOPS.items()}}


def tensors_of(model: nn.Module) -> list[Tensor]:
    """A model's parameters, their gradients, and buffers."""
    parameters = list(model.parameters())
    return [*parameters, *(p.grad for p in parameters if p.grad is not None), *model.buffers()]
