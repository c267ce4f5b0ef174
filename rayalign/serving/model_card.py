"""The README.md of an exported model: what it was made of, and what the run that made it says of itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rayalign import __version__
from rayalign.algorithms import ALGORITHMS
from rayalign.config.flags import flags_of
from rayalign.config.sections import DataConfig, ModelConfig, OptimizerConfig, TunerConfig
from rayalign.config.yaml_files import flags_of_run
from rayalign.storage import Store

MARK = "exported by rayalign"
"""What the card of every export says."""

SHOWN_METRICS = ("accuracy/likelihood", "accuracy/per_token", "accuracy/reward_model", "rewards/accuracies", "loss")
SHOWN_FACTS = ("steps", "training_records", "held_out_records", "dropped_records", "data_key", "seed")


def write_card(folder: Path, *, name: str, base: str, model: Store) -> None:
    """Writes README.md into an export's folder, for a model of this name.

    `model` is the folder that was exported; where a run's folder is around it, the card has the flags that were not the
    default, figures and versions.
    """
    run = model.parent
    summary = (run / "summary.json").read_json_object() if (run / "summary.json").exists() else {}
    flags = flags_of_run(run)
    algorithm = str(summary.get("algorithm", ""))
    base = Path(base).name if Path(base).is_dir() else base
    front = {"library_name": "transformers", "base_model": base, "tags": ["rayalign", *([algorithm] if algorithm else [])]}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    lines += [f"{base}{f', trained with {algorithm.upper()}' if algorithm else ''}; {MARK} {__version__}."]
    metrics = {metric: summary[f"eval_{metric}"] for metric in SHOWN_METRICS if f"eval_{metric}" in summary}
    tables = {
        "The run": {fact: summary[fact] for fact in SHOWN_FACTS if fact in summary},
        "On held-out records": metrics,
        "Flags that were not the default": _changed(flags, algorithm),
        "Versions": summary.get("versions", {}),
    }
    for title, values in tables.items():
        lines += ["", f"## {title}", "", *_table(values)] if values else []
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def is_export(folder: Store) -> bool:
    """Whether a folder holds what `write_card` was called for."""
    card = folder / "README.md"
    return card.exists() and MARK in card.read_bytes().decode(errors="replace")


def _changed(flags: Mapping[str, Any], algorithm: str) -> dict[str, Any]:
    """The flags that decide about the result and are not their defaults. Where a run lay, and on what machines it ran, is left
    out."""
    sections = (
        DataConfig,
        ModelConfig,
        TunerConfig,
        OptimizerConfig,
        *([ALGORITHMS[algorithm]] if algorithm in ALGORITHMS else []),
    )
    known = {flag.name: flag for section in sections for flag in flags_of(section)}

    def is_default(name: str, value: Any) -> bool:
        try:
            return bool(known[name].convert(value) == known[name].default)
        except ValueError:  # of a run of another version
            return False

    changed = {name: value for name, value in flags.items() if name in known and not is_default(name, value)}
    return {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in changed.items()}


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in values.items()]
    return ["| | |", "|---|---|", *rows]
