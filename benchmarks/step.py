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
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine_facts, markdown_table, show, spread, write_json
from sides import LORA_RANK, AlgorithmName, Job, Rayalign, Side, make_side, sides_of
from synthetic import Shape, draw_pairs, save_model
from transformers.utils import logging as transformers_logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
"""Absolute up to a loss of 1, relative above. float32: sums in another order. bfloat16: a token's log-probability is off by a
few hundredths, and the loss adds up some hundred; each side is about 2e-2 from its own loss in float32."""

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.5e-1}
"""Of the largest entry of any adapter's gradient; in bfloat16 each side is about 5e-2 from its own in float32."""


@dataclass(frozen=True)
class Case:
    """A model, and the responses of one batch in words (chosen, rejected) of each pair."""

    shape: Shape
    responses: tuple[tuple[int, int], ...]
    gradient_checkpointing: bool = False

    def job(self, folder: Path, algorithm: AlgorithmName, *, dtype: torch.dtype, device: torch.device) -> Job:
        """What each side computes a step of; the model is written to the folder."""
        pairs = draw_pairs(self.shape, list(self.responses))
        return Job(save_model(folder, self.shape), pairs, algorithm, self.gradient_checkpointing, dtype, device)


SHORT = Shape(512, 8, 8, vocabulary=32_000, vision_hidden=256, vision_layers=6, tile=84, grid=(1, 2))
MEDIUM = Shape(512, 8, 8, vocabulary=32_000, vision_hidden=256, vision_layers=6, tile=154, grid=(2, 2))
LONG = Shape(512, 8, 8, vocabulary=32_000, vision_hidden=256, vision_layers=6, tile=280, grid=(2, 2))
TINY = Shape(64, 2, 4, vocabulary=1_000, vision_hidden=32, vision_layers=2, tile=28, grid=(2, 2))
RESPONSES = ((150, 60), (105, 195))

CASES = {
    "tiny": Case(TINY, ((8, 5), (4, 9))),
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


def adapter(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def draw_adapter(model: Any) -> None:
    """Gives the adapter weights that make policy and reference differ; with a fresh one they agree and every loss is log 2."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter(model).values():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=generator))


def compare(sides: Mapping[str, Side], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """The loss of each side, and how far it and the gradients are from TRL's; raises SystemExit where the sides do not compute
    the same."""
    losses, gradients = {}, {}
    for name, side in sides.items():
        side.model.zero_grad()
        losses[name] = side.step().item()
        gradients[name] = {parameter: p.grad.float() for parameter, p in adapter(side.model).items()}
    expected = gradients["trl"]
    largest = max(g.abs().max().item() for g in expected.values())
    report = {"trl": {"loss": losses["trl"]}}
    for name in [name for name in sides if name != "trl"]:
        found = gradients[name]
        if set(expected) != set(found):
            raise SystemExit(f"trl and {name} train other weights: {sorted(set(expected) ^ set(found))[:3]}")
        report[name] = {
            "loss": losses[name],
            "loss_difference": abs(losses[name] - losses["trl"]) / max(1.0, abs(losses["trl"])),
            "gradient_difference_of_largest": max((found[n] - expected[n]).abs().max().item() for n in expected) / largest,
        }
        within = report[name]["loss_difference"] <= LOSS_TOLERANCE[dtype]
        if not (within and report[name]["gradient_difference_of_largest"] <= GRADIENT_TOLERANCE[dtype]):
            raise SystemExit(f"The sides do not compute the same, so their speed can't be compared: {json.dumps(report)}")
    return report


def timed(side: Side, device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds of one step."""
    side.model.zero_grad()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    side.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_time(sides: Mapping[str, Side], *, rounds: int, device: torch.device, pairs: int) -> dict[str, Any]:
    """All sides in turn, the first one changing from round to round; ratios are taken within a round.

    A turn is two steps, of which the second counts: in a run a step follows one of its own kind, whose memory it takes over.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        first = number % len(sides)
        for name in [*sides][first:] + [*sides][:first]:
            timed(sides[name], device)
            seconds[name].append(timed(sides[name], device))
    walls = {name: [wall for wall, _ in values] for name, values in seconds.items()}
    cpus = {name: [cpu for _, cpu in values] for name, values in seconds.items()}

    def times_as_fast(of: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        return {name: spread([a / b for a, b in zip(of["trl"], of[name], strict=True)]) for name in sides if name != "trl"}

    return {
        "rounds": rounds,
        "pairs_per_second": {name: spread([pairs / wall for wall in values]) for name, values in walls.items()},
        "step_seconds": {name: spread(values) for name, values in walls.items()},
        "step_cpu_seconds": {name: spread(values) for name, values in cpus.items()},
        "times_as_fast": times_as_fast(walls),
        "times_as_fast_in_cpu_seconds": times_as_fast(cpus),
    }


def peak_of_steps(side: Side, device: torch.device, *, steps: int = 2) -> dict[str, float]:
    """MiB that steps take at their peak, above what model, adapter and batch hold before."""
    side.step()  # weights that lie in a mapped file come to memory when they are first used
    side.model.zero_grad()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        if not Path("/proc/self/clear_refs").exists():
            raise SystemExit("Peak memory is read from /proc, which this system does not have. Pass --no-memory.")
        ctypes.CDLL(None).malloc_trim(0)  # what loading left behind would hide a part of what the step takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _resident_bytes("VmRSS")
    for _ in range(steps):
        side.model.zero_grad()
        side.step()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident_bytes("VmHWM")
    return {"before_mib": round(before / 2**20, 1), "step_peak_mib": round((peak - before) / 2**20, 1)}


def _resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_memory(side: str, case: str, algorithm: AlgorithmName, arguments: argparse.Namespace) -> dict[str, float]:
    """A side's peak in a process of its own, which loads nothing of the other side."""
    command = [sys.executable, __file__, "--memory_of", side, "--case", case, "--algorithm", algorithm]
    command += ["--threads", str(arguments.threads), "--device", arguments.device, "--dtype", arguments.dtype]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def run_case(name: str, algorithm: AlgorithmName, arguments: argparse.Namespace) -> dict[str, Any]:
    case, dtype, device = CASES[name], DTYPES[arguments.dtype], torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        job = case.job(Path(temporary) / "model", algorithm, dtype=dtype, device=device)
        ours = Rayalign(job)
        sides: dict[str, Side] = {"trl": make_side("trl", job), "rayalign": ours}
        if algorithm == "dpo":
            sides["rayalign-stored"] = ours.with_stored_reference()
        for side in (ours, sides["trl"]):
            draw_adapter(side.model)
        agreement = compare(sides, dtype)
        seconds = measure_time(sides, rounds=arguments.rounds, device=device, pairs=len(job.pairs))
    image_token = ours.policy.base.config.image_token_id
    report = {
        "case": name,
        "algorithm": algorithm,
        "model": {**asdict(case.shape), "parameters": sum(p.numel() for p in ours.policy.base.parameters())},
        "lora": {"rank": LORA_RANK, "target_modules": "ALL"},
        "gradient_checkpointing": case.gradient_checkpointing,
        "dtype": arguments.dtype,
        "batch": {
            "pairs": len(ours.encoded),
            "prompt_tokens": [len(p.prompt_ids) for p in ours.encoded],
            "image_tokens": [p.prompt_ids.count(image_token) for p in ours.encoded],
            "chosen_tokens": [len(p.chosen_ids) for p in ours.encoded],
            "rejected_tokens": [len(p.rejected_ids) for p in ours.encoded],
        },
        "agreement": agreement,
        "time": seconds,
    }
    del ours, sides, side
    gc.collect()
    if arguments.memory:
        memory = {side: measure_memory(side, name, algorithm, arguments) for side in sides_of(algorithm)}
        theirs = memory["trl"]["step_peak_mib"]
        ratios = {s: round(theirs / max(m["step_peak_mib"], 0.1), 2) for s, m in memory.items() if s != "trl"}
        report["memory"] = {**memory, "times_less_memory": ratios}
    return report


def table_of(cases: Sequence[Mapping[str, Any]]) -> str:
    """A line for each of our ways to compute each case's step."""
    header = ["case", "prompt (image) tokens", "response tokens", "our side", "TRL, pairs/s", "ours, pairs/s", "times as fast"]
    header += ["in processor time", "TRL, step's peak", "our step's peak", "times less memory"]
    rows = []
    for case in cases:
        batch, seconds, memory = case["batch"], case["time"], case.get("memory")
        responses = batch["chosen_tokens"] + batch["rejected_tokens"]
        for side in seconds["times_as_fast"]:
            row = [
                f"{case['algorithm']}, {case['case']}",
                f"{max(batch['prompt_tokens'])} ({max(batch['image_tokens'])})",
                f"{min(responses)}-{max(responses)}",
                side,
                show(seconds["pairs_per_second"]["trl"]),
                show(seconds["pairs_per_second"][side]),
                show(seconds["times_as_fast"][side]),
                show(seconds["times_as_fast_in_cpu_seconds"][side]),
            ]
            if memory:
                row += [f"{memory[s]['step_peak_mib']:.0f} MiB" for s in ("trl", side)]
                row += [f"{memory['times_less_memory'][side]:.3g}"]
            else:
                row += ["-", "-", "-"]
            rows.append(row)
    return markdown_table(header, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: medium for cpo and orpo, all but tiny for dpo")
    parser.add_argument(
        "--algorithm", nargs="+", choices=DEFAULT_CASES, help="default: dpo for the cases that are named, else all of them"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory as well")
    parser.add_argument("--output", type=Path, help="default: results/step.json, or results/step-bfloat16.json")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    arguments.output = arguments.output or RESULTS / ("step.json" if arguments.dtype == "float32" else "step-bfloat16.json")
    arguments.algorithm = arguments.algorithm or (["dpo"] if arguments.case else [*DEFAULT_CASES])
    return arguments


def main() -> None:
    arguments = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # TRL and peft still use the older of transformers' two names.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*importing from 'trl.experimental'")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        (name,), (algorithm,), device = arguments.case, arguments.algorithm, torch.device(arguments.device)
        with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
            job = CASES[name].job(Path(temporary) / "model", algorithm, dtype=DTYPES[arguments.dtype], device=device)
            measured = peak_of_steps(make_side(arguments.memory_of, job), device)
        print(json.dumps(measured))
        return
    facts = machine_facts(threads=arguments.threads)
    if arguments.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    cases = []
    for algorithm in arguments.algorithm:
        for name in arguments.case or DEFAULT_CASES[algorithm]:
            cases.append(run_case(name, algorithm, arguments))
            write_json(arguments.output, {"machine": facts, "cases": cases})
    print(table_of(cases))
    if "dpo" in arguments.algorithm:
        print("\nrayalign-stored has the reference's log-probabilities in its batch; reference.py measures the pass for them.")


if __name__ == "__main__":
    main()
