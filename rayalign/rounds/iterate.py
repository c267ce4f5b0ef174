"""The verb `iterate`: a policy responds, its responses are scored and paired, it trains on the pairs; and again.

output_dir/round_1/responses  scores  pairs  train      each stage's own folder, which goes on where it was ended
output_dir/round_2/...
output_dir/rounds.json  rounds.html                     what came out of each round
"""

import dataclasses
import itertools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayalign.config.config import Config
from rayalign.config.flags import section_from_mapping
from rayalign.config.inference import InferenceConfig
from rayalign.config.inference_verbs import GenerateConfig, IterateConfig, ScoreConfig
from rayalign.config.sections import ModelConfig
from rayalign.data.prepare import require_held_apart
from rayalign.evaluation import generate, score
from rayalign.evaluation.pool_folder import ROWS, SETTINGS, is_finished, open_output, result_files
from rayalign.evaluation.start import ANYWHERE, datasets_of, files_of_data, files_of_model, picture_root, sources_of
from rayalign.formats.parse import own_formats
from rayalign.formats.records import RecordError
from rayalign.images.fetch import fetch_images
from rayalign.joining import ray_as_found, start_ray
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import require_model
from rayalign.rounds.pairs import CUT, by_prompt, choose_pairs, pair_row, write_pairs
from rayalign.rounds.results import PAGE, PAIRS, RESPONSES, ROUNDS, SCORES, TRAIN, Round, write_results
from rayalign.sources.whole_paths import with_whole_paths
from rayalign.storage import Store
from rayalign.training import driver
from rayalign.training.places import require_lasting_folders

logger = logging.getLogger(__name__)

PAIRS_NOTE = "pairs.json"

DRAWS = ("n", "temperature", "top_p", "max_new_tokens")
"""Flags that a continued command may set anew for rounds that have no responses yet, or no pairs of them."""

FREE_TO_CHANGE = frozenset(
    {
        *("num_rounds", "prompts_per_step", "resume", "overwrite", "output_dir", "cache_dir", "report_to", "max_failures"),
        *("num_workers", "batch_size", "gradient_accumulation_steps", "gpus_per_worker", "cpus_per_worker", "wait_for_nodes"),
    }
)
"""Flags that a continued command may set anew: what a stage was begun with is compared once more by the stage itself."""


def run(config: Config, own: IterateConfig) -> list[Round]:
    """Runs the rounds that are not done yet, and returns all of them. The command's --dataset are the prompts.

    Raises ValueError for what the user can fix, a round without pairs among it.
    """
    config.check_inputs()
    _require_rounds(config)
    require_lasting_folders(config)
    if not config.run.output_dir:
        config = config.replace({"output_dir": "output/iterate"})
    config = with_whole_paths(config)
    source = require_model(config.model, REGISTERED_MODELS)
    generate.require_writer(source, config)
    scorers = score.scorers_of(_score_flags(own), ModelConfig())  # what is wrong with them is told before any work
    folder = Store.at(str(config.run.output_dir))
    flags = {**config.to_dict(), **dataclasses.asdict(own), "rlhf_type": config.algorithm.name}
    settings = {name: value for name, value in flags.items() if name not in FREE_TO_CHANGE}
    settings |= {"model files": files_of_model(source), "prompt files": files_of_data(sources_of(config))}
    if config.data.val_dataset:  # the records on which rounds are compared
        settings["held-out files"] = files_of_data(sources_of(config.replace({"dataset": config.data.val_dataset})))
    settings |= {"scorers": [dict(scorer.settings) for scorer in scorers]}
    inside = folder.list() if folder.is_dir() else []
    names = [inner.name for inner in inside if inner.name in (ROUNDS, PAGE) or re.fullmatch(r"round_\d+", inner.name)]
    if not config.run.overwrite:
        _require_all_rounds(folder, own.num_rounds)
        _allow_other_draws(folder, settings, own.num_rounds)
    open_output(folder, settings, overwrite=config.run.overwrite, names=names)
    rounds: list[Round] = []
    with ray_as_found():
        start_ray(config)
        for number in range(1, own.num_rounds + 1):
            rounds.append(_round(config, own, folder, number, [found.model for found in rounds]))
            write_results(folder, rounds, flags=flags)
    logger.info("Done: %d rounds; %s", len(rounds), (folder / ROUNDS).location)
    return rounds


def _allow_other_draws(folder: Store, settings: Mapping[str, Any], num_rounds: int) -> None:
    """Notes other flags of the draws where the first round that is not done has no responses, or no pairs came of them, so that
    it begins anew; earlier rounds stay as they are. Raises ValueError where the flags would be those of no round, or of a part
    of one."""
    note = folder / SETTINGS
    before = note.read_json_object() if note.exists() else {}
    changed = {name: (before[name], settings[name]) for name in DRAWS if name in before and before[name] != settings[name]}
    now = json.loads(json.dumps(settings))
    if not changed or {**before, **{name: now[name] for name in changed}} != now:
        return  # other flags differ, too, which is refused
    words = ", ".join(f"--{name} {one:g} -> {other:g}" for name, (one, other) in changed.items())
    words = f"--output_dir {folder.location}: its rounds were drawn with other flags ({words})"
    number = next((k for k in range(1, num_rounds + 1) if not _summary(folder / f"round_{k}").exists()), None)
    if number is None:
        raise ValueError(f"{words}, and all {num_rounds} are done. A higher --num_rounds adds rounds with the new ones.")
    place = folder / f"round_{number}"
    pairs = place / PAIRS / PAIRS_NOTE
    if result_files(place / RESPONSES) and not (pairs.exists() and not pairs.read_json_object()["pairs"]):
        raise ValueError(
            f"{words}, and round {number} has responses already. Give these flags as before, or delete {place.location} to "
            "begin that round anew; the rounds before it stay."
        )
    place.delete()
    note.write_json(now)


def _require_all_rounds(folder: Store, num_rounds: int) -> None:
    """Raises ValueError where more rounds are done than are asked for: the results would no longer tell of all."""
    done = next(k for k in itertools.count() if not _summary(folder / f"round_{k + 1}").exists())
    if num_rounds < done:
        raise ValueError(
            f"--num_rounds {num_rounds}: {done} rounds are done in --output_dir {folder.location}, and the results would tell "
            f"of {num_rounds}. Pass --num_rounds {done} or more, or another --output_dir."
        )


def _summary(place: Store) -> Store:
    """What the training of a round writes last."""
    return place / TRAIN / "summary.json"


def _require_rounds(config: Config) -> None:
    """Raises ValueError for what only the first round's training would find, and for flags that rounds make nothing of."""
    if config.run.dry_run:
        raise ValueError(
            "--dry_run: rounds have no plan of their own. `rayalign dpo --dry_run true` with the flags of the training tells "
            "what each takes."
        )
    if config.algorithm.name == "rm":
        raise ValueError(
            "--rlhf_type rm: a reward model writes no responses, with which the next round would begin. Pass an algorithm that "
            "trains a policy, such as dpo, and the reward model as --scorer reward_model=FOLDER."
        )
    if config.cluster.is_elastic:
        raise ValueError(
            f"--num_workers {config.cluster.num_workers}: as many workers respond and score as train, and of those that do, "
            "the number is fixed. Pass one number."
        )
    own_formats(config.plugins)
    require_held_apart(config)


def training_of(
    own: IterateConfig, folder: Store, number: int, *, start: Mapping[str, Any], policy: Mapping[str, Any]
) -> dict[str, Any]:
    """The flags of a round's training: from the round before, which is its `policy`, on the round's own pairs; or from the
    `start` of all rounds, on the pairs of all so far."""
    goes_on = own.reference == "previous"
    sets = [number] if goes_on else range(1, number + 1)
    return {
        **(policy if goes_on else start),
        "dataset": [(folder / f"round_{k}" / PAIRS / ROWS).location for k in sets],
        "output_dir": (folder / f"round_{number}" / TRAIN).location,
        "overwrite": False,
    }


def _round(config: Config, own: IterateConfig, folder: Store, number: int, models: Sequence[str]) -> Round:
    """A round; `models` are those of the rounds before it."""
    began = time.monotonic()
    place = folder / f"round_{number}"
    start: dict[str, Any] = {name: getattr(config.model, name) for name in ("model", "model_type", "adapter")}
    policy = {"model": models[-1], "model_type": None, "adapter": None} if models else start
    name = " with ".join(str(part) for part in policy.values() if part)
    logger.info("Round %d of %d: %s responds", number, own.num_rounds, name)
    seed = config.optimizer.seed + 1000 * number
    if not is_finished(place / RESPONSES):
        _respond(config, own, policy, place / RESPONSES, seed)
    if not is_finished(place / SCORES):
        _score(config, own, place)
    pairs = _pairs(config, own, place, number, policy=name, seed=seed)
    logger.info("Round %d: %d pairs of %d responses, whose mean score is %.4g", number, *(pairs[n] for n in _TOLD))
    if not pairs["pairs"]:
        raise ValueError(
            f"Round {number}: no two responses to a prompt differ in their scores by more than --pair_margin "
            f"{own.pair_margin:g}; {pairs['left_out'].get(CUT, 0)} of {pairs['responses']} responses did not end within "
            f"--max_new_tokens {own.max_new_tokens}. A higher --temperature or --n gives more different responses: the same "
            "command with one of them draws this round's anew, and the rounds before it stay."
        )
    run = training_of(own, folder, number, start=start, policy=policy)
    metrics = _train(config.replace(run), _summary(place))
    logger.info("Round %d: done in %.0f s", number, time.monotonic() - began)
    shown = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    model = (place / TRAIN / "model").location
    return Round(number=number, policy=name, seed=seed, **pairs, model=model, metrics=shown)


_TOLD = ("pairs", "responses", "mean_score")

NO_PAIR, NO_PICTURE = "prompts without a pair", "prompts whose pictures can't be read any more"


def _respond(config: Config, own: IterateConfig, policy: Mapping[str, Any], output: Store, seed: int) -> None:
    flags = _inference_flags(config, own, {**policy, "output_dir": output.location})
    how = ("n", "temperature", "top_p", "max_new_tokens", "backend")
    generate.run(flags, GenerateConfig(seed=seed, **{name: getattr(own, name) for name in how}), config.plugins)


def _score(config: Config, own: IterateConfig, place: Store) -> None:
    score.run(scoring_flags(config, own, place), _score_flags(own))


def scoring_flags(config: Config, own: IterateConfig, place: Store) -> InferenceConfig:
    """Of the stage that scores the responses of a round's folder, whose pictures are where the prompts' are."""
    read = {
        "dataset": [(place / RESPONSES / ROWS).location],
        "output_dir": (place / SCORES).location,
        "columns": (),
        "image_root": _image_root(config),
        "allow_image_urls": _allows_urls(config),
        **dict.fromkeys(("model", "model_type", "adapter")),
    }
    return _inference_flags(config, own, read)


def _score_flags(own: IterateConfig) -> ScoreConfig:
    names = ("scorer", "ensemble", "judge_model", "judge_prompt", "judge_pattern")
    return ScoreConfig(**{name: getattr(own, name) for name in names})


def _inference_flags(config: Config, own: IterateConfig, values: Mapping[str, Any]) -> InferenceConfig:
    """The flags of a stage that runs a model over records: those of the command, and what the stage has of its own."""
    return section_from_mapping(
        InferenceConfig, {**config.to_dict(), "batch_size": own.prompts_per_step, "overwrite": False, **values}
    )


def _pairs(config: Config, own: IterateConfig, place: Store, number: int, *, policy: str, seed: int) -> Mapping[str, Any]:
    """Makes the round's pairs, or finds them; what is to be told of them."""
    note = place / PAIRS / PAIRS_NOTE
    if note.exists():
        return note.read_json_object()
    lineage = {"round": number, "model": policy, "scorer": " ".join(own.scorer), "seed": seed}
    scores: list[float] = []
    left_out: Counter[str] = Counter()
    prompts, odd = 0, ""
    root, allow_urls = _image_root(config), _allows_urls(config)

    def rows() -> Iterator[Mapping[str, Any]]:
        nonlocal prompts, odd
        for responses in by_prompt(place / SCORES):
            prompts += 1
            scores.extend(response["score"] for response in responses)
            choice = choose_pairs(
                responses, per_prompt=own.pairs_per_prompt, margin=own.pair_margin, max_similarity=own.max_similarity
            )
            left_out.update(choice.left_out)
            left_out.update([NO_PAIR] if not choice.pairs else [])
            try:
                images = _contents(responses[0]["images"], root, allow_urls=allow_urls) if choice.pairs else []
            except RecordError as error:
                odd = odd or f"{responses[0]['prompt_id']}: {error}"
                left_out[NO_PICTURE] += 1
                continue
            yield from (pair_row(better, worse, images, lineage) for better, worse in choice.pairs)

    count = write_pairs(rows(), place / PAIRS / ROWS)
    if odd and not count:
        raise ValueError(
            f"Round {number}: the pictures of all {left_out[NO_PICTURE]} prompts with pairs can't be read any more (first "
            f"{odd}). Bring them back to where they were; the same command goes on."
        )
    if odd:
        logger.warning(
            "Round %d: the pictures of %d prompts can't be read any more (first %s)", number, left_out[NO_PICTURE], odd
        )
    found = {
        "prompts": prompts,
        "responses": len(scores),
        "mean_score": sum(scores) / max(1, len(scores)),
        "pairs": count,
        "left_out": dict(left_out),
    }
    note.write_json(found)
    return found


def _train(config: Config, summary: Store) -> Mapping[str, Any]:
    """What summary.json says of the round's training, which is run, or run on, where there is none yet."""
    if not summary.exists():
        driver.run(config)
    found: dict[str, Any] = json.loads(summary.read_bytes())
    return found


def _image_root(config: Config) -> str:
    """The folder below which all images of the prompts lie, whose whole paths the results hold, or ANYWHERE."""
    return picture_root(config.data.image_root, datasets_of(config.data.dataset))


def _allows_urls(config: Config) -> bool:
    """Whether a stage fetches what a prompt's image names by URL. Where no folder holds all images, those of several stores are
    read by their URLs: the results hold only images that the responding stage has fetched by the rules of the flags."""
    return config.data.allow_image_urls or _image_root(config) == ANYWHERE


def _contents(images: Sequence[Mapping[str, Any]], root: str, *, allow_urls: bool) -> list[dict[str, Any]]:
    """The images of a prompt by their bytes, so that pairs can be read from any folder."""
    refs = [image["bytes"] or image["path"] for image in images]
    place = Store(root)
    contents = fetch_images(refs, folder=place, image_root=place, allow_urls=allow_urls)
    return [{"bytes": content, "path": None} for content in contents]
