"""Operations per pair: of an optimizer step as it is, and with each of its savings left out.

Two operations for each weight and token of a matrix product; attention for every query and key that are handed to its kernel,
whatever their mask; norms, activations and rotations are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.dry_run import DryRun, DryRuns
from rayalign.estimate.passes import Pass, passes_of
from rayalign.estimate.shapes import DataShapes, Numbers
from rayalign.policy.adapters import trainable_parts

PROBES = (64, 128)
"""Row lengths whose dry runs tell the polynomial; the counts are exact, so any two do."""


@dataclass(frozen=True)
class Polynomial:
    """Operations of a row of t tokens and s pairs of query and key, which are t^2 where attention takes the row as one."""

    per_token: float
    per_square: float

    def __call__(self, tokens: Numbers, squares: Numbers) -> Numbers:
        return self.per_token * tokens + self.per_square * squares

    @classmethod
    def of(cls, dry_run: DryRun, item: Pass) -> "Polynomial":
        """Of a pass, by its dry runs. (DoRA's norms, which cost the same for any length, are so counted with the tokens.)"""
        short, long = PROBES
        first, second = (dry_run.flops(item, tokens) / tokens for tokens in PROBES)
        per_square = (second - first) / (long - short)
        return cls(first - per_square * short, per_square)


@dataclass(frozen=True)
class LanguageCosts:
    """The language model's passes over a row, each run dry when it is first asked for: a forward only (`read`), and forward
    and backward without and with gradient checkpointing. `head_read` and `head_train` are the output head's for each position
    that it scores."""

    dry_runs: DryRuns
    head_read: float
    head_train: float

    @cached_property
    def read(self) -> Polynomial:
        return Polynomial.of(self.dry_runs.plain, Pass())

    @cached_property
    def train(self) -> Polynomial:
        return Polynomial.of(self.dry_runs.plain, Pass(trains=True))

    @cached_property
    def train_recomputing(self) -> Polynomial:
        return Polynomial.of(self.dry_runs.recomputing, Pass(trains=True))


@dataclass(frozen=True)
class PassOptions:
    """What a step computes twice, and what it saves. `checkpointing`: the share of the layers that run again in the backward.
    `images_once`: the vision tower runs once on each distinct image of a pair, not for each response and each policy;
    `shared_prompt`: both responses stand in one row behind one prompt; `responses_only`: the output head sees only the
    positions that predict a response; `reference_known`: the reference's log-probs come with the data."""

    checkpointing: float
    images_once: bool = True
    shared_prompt: bool = True
    responses_only: bool = True
    reference_known: bool = False


@dataclass(frozen=True)
class PairFlops:
    """Operations per pair, means over the data, of the step's parts: `others` are forwards without a backward (reference,
    statistics)."""

    vision: float
    forward: float
    others: float
    head: float
    recomputation: float
    backward: float

    @property
    def total(self) -> float:
        return self.vision + self.forward + self.others + self.head + self.recomputation + self.backward


def language_costs(dry_runs: DryRuns, *, head_size: int, trains_head: bool) -> LanguageCosts:
    """Of a model whose output head has `head_size` weights, 0 where there is a value head instead."""
    # The gradient of the states is formed in the forward; a trainable head computes its logits again in the backward.
    return LanguageCosts(dry_runs, 2.0 * head_size, (8.0 if trains_head else 4.0) * head_size)


def pair_flops(data: DataShapes, costs: LanguageCosts, options: PassOptions) -> PairFlops:
    """Of an optimizer step with some options."""
    blueprint = costs.dry_runs.blueprint
    needs = blueprint.needs
    statistics, step = passes_of(needs, reference_known=options.reference_known)
    forward = others = head = recomputation = backward = 0.0
    for item in (*statistics, *step):
        for tokens, responses, share in _rows(data, item, shared_prompt=options.shared_prompt):
            packed = np.array([blueprint.packs(int(length)) for length in tokens])
            squares = np.where(packed, (tokens - responses) ** 2 + responses * tokens, tokens**2)
            positions = (responses if options.responses_only else tokens) * share
            head += float(np.mean(positions)) * (costs.head_train if item.trains else costs.head_read)
            read = float(np.mean(costs.read(tokens, squares) * share))
            if not item.trains:
                others += read
                continue
            train = float(np.mean(costs.train(tokens, squares) * share))
            forward, backward = forward + read, backward + train - read
            if options.checkpointing:
                again = float(np.mean(costs.train_recomputing(tokens, squares) * share)) - train
                recomputation += options.checkpointing * again
    return PairFlops(_vision(data, blueprint, options), forward, others, head, recomputation, backward)


def _rows(data: DataShapes, item: Pass, *, shared_prompt: bool) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
    """Tokens, response tokens and presence (0 or 1) of the rows that a pair takes in a pass."""
    companion = item.companion
    needed = data.has_images.astype(float) if companion and not companion.shares_images else np.ones(len(data.pairs))
    if companion and not companion.has_rejected:
        yield data.prompt + data.chosen, data.chosen, needed
    elif shared_prompt:
        yield data.rows, data.chosen + data.rejected, needed
    else:
        for responses in (data.chosen, data.rejected):
            yield data.prompt + responses, responses, (responses > 0) * needed


def _vision(data: DataShapes, blueprint: Blueprint, options: PassOptions) -> float:
    """Tower and aligner: their forwards, and backwards where they are trained."""
    needs, tuner = blueprint.needs, blueprint.tuner
    trainable = trainable_parts(tuner)
    own = 2.0 if tuner.sft_type == "full" else 1.0  # gradients of inputs, and of all weights, too, where they are trained
    tower_backward = own if "vit" in trainable else 0.0
    aligner_backward = own if "aligner" in trainable else tower_backward and 1.0
    again = blueprint.trains_vision and needs.reference and not options.reference_known
    runs_twice = needs.statistics and blueprint.trains_vision  # a frozen tower's features are kept for the step
    forwards = 1 + int(runs_twice) + int(needs.brings_images) + int(again) * (1 + int(runs_twice))
    if not options.images_once:
        forwards = (2 if data.rejected.any() else 1) * (1 + int(needs.reference and not options.reference_known))
    tower, aligner = float(data.tower_flops.mean()), float(data.aligner_flops.mean())
    return tower * (forwards + tower_backward) + aligner * (forwards + aligner_backward)
