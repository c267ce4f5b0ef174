"""The shelf of algorithms: one file each, holding its hyper-parameters and one step."""

from rayalign.algorithms.algorithm import Algorithm, PolicyForward, StepOutput
from rayalign.algorithms.dpo import DPO
from rayalign.algorithms.sft import SFT

ALGORITHMS: dict[str, type[Algorithm]] = {algorithm.name: algorithm for algorithm in (SFT, DPO)}

__all__ = ["ALGORITHMS", "DPO", "SFT", "Algorithm", "PolicyForward", "StepOutput"]
