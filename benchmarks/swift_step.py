"""One DPO step against that of ms-swift's trainer: pairs per second and peak memory, on the same pairs, weights and adapter.

    python -m venv swift; swift/bin/pip install torch==2.13.0 "ms-swift==4.6.*"       # the torch of this environment
    python benchmarks/swift_step.py --swift_python swift/bin/python                  # short, medium
    python benchmarks/swift_step.py --swift_python swift/bin/python --case tiny      # a smoke test, mostly imports

ms-swift wants older versions of transformers and TRL, so each side is a process under its own Python, which takes a step
whenever it is asked to, in turn with the other. ms-swift's step is `training_step` of a run of `swift rlhf`, held at its first
batch: image features, reference and policy forward, loss, backward. Tokens, losses and gradients of the two sides are compared
first; where they differ, nothing is measured.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import sides
import torch
from machine import RESULTS, machine_facts, markdown_table, show, spread, write_json
from PIL import Image
from safetensors.torch import load_file, save_file
from sides import BETA, LORA_ALPHA, LORA_RANK
from step import MEDIUM, SHORT, TINY, adapter, draw_adapter, peak_of_steps
from synthetic import RawPair, Shape, draw_pairs, save_model
from torch import Tensor
from transformers.utils import logging as transformers_logging

CPU = torch.device("cpu")

LOSS_TOLERANCE = 1e-4
"""Absolute, on losses of order 1: float32, sums in another order."""

GRADIENT_TOLERANCE = 1e-3
"""Of the largest entry of any adapter's gradient."""

SWIFT_MODEL_TYPE = "llava1_6_mistral_hf"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>' if loop.first else '' }}[INST] {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ ' [/INST]' if message['role'] == 'user' else '</s>' }}{% endfor %}"
)
"""The prompt that ms-swift writes for models of this type, by a template of its own: it doesn't read the model's."""


@dataclass(frozen=True)
class Case:
    """A model, and the responses of one batch in words (chosen, rejected) of each pair."""

    shape: Shape
    responses: tuple[tuple[int, int], ...]


RESPONSES = ((80, 60), (60, 85))

CASES = {
    "tiny": Case(TINY, ((8, 5), (4, 9))),
    "short": Case(SHORT, RESPONSES),
    "medium": Case(MEDIUM, RESPONSES),
}
DEFAULT_CASES = ("short", "medium")

Row = dict[str, list[int]]
"""Token ids of a `prompt` and its `response`."""


class Side(sides.Side, Protocol):
    """A way to compute the step that can tell its rows."""

    def rows(self) -> list[Row]:
        """The chosen rows of all pairs, then the rejected ones."""
        ...


class Rayalign(sides.Rayalign):
    """step.py's, of the records in a folder."""

    def __init__(self, folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        pairs = []
        for line in lines:
            question, chosen = (message["content"].removeprefix("<image>") for message in line["messages"])
            pairs.append(RawPair(question, Image.open(line["images"][0]), chosen, line["rejected_response"]))
        super().__init__(sides.Job(folder / "model", pairs, "dpo", False, torch.float32, CPU))

    def rows(self) -> list[Row]:
        chosen = [{"prompt": list(p.prompt_ids), "response": list(p.chosen_ids)} for p in self.encoded]
        return chosen + [{"prompt": list(p.prompt_ids), "response": list(p.rejected_ids)} for p in self.encoded]


class MsSwift:
    """The step of a run of `swift rlhf`, with the batch that its data loader brought."""

    def __init__(self, model: Any, batch: dict[str, Any], training_step: Callable[[], Any]) -> None:
        self.model = model
        self.batch = batch
        self.training_step = training_step

    def rows(self) -> list[Row]:
        tensors = (self.batch[name] for name in ("input_ids", "labels", "attention_mask"))
        rows = []
        for ids, labels, is_token in zip(*tensors, strict=True):
            counts = labels != -100
            rows.append({"prompt": ids[is_token.bool() & ~counts].tolist(), "response": ids[counts].tolist()})
        return rows

    def step(self) -> Tensor:
        loss: Tensor = self.training_step()
        return loss


def start_rayalign(folder: Path, answer: Callable[[Side], None]) -> None:
    answer(Rayalign(folder))


def start_ms_swift(folder: Path, answer: Callable[[Side], None]) -> None:
    """Starts a training run and answers with its first step; what trainers do before that (hooks, freezing) has been done."""
    from swift.arguments import RLHFArguments  # type: ignore[import-not-found]  # only in its own environment
    from swift.pipelines.train.rlhf import SwiftRLHF  # type: ignore[import-not-found]

    count = len((folder / "pairs.jsonl").read_text().splitlines())
    pipeline = SwiftRLHF(
        RLHFArguments(
            rlhf_type="dpo",
            beta=BETA,
            loss_type="sigmoid",
            model=str(folder / "model"),
            model_type=SWIFT_MODEL_TYPE,
            use_hf=True,
            check_model=False,  # else it asks a model hub for news
            torch_dtype="float32",
            attn_impl="sdpa",
            use_cpu=True,
            tuner_type="lora",
            target_modules=["all-linear"],
            lora_rank=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            lora_dropout=0.0,
            gradient_checkpointing=False,
            vit_gradient_checkpointing=False,
            dataset=[str(folder / "pairs.jsonl")],
            dataset_shuffle=False,
            train_dataloader_shuffle=False,
            dataloader_num_workers=0,
            per_device_train_batch_size=count,
            gradient_accumulation_steps=1,
            max_steps=1,
            output_dir=str(folder / "ms-swift"),
            add_version=False,
            save_strategy="no",
            report_to=["none"],
        )
    )
    start_training = pipeline.train

    def train(trainer: Any) -> None:
        training_step = trainer.training_step

        def first_step(model: Any, batch: dict[str, Any], *others: Any) -> None:
            answer(MsSwift(model, batch, lambda: training_step(model, batch, *others)))
            raise SystemExit  # nothing of the run is wanted but this step

        trainer.training_step = first_step
        start_training(trainer)

    pipeline.train = train
    pipeline.main()


STARTS = {"ms-swift": start_ms_swift, "rayalign": start_rayalign}
PACKAGES = {"ms-swift": ("ms-swift", "torch", "transformers", "peft", "trl"), "rayalign": ("torch", "transformers", "peft")}


def load_adapter(model: Any, file: str) -> None:
    weights, parameters = load_file(file), adapter(model)
    if set(weights) != set(parameters):
        raise SystemExit(f"The two sides train other weights: {sorted(set(weights) ^ set(parameters))[:3]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def timed(side: Side) -> dict[str, float]:
    """Loss, and wall and processor seconds of one step."""
    side.model.zero_grad()
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    loss = side.step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"loss": loss.item(), "wall_seconds": wall, "cpu_seconds": cpu}


def serve(name: str, folder: Path, *, threads: int) -> None:
    """Makes a side and does what lines on stdin say, with a line of JSON in response to each, until there are no more."""
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the responses
    torch.set_num_threads(threads)

    def answer(side: Side) -> None:
        for line in sys.stdin:
            request, _, file = line.strip().partition(" ")
            response: Any = None
            match request:
                case "facts":
                    versions = {package: importlib.metadata.version(package) for package in PACKAGES[name]}
                    parameters = sum(p.numel() for p in side.model.parameters())
                    trained = sum(p.numel() for p in adapter(side.model).values())
                    response = {"versions": versions, "threads": torch.get_num_threads(), "parameters": parameters - trained}
                case "rows":
                    response = side.rows()
                case "draw":
                    draw_adapter(side.model)
                    save_file({n: p.detach().contiguous() for n, p in adapter(side.model).items()}, file)
                case "load":
                    load_adapter(side.model, file)
                case "step":
                    response = timed(side)
                case "gradients":
                    save_file({n: p.grad.contiguous() for n, p in adapter(side.model).items()}, file)
                case "memory":
                    response = peak_of_steps(side, CPU)
                case _:
                    raise ValueError(f"no such request: {line!r}")
            responses.write(json.dumps(response) + "\n")
            responses.flush()

    STARTS[name](folder, answer)


class Process:
    """A side in a process of its own, under the Python that has what it needs."""

    def __init__(self, name: str, python: Path, folder: Path, *, threads: int) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        command = [str(python), __file__, "--side", name, "--folder", str(folder), "--threads", str(threads)]
        caches = {"HF_HOME": str(folder / "cache"), "MODELSCOPE_CACHE": str(folder / "cache")}
        offline = {"HF_HUB_OFFLINE": "1", "USE_HF": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # machine.py asks rayalign for its version, in both environments.
                env={**os.environ, **offline, **caches, "PYTHONPATH": str(Path(__file__).parent.parent)},
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of the requests ends it

    def ask(self, request: str) -> Any:
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


def write_pairs(folder: Path, pairs: Sequence[RawPair]) -> None:
    """The batch as ms-swift's DPO reads it."""
    lines = []
    for number, pair in enumerate(pairs):
        image = folder / f"{number}.png"
        image.write_bytes(pair.image_bytes())
        question = {"role": "user", "content": f"<image>{pair.question}"}
        messages = [question, {"role": "assistant", "content": pair.chosen}]
        lines.append(json.dumps({"messages": messages, "rejected_response": pair.rejected, "images": [str(image)]}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def compare(ours: Process, theirs: Process, folder: Path) -> dict[str, float]:
    """Loss and gradients of both sides; raises SystemExit where they do not compute the same, or not the same tokens."""
    facts = {side.name: side.ask("facts") for side in (ours, theirs)}
    for fact in ("threads", "parameters"):
        if facts[ours.name][fact] != facts[theirs.name][fact]:
            raise SystemExit(f"The two sides have different numbers of {fact}: {facts}")
    if facts[ours.name]["versions"]["torch"] != facts[theirs.name]["versions"]["torch"]:
        raise SystemExit(f"Put the same torch into both environments, to compare what is written on top of it: {facts}")
    for mine, other in zip(ours.ask("rows"), theirs.ask("rows"), strict=True):
        if mine != other:
            raise SystemExit(f"The two sides do not encode pairs alike.\n{ours.name}: {mine}\n{theirs.name}: {other}")
    ours.ask(f"draw {folder / 'adapter.safetensors'}")
    theirs.ask(f"load {folder / 'adapter.safetensors'}")
    losses, gradients = [], []
    for side in (theirs, ours):
        losses.append(side.ask("step")["loss"])
        side.ask(f"gradients {folder / side.name}.safetensors")
        gradients.append(load_file(folder / f"{side.name}.safetensors"))
    expected, found = gradients
    scale = max(g.abs().max().item() for g in expected.values())
    report = {
        "loss_ms_swift": losses[0],
        "loss_rayalign": losses[1],
        "loss_difference": abs(losses[0] - losses[1]),
        "gradient_difference_of_largest": max((found[n] - expected[n]).abs().max().item() for n in expected) / scale,
    }
    within = report["loss_difference"] <= LOSS_TOLERANCE
    if not (within and report["gradient_difference_of_largest"] <= GRADIENT_TOLERANCE):
        raise SystemExit(f"The two sides do not compute the same, so their speed can't be compared: {json.dumps(report)}")
    return report


def measure_time(sides: Sequence[Process], *, rounds: int, pairs: int) -> dict[str, Any]:
    """Both sides in turn, the first one changing from round to round; ratios are taken within a round."""
    steps: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for side in sides:
        side.ask("step")
    for number in range(rounds):
        for side in sides if number % 2 else reversed(sides):
            steps[side.name].append(side.ask("step"))
    walls = {name: [step["wall_seconds"] for step in values] for name, values in steps.items()}
    cpus = {name: [step["cpu_seconds"] for step in values] for name, values in steps.items()}
    return {
        "rounds": rounds,
        "pairs_per_second": {name: spread([pairs / wall for wall in values]) for name, values in walls.items()},
        "step_seconds": {name: spread(values) for name, values in walls.items()},
        "step_cpu_seconds": {name: spread(values) for name, values in cpus.items()},
        "times_as_fast": spread([a / b for a, b in zip(walls["ms-swift"], walls["rayalign"], strict=True)]),
        "times_as_fast_in_cpu_seconds": spread([a / b for a, b in zip(cpus["ms-swift"], cpus["rayalign"], strict=True)]),
    }


def run_case(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name]
    pythons = {"ms-swift": arguments.swift_python, "rayalign": Path(sys.executable)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder / "model", case.shape)
        (folder / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        write_pairs(folder, draw_pairs(case.shape, list(case.responses)))
        image_token = json.loads((folder / "model" / "config.json").read_text())["image_token_index"]

        def start(side: str) -> Process:
            return Process(side, pythons[side], folder, threads=arguments.threads)

        with ExitStack() as stack:
            theirs, ours = (stack.enter_context(start(side)) for side in STARTS)
            agreement = compare(ours, theirs, folder)
            facts, rows = {side.name: side.ask("facts") for side in (theirs, ours)}, ours.ask("rows")
            seconds = measure_time((theirs, ours), rounds=arguments.rounds, pairs=len(case.responses))
        memory: dict[str, dict[str, float]] = {}
        for side in STARTS if arguments.memory else ():
            with start(side) as process:
                process.ask(f"load {folder / 'adapter.safetensors'}")
                memory[side] = process.ask("memory")
    chosen, rejected = rows[: len(case.responses)], rows[len(case.responses) :]
    report = {
        "case": name,
        "model": {**asdict(case.shape), "parameters": facts["rayalign"]["parameters"]},
        "versions": {side: fact["versions"] for side, fact in facts.items()},
        "lora": {"rank": LORA_RANK, "target_modules": "ALL"},
        "gradient_checkpointing": False,
        "dtype": "float32",
        "batch": {
            "pairs": len(chosen),
            "prompt_tokens": [len(row["prompt"]) for row in chosen],
            "image_tokens": [row["prompt"].count(image_token) for row in chosen],
            "chosen_tokens": [len(row["response"]) for row in chosen],
            "rejected_tokens": [len(row["response"]) for row in rejected],
        },
        "agreement": agreement,
        "time": seconds,
    }
    if memory:
        ratio = memory["ms-swift"]["step_peak_mib"] / max(memory["rayalign"]["step_peak_mib"], 0.1)
        report["memory"] = {**memory, "times_less_memory": round(ratio, 2)}
    return report


def table_of(cases: Sequence[dict[str, Any]]) -> str:
    header = ["case", "prompt (image) tokens", "response tokens", "ms-swift, pairs/s", "rayalign, pairs/s", "times as fast"]
    header += ["in processor time", "ms-swift, step's peak", "rayalign, step's peak", "times less memory"]
    rows = []
    for case in cases:
        batch, seconds, memory = case["batch"], case["time"], case.get("memory")
        responses = batch["chosen_tokens"] + batch["rejected_tokens"]
        row = [
            case["case"],
            f"{max(batch['prompt_tokens'])} ({max(batch['image_tokens'])})",
            f"{min(responses)}-{max(responses)}",
            show(seconds["pairs_per_second"]["ms-swift"]),
            show(seconds["pairs_per_second"]["rayalign"]),
            show(seconds["times_as_fast"]),
            show(seconds["times_as_fast_in_cpu_seconds"]),
        ]
        if memory:
            peaks = [memory[side]["step_peak_mib"] for side in STARTS]
            row += [*(f"{peak:.0f} MiB" for peak in peaks), f"{memory['times_less_memory']:.3g}"]
        else:
            row += ["-", "-", "-"]
        rows.append(row)
    return markdown_table(header, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--swift_python", type=Path, help="the Python of an environment with ms-swift")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(DEFAULT_CASES))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory as well")
    parser.add_argument("--output", type=Path, default=RESULTS / "swift_step.json")
    parser.add_argument("--side", choices=STARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.side or arguments.swift_python):
        parser.error("--swift_python is missing")
    if arguments.memory and not Path("/proc/self/clear_refs").exists():
        parser.error("peak memory is read from /proc, which this system does not have; pass --no-memory")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        serve(arguments.side, arguments.folder, threads=arguments.threads)
        return
    transformers_logging.disable_progress_bar()
    facts, cases = machine_facts(threads=arguments.threads), []
    for name in arguments.case:
        cases.append(run_case(name, arguments))
        write_json(arguments.output, {"machine": facts, "cases": cases})
    print(table_of(cases))


if __name__ == "__main__":
    main()
