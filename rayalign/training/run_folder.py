"""A run's folder: whether a run may start or go on in it, and what is written there when the run is done."""

import functools
import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rayalign.config.config import Config
from rayalign.config.flags import flags_of
from rayalign.config.plugins import PLUGIN
from rayalign.config.sections import ModelConfig
from rayalign.config.workers import workers_of
from rayalign.config.yaml_files import parse_flags, to_yaml
from rayalign.reference.key import REFERENCE_NOTE
from rayalign.report.page import Times
from rayalign.storage import Store
from rayalign.training.answers import ANSWERS
from rayalign.training.benchmark_results import RESULTS
from rayalign.training.best import NOTE
from rayalign.training.checkpoint_folder import has_checkpoint
from rayalign.training.metrics import read_metrics
from rayalign.training.origin import ORIGIN_NOTE
from rayalign.training.profiling import PROFILE
from rayalign.training.run_report import REPORT, SCORES, Background, write_report
from rayalign.training.run_times import RUN_TIMES
from rayalign.training.sent_lines import RUN_IDS
from rayalign.training.sinks import EVENTS

if TYPE_CHECKING:
    from rayalign.data.prepare import RunData

logger = logging.getLogger(__name__)

CONTENTS = (
    *("checkpoints", NOTE, "model", "metrics.jsonl", "dropped.jsonl", REFERENCE_NOTE, ORIGIN_NOTE, ANSWERS, RUN_TIMES, REPORT),
    *(SCORES, RESULTS),
    *(EVENTS, RUN_IDS, PROFILE, "wandb", "mlflow.db", "summary.json", "plugins", "config.yaml"),
)
"""What a run writes, in the order in which it is deleted: as long as a checkpoint is left, so is the configuration that it was
made with, and a deletion cut short is never taken for a run of other flags."""

FREE_TO_CHANGE = frozenset(
    {
        *("resume", "overwrite", "output_dir", "logging_steps", "eval_steps", "eval_on_start", "max_eval_records"),
        *("report_to", "profile_steps"),
        *("eval_answers", "eval_benchmarks", "max_eval_questions", "save_steps", "save_total_limit"),
        *("metric_for_best_model", "greater_is_better", "early_stopping_patience", "load_best_model_at_end"),
        *("num_workers", "batch_size", "gradient_accumulation_steps"),
        *("gpus_per_worker", "cpus_per_worker", "strategy", "shard_group_size", "sync_each_batch"),
        *("max_failures", "wait_for_nodes"),
        *("accelerator_type", "label_selector", "data_label_selector"),
        *("cache_dir", "max_dropped_fraction"),
        *("gradient_checkpointing", "attn_implementation", "torch_compile", "precompute_ref_log_probs"),
    }
)
"""Flags that a continued run may set anew: they change neither the data nor the update, but for dropout's masks. (The three
that make up the global batch may change only together, which is checked. A run's folder may move.)"""

BATCH_FLAGS = ("batch_size", "gradient_accumulation_steps", "num_workers")

REMEDY = "Pass --overwrite true to delete it, or another --output_dir."

END_MARK = b"# All flags are above.\n"
"""The last line of config.yaml: with it the file is whole, whatever flags it has."""

LAST_WITHOUT_MARK = b"max_failures:"
"""How the last line began in versions that wrote no mark."""


def check_run_folder(config: Config) -> None:
    """Raises the ValueErrors of `open_run`, and changes nothing: a run is refused before it takes any resource. What follows
    from the cluster's GPUs is left to `open_run`."""
    if not config.run.overwrite:
        _flags_to_add(Store.at(str(config.run.output_dir)), config)


def open_run(config: Config) -> Store:
    """The run's folder, ready to be written. A run that has no checkpoint yet is replaced, whatever its flags.

    Raises ValueError where the folder holds a finished run, or an unfinished one of another configuration, and --overwrite
    isn't given.
    """
    folder = Store.at(str(config.run.output_dir))
    if config.run.overwrite:
        _delete_contents(folder)
    added = _flags_to_add(folder, config)
    if added is not None:
        logger.info("Continuing the unfinished run in %s", folder.location)
        if added:
            logger.info("It began with a version that had no --%s: taken as the default there", ", --".join(added))
    else:
        if (folder / "config.yaml").exists():
            logger.info("Starting anew in %s: the run there had no checkpoint yet", folder.location)
            _delete_contents(folder)
        folder.make_dir()
        for plugin in config.plugins:
            (folder / "plugins" / f"{plugin.name}.py").write_bytes(plugin.text)
    write_config(folder, config)
    return folder


def write_config(folder: Store, config: Config) -> None:
    """Writes the flags that the run in a folder goes on with."""
    (folder / "config.yaml").write_bytes(to_yaml(config).encode() + END_MARK)


def _flags_to_add(folder: Store, config: Config) -> list[str] | None:
    """The flags that an unfinished run was begun without, where the folder holds one that goes on; None where a new one may
    begin. Raises ValueError where neither is so."""
    if (folder / "summary.json").exists():
        raise ValueError(f"--output_dir {folder.location} holds a finished run. {REMEDY}")
    if has_checkpoint(folder / "checkpoints") or ((folder / "config.yaml").exists() and not _is_replaceable(folder)):
        return _check_resumable(folder, config)
    return None


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


def _check_resumable(folder: Store, config: Config) -> list[str]:
    """Returns the flags that the unfinished run was begun without, by a version that did not have them."""
    if not config.run.resume:
        raise ValueError(f"--output_dir {folder.location} holds an unfinished run, and --resume is false. {REMEDY}")
    now = config.to_dict() | {"rlhf_type": config.algorithm.name}
    written = _flags_before(folder / "config.yaml")
    before = {**_defaults(config), **written}
    types = arithmetic(before), arithmetic(now)
    before["dtype"], now["dtype"] = types if None not in types else ("", "")
    changed = {name: (before[name], now[name]) for name in now if name not in FREE_TO_CHANGE and before[name] != now[name]}
    before_plugins = _plugins_before(folder, before.get(PLUGIN) or ())
    plugins = {plugin.name: plugin.text for plugin in config.plugins}
    if before_plugins != plugins:
        edited = " (its text has changed)" if before_plugins.keys() == plugins.keys() else ""
        changed["plugin"] = (" ".join(before_plugins) or None, (" ".join(plugins) or "None") + edited)
    batches = _global_batch(before), config.global_batch_size
    if batches[0] != batches[1]:
        changed["batch_size x gradient_accumulation_steps x num_workers"] = batches
    elif config.uses_dropout and before["batch_size"] != now["batch_size"]:
        logger.warning(
            "--batch_size %s -> %s: dropout draws its masks for each micro-batch, so that the weights come out a little other "
            "than with the former",
            before["batch_size"],
            now["batch_size"],
        )
    if changed:
        lines = "".join(f"\n  {name}: {old} -> {new}" for name, (old, new) in changed.items())
        raise ValueError(f"--output_dir {folder.location} holds an unfinished run with another configuration:{lines}\n{REMEDY}")
    return [name for name in now if name not in written]


def arithmetic(flags: Mapping[str, Any]) -> str | None:
    """The type that a run computes in: what `auto` stands for follows from whether workers have GPUs. None before that is
    known."""
    gpus = flags["gpus_per_worker"]
    if gpus is None and flags["dtype"] == "auto":
        return None
    named: str = ModelConfig(dtype=flags["dtype"]).dtype_on("cuda" if gpus else "cpu")
    return named


def _defaults(config: Config) -> dict[str, Any]:
    """Each flag's default, as `Config.to_dict` has values."""
    flags = {flag.name: flag.default for section in config.sections() for flag in flags_of(type(section))}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}


def _flags_before(file: Store) -> Mapping[str, Any]:
    """The flags that an unfinished run began with, as its version had them; raises ValueError where they can't be told."""
    try:
        content = file.read_bytes()
        before = parse_flags(content)
    except FileNotFoundError:
        raise ValueError(
            f"--output_dir {file.parent.location} holds checkpoints, and no {file.name} that tells with which flags they were "
            f"made. {REMEDY}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{file.location}, the flags that the unfinished run began with: {error} {REMEDY}") from None
    missing = [name for name in ("rlhf_type", *BATCH_FLAGS) if name not in before]
    if missing or not _is_whole(content):
        raise ValueError(
            f"{file.location}, the flags that the unfinished run began with: "
            f"{f'lacks {missing[0]}; ' if missing else ''}it was cut short. {REMEDY}"
        )
    odd = [name for name in BATCH_FLAGS if _workers_or_number(name, before[name]) is None]
    if odd:
        raise ValueError(
            f"{file.location}, the flags that the unfinished run began with: {odd[0]} is {before[odd[0]]!r} and no whole "
            f"number. {REMEDY}"
        )
    return before


def _is_whole(content: bytes) -> bool:
    """Whether a config.yaml was written to its end, by this version or by one that had fewer flags."""
    last = content[content.rstrip(b"\n").rfind(b"\n") + 1 :]
    return last == END_MARK or (last.startswith(LAST_WITHOUT_MARK) and last.endswith(b"\n"))


def _plugins_before(folder: Store, arguments: Iterable[str]) -> dict[str, bytes | None]:
    """The text of each plugin that the run began with; None where it is gone."""
    names = [Store(argument).name.removesuffix(".py") for argument in map(str, arguments)]
    files = {name: folder / "plugins" / f"{name}.py" for name in names}
    return {name: file.read_bytes() if file.exists() else None for name, file in files.items()}


def _global_batch(values: Mapping[str, Any]) -> int:
    return math.prod(_workers_or_number(name, values[name]) or 0 for name in BATCH_FLAGS)


def _workers_or_number(flag: str, value: Any) -> int | None:
    """The value of one of BATCH_FLAGS, of an elastic run its most workers; None where it has none."""
    if type(value) is int:
        return value
    if flag != "num_workers" or not isinstance(value, str):
        return None
    try:
        return workers_of(value)[1]
    except ValueError:
        return None


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
