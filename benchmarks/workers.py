"""One train worker against two, a thread each: what the second one is worth.

    python benchmarks/workers.py                                             # nine minutes on two idle cores
    python benchmarks/workers.py --case tiny --rounds 1 --steps 8 --warm_up_steps 2    # a smoke test, mostly starts

Runs with one and with two workers take turns, on the same prepared pairs with the same global batch. Two cores share caches,
memory and often more, so that two jobs at once are not twice one: what the machine itself takes of that is measured by bare
loops (`runs.py`), one alone and two at once, which have nothing to say to each other.
"""

import contextlib
import dataclasses
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from measuring import in_turn, machine_facts, parser_of, ratios, set_up, show, spread, table, write_json
from runs import Lines, bare_at_once, check_alike, make_job, rate, through_ray, warm
from synthetic import RECORDS_CASES

from rayalign.config.config import Config
from rayalign.data.prepare import RunData

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
    runs: list[Lines] = []

    def by_workers(count: int) -> float:
        lines, _ = through_ray(with_workers(config, count), data, name=f"run{len(runs)}")
        runs.append(lines)
        return rate(lines, warm_up_steps)

    def bare(copies: int) -> float:
        return sum(rate(lines, warm_up_steps) for lines in bare_at_once(with_workers(config, 1), data, copies=copies))

    turns = {
        "one": partial(by_workers, 1),
        "two": partial(by_workers, 2),
        "alone": partial(bare, 1),
        "at once": partial(bare, 2),
    }
    rates = in_turn(turns, rounds=rounds)
    return {
        "loss_difference": check_alike(runs),
        "pairs_per_second": {name: spread(values) for name, values in rates.items()},
        "two_workers_of_one": ratios(rates["two"], rates["one"]),
        "two_bare_loops_of_one": ratios(rates["at once"], rates["alone"]),
        "data_wait_fraction": spread([line["data_wait_fraction"] for lines in runs for line in warm(lines, warm_up_steps)]),
    }


def main() -> None:
    parser = parser_of(__doc__, output="workers.json", rounds=2)
    parser.add_argument("--case", choices=RECORDS_CASES, default="small", help="a model and the responses' lengths")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    parser.add_argument("--warm_up_steps", type=int, default=12, help="steps that do not count: Ray Data starts beside them")
    arguments = parser.parse_args()
    set_up(threads=1)
    facts = machine_facts(threads=1)
    case = RECORDS_CASES[arguments.case]
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        flags = {"batch_size": 4, "max_steps": arguments.steps}
        config, data = make_job(Path(temporary), case.shape, case.words, flags)
        report = measure(config, data, rounds=arguments.rounds, warm_up_steps=arguments.warm_up_steps)
    job = {"case": dataclasses.asdict(case), "steps": arguments.steps, "pairs_per_step": GLOBAL_BATCH}
    write_json(arguments.output, {"machine": facts, "job": job, "rounds": arguments.rounds, **report})
    rates = report["pairs_per_second"]
    columns = {
        "": lambda line: line[0],
        "one, pairs/s": lambda line: show(rates[line[1]]),
        "two, pairs/s": lambda line: show(rates[line[2]]),
        "two / one": lambda line: show(report[line[3]]),
    }
    lines = [
        ("rayalign, workers", "one", "two", "two_workers_of_one"),
        ("bare loops, nothing between them", "alone", "at once", "two_bare_loops_of_one"),
    ]
    print(table(columns, lines))


if __name__ == "__main__":
    main()
