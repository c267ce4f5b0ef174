"""Ray's overhead: the same training job through `rayalign.training.driver.fit` on one worker and as a bare loop in one process.

    python benchmarks/overhead.py                             # eight minutes on two idle cores
    python benchmarks/overhead.py --rounds 1 --steps 8 --warm_up_steps 2     # a smoke test, mostly imports and starts

Runs (`runs.py`) alternate, bare, Ray, bare, Ray, bare: a Ray run is compared with the two bare ones around it, and what bare
ones differ by among themselves says how small a cost can be seen. What differs is Ray: its processes beside the worker, Ray
Data's fetches instead of plain reads, torch.distributed. Start-up is not in these figures.
"""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

from measuring import machine_facts, parser_of, set_up, show, spread, table, write_json
from runs import Lines, bare_at_once, check_alike, cpu_seconds_per_step, make_job, rate, through_ray, warm
from synthetic import Shape

SHAPE = Shape(128, 4, 4, vocabulary=2_000, vision_hidden=64, vision_layers=2, tile=56, grid=(2, 2))
WORDS = (30, 50)


def report_of(bare: Sequence[Lines], by_ray: Sequence[Lines], beside: Sequence[float], warm_up_steps: int) -> dict[str, Any]:
    kinds = {"bare": bare, "ray": by_ray}
    rates = {kind: [rate(lines, warm_up_steps) for lines in runs] for kind, runs in kinds.items()}
    cpu = {kind: [cpu_seconds_per_step(lines, warm_up_steps) for lines in runs] for kind, runs in kinds.items()}
    waits = {
        kind: mean(line["data_wait_fraction"] for lines in runs for line in warm(lines, warm_up_steps))
        for kind, runs in kinds.items()
    }
    # The bare runs before and after each of Ray's.
    around = {measure: [mean(both) for both in pairwise(of["bare"])] for measure, of in (("wall", rates), ("cpu", cpu))}
    return {
        "loss_difference": check_alike([*bare, *by_ray]),
        "pairs_per_second": {kind: spread(values) for kind, values in rates.items()},
        "cpu_seconds_per_step": {kind: spread(values) for kind, values in cpu.items()},
        "overhead": {
            "wall": spread([alone / ray - 1 for alone, ray in zip(around["wall"], rates["ray"], strict=True)]),
            "cpu": spread([ray / alone - 1 for alone, ray in zip(around["cpu"], cpu["ray"], strict=True)]),
        },
        "bare_runs_differ_by": {
            "wall": spread([abs(a / b - 1) for a, b in pairwise(rates["bare"])]),
            "cpu": spread([abs(a / b - 1) for a, b in pairwise(cpu["bare"])]),
        },
        "cores_beside": spread(beside),
        "data_wait_fraction": {kind: round(value, 5) for kind, value in waits.items()},
    }


def table_of(report: Mapping[str, Any]) -> str:
    def line(name: str, figure: str, measure: str) -> list[str]:
        shown = [show(report[figure][kind]) for kind in ("bare", "ray")]
        return [name, *shown, *(show_percent(report[key][measure]) for key in ("overhead", "bare_runs_differ_by"))]

    lines = [
        line("pairs/s, wall time", "pairs_per_second", "wall"),
        line("processor seconds a step", "cpu_seconds_per_step", "cpu"),
        ["waiting for data", *(f"{report['data_wait_fraction'][kind]:.2%}" for kind in ("bare", "ray")), "-", "-"],
        ["other processes of Ray, cores", "-", show(report["cores_beside"]), "-", "-"],
    ]
    header = ["", "bare loop", "one Ray worker", "Ray costs", "bare runs differ by"]
    return table({title: itemgetter(i) for i, title in enumerate(header)}, lines)


def show_percent(values: Mapping[str, float]) -> str:
    return f"{values['median']:.1%} ({values['min']:.1%}-{values['max']:.1%})".replace("(-", "(−").replace("--", "-−")


def main() -> None:
    parser = parser_of(__doc__, output="overhead.json", rounds=3)  # Ray runs; there is one bare run more
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each run")
    parser.add_argument("--warm_up_steps", type=int, default=40, help="steps that do not count: Ray Data starts beside them")
    arguments = parser.parse_args()
    set_up(threads=1)
    facts = machine_facts(threads=1)
    bare: list[Lines] = []
    by_ray: list[Lines] = []
    beside: list[float] = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        flags = {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": arguments.steps}
        config, data = make_job(Path(temporary), SHAPE, WORDS, flags)
        bare += bare_at_once(config, data)
        for number in range(arguments.rounds):
            lines, cores = through_ray(config, data, name=str(number))
            by_ray.append(lines)
            beside.append(cores)
            bare += bare_at_once(config, data)
    job = {
        "shape": dataclasses.asdict(SHAPE),
        "response_words": WORDS,
        "steps": arguments.steps,
        "warm_up_steps": arguments.warm_up_steps,
        "pairs_per_step": config.global_batch_size,
        "rounds": arguments.rounds,
    }
    report = {"machine": facts, "job": job, **report_of(bare, by_ray, beside, arguments.warm_up_steps)}
    write_json(arguments.output, report)
    print(table_of(report))


if __name__ == "__main__":
    main()
