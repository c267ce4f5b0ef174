"""Every algorithm on the quickstart's task: does it learn the preferences, and more than going on with SFT would teach?

For each seed all algorithms start from the same SFT model, see the same pairs, and are run by pipelines/*.py on a local Ray,
with one worker: starting it is most of the time. Prints a table in Markdown and writes every figure to compare.json in the
output folder.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

import stages
from judge import load, preference, ranking, sample_pairs, score, shuffled
from stages import stage
from task import Pairs, write_labelled, write_pairs

SEEDS = (0, 1, 2)
ROUNDS = 3
"""Pairs that are sampled of every training picture for the runs on more pairs: about six times as many as usual."""


class Run(NamedTuple):
    """A line of the table: which pipeline makes it, with which flags, from which records of the task's folder."""

    title: str
    pipeline: str
    flags: tuple[object, ...] = ()
    records: str = "pairs.jsonl"


MORE_STEPS = ("--max_steps", 16 * stages.STEPS)
MPO = ("--loss_type", "sigmoid", "bco_pair", "sft", "--loss_weights", 0.8, 0.2, 1, "--rpo_alpha", 0)
CONTROLS = {
    "sft": Run("SFT continued (control)", "sft"),
    "sft_fast": Run("SFT continued, twice the rate (control)", "sft", ("--learning_rate", 2 * stages.RATE)),
    "sft_more": Run("SFT continued, 6 x the pairs, 16 x the steps (control)", "sft", MORE_STEPS, "more_pairs.jsonl"),
}
# Chosen on seeds 10 and 11, like the controls' rates; steps and rate are the same for all, except where it is said. The chosen
# answers are only half right, so that what imitates them (NLL, mDPO's anchor, its preference for the true picture) weighs less
# than usual. A policy's log-probabilities begin with what the model sees; a value head begins from zero and has to learn from
# the pairs alone to look, so it needs more of them.
RUNS = {
    **CONTROLS,
    "dpo": Run("DPO", "dpo", ("--beta", 0.1, "--rpo_alpha", 0.1)),
    "mdpo": Run("mDPO", "mdpo", ("--beta", 0.1, "--conditional_weight", 0.3, "--anchor_weight", 0.1)),
    "mpo": Run("MPO", "dpo", ("--beta", 0.3, *MPO)),
    "cpo": Run("CPO", "cpo", ("--beta", 0.1, "--cpo_alpha", 0.1)),
    "orpo": Run("ORPO", "orpo", ("--beta", 3)),
    "simpo": Run("SimPO", "simpo", ("--beta", 2, "--simpo_gamma", 1, "--cpo_alpha", 0.1)),
    "kto": Run("KTO, on the pairs", "kto", ("--beta", 0.1)),
    "kto_labelled": Run("KTO, on one labelled response of each pair", "kto", ("--beta", 0.1), "labelled.jsonl"),
    "rm": Run("RM, 4 x the steps", "rm", ("--max_steps", 4 * stages.STEPS)),
    "rm_more": Run("RM, 6 x the pairs, 16 x the steps", "rm", MORE_STEPS, "more_pairs.jsonl"),
}
Figures = dict[str, float]


def judged(task: stages.Task, run: str) -> Figures:
    """The figures of a run's model on held-out handwriting; a reward model ranks by its value head and doesn't answer."""
    folder = task.folder / run / "model"
    model, other, pairs = load(task.folder / "base", folder), shuffled(task.held_out_pixels, task.seed), task.held_out_pairs
    head = folder / "value_head.safetensors"
    if head.is_file():
        share, margin = ranking(model, head, task.processor, task.held_out_pixels, pairs)
        return {"preference": share, "shuffled": ranking(model, head, task.processor, other, pairs)[0], "margin": margin}
    scores = score(model, task.processor, task.held_out_pixels, task.held_out.digits, pairs)
    return {**scores._asdict(), "shuffled": preference(model, task.processor, other, pairs)[0]}


def more_pairs(task: stages.Task) -> Pairs:
    """Pairs of the SFT model's own answers, several for each training picture."""
    sft = load(task.folder / "base", task.folder / "sft" / "model")
    votes = {"temperature": stages.TEMPERATURE, "wrong_votes": stages.WRONG_VOTES}
    rounds = [
        sample_pairs(
            sft, task.processor, task.training_pixels, task.training.digits, seed=1000 + ROUNDS * task.seed + k, **votes
        )
        for k in range(ROUNDS)
    ]
    return Pairs(*(np.concatenate(sides) for sides in zip(*rounds, strict=True)))


def compare(folder: Path, seed: int) -> dict[str, Figures]:
    """The figures of one seed's start and of all runs, by run."""
    task = stages.prepare(folder, seed)
    write_labelled(folder / "labelled.jsonl", task.training, task.training_pairs, 30 + seed)
    with stage("More pairs"):
        write_pairs(folder / "more_pairs.jsonl", task.training, more_pairs(task))
    figures = {"text_only": {"preference": task.text_only}, "start": judged(task, "sft")}
    for name, run in RUNS.items():
        with stage(f"Seed {seed}: {run.title}"):
            seconds = stages.align(task, run.pipeline, f"run_{name}", *stages.ONE_WORKER, *run.flags, records=run.records)
            figures[name] = {**judged(task, f"run_{name}"), "seconds": seconds}
            print(json.dumps(figures[name]), flush=True)
    return figures


def markdown(seeds: Mapping[str, Mapping[str, Figures]]) -> str:
    """The table: mean (lowest to highest) over the seeds, and on how many a run beats start, controls and a coin."""
    bars = [max(0.5, *(figures[name]["preference"] for name in ("start", *CONTROLS))) for figures in seeds.values()]
    titles = {"text_only": "a classifier that sees only the text", "start": "SFT, where all start"}
    titles |= {name: run.title for name, run in RUNS.items()}
    lines = [
        "| | preference accuracy | pictures shuffled | margin | digits right | above start and controls | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in titles.items():
        figures = [of_seed[name] for of_seed in seeds.values()]
        places = {"preference": 3, "shuffled": 2, "margin": 2, "digits": 2}
        cells = [_spread([line[key] for line in figures if key in line], digits) for key, digits in places.items()]
        wins = sum(line["preference"] > bar for line, bar in zip(figures, bars, strict=True))
        above = f"{wins} of {len(figures)}" if name in RUNS and name not in CONTROLS else ""
        seconds = f"{mean(line['seconds'] for line in figures):.0f}" if name in RUNS else ""
        lines.append(f"| {' | '.join([title, *cells, above, seconds])} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], places: int) -> str:
    if not values:
        return ""
    middle, low, high = (f"{value:.{places}f}" for value in (mean(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=stages.ROOT / "output" / "compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--show", type=Path, help="Print the table of an earlier run's compare.json, and run nothing.")
    options = parser.parse_args()
    if options.show:
        print(markdown(json.loads(options.show.read_text())["seeds"]))
        return
    folder, started = options.output_dir.resolve(), time.monotonic()
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in ("rayalign", "ray", "torch", "transformers", "peft")},
        "steps": stages.STEPS,
        "learning_rate": stages.RATE,
        "runs": {name: run._asdict() for name, run in RUNS.items()},
        "seeds": {},
    }
    with stages.cluster():
        for seed in options.seeds:
            result["seeds"][str(seed)] = compare(folder / f"seed_{seed}", seed)
            result["seconds"] = round(time.monotonic() - started)
            (folder / "compare.json").write_text(json.dumps(result, indent=2) + "\n")
            print(f"\n{markdown(result['seeds'])}\n", flush=True)
    print("Mean (lowest to highest) over the seeds; RM ranks by its value head, and its margin is one of rewards.")
    print(f"{time.monotonic() - started:.0f} s in all; every figure is in {folder / 'compare.json'}")


if __name__ == "__main__":
    main()
