"""A sweep's folder: whether its trials are those of the same sweep, so that it goes on with them."""

import hashlib
from collections.abc import Mapping
from typing import Any

from rayalign.config.config import Config
from rayalign.config.tune import TuneConfig
from rayalign.storage import Store
from rayalign.sweeps.search_space import ALGORITHM
from rayalign.sweeps.trials import TRIALS
from rayalign.training.run_folder import FREE_TO_CHANGE, arithmetic

SEARCH_NOTE = "search.json"

SEARCHED = ("search", "search_alg", "search_seed")
"""The flags of a sweep that decide which trials there are; more of them (--num_samples, --num_seeds), another ranking and
another scheduler go on from those that are there."""

RANKING = {
    *("max_eval_records", "eval_steps", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "early_stopping_patience"),
}
"""Flags that a run may change and a sweep may not: trials are compared by what these measure."""

ARITHMETIC = "arithmetic"
"""In the note: the type that trials compute in."""

REMEDY = "Pass --overwrite true to delete it, or another --output_dir."


def check_sweep_folder(folder: Store, config: Config, sweep: TuneConfig) -> None:
    """Raises ValueError where the folder holds another sweep, or something else. What follows from the cluster's GPUs is only
    compared where these are known."""
    note = folder / SEARCH_NOTE
    if not note.exists():
        if (folder / TRIALS).list():
            raise ValueError(f"--output_dir {folder.location} holds a sweep of an earlier version, which can't go on. {REMEDY}")
        if (folder / "config.yaml").exists():
            raise ValueError(f"--output_dir {folder.location} holds a run. Pass another --output_dir.")
        return
    before, now = note.read_json_object(), _identity(config, sweep)
    # A note of an earlier version lacks what it did not compare.
    known = [name for name in now if name in before and (name != ARITHMETIC or None not in (before[name], now[name]))]
    changed = {name: (before[name], now[name]) for name in known if before[name] != now[name]}
    if changed and (folder / TRIALS).list():
        lines = "".join(f"\n  {name}: {old} -> {new}" for name, (old, new) in changed.items())
        raise ValueError(f"--output_dir {folder.location} holds a sweep with other flags:{lines}\n{REMEDY}")


def write_search(folder: Store, config: Config, sweep: TuneConfig) -> None:
    """Notes which sweep the folder is of."""
    (folder / SEARCH_NOTE).write_json(_identity(config, sweep))


def _identity(config: Config, sweep: TuneConfig) -> Mapping[str, Any]:
    """What the trials depend on, as JSON has it."""
    free = FREE_TO_CHANGE - RANKING
    fixed = {name: value for name, value in config.to_dict().items() if name not in free}
    batch = "batch_size x gradient_accumulation_steps x num_workers"
    searched = {name: getattr(sweep, name) for name in SEARCHED}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in searched.items()}
    whole = {ALGORITHM: config.algorithm.name, batch: config.global_batch_size, ARITHMETIC: arithmetic(config.to_dict())}
    texts = [hashlib.sha256((plugin.source or "").encode()).hexdigest() for plugin in config.plugins]
    return {**listed, **fixed, **whole, "texts of plugins": texts}
