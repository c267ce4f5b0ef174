"""bitsandbytes' linear layers of 4 bits, as far as training reaches into them.

https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/nn/modules.py (`Linear4bit`), 0.50.2.
"""

from typing import Any

import torch
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


def lay_bare(model: nn.Module, device: torch.device) -> None:
    """Puts plain tensors of bytes [n, 1], which can be cut into rows, in the place of the layers' own kind of weights. Scales,
    which are a 32nd to an 8th of these bytes, stay in the layers, whole and on the device: there their forward finds them."""
    for linear in linears_of_4_bits(model):
        linear.quant_state = linear.weight.quant_state
        linear.quant_state.to(device)
        linear.weight = nn.Parameter(linear.weight.data.as_subclass(Tensor), requires_grad=False)
