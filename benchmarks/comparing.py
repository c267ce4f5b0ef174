"""Steps of several sides compared: that they compute the same, how long they take in turn, and how much memory.

A side is a `Local` one, in this process, or a `Remote` one, in a process of its own under the Python that has what it needs,
which does what lines on its stdin say.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measuring import in_turn, installed, parser_of, peak_memory, ratios, seconds_of, set_up, show, spread, table
from safetensors.torch import load_file, save_file
from sides import LORA_RANK, Case, Job, Row, Side, adapter_of, batch_facts, draw_adapter
from torch import Tensor

LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}
"""Absolute up to a loss of 1, relative above. float32: sums in another order. bfloat16: a token's log-probability is off by a
few hundredths, and the loss adds up some hundred; each side is about 2e-2 from its own loss in float32."""

GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 1.5e-1}
"""Of the largest entry of any adapter's gradient; in bfloat16 each side is about 5e-2 from its own in float32."""

Step = dict[str, float]
"""`loss`, and `wall` and `cpu` seconds."""


class Local:
    """A side, its adapter drawn anew."""

    def __init__(self, side: Any, job: Job) -> None:
        self.side: Any = side
        self._device = torch.device(job.device)
        draw_adapter(side.model)

    def facts(self) -> dict[str, Any]:
        trained = sum(p.numel() for p in adapter_of(self.side.model).values())
        parameters = sum(p.numel() for p in self.side.model.parameters()) - trained
        versions = installed("ms-swift", "torch", "transformers", "peft", "trl")
        return {"versions": versions, "threads": torch.get_num_threads(), "parameters": parameters}

    def rows(self) -> list[Row]:
        rows: list[Row] = self.side.rows()
        return rows

    def step(self) -> Step:
        self.side.model.zero_grad()
        gc.collect()
        losses: list[Tensor] = []
        seconds = seconds_of(lambda: losses.append(self.side.step()), self._device)
        return {"loss": losses[0].item(), **seconds._asdict()}

    def gradients(self) -> dict[str, Tensor]:
        """Of the last step."""
        return {name: p.grad.float().contiguous() for name, p in adapter_of(self.side.model).items()}

    def memory(self, *, steps: int = 2) -> dict[str, float]:
        """MiB that steps take at their peak, above what model, adapter and batch hold before."""

        def take_steps() -> None:
            for _ in range(steps):
                self.side.model.zero_grad()
                self.side.step()

        self.side.step()  # weights that lie in a mapped file come to memory when they are first used
        self.side.model.zero_grad()
        before, peak = peak_memory(take_steps, self._device)
        return {"before_mib": round(before / 2**20, 1), "step_peak_mib": round((peak - before) / 2**20, 1)}


class Remote(AbstractContextManager["Remote"]):
    """A side that another process makes when `script` is called with `--side` and `--job`; see `answer_requests`."""

    def __init__(self, script: str, name: str, job: Job, *, python: str = sys.executable) -> None:
        self.name, self._folder = name, Path(job.folder)
        self._log = self._folder / f"{name}.log"
        caches = {"HF_HOME": str(self._folder / "cache"), "MODELSCOPE_CACHE": str(self._folder / "cache")}
        offline = {"HF_HUB_OFFLINE": "1", "USE_HF": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(job.threads)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, script, "--side", name, "--job", json.dumps(asdict(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # measuring.py asks rayalign for its version, in any environment.
                env={**os.environ, **offline, **caches, "PYTHONPATH": str(Path(__file__).parents[1])},
            )

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of the requests ends it

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = self._ask("facts")
        return facts

    def rows(self) -> list[Row]:
        rows: list[Row] = self._ask("rows")
        return rows

    def step(self) -> Step:
        step: Step = self._ask("step")
        return step

    def memory(self) -> dict[str, float]:
        memory: dict[str, float] = self._ask("memory")
        return memory

    def gradients(self) -> dict[str, Tensor]:
        file = self._folder / f"{self.name}.safetensors"
        self._ask(f"gradients {file}")
        return load_file(file)

    def _ask(self, request: str) -> Any:
        """The response to one request; raises SystemExit where the process has come to an end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            end = "\n".join(self._log.read_text().splitlines()[-15:])
            raise SystemExit(f"The side {self.name} ended instead of answering {request!r}. The end of its log:\n{end}")
        return json.loads(line)


def answer_requests(start: Callable[[Callable[[Side], None]], None], job: Job) -> None:
    """Does what lines on stdin say, with a line of JSON in response to each, until there are no more. `start` makes a side and
    hands it over."""
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the responses
    set_up(job.threads)

    def answer(side: Side) -> None:
        local = Local(side, job)
        for line in sys.stdin:
            request, _, file = line.strip().partition(" ")
            response = save_file(local.gradients(), file) if request == "gradients" else getattr(local, request)()
            responses.write(json.dumps(response) + "\n")
            responses.flush()

    start(answer)


def compare(sides: Mapping[str, Local | Remote], dtype: str) -> dict[str, dict[str, float]]:
    """The loss of each side, and how far it and the gradients are from those of the first side, the rival; raises SystemExit
    where the sides do not compute the same."""
    losses, gradients = {}, {}
    for name, side in sides.items():
        losses[name] = side.step()["loss"]
        gradients[name] = side.gradients()
    rival = next(iter(sides))
    expected = gradients[rival]
    largest = max(g.abs().max().item() for g in expected.values())
    report = {rival: {"loss": losses[rival]}}
    for name in [name for name in sides if name != rival]:
        found = gradients[name]
        if set(expected) != set(found):
            raise SystemExit(f"{rival} and {name} train other weights: {sorted(set(expected) ^ set(found))[:3]}")
        loss_difference = abs(losses[name] - losses[rival]) / max(1.0, abs(losses[rival]))
        # torch's max hands a NaN on, Python's loses it.
        gradient_difference = torch.stack([(found[n] - expected[n]).abs().max() for n in expected]).max().item() / largest
        report[name] = {
            "loss": losses[name],
            "loss_difference": loss_difference,
            "gradient_difference_of_largest": gradient_difference,
        }
        # Written so that a NaN is no agreement.
        if not (loss_difference <= LOSS_TOLERANCE[dtype] and gradient_difference <= GRADIENT_TOLERANCE[dtype]):
            raise SystemExit(f"The sides do not compute the same, so their speed can't be compared: {json.dumps(report)}")
    return report


def measure_time(sides: Mapping[str, Local | Remote], *, rounds: int, pairs: int) -> dict[str, Any]:
    """All sides in turn; ratios to the first one, the rival, are taken within a round.

    A turn is two steps, of which the second counts: in a run a step follows one of its own kind, whose memory it takes over.
    """

    def turn_of(side: Local | Remote) -> Callable[[], Step]:
        return lambda: (side.step(), side.step())[1]

    steps = in_turn({name: turn_of(side) for name, side in sides.items()}, rounds=rounds)
    wall, cpu = ({name: [step[clock] for step in of_side] for name, of_side in steps.items()} for clock in ("wall", "cpu"))
    rival, *ours = sides
    return {
        "rounds": rounds,
        "pairs_per_second": {name: spread([pairs / seconds for seconds in wall[name]]) for name in sides},
        "step_seconds": {name: spread(wall[name]) for name in sides},
        "step_cpu_seconds": {name: spread(cpu[name]) for name in sides},
        "times_as_fast": {name: ratios(wall[rival], wall[name]) for name in ours},
        "times_as_fast_in_cpu_seconds": {name: ratios(cpu[rival], cpu[name]) for name in ours},
    }


def report_of(case: Case, job: Job, sides: Mapping[str, Local | Remote], *, rounds: int) -> dict[str, Any]:
    """What was compared, that it is the same, and how long it takes."""
    ours = sides["rayalign"]
    return {
        "algorithm": job.algorithm,
        "model": {**asdict(case.shape), "parameters": ours.facts()["parameters"]},
        "lora": {"rank": LORA_RANK, "target_modules": "ALL"},
        "gradient_checkpointing": job.gradient_checkpointing,
        "dtype": job.dtype,
        "batch": batch_facts(ours.rows(), job.image_token),
        "agreement": compare(sides, job.dtype),
        "time": measure_time(sides, rounds=rounds, pairs=len(job.pairs)),
    }


def measure_memory(script: str, sides: Sequence[str], job: Job, *, pythons: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The peak of each side in a process of its own, which loads nothing of the others; the first side is the rival."""
    memory: dict[str, Any] = {}
    for name in sides:
        with Remote(script, name, job, python=(pythons or {}).get(name, sys.executable)) as side:
            memory[name] = side.memory()
    peaks = {name: max(memory[name]["step_peak_mib"], 0.1) for name in sides}
    rival, *ours = sides
    return {**memory, "times_less_memory": {name: round(peaks[rival] / peaks[name], 2) for name in ours}}


def table_of(cases: Sequence[Mapping[str, Any]], *, rival: str, title: str) -> str:
    """A line for each of our ways to compute each case's step; `title` is the rival's in words."""
    lines = [(case, case["batch"], case["time"], side) for case in cases for side in case["time"]["times_as_fast"]]

    def responses(line: Any) -> str:
        counts = line[1]["chosen_tokens"] + line[1]["rejected_tokens"]
        return f"{min(counts)}-{max(counts)}"

    def peak(line: Any, side: str) -> str:
        memory = line[0].get("memory")
        return f"{memory[side]['step_peak_mib']:.0f} MiB" if memory else "-"

    def times_less(line: Any) -> str:
        memory = line[0].get("memory")
        return f"{memory['times_less_memory'][line[3]]:.3g}" if memory else "-"

    return table(
        {
            "case": lambda line: f"{line[0]['algorithm']}, {line[0]['case']}",
            "prompt (image) tokens": lambda line: f"{max(line[1]['prompt_tokens'])} ({max(line[1]['image_tokens'])})",
            "response tokens": responses,
            "our side": lambda line: line[3],
            f"{title}, pairs/s": lambda line: show(line[2]["pairs_per_second"][rival]),
            "ours, pairs/s": lambda line: show(line[2]["pairs_per_second"][line[3]]),
            "times as fast": lambda line: show(line[2]["times_as_fast"][line[3]]),
            "in processor time": lambda line: show(line[2]["times_as_fast_in_cpu_seconds"][line[3]]),
            f"{title}, step's peak": lambda line: peak(line, rival),
            "our step's peak": lambda line: peak(line, line[3]),
            "times less memory": times_less,
        },
        lines,
    )


def step_parser(doc: str | None, *, output: str, on_device: bool) -> argparse.ArgumentParser:
    """The flags of the benchmarks of steps, and those by which a `Remote` side is made."""
    parser = parser_of(doc, output=output, rounds=5, threads=1, on_device=on_device)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory as well")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=lambda text: Job(**json.loads(text)), help=argparse.SUPPRESS)
    return parser
