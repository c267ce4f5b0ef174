"""rayalign aligns vision-language models with human preferences on a Ray cluster."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayalign.api import Plan, export, load_policy, plan, train
    from rayalign.policy.scoring import LoadedPolicy
    from rayalign.training.driver import Result

__version__ = "0.1.0"

__all__ = ["LoadedPolicy", "Plan", "Result", "__version__", "export", "load_policy", "plan", "train"]

# Loaded when they are first used: `import rayalign` costs nothing.
_MODULES = {
    **dict.fromkeys(("Plan", "export", "load_policy", "plan", "train"), "rayalign.api"),
    "LoadedPolicy": "rayalign.policy.scoring",
    "Result": "rayalign.training.driver",
}

if not TYPE_CHECKING:  # a type checker would take every name for one that there is

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'rayalign' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
