"""One train worker against two, a thread each: what the second one is worth.

    python benchmarks/workers.py                                             # nine minutes on two idle cores
    python benchmarks/workers.py --case tiny --rounds 1 --steps 8 --warm_up_steps 2    # a smoke test, mostly starts

Runs with one and with two workers alternate, on the same prepared pairs with the same global batch. Two cores share caches,
memory and often more, so that two jobs at once are not twice one: what the machine itself takes of that is measured by bare
loops (`overhead.py`), one alone and two at once, which have nothing to say to each other.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from job import CASES
from machine import RESULTS, machine_facts, markdown_table, show, spread, write_json
from overhead import Lines, bare_at_once, check_alike, make_config, own_cluster, quiet_libraries, rate, through_ray, warm

from rayalign.config.config import Config
from rayalign.data.prepare import RunData, prepare_run

GLOBAL_BATCH = 8


def with_workers(config: Config, num_workers: int) -> Config:
    """The same job with its global batch dealt to so many workers."""
    accumulation = GLOBAL_BATCH // (config.optimizer.batch_size * num_workers)
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, gradient_accumulation_steps=accumulation),
        cluster=dataclasses.replace(config.cluster, num_workers=num_workers, cpus_per_worker=1),
    )


def measure(config: Config, data: RunData, *, rounds: int, warm_up_steps: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"one": [], "two": [], "alone": [], "at once": []}
    waits: list[float] = []
    runs: list[Lines] = []
    for number in range(rounds):
        for count, name in ((1, "one"), (2, "two")):
            lines, _ = through_ray(with_workers(config, count), data, name=f"{name}{number}")
            runs.append(lines)
            rates[name].append(rate(lines, warm_up_steps))
            waits += [line["data_wait_fraction"] for line in warm(lines, warm_up_steps)]
        for copies, name in ((1, "alone"), (2, "at once")):
            bare = bare_at_once([with_workers(config, 1)] * copies, data)
            rates[name].append(sum(rate(lines, warm_up_steps) for lines in bare))
    return {
        "loss_difference": check_alike(runs),
        "pairs_per_second": {name: spread(values) for name, values in rates.items()},
        "two_workers_of_one": spread([two / one for one, two in zip(rates["one"], rates["two"], strict=True)]),
        "two_bare_loops_of_one": spread([two / one for one, two in zip(rates["alone"], rates["at once"], strict=True)]),
        "data_wait_fraction": spread(waits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, default="small", help="a model of job.py and the responses' lengths")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    parser.add_argument("--warm_up_steps", type=int, default=12, help="steps that do not count: Ray Data starts beside them")
    parser.add_argument("--output", type=Path, default=RESULTS / "workers.json")
    arguments = parser.parse_args()
    quiet_libraries()
    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray sets it for a worker with one CPU
    facts = machine_facts(threads=1)
    case = CASES[arguments.case]
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        config = make_config(Path(temporary), case.shape, case.words, {"batch_size": 4, "max_steps": arguments.steps})
        with own_cluster(config):
            data = prepare_run(config)
        report = measure(config, data, rounds=arguments.rounds, warm_up_steps=arguments.warm_up_steps)
    job = {"case": dataclasses.asdict(case), "steps": arguments.steps, "pairs_per_step": GLOBAL_BATCH}
    write_json(arguments.output, {"machine": facts, "job": job, "rounds": arguments.rounds, **report})
    rates = report["pairs_per_second"]
    rows = [
        ["rayalign, workers", show(rates["one"]), show(rates["two"]), show(report["two_workers_of_one"])],
        [
            "bare loops, nothing between them",
            show(rates["alone"]),
            show(rates["at once"]),
            show(report["two_bare_loops_of_one"]),
        ],
    ]
    print(markdown_table(["", "one, pairs/s", "two, pairs/s", "two / one"], rows))


if __name__ == "__main__":
    main()
