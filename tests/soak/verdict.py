"""What differs between a run that was killed and went on, and one that was left alone."""

import json
from pathlib import Path
from typing import Any

from rayalign.storage import Store
from rayalign.training.checkpoint import whole_checkpoints

OF_TIME = ("pairs_per_second", "tokens_per_second", "data_wait_fraction", "time", "seconds")
"""Metrics that time decides."""
EQUAL = ("answers.json", "dropped.jsonl", "held_out.jsonl")
"""Files that must be equal to the byte, where there are such."""


def differences(calm: Path, stormy: Path) -> list[str]:
    """In words; none where both have the same weights, metrics, answers and files, and whole checkpoints only."""
    found = []
    files = {path.relative_to(calm) for path in (calm / "model").rglob("*.safetensors")}
    for name in sorted(files | {Path(name) for name in EQUAL if (calm / name).exists()}):
        if not (stormy / name).exists():
            found.append(f"{name} is missing")
        elif (stormy / name).read_bytes() != (calm / name).read_bytes():
            found.append(f"{name} differs")
    if not files:
        found.append("there are no weights to compare")
    lines, expected = metrics(stormy), metrics(calm)
    steps = [line["step"] for line in lines if "loss" in line]
    if len(steps) != len(set(steps)):
        found.append(f"steps in metrics.jsonl twice: {sorted({step for step in steps if steps.count(step) > 1})}")
    if lines != expected:
        other = [line["step"] for line, right in zip(lines, expected, strict=False) if line != right]
        first = f"step {other[0]}" if other else "the end"
        found.append(f"metrics.jsonl has {len(lines)} lines, not {len(expected)}, and other ones from {first}")
    names, right = file_names(stormy), file_names(calm)
    if names != right:
        found.append(f"files beside: {sorted(names - right)}, missing: {sorted(right - names)}")
    whole = {checkpoint.step for checkpoint in whole_checkpoints(Store.at(str(stormy / "checkpoints")))}
    if whole != {checkpoint.step for checkpoint in whole_checkpoints(Store.at(str(calm / "checkpoints")))}:
        found.append(f"whole checkpoints are those of steps {sorted(whole)}")
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what time decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_TIME} for line in lines]


def file_names(run: Path) -> set[str]:
    """Of all files, but checkpoints and events by their kind only, as their names tell of the start that wrote them."""
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name.split("/")[0] if name.startswith(("checkpoints/", "tensorboard/")) else name for name in names}
