"""Runs whose processes are killed again and again, at moments drawn by a seed, and the verdict on what they leave.

    python -m tests.soak.storm --kills 100 --folder build/soak       # `make soak`; over an hour on two cores
    python -m tests.soak.storm --kills 6 --variants lora --folder build/soak

Each variant is run once undisturbed. A stormy run of it prepares its records and its reference anew, is killed some eight times
from preparation to export, is started again where its command died, and must end with the same weights, metrics and files.
Runs are kept in `storm.jsonl` of the folder: the same command goes on where it was left.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak.processes import Nodes
from tests.soak.verdict import differences
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model

STEPS = 48
COMMON = (
    *("--num_workers", 2, "--batch_size", 2, "--gradient_accumulation_steps", 2, "--dataset_test_ratio", 0.1),
    *("--learning_rate", 1e-3, "--max_steps", STEPS, "--logging_steps", 1, "--save_steps", 4, "--eval_steps", 6),
    *("--precompute_ref_log_probs", "true", "--max_failures", 10, "--save_total_limit", 3),
)
VARIANTS: dict[str, tuple[object, ...]] = {
    "lora": (),
    "full": ("--tuner_type", "full"),
    "fsdp": ("--strategy", "fsdp"),
    "fsdp full": ("--strategy", "fsdp", "--tuner_type", "full"),
}
MOMENTS = {
    "preparation": "Data: encoding",
    "reference": "Reference: computing",
    "start": "Starting 2 train workers",
    "training": "Step ",
    "evaluation": "Evaluating ",
    "save": "Saving the checkpoint",
    "export": "Writing the model",
}
"""What the log says as each begins."""
ANYWHERE = ("driver", "node", "everything")
VICTIMS = {
    "preparation": (*ANYWHERE, "data task"),
    "reference": (*ANYWHERE, "data task"),
    **dict.fromkeys(("start", "training", "evaluation", "save", "export"), (*ANYWHERE, "train worker", "controller")),
}
LONGEST_WAIT = 300
"""Seconds within which each next moment must come."""


@dataclass(frozen=True)
class Kill:
    """What is killed, how many seconds after the log has told of a moment so many times since the last kill."""

    moment: str
    victim: str
    times: int
    seconds: float
    choice: int


def kills_of(run: int, seed: int) -> list[Kill]:
    """One kill of each stage, and four while it trains."""
    draw = random.Random(f"{seed}/{run}")
    moments = ["preparation", "reference", "start", *draw.choices(["training", "evaluation", "save"], k=4), "export"]

    def kill(moment: str) -> Kill:
        times = draw.randint(2, 9) if moment == "training" else 1
        return Kill(moment, draw.choice(VICTIMS[moment]), times, draw.uniform(0, 0.6), draw.randrange(100))

    return [kill(moment) for moment in moments]


@dataclass
class Run:
    """A command that is killed and started again, and its log."""

    nodes: Nodes
    words: Sequence[object]
    folder: Path
    process: "subprocess.Popen[str] | None" = None
    starts: int = 0
    seen: int = 0
    """How much of the present log came before the last kill."""
    findings: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.starts += 1
        self.seen = 0
        self.process = self.nodes.head.start(*self.words, log=self.log)

    @property
    def log(self) -> Path:
        return self.folder.parent / f"log{self.starts}.txt"

    def new_text(self) -> str:
        return self.log.read_text(errors="replace")[self.seen :]

    def wait_for(self, condition: Callable[[str], bool]) -> bool:
        """Whether the log came to say so; otherwise the command ended, well or not."""
        deadline = time.monotonic() + LONGEST_WAIT
        while not condition(self.new_text()):
            if self.process.poll() is not None:
                return condition(self.new_text())
            if time.monotonic() > deadline:
                raise SystemExit(f"Nothing more after {LONGEST_WAIT} s in {self.log}:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)
        return True

    def kill(self, kill: Kill) -> bool:
        """Whether there was something to kill."""
        if kill.victim in ("driver", "everything"):
            self.process.kill()
            self.process.wait()
        if kill.victim == "everything":
            self.nodes.kill()
            self.nodes.start()
        elif kill.victim == "node":
            self.seen = len(self.log.read_text(errors="replace"))
            self.nodes.kill_node(kill.choice)
        elif kill.victim != "driver":
            pids = self.nodes.pids(kill.victim)
            if not pids:
                return False
            self.seen = len(self.log.read_text(errors="replace"))
            os.kill(pids[kill.choice % len(pids)], 9)
        if kill.victim in ("driver", "everything"):
            self.start()
        return True


def storm(nodes: Nodes, words: Sequence[object], folder: Path, kills: Sequence[Kill]) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs a command through kills to its end: what was killed, with the seconds to the next step, and what went wrong."""
    run = Run(nodes, words, folder)
    run.start()
    done: list[dict[str, Any]] = []
    for kill in kills:
        mark = MOMENTS[kill.moment]
        if not run.wait_for(lambda text, mark=mark, times=kill.times: text.count(mark) >= times):  # type: ignore[misc]
            if run.process.returncode == 0:
                break  # it came to its end before this moment could come again
            run.findings.append(f"ended by itself with {run.process.returncode}: {last_line(run.log)}")
            run.start()
            continue
        time.sleep(kill.seconds)
        if run.process.poll() is not None:
            break
        began = time.monotonic()
        if not run.kill(kill):
            continue
        record = {"moment": kill.moment, "victim": kill.victim}
        if kill.moment in ("training", "evaluation", "save") and run.wait_for(trains_again):
            record["seconds"] = round(time.monotonic() - began, 1)
        done.append(record)
        print("  ", record, flush=True)
    while run.process.wait(timeout=LONGEST_WAIT) != 0:
        run.findings.append(f"ended by itself with {run.process.returncode}: {last_line(run.log)}")
        if len(run.findings) > 5:
            break
        run.start()
    return done, run.findings


def trains_again(text: str) -> bool:
    """Whether a log tells of a step after a new start of the training. (Lines of the start before may come late.)"""
    return MOMENTS["training"] in text.partition("Training DPO from step")[2]


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/soak"), help="where runs and storm.jsonl are kept")
    parser.add_argument("--kills", type=int, default=100, help="kills in all, those of storm.jsonl among them")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments and the victims")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "storm.jsonl"
    told = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    with Nodes({"RAYALIGN_LOG_COLORS": "0"}) as nodes:
        while sum(len(run["kills"]) for run in told) < arguments.kills:
            number = len(told)
            variant = arguments.variants[number % len(arguments.variants)]
            told.append(stormy_run(nodes, folder, variant, number, arguments.seed))
            with results.open("a") as lines:
                lines.write(json.dumps(told[-1]) + "\n")
    print(table(told))
    return int(any(run["findings"] for run in told))


def stormy_run(nodes: Nodes, folder: Path, variant: str, number: int, seed: int) -> dict[str, Any]:
    """One run of a variant through its kills, and what differs from the run that was left alone."""
    model, records = inputs(folder)
    calm = folder / f"undisturbed {variant}"
    if not (calm / "done").exists():
        shutil.rmtree(calm, ignore_errors=True)
        calm.mkdir()
        print(f"{variant}, undisturbed", flush=True)
        _, findings = storm(nodes, words_for(variant, model, records, calm), calm / "run", [])
        if findings:
            raise SystemExit(f"The run that nobody killed: {findings}")
        (calm / "done").touch()
    place = folder / f"stormy {number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    print(f"{variant}, run {number}", flush=True)
    kills, findings = storm(nodes, words_for(variant, model, records, place), place / "run", kills_of(number, seed))
    findings += differences(calm / "run", place / "run")
    print("  ", findings or "equal to the run that was left alone", flush=True)
    if not findings:
        shutil.rmtree(place)
    return {"variant": variant, "run": number, "kills": kills, "findings": findings}


def inputs(folder: Path) -> tuple[Path, Path]:
    """A tiny model and 400 records in two tasks, for all runs."""
    model, data = folder / "llava", folder / "data"
    if not (folder / "inputs").exists():
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(data, ignore_errors=True)
        save_tiny_model(model)
        write_rows(data, 400, seed=1, extra_lines=("{broken", '{"query": "no answers"}'))
        (folder / "inputs").touch()
    return model, data / "train.jsonl"


def words_for(variant: str, model: Path, records: Path, place: Path) -> list[object]:
    paths = ("--model", model, "--dataset", records, "--output_dir", place / "run", "--cache_dir", place / "cache")
    return ["pipelines/dpo.py", *paths, *COMMON, *VARIANTS[variant]]


def table(told: Sequence[dict[str, Any]]) -> str:
    kills = [kill for run in told for kill in run["kills"]]
    lines = [f"{len(kills)} kills in {len(told)} runs; {sum(bool(run['findings']) for run in told)} runs with findings", ""]
    lines += ["| killed | " + " | ".join(MOMENTS) + " | seconds to the next step, median (most) |"]
    lines += ["|" + " --- |" * (len(MOMENTS) + 2)]
    for victim in sorted({kill["victim"] for kill in kills}):
        own = [kill for kill in kills if kill["victim"] == victim]
        at = Counter(kill["moment"] for kill in own)
        seconds = [kill["seconds"] for kill in own if "seconds" in kill]
        took = f"{statistics.median(seconds):.0f} ({max(seconds):.0f})" if seconds else "-"
        lines.append(f"| {victim} | " + " | ".join(str(at[moment] or "-") for moment in MOMENTS) + f" | {took} |")
    lines += [f"run {run['run']} ({run['variant']}): {finding}" for run in told for finding in run["findings"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
