"""One DPO step that computes its reference against one whose batch brings it along, and the pass that computes it beforehand.

    python benchmarks/reference.py                       # all cases but tiny
    python benchmarks/reference.py --case tiny           # a smoke test

The batches, models and adapters are those of step.py, in which the vision tower is frozen: a step that computes its reference
shares the images' features with it, the pass has to make them. The pass is the work of its actors, without their start. It has
paid after so many epochs: what it takes over what it spares in one. Processor seconds, on one thread; wall seconds on a GPU.
"""

import argparse
import contextlib
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import in_turn, machine_facts, parser_of, ratios, seconds_of, set_up, show, spread, table, write_json
from sides import Rayalign, draw_adapter
from step import CASES, DEFAULT_CASES

from rayalign.reference.scoring import score


def run_case(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises SystemExit where the two losses differ."""
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        side = Rayalign(CASES[name].job(Path(temporary), device=arguments.device, threads=arguments.threads))
    draw_adapter(side.model)
    stored = side.with_stored_reference()
    losses = side.step(), stored.step()
    if not abs(losses[0] - losses[1]) <= 1e-5:  # float32
        raise SystemExit(f"The two steps do not compute the same loss: {losses}")

    def seconds(action: Any) -> float:
        side.model.zero_grad()
        gc.collect()
        taken = seconds_of(action, device)
        return taken.wall if device.type == "cuda" else taken.cpu

    ways = {
        "computed": lambda: seconds(side.step),
        "stored": lambda: seconds(stored.step),
        "pass": lambda: seconds(lambda: score(side.policy, side.encoded.pairs, side.batch)),
    }
    taken = in_turn(ways, rounds=arguments.rounds)
    spared = [computed - stored for computed, stored in zip(taken["computed"], taken["stored"], strict=True)]
    pairs = len(side.encoded.pairs)
    return {
        "case": name,
        "pairs_per_second": {way: spread([pairs / value for value in values]) for way, values in taken.items()},
        "times_as_fast": ratios(taken["computed"], taken["stored"]),
        "paid_after_epochs": ratios(taken["pass"], spared),
    }


def main() -> None:
    parser = parser_of(__doc__, output="reference.json", rounds=5, threads=1, on_device=True)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(DEFAULT_CASES["dpo"]))
    arguments = parser.parse_args()
    set_up(arguments.threads)
    facts = machine_facts(threads=arguments.threads, device=arguments.device)
    cases = [run_case(name, arguments) for name in arguments.case]
    write_json(arguments.output, {"machine": facts, "cases": cases})
    columns = {
        "case": lambda case: case["case"],
        "reference computed, pairs/s": lambda case: show(case["pairs_per_second"]["computed"]),
        "stored, pairs/s": lambda case: show(case["pairs_per_second"]["stored"]),
        "the pass, pairs/s": lambda case: show(case["pairs_per_second"]["pass"]),
        "times as fast": lambda case: show(case["times_as_fast"]),
        "paid after epochs": lambda case: show(case["paid_after_epochs"]),
    }
    print(table(columns, cases))


if __name__ == "__main__":
    main()
