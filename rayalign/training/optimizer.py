"""The optimizer of a run and the learning rate of each of its steps."""

import math
from typing import Any

import torch

from rayalign.config.sections import OptimizerConfig
from rayalign.policy.policy import Policy
from rayalign.training.distributed import is_sharded


def make_optimizer(policy: Policy, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable weights; no decay on biases and norms (fewer than two dimensions).

    Raises ValueError where there are none.
    """
    parameters = list(policy.trainable.values())
    if not parameters:
        raise ValueError(
            "There is nothing to train: the adapter that training starts from is on frozen parts of the model only. Turn "
            "--freeze_vit, --freeze_aligner or --freeze_llm off."
        )
    # torch's kernels for many tensors at a time take no sharded ones among others.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if (p.ndim >= 2) == decays and is_sharded(p) == sharded], "weight_decay": decay}
        for decays, decay in ((True, config.weight_decay), (False, 0.0))
        for sharded in (False, True)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=policy.device.type == "cuda",
    )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of a step (0-based): a linear rise over `warmup_ratio` of the steps, then the decay to 0."""
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match config.lr_scheduler_type:
        case "linear":
            factor = 1 - progress
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            factor = 1.0
    return config.learning_rate * factor
