"""One DPO step that computes its reference against one whose batch brings it along, and the pass that computes it beforehand.

    python benchmarks/reference.py                       # short, medium, medium-checkpointing
    python benchmarks/reference.py --case tiny           # a smoke test

The batches, models and adapters are those of step.py, in which the vision tower is frozen: a step that computes its reference
shares the images' features with it, the pass has to make them. The pass is the work of its actors, without their start. It has
paid after so many epochs: what it takes over what it spares in one. Processor seconds, on one thread.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import markdown_table, show, spread
from sides import Rayalign
from step import CASES, DEFAULT_CASES, draw_adapter, timed
from torch import Tensor
from transformers.utils import logging as transformers_logging

from rayalign.reference.precompute import score


class Timed:
    """Something to time as a step of this model."""

    def __init__(self, model: Any, step: Callable[[], Tensor]) -> None:
        self.model, self.step = model, step


def measure(name: str, rounds: int, device: torch.device) -> list[str]:
    """One line of the table; raises SystemExit where the two losses differ."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        side = Rayalign(case.job(Path(temporary) / "model", "dpo", dtype=torch.float32, device=device))
    draw_adapter(side.model)
    logps = score(side.policy, side.encoded, side.batch)
    flat = [logp for pair in logps for logp in (*pair.chosen, *pair.rejected)]
    stored = replace(side.batch, reference_logps=torch.tensor(flat, device=device))

    def step_with_stored() -> Tensor:
        loss = side.algorithm.loss(side.policy, stored, side.counts).loss
        loss.backward()
        return loss.detach()

    def pass_over_the_batch() -> Tensor:
        score(side.policy, side.encoded, side.batch)
        return torch.zeros((), device=device)

    losses = side.step(), step_with_stored()
    if abs(losses[0] - losses[1]) > 1e-5:  # float32
        raise SystemExit(f"The two steps do not compute the same loss: {losses}")
    ways = {"computed": side, "stored": Timed(side.model, step_with_stored), "pass": Timed(side.model, pass_over_the_batch)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, each in ways.items():
            wall, processor = timed(each, device)
            seconds[way].append(wall if device.type == "cuda" else processor)
    rounds_of = list(zip(seconds["computed"], seconds["stored"], seconds["pass"], strict=True))
    return [
        name,
        *(show(spread([len(side.encoded) / second for second in seconds[way]])) for way in ways),
        show(spread([computed / with_stored for computed, with_stored, _ in rounds_of])),
        show(spread([once / (computed - with_stored) for computed, with_stored, once in rounds_of])),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(DEFAULT_CASES["dpo"]))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    header = [
        "case",
        "reference computed, pairs/s",
        "stored, pairs/s",
        "the pass, pairs/s",
        "times as fast",
        "paid after epochs",
    ]
    print(markdown_table(header, [measure(name, arguments.rounds, torch.device(arguments.device)) for name in arguments.case]))


if __name__ == "__main__":
    main()
