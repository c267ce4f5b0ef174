"""A sweep with Ray Tune on the quickstart's task: which beta and gamma SimPO needs, found in minutes on two cores.

The trials share the encoded records, and processes that take one trial after another; ASHA stops the worse ones. Prints the
table in Markdown and ends with the sweep's page.
"""

import argparse
import json
import time
from pathlib import Path

import stages
from stages import stage

METRIC = "eval_accuracy/per_token"
"""Compares across beta, which scales rewards and margins but not this."""

SPACE = ("beta=loguniform:0.5:10", "simpo_gamma=uniform:0:2")
FLAGS = (
    *("--rlhf_type", "simpo", "--cpo_alpha", 0.1, "--search", *SPACE, "--metric", METRIC, "--scheduler", "asha"),
    *(*stages.ONE_WORKER, "--eval_steps", 10, "--report_to", "tensorboard", "--overwrite", "false"),
)


def markdown(folder: Path) -> str:
    """The sweep's table, best first."""
    heads = {"trial": "number", "beta": "beta", "gamma": "simpo_gamma", METRIC: METRIC, "steps": "steps", "": "state"}
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for trial in json.loads((folder / "sweep.json").read_text())["trials"]:
        cells = [trial.get(key) for key in heads.values()]
        lines.append(f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=stages.ROOT / "output" / "sweep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_samples", type=int, default=12)
    options = parser.parse_args()
    folder, started = options.output_dir.resolve(), time.monotonic()
    with stages.cluster():
        task = stages.prepare(folder, options.seed)
        with stage("The sweep"):
            stages.align(task, "tune", "sweep", *FLAGS, "--num_samples", options.num_samples)
    print(f"\n{markdown(folder / 'sweep')}\n\nThe sweep's page: {folder / 'sweep' / 'sweep.html'}")
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
