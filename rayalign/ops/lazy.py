"""Torch, loaded when it is first computed with: an algorithm's flags stand beside its formulas, and are read for `--help` and
for a mistyped flag, which need no tensors."""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["F", "torch"]

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
else:

    class _Lazy:
        """A module under its name, which is imported when something of it is asked for."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    torch = _Lazy("torch")
    F = _Lazy("torch.nn.functional")
