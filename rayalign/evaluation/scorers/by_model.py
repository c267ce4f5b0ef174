"""Scores by a model of ours: a reward model's value head, the implicit reward of a policy, the likelihood of a response.

A reward model is a run's of rm, or another tool's with the same file beside its adapter or weights: value_head.safetensors or
value_head.bin with v_head.summary.weight and .bias, as LLaMA-Factory and ms-swift up to 3.0 write it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rayalign.config.config import Config
from rayalign.config.sections import ModelConfig
from rayalign.data.batch import PairBatch
from rayalign.data.pairs import EncodedPair, rows_of_two
from rayalign.data.rows import Sources
from rayalign.evaluation.loaded_model import LoadedModel, flags_around, load_model, load_with_reference, start_of_run
from rayalign.evaluation.scorers.scorer import Candidate, Score, Scored, ScoreFunction
from rayalign.evaluation.start import files_of_model
from rayalign.formats.records import RecordError
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import ModelSource, require_model
from rayalign.ops.value_head import find_value_head
from rayalign.sources.whole_paths import whole_model

Kind = Literal["reward_model", "implicit_reward", "likelihood", "per_token"]
KINDS: tuple[Kind, ...] = ("reward_model", "implicit_reward", "likelihood", "per_token")

DEFAULT_BETA = 0.1


@dataclass(frozen=True)
class ModelScorer:
    """`reference` and `beta` are of implicit rewards: beta (log p - log p of the reference), summed over the response's tokens,
    of likelihoods the sum or the mean per token of log p."""

    kind: Kind
    model: ModelConfig
    source: ModelSource
    reference: ModelConfig | None = None
    beta: float = DEFAULT_BETA

    @property
    def settings(self) -> Mapping[str, Any]:
        reference = None
        if self.reference is not None:
            reference = [files_of_model(require_model(self.reference, REGISTERED_MODELS)), self.beta]
        return {"kind": self.kind, "model": files_of_model(self.source), "reference": reference}

    def load(self, config: Config, sources: Sources) -> ScoreFunction:
        config = dataclasses.replace(config, model=self.model)
        if self.reference is not None:
            model = load_with_reference(config, sources, self.reference, responses="chosen")
        else:
            model = load_model(config, sources, responses="chosen")
        _require_kind(self.kind, self.source, is_reward_model=model.is_reward_model)
        return functools.partial(self._score, model, config.optimizer.batch_size)

    def _score(self, model: LoadedModel, batch_size: int, candidates: Sequence[Candidate]) -> list[Scored]:
        scores: dict[int, Scored] = {}
        pairs: dict[int, EncodedPair] = {}
        for i, candidate in enumerate(candidates):
            try:
                pairs[i] = model.encode(candidate.record, candidate.folder)
            except RecordError as error:
                scores[i] = error
        rows = sorted(rows_of_two(pairs), key=lambda row: row[0].num_tokens)
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            sides = self._values(model, model.batch([row for row, _ in some]))
            values = torch.stack(sides, dim=1).double().cpu().tolist()
            for (_, numbers), both in zip(some, values, strict=True):
                scores |= {i: Score(value) for i, value in zip(numbers, both, strict=False)}
        return [scores[i] for i in range(len(candidates))]

    def _values(self, model: LoadedModel, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Of both responses of each row, [B] each."""
        match self.kind:
            case "reward_model":
                return model.values(batch)
            case "likelihood":
                logps = model.logps(batch)
                return logps.chosen.total, logps.rejected.total
            case "per_token":
                logps = model.logps(batch)
                return logps.chosen.average, logps.rejected.average
            case "implicit_reward":
                logps, start = model.logps(batch), model.reference_logps(batch)
                chosen = logps.chosen.total.cpu() - start.chosen.total.cpu()
                return self.beta * chosen, self.beta * (logps.rejected.total.cpu() - start.rejected.total.cpu())


def _require_kind(kind: Kind, source: ModelSource, *, is_reward_model: bool) -> None:
    if is_reward_model != (kind == "reward_model"):
        has = "has a value head, and so no likelihoods" if is_reward_model else "has no value head"
        raise ValueError(f"--scorer {kind}: the model {source.adapter or source.base} {has}.")


def model_scorer(kind: Kind, model: ModelConfig, *, beta: float | None, reference: str | None) -> ModelScorer:
    """The scorer of some kind by a model. `beta` and `reference` of implicit rewards are by default those of the run that made
    the policy. Raises ValueError for a model that is not there or is of another kind, and where there is no telling its
    reference, or it is the policy itself."""
    source = require_model(model, REGISTERED_MODELS)
    place = Path(source.adapter or source.base)
    if place.is_dir():  # of others the actors find out
        _require_kind(kind, source, is_reward_model=find_value_head(place) is not None)
    if kind != "implicit_reward":
        return ModelScorer(kind, model, source)
    start = start_of_run(source, model)
    if reference is not None:
        start = dataclasses.replace(model, model=whole_model(reference), model_type=None, adapter=None)
        try:
            is_itself = require_model(start, REGISTERED_MODELS) == source
        except ValueError as error:
            raise ValueError(str(error).replace("--model ", "--reference ", 1)) from None
        if is_itself:
            raise ValueError(
                f"--reference {reference}: is the policy itself, whose rewards would all be 0. Give another model."
            )
    if start is None:
        raise ValueError(
            f"--scorer implicit_reward: nothing tells what {source.base} was trained from. Pass --reference with that model."
        )
    if reference is None:
        try:
            require_model(start, REGISTERED_MODELS)
        except ValueError as error:
            raise ValueError(
                f"The reference, from which the policy's run started: {error} --reference names another."
            ) from None
    of_run = flags_around(source).get("beta")
    return ModelScorer(kind, model, source, start, beta if beta is not None else float(of_run or DEFAULT_BETA))
