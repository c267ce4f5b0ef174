"""The optimizer of a run and the learning rate of each of its steps."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rayalign.config.sections import OptimizerConfig
from rayalign.models.parts import PART_NAMES, Part
from rayalign.policy.policy import Policy
from rayalign.training.distributed import is_sharded

PEAK = "peak_lr"
"""The entry of an optimizer's groups that says how high their learning rate rises."""


def make_optimizer(policy: Policy, config: OptimizerConfig) -> Optimizer:
    """AdamW over the trainable weights; no decay on biases and norms (fewer than two dimensions).

    Raises ValueError where there are none, or none of a part that has a learning rate of its own.
    """
    parameters = policy.trainable
    if not parameters:
        raise ValueError(
            "There is nothing to train: the adapter that training starts from is on frozen parts of the model only. Turn "
            "--freeze_vit, --freeze_aligner or --freeze_llm off."
        )
    peaks = _peaks(policy, parameters, config)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        # torch's kernels for many tensors at a time take no sharded ones among others.
        groups.setdefault((peaks[name], decay, is_sharded(parameter)), []).append(parameter)
    return _adamw(
        [{"params": group, "lr": peak, PEAK: peak, "weight_decay": decay} for (peak, decay, _), group in groups.items()],
        config,
        fused=policy.device.type == "cuda",
    )


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig, *, fused: bool) -> Optimizer:
    betas, epsilon = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    if config.optim == "adamw_8bit":
        from rayalign.training.adamw_8bit import AdamW8bit  # which needs bitsandbytes, an extra

        return AdamW8bit(groups, betas=betas, eps=epsilon)
    return torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=fused)


def _peaks(policy: Policy, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> dict[str, float]:
    """The highest learning rate of each trainable weight, by name."""
    rates: dict[Part, float | None] = {"vit": config.vit_lr, "aligner": config.aligner_lr}
    own = {part: rate for part, rate in rates.items() if rate is not None}
    if not own:
        return dict.fromkeys(parameters, config.learning_rate)
    part_of = policy.parts_of(parameters)
    for part, rate in own.items():
        if part not in part_of.values():
            raise ValueError(
                f"--{part}_lr {rate:g}: no weight of the model's {PART_NAMES[part]} is trained. Leave the rate out."
            )
    return {name: own.get(part, config.learning_rate) for name, part in part_of.items()}


def learning_rate(config: OptimizerConfig, step: int, num_steps: int, *, peak: float | None = None) -> float:
    """The rate of a step (0-based): a linear rise over `warmup_ratio` of the steps to `peak`, or the run's, then the decay to
    0."""
    peak = config.learning_rate if peak is None else peak
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match config.lr_scheduler_type:
        case "linear":
            factor = 1 - progress
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            factor = 1.0
    return peak * factor
