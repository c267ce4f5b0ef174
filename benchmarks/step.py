"""One preference step against TRL's: pairs per second and peak memory, on the same pairs, weights and adapter, in one run.

    python benchmarks/step.py                                # DPO on all cases but tiny; CPO and ORPO on medium
    python benchmarks/step.py --case long --dtype bfloat16   # DPO
    python benchmarks/step.py --case tiny --algorithm orpo   # a smoke test, mostly imports

A step is what the trainers do with a batch that lies ready on the device: image features, reference and policy forward, loss,
backward. Collation, the optimizer's update and the reading of data are left out on both sides. Losses and gradients of the
sides (`sides.py`) are compared first; where they differ, nothing is measured. `rayalign-stored` is our step of a batch that
brings the reference's log-probabilities along (`--precompute_ref_log_probs`); the pass that makes them comes once for all
epochs, and reference.py measures it.
"""

import argparse
import contextlib
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

from comparing import Local, answer_requests, measure_memory, report_of, step_parser, table_of
from measuring import DTYPES, RESULTS, machine_facts, set_up, write_json
from sides import AlgorithmName, Case, Job, Rayalign, make_side, sides_of
from synthetic import LONG, MEDIUM, RESPONSES, SHORT, TINY, TINY_RESPONSES

CASES = {
    "tiny": Case(TINY, TINY_RESPONSES),
    "short": Case(SHORT, RESPONSES),
    "medium": Case(MEDIUM, RESPONSES),
    "medium-checkpointing": Case(MEDIUM, RESPONSES, gradient_checkpointing=True),
    "long": Case(LONG, RESPONSES),
    "long-checkpointing": Case(LONG, RESPONSES, gradient_checkpointing=True),
}
DEFAULT_CASES: dict[AlgorithmName, tuple[str, ...]] = {
    "dpo": tuple(name for name in CASES if name != "tiny"),
    "cpo": ("medium",),
    "orpo": ("medium",),
}


def measure_steps(case: Case, job: Job, *, rounds: int) -> dict[str, Any]:
    ours = Rayalign(job)
    sides = {"trl": Local(make_side("trl", job), job), "rayalign": Local(ours, job)}
    if job.algorithm == "dpo":
        sides["rayalign-stored"] = Local(ours.with_stored_reference(), job)
    return report_of(case, job, sides, rounds=rounds)


def run_case(name: str, algorithm: AlgorithmName, arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {"dtype": arguments.dtype, "device": arguments.device, "threads": arguments.threads}
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        job = CASES[name].job(Path(temporary), algorithm=algorithm, **settings)
        report = {"case": name, **measure_steps(CASES[name], job, rounds=arguments.rounds)}
        gc.collect()
        if arguments.memory:
            report["memory"] = measure_memory(__file__, sides_of(algorithm), job)
    return report


def parse_arguments() -> argparse.Namespace:
    parser = step_parser(__doc__, output="step.json", on_device=True)
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: medium for cpo and orpo, all but tiny for dpo")
    parser.add_argument(
        "--algorithm", nargs="+", choices=DEFAULT_CASES, help="default: dpo for the cases that are named, else all of them"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: float32 on cpu, bfloat16 on cuda")
    parser.set_defaults(output=None)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    arguments.output = arguments.output or RESULTS / ("step.json" if arguments.dtype == "float32" else "step-bfloat16.json")
    arguments.algorithm = arguments.algorithm or (["dpo"] if arguments.case else [*DEFAULT_CASES])
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        answer_requests(lambda answer: answer(make_side(arguments.side, arguments.job)), arguments.job)
        return
    set_up(arguments.threads)
    facts = machine_facts(threads=arguments.threads, device=arguments.device)
    cases = []
    for algorithm in arguments.algorithm:
        for name in arguments.case or DEFAULT_CASES[algorithm]:
            cases.append(run_case(name, algorithm, arguments))
            write_json(arguments.output, {"machine": facts, "cases": cases})
    print(table_of(cases, rival="trl", title="TRL"))
    if "dpo" in arguments.algorithm:
        print("\nrayalign-stored has the reference's log-probabilities in its batch; reference.py measures the pass for them.")


if __name__ == "__main__":
    main()
