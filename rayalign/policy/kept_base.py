"""A base model that a process loads once for several policies, one after another, as the trials of a sweep are.

`loading` asks for it; what it makes of the model (adapters, modes, hooks) is in modules that each policy has of its own.
"""

import copy
from collections.abc import Callable, Hashable
from typing import Any

from torch import nn


class KeptBase:
    """The base model that was loaded last, with its weights as its files have them."""

    def __init__(self) -> None:
        self._base: Any = None
        self._loaded: tuple[Hashable, list[int]] | None = None

    def get(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """New modules over the weights of the model that `key` names. It is loaded where another one was before, and where
        somebody has written into its weights since. Take copies of weights that are to be trained."""
        if self._loaded != (key, self._versions()):
            self._base = None  # its room is needed
            self._base = load()
            self._loaded = (key, self._versions())
        return over_same_weights(self._base)

    def _versions(self) -> list[int]:
        """How often each weight was written into, by any of the policies, which share torch's count with their weights."""
        return [] if self._base is None else [parameter._version for parameter in self._base.parameters()]


def over_same_weights(base: Any) -> Any:
    """A copy of a model whose parameters are new ones over the same memory; all else is copied."""
    shared = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in base.parameters()}
    return copy.deepcopy(base, shared)
