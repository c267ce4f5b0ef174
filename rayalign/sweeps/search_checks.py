"""Whether a sweep can be what its flags ask for: told before anything starts. `search_space` is what comes out."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rayalign.config.config import Config
from rayalign.config.flags import did_you_mean, flags_of
from rayalign.config.sections import ClusterConfig, RunConfig
from rayalign.config.tune import TuneConfig
from rayalign.sweeps.ranking import with_whole_names
from rayalign.sweeps.search_space import (
    ALGORITHM,
    LISTED,
    SearchRange,
    SearchSpace,
    algorithms_of,
    changed_flags,
    class_of,
    parse_search,
    searchable,
)

if TYPE_CHECKING:
    from rayalign.models.source import ModelSource

REWARDS, DRIFT = "eval_rewards/", "eval_drift"
SHAPE = ("lora_rank", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora")
"""Flags of an adapter that one to continue from has already."""
DRAWING = ("dataset", "dataset_test_ratio", "data_seed")
"""Flags by which records are held out, where --val_dataset names none."""

MOST_OTHERS = 200


def check_search(config: Config, tune: TuneConfig) -> SearchSpace:
    """What a sweep searches; raises ValueError for a value that its flag does not take, and for flags of the sweep that can't
    be together."""
    if not tune.search:
        raise ValueError("--search is empty: name at least one flag to search, such as --search beta=grid:0.05,0.1,0.5.")
    space = SearchSpace(config, parse_search(tune.search))
    fixed = {flag.name for section in (RunConfig, ClusterConfig, TuneConfig) for flag in flags_of(section)}
    for name in space.algorithms if ALGORITHM in space.ranges else ():
        _require_algorithm(space, name)
    lost = changed_flags(config) - {name for a in space.algorithms for name in searchable(class_of(config, a))}
    if lost:
        raise ValueError(
            f"--{min(lost)}: none of the algorithms that --search {ALGORITHM} names has it ({', '.join(space.algorithms)}). "
            "Leave it out."
        )
    flags = {name: flag for algorithm in space.algorithms for name, flag in searchable(class_of(config, algorithm)).items()}
    for name in space.ranges:
        if name in fixed:
            raise ValueError(f"--search {name}: is the same for all trials of a sweep; pass --{name} itself.")
        if name not in flags and name != ALGORITHM:
            raise ValueError(f"--search {name}: {_no_such_flag(space, name, flags)}")
    for algorithm in space.algorithms:
        for name in space.ranges:
            if name != ALGORITHM and space.has(name, algorithm):
                _check_values(space, algorithm, name)
    _check_together(space, tune)
    return space


def _no_such_flag(space: SearchSpace, name: str, flags: Iterable[str]) -> str:
    owners = [other for other, algorithm in algorithms_of(space.base).items() if name in searchable(algorithm)]
    if not owners:
        return f"there is no such flag.{did_you_mean(name, flags)}"
    searched = ", ".join(space.algorithms)
    return (
        f"{searched} {'has' if len(space.algorithms) == 1 else 'have'} no such flag; {', '.join(owners)} "
        f"{'has' if len(owners) == 1 else 'have'}. Leave it out, or try an algorithm that has it (--search {ALGORITHM}=grid:"
        f"{','.join([*space.algorithms, owners[0]])})."
    )


def _check_together(space: SearchSpace, tune: TuneConfig) -> None:
    grids = [name for name, values in space.ranges.items() if not values.is_drawn]
    if tune.search_alg == "optuna" and grids:
        raise ValueError(
            f"--search {grids[0]}=grid with --search_alg optuna: a grid runs whole, and Optuna chooses. Use choice, or "
            "--search_alg random."
        )
    if tune.num_seeds > 1 and "seed" in space.ranges:
        raise ValueError(f"--num_seeds {tune.num_seeds} with --search seed: both set the seed. Leave one of the two out.")
    if tune.num_seeds > 1 and tune.scheduler in ("asha", "median"):
        raise ValueError(
            f"--scheduler {tune.scheduler} with --num_seeds {tune.num_seeds}: a setting is ranked by the mean of all its "
            "seeds, none of which may be stopped. Leave one of the two out."
        )
    of_lora = [name for name in space.ranges if name.startswith("lora_")]
    if of_lora and space.base.tuner.sft_type == "full" and "sft_type" not in space.ranges:
        raise ValueError(f"--search {of_lora[0]} with --sft_type full: full trains no adapter. Leave one of the two out.")
    if tune.price_per_hour is not None and not space.base.run.dry_run:
        raise ValueError(
            f"--price_per_hour {tune.price_per_hour:g}: only --dry_run true tells costs. Pass it, or leave this out."
        )
    _check_held_out(space)
    _check_metric(space, with_whole_names(tune))


def check_shape(space: SearchSpace, source: "ModelSource") -> None:
    """Raises ValueError for a searched flag of adapters where trials continue from an adapter, which keeps its own."""
    searched = [name for name in SHAPE if name in space.ranges]
    stacks = space.base.tuner.stack_adapter and "stack_adapter" not in space.ranges
    if searched and source.adapter and not stacks:
        raise ValueError(
            f"--search {searched[0]}: trials continue from the adapter {source.adapter}, which keeps its shape. Leave it out, "
            "or train new adapters on top of it (--stack_adapter true)."
        )


def _check_held_out(space: SearchSpace) -> None:
    """Raises ValueError where trials would be compared on different records."""
    data = space.base.data
    same = "trials are compared on the same held-out records, and these would differ."
    if "val_dataset" in space.ranges:
        raise ValueError(f"--search val_dataset: {same} Pass --val_dataset itself.")
    for name in DRAWING:
        if name in space.ranges and not data.val_dataset:
            raise ValueError(f"--search {name}: {same} Name them (--val_dataset), or leave it out.")
    if "data_seed" not in space.ranges:
        return
    from rayalign.sources.files import split_sample  # here, as it loads what reads files

    drawn = [argument for argument in data.val_dataset if split_sample(argument)[1] is not None]
    if drawn:
        raise ValueError(
            f"--search data_seed: {same} --val_dataset {drawn[0]} is drawn by it. Write them into a file of their own."
        )


def _check_metric(space: SearchSpace, tune: TuneConfig) -> None:
    """Raises ValueError for metrics that some trials can't have."""
    data = space.base.data
    if not data.val_dataset and data.dataset_test_ratio == 0:
        raise ValueError(
            f"--metric {tune.metric} with --dataset_test_ratio 0: no record is held out, so that trials can't be compared. "
            "Hold some out, or pass --val_dataset."
        )
    instead = "eval_loss" if len(space.algorithms) == 1 else "eval_nll_loss, which all have"
    for name in space.algorithms:
        needs = space.config({ALGORITHM: name} if ALGORITHM in space.ranges else {}).algorithm.needs
        for flag, metric in (("metric", tune.metric), ("cost_metric", tune.cost_metric or "")):
            if metric.startswith(REWARDS) and needs.responses == "chosen":
                raise ValueError(f"--{flag} {metric}: {name} has no rewards. Pass --{flag} {instead}.")
            if metric == DRIFT and not needs.reference:
                raise ValueError(f"--{flag} {metric}: {name} has no reference to drift from. Pass --{flag} eval_nll_loss.")


def _check_values(space: SearchSpace, algorithm: str, name: str) -> None:
    flag, values = space.flag(name, algorithm), space.ranges[name]
    if values.kind not in LISTED:
        if flag.item_type not in (int, float) or flag.is_list:
            raise ValueError(f"--search {name}={values.kind}: --{name} takes no range of numbers; use grid or choice.")
        if flag.item_type is int and any(number != int(number) for number in values.values):
            raise ValueError(f"--search {name}={values.kind}: --{name} takes whole numbers, and these are not.")
    for value in _ends(values):
        errors = []
        for others in _others(space, algorithm, name):
            try:
                space.config({**others, name: space.value(name, algorithm, value)})
            except ValueError as error:
                errors.append(error)
                continue
            break
        else:
            raise ValueError(f"--search {name}={values.kind}: {errors[0]}") from None


def _ends(values: SearchRange) -> tuple[Any, ...]:
    """All values of a list, and the lowest and the highest number of a range."""
    return values.values if values.kind in LISTED else (values.values[0], values.last)


def _others(space: SearchSpace, algorithm: str, name: str) -> Iterator[dict[str, Any]]:
    """What may stand beside a searched flag: first nothing, then values of the other ones, at most MOST_OTHERS times: a value
    may only be allowed beside another one."""
    chosen = {ALGORITHM: algorithm} if ALGORITHM in space.ranges else {}
    yield chosen
    names = [other for other in space.ranges if other not in (name, ALGORITHM) and space.has(other, algorithm)]
    for some in itertools.islice(itertools.product(*(_ends(space.ranges[other]) for other in names)), MOST_OTHERS):
        try:
            beside = {other: space.value(other, algorithm, value) for other, value in zip(names, some, strict=True)}
        except ValueError:  # of a value that is refused when its own flag is looked at
            continue
        yield chosen | beside


def _require_algorithm(space: SearchSpace, name: str) -> None:
    kind, known = space.ranges[ALGORITHM].kind, algorithms_of(space.base)
    if kind not in LISTED:
        raise ValueError(f"--search {ALGORITHM}={kind}: algorithms are names; use grid or choice.")
    if name not in known:
        raise ValueError(f"--search {ALGORITHM}={kind}: {name} is not one of {', '.join(known)}.{did_you_mean(name, known)}")
