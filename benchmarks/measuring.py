"""What every benchmark does: read its arguments, take time and memory, take turns, and write what came of it.

A benchmark says what it compares; `synthetic` says on which models and records.
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
from transformers.utils import logging as transformers_logging

import rayalign

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

T = TypeVar("T")
Spread = dict[str, float]
"""`median`, `min` and `max`."""


def parser_of(
    doc: str | None, *, output: str, rounds: int | None = None, threads: int | None = None, on_device: bool = False
) -> argparse.ArgumentParser:
    """The flags that benchmarks have in common: `--output` (a name in results/), and `--rounds`, `--threads` and `--device`
    where they can be chosen."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, help="how often each side has its turn")
    parser.add_argument("--output", type=Path, default=RESULTS / output, help="where the figures go, as JSON")
    if threads:
        parser.add_argument("--threads", type=int, default=threads)
    if on_device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    return parser


def parse_on_device(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a benchmark with --device; an error where that is a GPU and there is none."""
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("There is no GPU here. A rehearsal without one: --device cpu --shape tiny")
    return arguments


def set_up(threads: int) -> None:
    """Threads of this process, and no bars or known warnings between the figures."""
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # TRL and peft still use the older of transformers' two names.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*importing from 'trl.experimental'")


def machine_facts(*, threads: int, device: str = "cpu") -> dict[str, Any]:
    """What a reader must know to compare figures: of packages those that are installed; the load is other processes' and ours,
    over the last minute."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {"rayalign": rayalign.__version__, **installed("torch", "transformers", "peft", "trl", "ray")},
        "date": datetime.date.today().isoformat(),
    }
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        facts |= {"gpu": torch.cuda.get_device_name(), "gpu_memory_gib": round(memory, 1), "cuda": torch.version.cuda}
    return facts


def installed(*packages: str) -> dict[str, str]:
    """The versions of those packages that there are."""
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


class Seconds(NamedTuple):
    """What something took: wall time, and processor time of this process."""

    wall: float
    cpu: float


def seconds_of(action: Callable[[], Any], device: torch.device | None = None) -> Seconds:
    """Until the device has done it, too; what must be collected before is up to the caller."""
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    _synchronize(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()


def in_turn(sides: Mapping[str, Callable[[], T]], *, rounds: int) -> dict[str, list[T]]:
    """What each side returns in each round; another one begins from round to round."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(rounds):
        first = number % len(sides)
        for name in [*sides][first:] + [*sides][:first]:
            found[name].append(sides[name]())
    return found


def peak_memory(action: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Bytes held before and at the action's peak: the allocator's on a GPU, else the process's resident memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return before, torch.cuda.max_memory_allocated()
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        raise SystemExit("Peak memory is read from /proc, which this system does not have. Pass --no-memory.")
    ctypes.CDLL(None).malloc_trim(0)  # what loading left behind would hide a part of what the action takes
    reset.write_text("5")  # the peak starts anew from here
    before = _resident_bytes("VmRSS")
    action()
    return before, _resident_bytes("VmHWM")


def spread(values: Sequence[float], *, digits: int = 4) -> Spread:
    figures = {"median": median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in figures.items()}


def ratios(of: Sequence[float], to: Sequence[float]) -> Spread:
    """Of two sides' values, taken within a round."""
    return spread([a / b for a, b in zip(of, to, strict=True)])


def show(values: Mapping[str, float] | None) -> str:
    """`2.91 (2.72-3.05)`, and `-` for what was not measured."""
    return f"{values['median']:.3g} ({values['min']:.3g}-{values['max']:.3g})" if values else "-"


def table(columns: Mapping[str, Callable[[Any], Any]], rows: Sequence[Any]) -> str:
    """In Markdown: a column for each title, whose function makes a row's cell."""
    lines = [[str(cell(row)) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(columns), ["---"] * len(columns), *lines])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
