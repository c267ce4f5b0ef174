"""The README.md of an exported model: what it was made of, and what the run that made it says of itself."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from rayalign import __version__
from rayalign.algorithms import ALGORITHMS
from rayalign.config.flags import flags_of
from rayalign.config.sections import DataConfig, ModelConfig, OptimizerConfig, TunerConfig
from rayalign.config.yaml_files import flags_of_run
from rayalign.downloads import local_where_it_is
from rayalign.storage import Store, is_url

MARK = "exported by rayalign"
"""What the card of every export says."""

SHOWN_METRICS = ("accuracy/likelihood", "accuracy/per_token", "accuracy/reward_model", "rewards/accuracies", "loss")
SHOWN_FACTS = ("steps", "training_records", "held_out_records", "dropped_records", "data_key", "seed")

NOT_SHOWN = ("cache_dir",)
PATHS = ("dataset", "val_dataset", "image_root")
"""Flags whose values are paths, URLs or names without a slash."""


def write_card(folder: Path, *, name: str, base: str, model: Store) -> None:
    """Writes README.md into an export's folder, for a model of this name.

    `model` is the folder that was exported; where a run's folder is around it, the card has the flags that were not the
    default, figures and versions.
    """
    run = model.parent
    summary = (run / "summary.json").read_json_object() if (run / "summary.json").exists() else {}
    flags = flags_of_run(run)
    algorithm = str(summary.get("algorithm", ""))
    base = PurePath(base).name if Path(base).expanduser().is_dir() else _public(base)
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
    """The flags that decide about the result and are not their defaults. Where a run and its data lay, and on what machines it
    ran, is left out."""
    sections = (
        DataConfig,
        ModelConfig,
        TunerConfig,
        OptimizerConfig,
        *([ALGORITHMS[algorithm]] if algorithm in ALGORITHMS else []),
    )
    known = {flag.name: flag for section in sections for flag in flags_of(section) if flag.name not in NOT_SHOWN}

    def read(name: str, value: Any) -> Any:
        try:
            return known[name].convert(value)
        except ValueError:  # of a run of another version
            return value

    values = {name: read(name, value) for name, value in flags.items() if name in known}
    return {name: _shown(name, value) for name, value in values.items() if value != known[name].default}


def _shown(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return " ".join(str(_shown(name, item)) for item in value)
    return _public(value, is_path=name in PATHS) if isinstance(value, str) else value


def _public(value: str, *, is_path: bool = False) -> str:
    """A hub id, a word or a URL; of a path (`is_path`: whatever is no URL) its last name alone, with the #N behind it. URLs
    lose what may hold credentials."""
    value = local_where_it_is(value)
    if is_url(value):
        sample = re.search(r"#[0-9]+$", value)
        scheme, _, rest = re.split(r"[?#]", value, maxsplit=1)[0].partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{sample.group() if sample else ''}"
    if is_path or value.startswith(("/", "~", "./", "../")) or value.count("/") > 1:
        return PurePath(value).name or value
    return value


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in values.items()]
    return ["| | |", "|---|---|", *rows]
