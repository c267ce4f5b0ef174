"""What an evaluation is of: a model or two, and what each one's implicit rewards and drift are compared with; or the scorers of
--scorer."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from rayalign.config.config import Config
from rayalign.config.evaluate import EvaluateConfig
from rayalign.config.sections import ModelConfig
from rayalign.evaluation.loaded_model import start_of_run
from rayalign.evaluation.score import scorers_of
from rayalign.evaluation.scorers.scorer import Scorer
from rayalign.evaluation.start import is_reward_model_here, model_of
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import ModelSource, require_model
from rayalign.sources.whole_paths import whole_model

NO_REFERENCE, START_OF_RUN = "none", "auto"


@dataclass(frozen=True)
class Contender:
    """What is evaluated: what it is called among the results, and the model that `config` loads, with its reference; or
    scorers, which may load models of their own."""

    role: str
    name: str
    config: Config
    source: ModelSource | None
    reference: ModelConfig | None = None
    reference_source: ModelSource | None = None
    scorers: tuple[Scorer, ...] = ()


def contenders_of(config: Config, evaluation: EvaluateConfig) -> list[Contender]:
    """The model of the flags, and the second one where --compare names it; or the scorers of --scorer. Raises ValueError for
    models and references that are not there, and for flags that ask for a reference where none can be."""
    if evaluation.scorer:
        return [_of_scorers(config, evaluation)]
    contenders = [_contender("model", config, evaluation)]
    if evaluation.compare:
        second = dataclasses.replace(config.model, model=whole_model(evaluation.compare), model_type=None, adapter=None)
        contenders.append(_contender("compare", dataclasses.replace(config, model=second), evaluation))
    _require_reference(contenders, config, evaluation)
    return contenders


def _of_scorers(config: Config, evaluation: EvaluateConfig) -> Contender:
    try:
        scorers = scorers_of(evaluation.score_config(), config.model)
    except ValueError as error:
        raise ValueError(str(error).replace("--reference", "--ref_model")) from None
    source = next((scorer.source for scorer in scorers if scorer.source), None)
    return Contender("scorer", " ".join(evaluation.scorer), config, source, scorers=scorers)


def _contender(role: str, config: Config, evaluation: EvaluateConfig) -> Contender:
    try:
        source = model_of(config)
    except ValueError as error:
        raise ValueError(str(error).replace("--model ", "--compare ", 1) if role == "compare" else str(error)) from None
    reference = None if is_reward_model_here(source) else reference_of(source, config.model, evaluation.ref_model)
    reference_source = None
    if reference is not None:
        try:
            reference_source = require_model(reference, REGISTERED_MODELS)
        except ValueError as error:
            if evaluation.ref_model == START_OF_RUN:
                raise ValueError(
                    f"The reference, from which the model's run started: {error} --ref_model names another."
                ) from None
            said = str(error).replace("--model ", "--ref_model ", 1)
            raise ValueError(f"{said} It names the reference; none: no reference.") from None
        if reference_source == source:
            reference = reference_source = None  # all its rewards would be 0
    return Contender(role, source.adapter or source.base, config, source, reference, reference_source)


def _require_reference(contenders: Sequence[Contender], config: Config, evaluation: EvaluateConfig) -> None:
    """Raises ValueError where flags ask for what only a reference gives, and no model has one that differs from it."""
    sources = [contender.source for contender in contenders if contender.source]
    is_named = evaluation.ref_model not in (START_OF_RUN, NO_REFERENCE)
    asked = {
        f"--ref_model {evaluation.ref_model}": is_named,
        "--sample_kl true": evaluation.sample_kl,
        f"--beta {evaluation.beta}": evaluation.beta is not None,
    }
    if any(asked.values()) and all(map(is_reward_model_here, sources)):
        raise ValueError(
            f"{next(flag for flag, is_given in asked.items() if is_given)}: {contenders[0].name} is a reward model, whose "
            "scores need no reference. Leave the flag out."
        )
    has_one = any(contender.reference is not None for contender in contenders)
    if is_named and not has_one:
        raise ValueError(f"--ref_model {evaluation.ref_model}: is the model that is evaluated. Give another one, or none.")
    if evaluation.sample_kl and not (has_one and config.data.dataset):
        missing = "a reference: pass --ref_model" if config.data.dataset else "prompts: pass --dataset"
        raise ValueError(f"--sample_kl true: there is no divergence without {missing}, or leave the flag out.")
    if evaluation.beta is not None and not has_one:
        raise ValueError(
            f"--beta {evaluation.beta:g}: there is no implicit reward without a reference: pass --ref_model, or leave it out."
        )


def reference_of(source: ModelSource, model: ModelConfig, named: str) -> ModelConfig | None:
    """What --ref_model means for a model."""
    if named == NO_REFERENCE:
        return None
    if named == START_OF_RUN:
        return start_of_run(source, model)
    return dataclasses.replace(model, model=whole_model(named), model_type=None, adapter=None)
