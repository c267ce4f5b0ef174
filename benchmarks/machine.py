"""Facts of the machine that a measurement belongs to, and how results are written."""

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import rayalign

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "ray")


def machine_facts(*, threads: int) -> dict[str, Any]:
    """What a reader must know to compare figures; the load is other processes' and ours, over the last minute."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {"rayalign": rayalign.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "date": datetime.date.today().isoformat(),
    }


def spread(values: Sequence[float], *, digits: int = 4) -> dict[str, float]:
    """Median and range."""
    return {
        name: float(f"{value:.{digits}g}")
        for name, value in (("median", median(values)), ("min", min(values)), ("max", max(values)))
    }


def show(values: dict[str, float], *, unit: str = "") -> str:
    """`2.91 (2.72-3.05)`"""
    return f"{values['median']:.3g}{unit} ({values['min']:.3g}-{values['max']:.3g})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
