"""Which algorithms there are: one file each, with its flags, its formula and its loss."""

from rayalign.algorithms.algorithm import Algorithm, AlgorithmWithStatistics, LossOutput, Needs, PolicyForward, StepStatistics
from rayalign.algorithms.cpo import CPO
from rayalign.algorithms.dpo import DPO
from rayalign.algorithms.kto import KTO
from rayalign.algorithms.mdpo import MDPO
from rayalign.algorithms.orpo import ORPO
from rayalign.algorithms.rm import RM
from rayalign.algorithms.sft import SFT
from rayalign.algorithms.simpo import SimPO

ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm for algorithm in (SFT, DPO, MDPO, RM, CPO, ORPO, SimPO, KTO)
}

__all__ = [
    "ALGORITHMS",
    "CPO",
    "DPO",
    "KTO",
    "MDPO",
    "ORPO",
    "RM",
    "SFT",
    "Algorithm",
    "AlgorithmWithStatistics",
    "LossOutput",
    "Needs",
    "PolicyForward",
    "SimPO",
    "StepStatistics",
]
