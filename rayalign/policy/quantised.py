"""bitsandbytes' linear layers of 4 bits, as far as training reaches into them.

https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/nn/modules.py (`Linear4bit`), 0.50.2.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def linears_of_4_bits(model: nn.Module) -> list[Any]:
    """The layers whose weights are 4 bits each."""
    # By the name of the class: an import of bitsandbytes takes a second, and it is not always there.
    return [module for module in model.modules() if type(module._parameters.get("weight")).__name__ == "Params4bit"]


def keep_as_they_are(model: nn.Module) -> None:
    """Keeps the layers from laying out their weights anew, for this CPU, in the first forward without gradients: such weights
    have no backward, and can't be sharded. Can go when bitsandbytes asks before it does so."""
    for linear in linears_of_4_bits(model):
        linear.support_avx512bf16_for_cpu = False


def lay_bare(model: nn.Module, device: torch.device, *, scattered: bool = False) -> None:
    """Puts plain tensors of bytes [n, 1], which can be cut into rows, in the place of the layers' own kind of weights. Scales,
    which are a 32nd to an 8th of these bytes, stay in the layers, whole and on the device: there their forward finds them.

    `scattered`: only rank 0 has them, and gives all workers the scales; the others' weights are those of `shape_as_quantised`.
    """
    for linear in linears_of_4_bits(model):
        linear.quant_state = _scales_of_first(linear.weight) if scattered else linear.weight.quant_state
        linear.quant_state.to(device)
        linear.weight = nn.Parameter(linear.weight.data.as_subclass(Tensor), requires_grad=False)


def _scales_of_first(weight: Any) -> Any:
    """The scales that rank 0 has of a weight. Every worker calls it."""
    from bitsandbytes.functional import QuantState

    is_first = dist.get_rank() == 0
    scales: list[Any] = [weight.quant_state.as_dict() if is_first else None]
    dist.broadcast_object_list(scales, src=0)
    return weight.quant_state if is_first else QuantState.from_dict(scales[0], torch.device("cpu"))


def shape_as_quantised(model: nn.Module) -> None:
    """Gives layers whose weights are on the meta device the bytes and scales, without numbers, that quantised ones have: peft's
    DoRA asks for them. (The library's own quantisation would keep a tensor without numbers for the next call.)"""
    from bitsandbytes.functional import QuantState

    make_state: Any = QuantState  # which is not typed
    for weight in (linear.weight for linear in linears_of_4_bits(model)):
        absmax = torch.empty(-(-weight.numel() // weight.blocksize), device="meta")
        weight.quant_state = make_state(
            absmax,
            shape=weight.shape,
            code=torch.empty(2**4, device="meta"),
            blocksize=weight.blocksize,
            quant_type=weight.quant_type,
            dtype=weight.dtype,
        )
        weight.data = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        weight.bnb_quantized = True
