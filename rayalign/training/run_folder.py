"""A run's folder: whether a run may start or go on in it, and what is written there when the run is done."""

import functools
import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rayalign.config.config import Config
from rayalign.config.plugins import PLUGIN
from rayalign.config.yaml_files import parse_flags, to_yaml
from rayalign.reference.key import REFERENCE_NOTE
from rayalign.report.page import Times
from rayalign.storage import Store
from rayalign.training.answers import ANSWERS
from rayalign.training.checkpoint import has_checkpoint
from rayalign.training.metrics import read_metrics
from rayalign.training.origin import ORIGIN_NOTE
from rayalign.training.run_report import REPORT, Background, write_report
from rayalign.training.run_times import RUN_TIMES

if TYPE_CHECKING:
    from rayalign.data.prepare import RunData

logger = logging.getLogger(__name__)

CONTENTS = (
    *("checkpoints", "model", "metrics.jsonl", "dropped.jsonl", REFERENCE_NOTE, ORIGIN_NOTE, ANSWERS, RUN_TIMES, REPORT),
    *("summary.json", "plugins", "config.yaml"),
)
"""What a run writes, in the order in which it is deleted: as long as a checkpoint is left, so is the configuration that it was
made with, and a deletion cut short is never taken for a run of other flags."""

FREE_TO_CHANGE = frozenset(
    {
        *("resume", "overwrite", "output_dir", "logging_steps", "eval_steps", "eval_on_start", "max_eval_records"),
        *("eval_answers", "save_steps", "save_total_limit"),
        *("num_workers", "batch_size", "gradient_accumulation_steps"),
        *("gpus_per_worker", "cpus_per_worker", "strategy", "max_failures", "wait_for_nodes"),
        *("cache_dir", "max_dropped_fraction"),
        *("gradient_checkpointing", "attn_implementation", "torch_compile", "precompute_ref_log_probs"),
    }
)
"""Flags that a continued run may set anew: they change neither the data nor the update. (The three that make up the global
batch may change only together, which is checked. A run's folder may move.)"""

BATCH_FLAGS = ("batch_size", "gradient_accumulation_steps", "num_workers")

REMEDY = "Pass --overwrite true to delete it, or another --output_dir."


def open_run(config: Config) -> Store:
    """The run's folder, ready to be written. A run that has no checkpoint yet is replaced, whatever its flags.

    Raises ValueError where the folder holds a finished run, or an unfinished one of another configuration, and --overwrite
    isn't given.
    """
    folder = Store.at(str(config.run.output_dir))
    if config.run.overwrite:
        _delete_contents(folder)
    if (folder / "summary.json").exists():
        raise ValueError(f"--output_dir {folder.location} holds a finished run. {REMEDY}")
    if has_checkpoint(folder / "checkpoints") or ((folder / "config.yaml").exists() and not _is_replaceable(folder)):
        _check_resumable(folder, config)
        logger.info("Continuing the unfinished run in %s", folder.location)
    else:
        if (folder / "config.yaml").exists():
            logger.info("Starting anew in %s: the run there had no checkpoint yet", folder.location)
            _delete_contents(folder)
        folder.make_dir()
        for plugin in config.plugins:
            (folder / "plugins" / f"{plugin.name}.py").write_bytes(plugin.text)
    (folder / "config.yaml").write_bytes(to_yaml(config).encode())
    return folder


def _is_replaceable(folder: Store) -> bool:
    """Whether an unfinished run without checkpoints has nothing to lose: its configuration is a run's, and it left no model."""
    try:
        is_run = {"rlhf_type", "output_dir"} <= parse_flags((folder / "config.yaml").read_bytes()).keys()
    except ValueError:
        is_run = False
    return is_run and not (folder / "model").exists()


def _delete_contents(folder: Store) -> None:
    for name in CONTENTS:
        (folder / name).delete()


def _check_resumable(folder: Store, config: Config) -> None:
    if not config.run.resume:
        raise ValueError(f"--output_dir {folder.location} holds an unfinished run, and --resume is false. {REMEDY}")
    now = config.to_dict() | {"rlhf_type": config.algorithm.name}
    before = _flags_before(folder / "config.yaml", now)
    changed = {name: (before[name], now[name]) for name in now if name not in FREE_TO_CHANGE and before[name] != now[name]}
    before_plugins = _plugins_before(folder, before.get(PLUGIN) or ())
    plugins = {plugin.name: plugin.text for plugin in config.plugins}
    if before_plugins != plugins:
        edited = " (its text has changed)" if before_plugins.keys() == plugins.keys() else ""
        changed["plugin"] = (" ".join(before_plugins) or None, (" ".join(plugins) or "None") + edited)
    batches = _global_batch(before), config.global_batch_size
    if batches[0] != batches[1]:
        changed["batch_size x gradient_accumulation_steps x num_workers"] = batches
    if changed:
        lines = "".join(f"\n  {name}: {old} -> {new}" for name, (old, new) in changed.items())
        raise ValueError(f"--output_dir {folder.location} holds an unfinished run with another configuration:{lines}\n{REMEDY}")


def _flags_before(file: Store, now: Mapping[str, Any]) -> Mapping[str, Any]:
    """The flags that an unfinished run began with; raises ValueError where they can't be told."""
    try:
        before = parse_flags(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"--output_dir {file.parent.location} holds checkpoints, and no {file.name} that tells with which flags they were "
            f"made. {REMEDY}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{file.location}, the flags that the unfinished run began with: {error} {REMEDY}") from None
    missing = [name for name in now if name not in before]
    if missing:
        raise ValueError(
            f"{file.location}, the flags that the unfinished run began with: lacks {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; it was cut short, or written by another version. {REMEDY}"
        )
    odd = [name for name in BATCH_FLAGS if type(before[name]) is not int]
    if odd:
        raise ValueError(
            f"{file.location}, the flags that the unfinished run began with: {odd[0]} is {before[odd[0]]!r} and no whole "
            f"number. {REMEDY}"
        )
    return before


def _plugins_before(folder: Store, arguments: Iterable[str]) -> dict[str, bytes | None]:
    """The text of each plugin that the run began with; None where it is gone."""
    names = [Store(argument).name.removesuffix(".py") for argument in map(str, arguments)]
    files = {name: folder / "plugins" / f"{name}.py" for name in names}
    return {name: file.read_bytes() if file.exists() else None for name, file in files.items()}


def _global_batch(values: Mapping[str, Any]) -> int:
    return math.prod(values[name] for name in BATCH_FLAGS)


def write_results(
    folder: Store,
    config: Config,
    data: "RunData",
    summary: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, float]],
    times: Times,
) -> None:
    """Writes report.html and summary.json, which marks the run as finished."""
    report = Background()
    metrics = read_metrics(folder / "metrics.jsonl")
    write = functools.partial(
        write_report, folder, config, data, scores, metrics=metrics, num_steps=summary["steps"], times=times, summary=summary
    )
    report.run(write)
    report.wait()
    (folder / "summary.json").write_json(dict(summary))
