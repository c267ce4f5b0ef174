"""The runs that are killed: their model, records and flags."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.paced import PROGRAM
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model

STEPS = 120
COMMON = (
    *("--batch_size", 2, "--dataset_test_ratio", 0.1, "--learning_rate", 1e-3, "--max_steps", STEPS, "--logging_steps", 1),
    *("--save_steps", 4, "--eval_steps", 6, "--save_total_limit", 3, "--max_failures", 10),
    *("--precompute_ref_log_probs", "true"),
)
ONE_WORKER = ("--num_workers", 1, "--gradient_accumulation_steps", 4)
TWO_WORKERS = ("--num_workers", 2, "--gradient_accumulation_steps", 2)
ONE_OR_TWO = ("--num_workers", "1:2", "--gradient_accumulation_steps", 2, "--cpus_per_worker", 2)  # one a node


@dataclass(frozen=True)
class Variant:
    """Flags of a run, and those that its starts take in turn. `is_exact`: all its starts have the same number of workers, so
    that no sum is taken in another order."""

    flags: tuple[object, ...] = ()
    turns: tuple[tuple[object, ...], ...] = (TWO_WORKERS,)
    is_exact: bool = True

    def command(self, inputs: tuple[Path, Path], place: Path) -> Callable[[int], Sequence[object]]:
        """What Python is started with, by the number of the start (from 1); the records are prepared in the place, too, and
        the reference's log-probs, whose last bits depend on a worker's threads."""
        model, records = inputs
        paths = ("--model", model, "--dataset", records, "--output_dir", place / "run", "--cache_dir", place / "cache")
        common = ("-c", PROGRAM, "dpo", *paths, *COMMON, *self.flags)
        return lambda start: (*common, *self.turns[(start - 1) % len(self.turns)])


FULL, SHARDED = ("--tuner_type", "full"), ("--strategy", "fsdp")
WITH_TOWER = ("--freeze_vit", "false", "--freeze_aligner", "false")
VARIANTS = {
    "lora": Variant(),
    "full": Variant(FULL),
    "fsdp": Variant(SHARDED),
    "fsdp full": Variant((*SHARDED, *FULL, *WITH_TOWER)),
    "elastic": Variant(turns=(ONE_OR_TWO,), is_exact=False),
    "elastic fsdp": Variant(SHARDED, (ONE_OR_TWO,), is_exact=False),
    "resharded": Variant((*SHARDED, *FULL, *WITH_TOWER), (TWO_WORKERS, ONE_WORKER), is_exact=False),
}


def inputs_in(folder: Path) -> tuple[Path, Path]:
    """A tiny model and 400 records in two tasks, for all runs."""
    model, data = folder / "llava", folder / "data"
    if not (folder / "inputs").exists():
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(data, ignore_errors=True)
        save_tiny_model(model)
        write_rows(data, 400, seed=1, extra_lines=("{broken", '{"query": "no answers"}'))
        (folder / "inputs").touch()
    return model, data / "train.jsonl"
