"""A sweep's folder: whether its trials are those of the same sweep, so that it goes on with them."""

from collections.abc import Mapping
from typing import Any

from rayalign.config.config import Config
from rayalign.config.tune import TuneConfig
from rayalign.storage import Store
from rayalign.sweeps.search_space import ALGORITHM
from rayalign.sweeps.trials import TRIALS
from rayalign.training.run_folder import FREE_TO_CHANGE

SEARCH_NOTE = "search.json"

SEARCHED = ("search", "search_alg", "search_seed")
"""The flags of a sweep that decide which trials there are; more of them (--num_samples, --num_seeds), another ranking and
another scheduler go on from those that are there."""

REMEDY = "Pass --overwrite true to delete it, or another --output_dir."


def check_sweep_folder(folder: Store, config: Config, sweep: TuneConfig) -> None:
    """Raises ValueError where the folder holds another sweep, or something else."""
    note = folder / SEARCH_NOTE
    if not note.exists():
        if (folder / TRIALS).list():
            raise ValueError(f"--output_dir {folder.location} holds a sweep of an earlier version, which can't go on. {REMEDY}")
        if (folder / "config.yaml").exists():
            raise ValueError(f"--output_dir {folder.location} holds a run. Pass another --output_dir.")
        return
    before, now = note.read_json_object(), _identity(config, sweep)
    changed = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
    if changed and (folder / TRIALS).list():
        lines = "".join(f"\n  {name}: {old} -> {new}" for name, (old, new) in changed.items())
        raise ValueError(f"--output_dir {folder.location} holds a sweep with other flags:{lines}\n{REMEDY}")


def write_search(folder: Store, config: Config, sweep: TuneConfig) -> None:
    """Notes which sweep the folder is of."""
    (folder / SEARCH_NOTE).write_json(_identity(config, sweep))


def _identity(config: Config, sweep: TuneConfig) -> Mapping[str, Any]:
    """What the trials depend on, as JSON has it."""
    fixed = {name: value for name, value in config.to_dict().items() if name not in FREE_TO_CHANGE}
    batch = "batch_size x gradient_accumulation_steps x num_workers"
    searched = {name: getattr(sweep, name) for name in SEARCHED}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in searched.items()}
    return {**listed, ALGORITHM: config.algorithm.name, **fixed, batch: config.global_batch_size}
