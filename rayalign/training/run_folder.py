"""A run's folder: whether a run may start or go on in it, and what is written there when the run is done."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from rayalign.config.config import Config
from rayalign.config.yaml_files import to_yaml
from rayalign.reference.key import REFERENCE_NOTE
from rayalign.report.page import render_report
from rayalign.report.pairs import ScoredPair
from rayalign.storage import Store
from rayalign.training.metrics import read_metrics

if TYPE_CHECKING:
    from rayalign.data.prepare import RunData

logger = logging.getLogger(__name__)

CONTENTS = (
    *("config.yaml", "plugins", "metrics.jsonl", "dropped.jsonl", REFERENCE_NOTE, "checkpoints"),
    *("model", "report.html", "summary.json"),
)

FREE_TO_CHANGE = frozenset(
    {
        *("resume", "overwrite", "logging_steps", "eval_steps", "save_steps", "save_total_limit"),
        *("num_workers", "batch_size", "gradient_accumulation_steps"),
        *("gpus_per_worker", "cpus_per_worker", "strategy", "max_failures", "cache_dir", "max_dropped_fraction"),
        *("gradient_checkpointing", "attn_implementation", "torch_compile", "precompute_ref_log_probs"),
    }
)
"""Flags that a continued run may set anew: they change neither the data nor the update. (The three that make up the global
batch may change only together, which is checked.)"""

REPORTED_PAIRS = 2000
"""Held-out pairs whose scores go into the report's histograms."""


def with_output_dir(config: Config) -> Config:
    """The same configuration with --output_dir resolved: absolute, or its URL."""
    folder = config.run.output_dir or f"output/{config.algorithm.name}"
    return dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=Store.at(folder).location))


def open_run(config: Config) -> Store:
    """The run's folder, ready to be written. Raises ValueError where it holds a finished run, or an unfinished one of another
    configuration, and --overwrite isn't given."""
    folder = Store.at(str(config.run.output_dir))
    if config.run.overwrite:
        for name in CONTENTS:
            (folder / name).delete()
    if (folder / "config.yaml").exists():
        _check_resumable(folder, config)
        logger.info("Continuing the unfinished run in %s", folder.location)
    folder.make_dir()
    (folder / "plugins").delete()
    for plugin in config.plugins:
        (folder / "plugins" / f"{plugin.name}.py").write_bytes(plugin.text)
    (folder / "config.yaml").write_bytes(to_yaml(config).encode())
    return folder


def _check_resumable(folder: Store, config: Config) -> None:
    remedy = "Pass --overwrite true to delete it, or another --output_dir."
    if (folder / "summary.json").exists():
        raise ValueError(f"--output_dir {folder.location} holds a finished run. {remedy}")
    if not config.run.resume:
        raise ValueError(f"--output_dir {folder.location} holds an unfinished run, and --resume is false. {remedy}")
    before = yaml.safe_load((folder / "config.yaml").read_bytes())
    now = config.to_dict() | {"rlhf_type": config.algorithm.name}
    changed = {
        name: (before.get(name), now[name]) for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]
    }
    before_plugins = {file.name.removesuffix(".py"): file.read_bytes() for file in (folder / "plugins").list()}
    plugins = {plugin.name: plugin.text for plugin in config.plugins}
    if before_plugins != plugins:
        edited = " (its text has changed)" if before_plugins.keys() == plugins.keys() else ""
        changed["plugin"] = (" ".join(before_plugins) or None, (" ".join(plugins) or "None") + edited)
    batches = _global_batch(before), config.global_batch_size
    if batches[0] != batches[1]:
        changed["batch_size x gradient_accumulation_steps x num_workers"] = batches
    if changed:
        lines = "".join(f"\n  {name}: {old} -> {new}" for name, (old, new) in changed.items())
        raise ValueError(f"--output_dir {folder.location} holds an unfinished run with another configuration:{lines}\n{remedy}")


def _global_batch(values: Mapping[str, Any]) -> int:
    return int(values["batch_size"] * values["gradient_accumulation_steps"] * values["num_workers"])


def write_results(
    folder: Store, config: Config, data: "RunData", summary: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]]
) -> None:
    """Writes report.html and summary.json, which marks the run as finished."""
    held_out = data.held_out or data.training
    dropped: dict[str, int] = {}
    for line in data.training.dropped():
        dropped[line["reason"]] = dropped.get(line["reason"], 0) + 1
    page = render_report(
        title=folder.name,
        config=config.to_dict() | {"rlhf_type": config.algorithm.name},
        summary=summary,
        metrics=read_metrics(folder / "metrics.jsonl"),
        dropped=dropped,
        pairs=_scored_pairs(held_out, data, scores),
        score_name="log-prob per token" if data.spec.responses == "chosen" else "reward",
    )
    (folder / "report.html").write_bytes(page.encode())
    (folder / "summary.json").write_json(dict(summary))


def _scored_pairs(held_out: Any, data: "RunData", scores: Mapping[str, Mapping[str, float]]) -> Sequence[ScoredPair]:
    """The scored held-out pairs with texts and images, as the report shows them."""
    ids = held_out.index()["id"].to_pylist()
    rows = [row for row, pair_id in enumerate(ids) if pair_id in scores][:REPORTED_PAIRS]
    tokenizer = data.spec.tokenizer
    pairs = []
    for line in held_out.reader().read(rows).to_pylist():
        score = scores[line["id"]]
        pairs.append(
            ScoredPair(
                id=line["id"],
                prompt=tokenizer.decode(line["prompt_ids"], skip_special_tokens=True).strip(),
                chosen=tokenizer.decode(line["chosen_ids"], skip_special_tokens=True).strip(),
                rejected=tokenizer.decode(line["rejected_ids"], skip_special_tokens=True).strip(),
                images=tuple(line["images"]),
                reward_chosen=_reward(score, line, "chosen"),
                reward_rejected=_reward(score, line, "rejected"),
                tokens_chosen=len(line["chosen_ids"]),
                tokens_rejected=len(line["rejected_ids"]),
            )
        )
    return pairs


def _reward(score: Mapping[str, float], row: Mapping[str, Any], side: str) -> float:
    """A response's reward; without rewards its log-prob per token; nan where the row has no such response."""
    if f"rewards/{side}" in score:
        return score[f"rewards/{side}"]
    return score[f"logps/{side}"] / len(row[f"{side}_ids"]) if f"logps/{side}" in score else math.nan
