"""The forward and backward of a frozen linear layer with a LoRA adapter on it, in as few passes over memory as there can be.

`policy/adapters` has peft use it in the place of its own layer, whose scaling, addition and casts each read and write the whole
output again. It computes in the type of the layer's input, as autocast does; the adapter's weights stay in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn


class FusedLoraLinear(lora.Linear):
    """peft's LoRA linear, except for the arithmetic: y = W x + b + s B A x (Hu et al. 2021, https://arxiv.org/abs/2106.09685,
    section 4.1). Adapters add up. What the formula leaves out (dropout, DoRA, autocast, a W that needs_grad) peft computes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., out] of [..., in]."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        base: Any = self.get_base_layer()
        plain = not (args or kwargs or self.merged or self.disable_adapters) and all(map(self._is_plain, names))
        if not plain or base.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        factors = [layer[name].weight.to(x.dtype) for name in names for layer in (self.lora_A, self.lora_B)]
        scales = [self.scaling[name] for name in names]
        output: Tensor = _Product.apply(x, base.weight, base.bias, scales, *factors)  # type: ignore[no-untyped-call]  # apply is untyped
        return output

    def _is_plain(self, name: str) -> bool:
        dropout: Any = self.lora_dropout[name]
        drops = self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
        return not drops and name not in self.lora_variant and self.lora_B[name].bias is None


def fused_or_none(target: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> FusedLoraLinear | None:
    """The fused layer for a plain linear, as peft makes its own; None for all else (quantised weights), which stays peft's."""
    if type(target) is not nn.Linear or type(target.weight) is not nn.Parameter:
        return None
    return FusedLoraLinear(target, adapter_name, config, **options)


class _Product(torch.autograd.Function):
    """y of x by W, b and the scale, A and B of each adapter. W and b are frozen: they have no gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Sequence[float], *factors: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        output = nn.functional.linear(rows, weight, bias)
        x_a = []
        for scale, a, b in zip(scales, factors[::2], factors[1::2], strict=True):
            x_a.append(rows @ a.t())
            output.addmm_(x_a[-1], b.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, *x_a, *factors)
        ctx.scales, ctx.shape = scales, x.shape
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *saved = ctx.saved_tensors
        x_a, factors = saved[: len(ctx.scales)], saved[len(ctx.scales) :]
        grad_output = outputs[0].flatten(0, -2)
        grad_x = grad_output @ weight if ctx.needs_input_grad[0] else None
        grad_factors: list[Tensor | None] = []
        needs_grad = ctx.needs_input_grad[4:]
        for i, (scale, own_x_a) in enumerate(zip(ctx.scales, x_a, strict=True)):
            a, b = factors[2 * i : 2 * i + 2]
            grad_x_a = (grad_output @ b).mul_(scale)
            if grad_x is not None:
                grad_x.addmm_(grad_x_a, a)
            grad_factors.append(grad_x_a.t() @ rows if needs_grad[2 * i] else None)
            grad_factors.append((grad_output.t() @ own_x_a).mul_(scale) if needs_grad[2 * i + 1] else None)
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, *grad_factors
