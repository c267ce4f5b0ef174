"""What differs between a run that was killed and went on, and one that was left alone."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from rayalign.shared_paths import TOKEN
from rayalign.storage import Store
from rayalign.training.checkpoint_folder import whole_checkpoints
from rayalign.training.lease import LEASE
from rayalign.training.sent_lines import RUN_IDS

OF_TIME = ("pairs_per_second", "tokens_per_second", "data_wait_fraction", "time", "seconds")
"""Metrics that time decides."""

EQUAL = ("dropped.jsonl", "answers.json", "held_out_scores.json")
"""Files that must be equal to the byte, where there are such; without `is_exact` the first one only."""

COUNTED = ("step", "epoch", "num_tokens")
"""Metrics that must be equal in any case. The tokens of all records up to each step are counted: a record that was left out of
an epoch, or came twice, would show."""

ROUNDED = ("loss", "grad_norm", "logps/chosen", "eval_loss")
"""Metrics that are compared without `is_exact`: those that don't jump where a pair's margin is about 0."""

ROUNDING = 1e-5
"""Of weights, by float32 sums in another order over the steps of AdamW, each up to 1e-3 long here; 6e-6 were seen."""

OF_ROUNDING = "vision_tower.encoder.layers.0.self_attn.k_proj.bias"
"""A bias of keys adds one number to all logits of a query, which the softmax takes away again: its gradient is 0 but for
rounding, and AdamW makes whole steps of that. Without `is_exact` it is not compared."""

ROUNDING_OF_METRICS = 1e-3
"""Relative; single pairs change them more."""


def differences(calm: Path, stormy: Path, *, is_exact: bool = True) -> list[str]:
    """In words; none where both have the same weights, metrics, answers and files, and whole checkpoints only."""
    found = []
    weights = {path.relative_to(calm) for path in (calm / "model").rglob("*.safetensors")}
    if not weights:
        found.append("there are no weights to compare")
    files = {Path(name) for name in (EQUAL if is_exact else EQUAL[:1]) if (calm / name).exists()}
    for name in sorted(weights | files):
        if not (stormy / name).exists():
            found.append(f"{name} is missing")
        elif name in weights and not is_exact:
            apart = furthest(load_file(calm / name), load_file(stormy / name))
            found += [f"{name} differs by {apart:.2g}"] * (apart > ROUNDING)
        elif (stormy / name).read_bytes() != (calm / name).read_bytes():
            found.append(f"{name} differs")
    found += differences_of_metrics(metrics(calm), metrics(stormy), is_exact=is_exact)
    names, right = file_names(stormy), file_names(calm)
    if names != right:
        found.append(f"files beside: {sorted(names - right)}, missing: {sorted(right - names)}")
    whole = {checkpoint.step for checkpoint in whole_checkpoints(Store.at(str(stormy / "checkpoints")))}
    if whole != {checkpoint.step for checkpoint in whole_checkpoints(Store.at(str(calm / "checkpoints")))}:
        found.append(f"whole checkpoints are those of steps {sorted(whole)}")
    return found


def furthest_of(calm: Path, stormy: Path) -> float:
    """The largest difference between two runs' weights."""
    files = [path.relative_to(calm) for path in (calm / "model").rglob("*.safetensors")]
    return max(furthest(load_file(calm / file), load_file(stormy / file)) for file in files)


def furthest(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest difference of two weights of the same name but OF_ROUNDING; infinite where one has others."""
    if {name: values.shape for name, values in one.items()} != {name: values.shape for name, values in other.items()}:
        return math.inf
    return max(float(np.abs(values - other[name]).max()) for name, values in one.items() if name != OF_ROUNDING)


def differences_of_metrics(expected: list[dict[str, Any]], lines: list[dict[str, Any]], *, is_exact: bool) -> list[str]:
    found = []
    steps = [line["step"] for line in lines if "loss" in line]
    if len(steps) != len(set(steps)):
        found.append(f"steps in metrics.jsonl twice: {sorted({step for step in steps if steps.count(step) > 1})}")
    same = dict.__eq__ if is_exact else nearly_equal
    other = [line["step"] for line, right in zip(lines, expected, strict=False) if not same(line, right)]
    if other or len(lines) != len(expected):
        first = f"step {other[0]}" if other else "the end"
        found.append(f"metrics.jsonl has {len(lines)} lines, not {len(expected)}, and other ones from {first}")
    return found


def nearly_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    counted = all(one[name] == other[name] for name in COUNTED if name in one and name in other)
    return (
        one.keys() == other.keys()
        and counted
        and all(math.isclose(one[name], other[name], rel_tol=ROUNDING_OF_METRICS) for name in ROUNDED if name in one)
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what time decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_TIME} for line in lines]


def file_names(run: Path) -> set[str]:
    """Of all files, but checkpoints and events by their kind only, as their names tell of the start that wrote them; without
    what a kill may leave and nobody takes for more: the lease of a run that was over, parts of files under names of their
    own, what nodes were to see of the folder, and what TensorBoard got ahead of a checkpoint."""
    files = (
        path for path in run.rglob("*") if path.is_file() and path.suffix != ".partial" and path.name not in (LEASE, RUN_IDS)
    )
    files = (path for path in files if not path.name.startswith(TOKEN))
    names = {str(path.relative_to(run)) for path in files}
    return {name.split("/")[0] if name.startswith(("checkpoints/", "tensorboard/")) else name for name in names}
