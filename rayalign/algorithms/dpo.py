"""Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) and its family: the losses of
`dpo_losses`, one or a weighted list of them, and the NLL term of RPO."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rayalign.algorithms import dpo_losses
from rayalign.algorithms.algorithm import LossOutput, Needs, PolicyForward, StepStatistics
from rayalign.algorithms.dpo_losses import PAIR_LOSSES, SFT_LOSS, Divergence, LossSettings, PairScores, RankPartners
from rayalign.algorithms.terms import logp_metrics, negative_log_likelihood, nll_metric, reward_metrics
from rayalign.config.flags import check_bounds, flag
from rayalign.ops.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rayalign.data.batch import PairBatch
    from rayalign.data.sampler import StepCounts
    from rayalign.ops.logprobs import PairLogps

ALPHA, TAU = 0.5, 0.05

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
]


@dataclass(frozen=True)
class DPO:
    """DPO"""

    name: ClassVar[str] = "dpo"

    beta: float = flag(0.1, "Strength of the pull to the reference: higher keeps closer to it.", above=0)
    loss_type: tuple[LossType, ...] = flag(
        ("sigmoid",), "The loss, or several that are added up (MPO: sigmoid bco_pair sft, with weights 0.8 0.2 1)."
    )
    loss_weights: tuple[float, ...] = flag((), "A weight for each --loss_type; without them each counts 1.", at_least=0)
    label_smoothing: float = flag(
        0.0, "Probability that a preference label is wrong; sigmoid, exo_pair, robust and aot use it.", at_least=0, at_most=0.5
    )
    rpo_alpha: float = flag(
        1.0, "Weight of the chosen responses' token-mean negative log-likelihood (RPO); 0 turns it off.", at_least=0
    )
    f_divergence_type: Divergence = flag("reverse_kl", "Divergence that the policy is held to the reference by.")
    f_alpha_divergence_coef: float = flag(ALPHA, "Order of alpha_divergence; 1 is reverse_kl.", above=0)
    discopop_tau: float = flag(TAU, "Temperature of discopop's blend.", above=0)
    ld_alpha: float | None = flag(
        None,
        "Weight of the tokens that the longer response has beyond the shorter one's length (LD-DPO); none: all count alike.",
        at_least=0,
        at_most=1,
    )
    reference_free: bool = flag(
        False,
        "Compare with a uniform reference, which costs nothing, instead of the start model; for losses of the difference "
        "between chosen and rejected, with reverse_kl or js_divergence.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        _check_losses(self)

    @property
    def needs(self) -> Needs:
        return Needs(reference=not self.reference_free, statistics=not dpo_losses.RANKED.isdisjoint(self.loss_type))

    def statistics(self, policy: PolicyForward, batch: PairBatch) -> Tensor:
        """[B, 4]: log-probs of chosen and rejected, by the policy and by the reference."""
        images = policy.image_features(batch)
        logps = dpo_losses.discounted(policy.logps(batch, images), self.ld_alpha)
        return torch.stack([*logps, *self._reference(policy, batch, images, like=logps)], dim=1)

    def loss(
        self, policy: PolicyForward, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None = None
    ) -> LossOutput:
        images = policy.image_features(batch)
        logps = policy.logps(batch, images)
        policy_logps = dpo_losses.discounted(logps, self.ld_alpha)
        if statistics is None:
            reference, partners = self._reference(policy, batch, images, like=policy_logps), None
        else:
            reference = statistics.of(batch)[:, 2:].unbind(1)
            partners = dpo_losses.rank_partners(statistics, batch)
        scores = self.scores(logps, reference, partners)
        nll = negative_log_likelihood(logps.chosen)
        settings = LossSettings(self.beta, self.label_smoothing, self.discopop_tau)
        loss = self.rpo_alpha * nll / counts.chosen_tokens
        for name, weight in zip(self.loss_type, self.loss_weights or (1.0,) * len(self.loss_type), strict=True):
            if name == SFT_LOSS:
                loss = loss + weight * nll / counts.chosen_tokens
            else:
                loss = loss + weight * PAIR_LOSSES[name](scores, settings).sum() / counts.pairs
        return LossOutput(
            loss=loss,
            pair_metrics=reward_metrics(self.beta * scores.chosen_logratios, self.beta * scores.rejected_logratios)
            | logp_metrics(*policy_logps),
            mean_metrics=nll_metric(logps.chosen),
        )

    def scores(self, logps: PairLogps, reference: tuple[Tensor, ...], partners: RankPartners | None = None) -> PairScores:
        """What the losses see, from the policy's log-probs and the reference's discounted ones."""
        policy_chosen_logps, policy_rejected_logps = dpo_losses.discounted(logps, self.ld_alpha)
        reference_chosen_logps, reference_rejected_logps = reference
        chosen_logratios = policy_chosen_logps - reference_chosen_logps
        rejected_logratios = policy_rejected_logps - reference_rejected_logps
        see = functools.partial(
            dpo_losses.divergence_score, divergence=self.f_divergence_type, alpha=self.f_alpha_divergence_coef
        )
        return PairScores(
            chosen_logratios=chosen_logratios,
            rejected_logratios=rejected_logratios,
            chosen_score=see(chosen_logratios),
            rejected_score=see(rejected_logratios),
            chosen_tokens=logps.chosen.tokens,
            rejected_tokens=logps.rejected.tokens,
            gap=policy_chosen_logps - policy_rejected_logps,
            partners=partners,
        )

    def _reference(
        self, policy: PolicyForward, batch: PairBatch, images: tuple[Tensor, ...], *, like: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if self.reference_free:
            return tuple(torch.zeros_like(side) for side in like)
        return dpo_losses.discounted(policy.reference_logps(batch, images), self.ld_alpha)


def _check_losses(dpo: DPO) -> None:
    """Raises ValueError for losses, weights and settings that don't go together."""
    names, given = set(dpo.loss_type), " ".join(dpo.loss_type)
    if not names:
        raise ValueError("--loss_type names no loss: give one of them, such as sigmoid.")
    if len(names) < len(dpo.loss_type):
        raise ValueError(f"--loss_type {given}: each loss can be named once; give it a larger weight instead.")
    if dpo.loss_weights and len(dpo.loss_weights) != len(dpo.loss_type):
        weights = " ".join(f"{weight:g}" for weight in dpo.loss_weights)
        raise ValueError(f"--loss_weights {weights} with --loss_type {given}: there must be as many weights as losses.")
    if SFT_LOSS in names and dpo.rpo_alpha:
        raise ValueError(
            f"--loss_type {given} with --rpo_alpha {dpo.rpo_alpha:g}: sft and --rpo_alpha both add the chosen responses' "
            "likelihood. Pass --rpo_alpha 0, or leave sft out."
        )
    if dpo.label_smoothing and names.isdisjoint(dpo_losses.SMOOTHED):
        raise ValueError(
            f"--label_smoothing {dpo.label_smoothing:g} with --loss_type {given}: smoothing is for "
            f"{', '.join(sorted(dpo_losses.SMOOTHED))}. Leave it out, or take one of these."
        )
    if "exo_pair" in names and dpo.label_smoothing == 0:
        raise ValueError("--loss_type exo_pair needs a --label_smoothing above 0, such as 0.001: it divides by it.")
    if "robust" in names and dpo.label_smoothing == 0.5:
        raise ValueError("--loss_type robust needs a --label_smoothing below 0.5: labels as good as a coin's teach nothing.")
    if dpo.discopop_tau != TAU and "discopop" not in names:
        raise ValueError(f"--discopop_tau {dpo.discopop_tau:g} with --loss_type {given}: it belongs to the loss discopop.")
    if dpo.f_alpha_divergence_coef != ALPHA and dpo.f_divergence_type != "alpha_divergence":
        raise ValueError(
            f"--f_alpha_divergence_coef {dpo.f_alpha_divergence_coef:g} with --f_divergence_type {dpo.f_divergence_type}: it "
            "belongs to alpha_divergence."
        )
    odd = sorted(names - dpo_losses.BY_DIVERGENCE)
    if dpo.f_divergence_type != "reverse_kl" and odd:
        raise ValueError(
            f"--f_divergence_type {dpo.f_divergence_type} with --loss_type {' '.join(odd)}: this loss is derived for "
            f"reverse_kl. Other divergences go with {', '.join(sorted(dpo_losses.BY_DIVERGENCE))}."
        )
    if dpo.reference_free:
        _check_reference_free(dpo)


def _check_reference_free(dpo: DPO) -> None:
    """Raises ValueError for what needs the log-ratios to a real reference, which begin at 0."""
    held = sorted(set(dpo.loss_type) - dpo_losses.REFERENCE_FREE)
    if held:
        raise ValueError(
            f"--reference_free true with --loss_type {' '.join(held)}: it holds each response's log-ratio against 0, where "
            "only a real reference puts it, and would train nothing or the wrong way. Leave --reference_free out, or take "
            f"one of {', '.join(sorted(dpo_losses.REFERENCE_FREE))}."
        )
    if dpo.f_divergence_type not in dpo_losses.REFERENCE_FREE_DIVERGENCES:
        raise ValueError(
            f"--reference_free true with --f_divergence_type {dpo.f_divergence_type}: it grows exponentially with the "
            "log-ratio, which is near 0 only beside a real reference, and is cut off: nothing would be trained. Leave "
            f"--reference_free out, or take {' or '.join(dpo_losses.REFERENCE_FREE_DIVERGENCES)}."
        )
