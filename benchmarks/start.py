"""What passes between the command and the first step: `pipelines/dpo.py` on a tiny model, against the floor.

    python benchmarks/start.py                     # a minute a round on two cores
    python benchmarks/start.py --rounds 3

The floor is a bare TorchTrainer of as many workers that load the same model with transformers and peft: what Ray, torch and
transformers cost whoever starts them. Cold: nothing is prepared; prepared: the records are encoded. Each is a command of its
own with a Ray of its own. Processor seconds are summed over all processes of a command by what they are.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from job import ROOT
from measuring import machine_facts, parser_of, ratios, show, spread, table, write_json
from synthetic import RECORDS_CASES, save_model, write_records

LOOK_SECONDS = 0.1
KINDS = ("floor", "cold", "prepared")
MARKS = {
    "flags read": r"Ray: starting",
    "Ray started": r"Results will be in",
    "records encoded": r"Data: \d+ records",
    "workers asked for": r"Starting \d+ train worker",
    "worker's loop begins": r"Loading |worker loop",
    "model loaded": r"Training DPO from step|model loaded",
    "first step": r"Step \d+/\d+",
    "done": r"Done: \d+ steps|fit done",
}
"""What a line of the log tells of the start."""

PARTS = ("start.py", "dpo.py", "default_worker.py", "gcs_server", "runtime_env", "dashboard", "raylet", "agent", "monitor")
"""What a process is called by, where Ray has not named it: the first word that its command holds."""


def floor(model: str, workers: int) -> None:
    """The floor's own process."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    ray.init(address="local", num_cpus=workers + 1, include_dashboard=True, logging_level="WARNING")
    sys.stdout.write("Results will be in\n")

    def loop(settings: dict[str, Any]) -> None:
        sys.stdout.write("worker loop\n")
        import peft  # noqa: F401
        from transformers import AutoModelForImageTextToText

        AutoModelForImageTextToText.from_pretrained(settings["model"])
        sys.stdout.write("model loaded\n")

    scaling = ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1})
    sys.stdout.write("Starting 2 train workers\n")
    with tempfile.TemporaryDirectory() as folder:
        run = ray.train.RunConfig(name="floor", storage_path=folder)
        TorchTrainer(loop, train_loop_config={"model": model}, scaling_config=scaling, run_config=run).fit()
    sys.stdout.write("fit done\n")


def kind_of(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    if name := re.match(r"ray::([\w.]+)", words):
        return f"ray::{name[1]}"
    return next((part for part in PARTS if part in words), Path(words.partition(" ")[0]).name or "-")


class ProcessorTime:
    """Processor seconds of a command's processes by their kind, looked at while they run."""

    def __init__(self, pid: int) -> None:
        self._root, self._seen, self._ended = psutil.Process(pid), {}, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for process in processes:
                try:
                    times, key = process.cpu_times(), (process.pid, process.create_time())
                    name = kind_of(process)
                    # An idle process of Ray takes the name of what it did last.
                    if name != "ray::IDLE" or key not in self._seen:
                        self._seen[key] = (name, times.user + times.system)
                    else:
                        self._seen[key] = (self._seen[key][0], times.user + times.system)
                except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                    continue

    def total(self) -> Counter[str]:
        self._ended.set()
        self._thread.join()
        sums: Counter[str] = Counter()
        for name, seconds in self._seen.values():
            sums[name] += seconds
        return sums


def run_command(command: Sequence[str], folder: Path) -> dict[str, Any]:
    settings = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    settings |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    began = time.time()
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch = ProcessorTime(process.pid)
    assert process.stdout is not None
    marks: dict[str, float] = {}
    lines = []
    for line in process.stdout:
        lines.append(line)
        for name, pattern in MARKS.items():
            if name not in marks and re.search(pattern, line):
                marks[name] = time.time() - began
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(lines[-30:])}")
    marks["exit"] = time.time() - began
    return {"marks": marks, "processor": dict(watch.total())}


def measure(kind: str, folder: Path, arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    if kind == "floor":
        words = ["--floor", str(folder / "model"), "--num_workers", str(arguments.num_workers)]
        return run_command([sys.executable, __file__, *words], folder)
    flags: dict[str, Any] = {
        "model": folder / "model",
        "dataset": folder / "data" / "pairs.jsonl",
        "output_dir": folder / f"{kind}{number}",
        "cache_dir": folder / f"cache{number}",
        "max_steps": 3,
        "logging_steps": 1,
        "num_workers": arguments.num_workers,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "eval_on_start": "false",
        "eval_answers": 0,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return run_command([sys.executable, str(ROOT / "pipelines" / "dpo.py"), *words], folder)


def tables_of(found: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    def seconds(kind: str, mark: str) -> str:
        values = [run["marks"][mark] for run in found[kind] if mark in run["marks"]]
        return f"{median(values):.1f}" if values else "-"

    def processor(kind: str, name: str) -> str:
        return f"{median([run['processor'].get(name, 0.0) for run in found[kind]]):.1f}"

    names = sorted({name for runs in found.values() for run in runs for name in run["processor"]})
    sums = {kind: [sum(run["processor"].values()) for run in runs] for kind, runs in found.items()}
    marks = {"seconds until": lambda mark: mark} | {k: lambda mark, k=k: seconds(k, mark) for k in found}
    parts = {"processor seconds": lambda name: name} | {k: lambda name, k=k: processor(k, name) for k in found}
    whole = {"": lambda kind: kind, "processor seconds in all": lambda kind: show(spread(sums[kind]))}
    return "\n\n".join([table(marks, [*MARKS, "exit"]), table(parts, names), table(whole, [*found])])


def main() -> None:
    parser = parser_of(__doc__, output="start.json", rounds=1)
    parser.add_argument("--records", type=int, default=600)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--floor", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.floor:
        floor(arguments.floor, arguments.num_workers)
        return
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in arguments.kinds}
    facts = machine_facts(threads=1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, case = Path(temporary), RECORDS_CASES["tiny"]
        save_model(folder / "model", case.shape)
        write_records(folder / "data", pairs=arguments.records, words=case.words)
        for number in range(arguments.rounds):
            for kind in arguments.kinds:
                found[kind].append(measure(kind, folder, arguments, number))
    # The floor ends where a model is loaded; a run's first step comes right behind that.
    of_floor = [run["marks"]["model loaded"] for run in found.get("floor", ())]
    over = {
        kind: ratios([run["marks"]["first step"] for run in found[kind]], of_floor)
        for kind in ("cold", "prepared")
        if of_floor and found.get(kind)
    }
    write_json(arguments.output, {"machine": facts, "records": arguments.records, "runs": found, "first_step_over_floor": over})
    print(tables_of(found))
    print("\n" + "\n".join(f"first step, {kind}: {show(ratio)} times the floor" for kind, ratio in over.items()))


if __name__ == "__main__":
    main()
