"""rayalign aligns vision-language models with human preferences on a Ray cluster."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayalign.api import Plan, evaluate, export, generate, iterate, load_policy, plan, score, train
    from rayalign.evaluation.evaluate import Evaluation
    from rayalign.evaluation.pool import PoolResult
    from rayalign.policy.scoring import LoadedPolicy
    from rayalign.rounds.results import Round
    from rayalign.training.driver import Result

__version__ = "0.1.0"

__all__ = [
    "Evaluation",
    "LoadedPolicy",
    "Plan",
    "PoolResult",
    "Result",
    "Round",
    "__version__",
    "evaluate",
    "export",
    "generate",
    "iterate",
    "load_policy",
    "plan",
    "score",
    "train",
]

# Loaded when they are first used: `import rayalign` costs nothing.
_MODULES = {
    **dict.fromkeys(
        ("Plan", "evaluate", "export", "generate", "iterate", "load_policy", "plan", "score", "train"), "rayalign.api"
    ),
    "Evaluation": "rayalign.evaluation.evaluate",
    "PoolResult": "rayalign.evaluation.pool",
    "Round": "rayalign.rounds.results",
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
