"""Runs whose processes are killed again and again, at moments drawn by a seed, and the verdict on what they leave.

    python -m tests.soak.storm --kills 100 --folder build/soak       # a part of `make soak`
    python -m tests.soak.storm --kills 6 --variants lora --folder build/soak

Each variant is run once undisturbed. A stormy run of it prepares its records and its reference anew, is killed some sixteen
times from preparation to export, is started again where its command died, and must end with the same weights, metrics and
files.
Runs are kept in `storm.jsonl` of the folder: the same command goes on where it was left.
"""

import argparse
import functools
import json
import os
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

from tests.soak.kills import BEFORE_TRAINING, MOMENTS, OF_TRAINING, Kill, kills_of
from tests.soak.processes import Nodes
from tests.soak.runs import VARIANTS, inputs_in
from tests.soak.verdict import differences, furthest_of

LONGEST_WAIT = 300
"""Seconds within which each next moment must come."""

SECONDS_TO_COME = 10
"""Within which a process that is to be killed must be there."""

MOST_FINDINGS = 5


@dataclass
class Run:
    """A command that is killed and started again, and its log. `command`: what is started, by the number of the start."""

    nodes: Nodes
    command: Callable[[int], Sequence[object]]
    folder: Path
    process: "subprocess.Popen[str] | None" = None
    starts: int = 0
    seen: int = 0
    """How much of the present log came before the last kill."""
    findings: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.starts += 1
        self.seen = 0
        self.process = self.nodes.head.start(*self.command(self.starts), log=self.log)

    @property
    def log(self) -> Path:
        return self.folder / f"log{self.starts}.txt"

    @property
    def is_done(self) -> bool:
        """Whether the command has ended well, also one that was killed with its last words."""
        return self.process.returncode == 0 or (self.starts > 1 and "holds a finished run" in last_line(self.log))

    def start_after_end(self) -> bool:
        """Starts a command that has ended by itself again, as long as there is hope; returns whether it is not done."""
        if self.is_done:
            return False
        self.findings.append(f"start {self.starts} ended by itself with {self.process.returncode}: {last_line(self.log)}")
        if len(self.findings) > MOST_FINDINGS:
            return False
        self.start()
        return True

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
            self.start()
            return True
        is_node = kill.victim in ("node", "raylet")
        pids = [] if is_node else self.pids_of(kill.victim)
        if not is_node and not pids:
            return False
        self.seen = len(self.log.read_text(errors="replace"))
        if is_node:
            self.nodes.kill_node(kill.choice, only_raylet=kill.victim == "raylet")
        else:
            os.kill(pids[kill.choice % len(pids)], 9)
        return True

    def pids_of(self, victim: str) -> list[int]:
        """Waits for some, as data tasks are at work for moments and actors begin after the log says so."""
        deadline = time.monotonic() + SECONDS_TO_COME
        while not (found := self.nodes.pids(victim)) and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return found


def storm(run: Run, kills: Sequence[Kill]) -> list[dict[str, Any]]:
    """Takes a run through kills to its end; returns what was killed, with the seconds to the next step."""
    run.start()
    done: list[dict[str, Any]] = []
    in_training = False
    for kill, following in zip(kills, [*kills, None][1:], strict=True):
        while not run.wait_for(functools.partial(has_come_or_gone, kill)):
            if not run.start_after_end():
                return done  # before this moment could come again
        if not has_come(kill, run.new_text()):
            continue
        time.sleep(kill.seconds)
        if run.process.poll() is not None:
            continue
        began = time.monotonic()
        if not run.kill(kill):
            print(f"   no {kill.victim} in {kill.moment}", flush=True)
            continue
        record = {"moment": kill.moment, "victim": kill.victim}
        in_training = kill.moment in OF_TRAINING or (in_training and kill.moment == "recovery")
        waits = in_training and kill.victim != "helper" and (following is None or following.moment != "recovery")
        if waits and run.wait_for(trains_again):  # without a helper it may go on as if nothing were
            record["seconds"] = round(time.monotonic() - began, 1)
        done.append(record)
        print("  ", record, flush=True)
    while run.process.wait(timeout=LONGEST_WAIT) != 0:
        if not run.start_after_end():
            break
    return done


def has_come(kill: Kill, text: str) -> bool:
    """Whether a log tells of the moment of a kill."""
    return text.count(MOMENTS[kill.moment]) >= kill.times


def has_come_or_gone(kill: Kill, text: str) -> bool:
    """The same, or of later ones, so that the moment is over."""
    return has_come(kill, text) or (kill.moment in BEFORE_TRAINING and MOMENTS["training"] in text)


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


def stormy_run(nodes: Nodes, folder: Path, name: str, number: int, seed: int) -> dict[str, Any]:
    """One run of a variant through its kills, and what differs from the run that was left alone."""
    variant = VARIANTS[name]
    calm = undisturbed(nodes, folder, name)
    place = folder / f"stormy {number}"
    print(f"{name}, run {number}", flush=True)
    began = time.monotonic()
    run = Run(nodes, variant.command(inputs_in(folder), place), emptied(place))
    kills = storm(run, kills_of(number, seed))
    findings = [*run.findings, *differences(calm / "run", place / "run", is_exact=variant.is_exact)]
    seconds = round(time.monotonic() - began)
    told = {"variant": name, "run": number, "kills": kills, "findings": findings, "seconds": seconds}
    if not variant.is_exact:
        told["furthest weights"] = furthest_of(calm / "run", place / "run")
    print(f"   {seconds} s;", findings or "equal to the run that was left alone", told.get("furthest weights", ""), flush=True)
    if not findings:
        shutil.rmtree(place)
    return told


def undisturbed(nodes: Nodes, folder: Path, name: str) -> Path:
    """The place of a variant's run that was left alone, which is run now if it wasn't before."""
    place = folder / f"undisturbed {name}"
    if not (place / "done").exists():
        print(f"{name}, undisturbed", flush=True)
        run = Run(nodes, VARIANTS[name].command(inputs_in(folder), place), emptied(place))
        storm(run, [])
        if run.findings:
            raise SystemExit(f"The run that nobody killed: {run.findings}")
        (place / "done").touch()
    return place


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def table(told: Sequence[dict[str, Any]]) -> str:
    kills = [kill for run in told for kill in run["kills"]]
    minutes = sum(run["seconds"] for run in told) / 60
    bad = sum(bool(run["findings"]) for run in told)
    lines = [f"{len(kills)} kills in {len(told)} runs and {minutes:.0f} minutes; {bad} runs with findings", ""]
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
