"""RMS norms in one kernel on a GPU, in place of the seven that transformers' own arithmetic takes.

`loading` calls it for models that run on a GPU. A norm rounds once there, after its weight, where transformers rounds
before it, too.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

FUSED = "is_fused_norm"
"""The mark of the classes of fused norms."""

EXACT = 1e-5
"""How far the two may be apart in float32, relative to the largest entry, for a norm to be taken for an RMS norm."""


def fuse_norms(base: nn.Module) -> list[nn.Module]:
    """Has all frozen RMS norms of a model computed by torch's fused kernel, and returns them.

    Norms of another formula (1 + w in Gemma, a mean taken off) stay as they are, and so do trained ones, whose weights have
    another type than what they are given.
    """
    found = [module for module in base.modules() if _is_rms_norm(module)]
    _fuse(found)
    return found


def fused_names(base: nn.Module) -> list[str]:
    """The names of the norms that are fused."""
    return [name for name, module in base.named_modules() if FUSED in vars(type(module))]


def fuse_named(base: nn.Module, names: Collection[str]) -> None:
    """Fuses norms that are fused in another process's copy of the model."""
    _fuse([base.get_submodule(name) for name in names])


def _fuse(norms: Iterable[nn.Module]) -> None:
    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    for norm in norms:
        kind = type(norm)
        if kind not in kinds:
            kinds[kind] = _fused(kind)
        norm.__class__ = kinds[kind]


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module computes w x / sqrt(mean(x^2) + epsilon), by what it makes of numbers."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float):
        return False
    if weight.requires_grad or weight.ndim != 1 or len(list(module.parameters())) > 1 or "forward" in vars(module):
        return False
    # Of size 1 and so small that epsilon counts.
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    x[2:] *= epsilon**0.5
    with torch.no_grad():
        ours, theirs = nn.functional.rms_norm(x, weight.shape, weight.float(), epsilon), module(x)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= EXACT * ours.abs().max())


def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            result: Tensor = kind.forward(self, hidden_states)
            return result
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward, FUSED: True})
