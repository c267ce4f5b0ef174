"""One DPO step against TRL's: pairs per second and peak memory, on the same pairs, weights and adapter, in one run.

    python benchmarks/step.py                       # short, medium, medium-checkpointing
    python benchmarks/step.py --case tiny           # a smoke test, mostly imports

A step is what the trainers do with a batch that lies ready on the device: image features, reference and policy forward, loss,
backward. Collation, the optimizer's update and the reading of data are left out on both sides. Losses and gradients of the two
sides are compared first; where they differ, nothing is measured.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from machine import RESULTS, machine_facts, markdown_table, show, spread, write_json
from synthetic import RawPair, Shape, draw_pairs, save_model
from torch import Tensor
from transformers.utils import logging as transformers_logging

BETA = 0.1
LORA_RANK, LORA_ALPHA = 8, 16

LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Absolute, on losses of order 1. float32: sums in another order; bfloat16: three digits, and log-probabilities add them up."""

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of the largest entry of any adapter's gradient."""


@dataclass(frozen=True)
class Case:
    """A model, and the responses of one batch in words (chosen, rejected) of each pair."""

    shape: Shape
    responses: tuple[tuple[int, int], ...]
    gradient_checkpointing: bool = False


MEDIUM = Shape(512, 8, 8, vocabulary=32_000, vision_hidden=256, vision_layers=6, tile=154, grid=(2, 2))
SHORT = Shape(512, 8, 8, vocabulary=32_000, vision_hidden=256, vision_layers=6, tile=84, grid=(1, 2))
TINY = Shape(64, 2, 4, vocabulary=1_000, vision_hidden=32, vision_layers=2, tile=28, grid=(2, 2))
RESPONSES = ((80, 60), (60, 85))

CASES = {
    "tiny": Case(TINY, ((8, 5), (4, 9))),
    "short": Case(SHORT, RESPONSES),
    "medium": Case(MEDIUM, RESPONSES),
    "medium-checkpointing": Case(MEDIUM, RESPONSES, gradient_checkpointing=True),
}
DEFAULT_CASES = ("short", "medium", "medium-checkpointing")


class Side(Protocol):
    """A way to compute the step. `model` holds the adapter under the same names on both sides."""

    model: Any

    def step(self) -> Tensor:
        """Loss [] of the batch; gradients are added to the adapter's."""
        ...


class Rayalign:
    """Encoder, batch, policy and DPO's step, as a train worker runs them."""

    def __init__(self, folder: Path, case: Case, pairs: Sequence[RawPair], device: torch.device) -> None:
        from rayalign.algorithms import DPO
        from rayalign.batch import assemble
        from rayalign.config import ModelConfig, TunerConfig
        from rayalign.encode import Encoder, EncoderSpec, image_processing
        from rayalign.loading import load_policy
        from rayalign.models import ModelSource
        from rayalign.plan import StepTotals
        from rayalign.records import Message, build_record

        spec = EncoderSpec(str(folder), responses="both")
        encoder = Encoder(spec)
        self.encoded = []
        for i, pair in enumerate(pairs):
            images = [pair.image_bytes()]
            question = [Message(role="user", content=pair.question)]
            record = build_record(id=str(i), messages=question, images=images, chosen=pair.chosen, rejected=pair.rejected)
            self.encoded.append(encoder.encode(record, images))
        batch = assemble(self.encoded, layout=spec.layout, process_images=image_processing(spec))
        self.batch = batch.to(device)
        self.totals = StepTotals(
            pairs=len(self.encoded),
            responses=2 * len(self.encoded),
            chosen_tokens=sum(len(p.chosen_ids) for p in self.encoded),
            rejected_tokens=sum(len(p.rejected_ids) for p in self.encoded),
        )
        self.policy = load_policy(
            ModelSource(str(folder)),
            model=ModelConfig(gradient_checkpointing=case.gradient_checkpointing),
            tuner=TunerConfig(lora_target_modules=("ALL",), lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA),
            device=device,
            needs=DPO().needs,
        )
        self.model = self.policy.model
        self.algorithm = DPO(beta=BETA, rpo_alpha=0.0)

    def step(self) -> Tensor:
        loss = self.algorithm.step(self.policy, self.batch, self.totals).loss_share
        loss.backward()
        return loss.detach()


class TRL:
    """DPOTrainer's own collator and loss."""

    def __init__(self, folder: Path, case: Case, pairs: Sequence[RawPair], device: torch.device) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from trl import DPOConfig, DPOTrainer

        examples = [
            {
                "images": [pair.image],
                "prompt": [{"role": "user", "content": pair.question}],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
            for pair in pairs
        ]
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype_on(device), attn_implementation="sdpa")
        language_model = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        settings = DPOConfig(
            output_dir=str(folder / "trl"),
            beta=BETA,
            per_device_train_batch_size=len(pairs),
            max_length=None,
            gradient_checkpointing=case.gradient_checkpointing,
            bf16=False,  # autocast; the weights have their type already, as on the other side
            use_cpu=device.type == "cpu",
            report_to=[],
            save_strategy="no",
        )
        self.trainer = DPOTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(examples),
            processing_class=AutoProcessor.from_pretrained(folder),
            peft_config=LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=language_model),
        )
        self.model = self.trainer.model
        self.model.to(device)
        if case.gradient_checkpointing:
            # What transformers' Trainer does when training starts.
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=None)
        self.model.train()
        self.batch = {name: value.to(device) for name, value in self.trainer.data_collator(examples).items()}

    def step(self) -> Tensor:
        loss: Tensor = self.trainer.compute_loss(self.model, dict(self.batch))
        loss.backward()
        return loss.detach()


SIDES: dict[str, Callable[[Path, Case, Sequence[RawPair], torch.device], Side]] = {"trl": TRL, "rayalign": Rayalign}


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def adapter(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def draw_adapter(model: Any) -> None:
    """Gives the adapter weights that make policy and reference differ; with a fresh one they agree and every loss is log 2."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter(model).values():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=generator))


def compare(ours: Side, theirs: Side, dtype: torch.dtype) -> dict[str, float]:
    """Loss and gradients of both sides; raises SystemExit where they do not compute the same."""
    losses, gradients = [], []
    for side in (theirs, ours):
        side.model.zero_grad()
        losses.append(side.step().item())
        gradients.append({name: p.grad.float() for name, p in adapter(side.model).items()})
    expected, found = gradients
    if set(expected) != set(found):
        raise SystemExit(f"The two sides train other weights: {sorted(set(expected) ^ set(found))[:3]}")
    scale = max(g.abs().max().item() for g in expected.values())
    report = {
        "loss_trl": losses[0],
        "loss_rayalign": losses[1],
        "loss_difference": abs(losses[0] - losses[1]),
        "gradient_difference_of_largest": max((found[n] - expected[n]).abs().max().item() for n in expected) / scale,
    }
    within = report["loss_difference"] <= LOSS_TOLERANCE[dtype]
    if not (within and report["gradient_difference_of_largest"] <= GRADIENT_TOLERANCE[dtype]):
        raise SystemExit(f"The two sides do not compute the same, so their speed can't be compared: {json.dumps(report)}")
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


def measure_time(sides: dict[str, Side], *, rounds: int, device: torch.device, pairs: int) -> dict[str, Any]:
    """Both sides in turn, the first one changing from round to round; ratios are taken within a round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for side in sides.values():
        timed(side, device)
    for number in range(rounds):
        for name in sorted(sides, reverse=number % 2 == 0):
            seconds[name].append(timed(sides[name], device))
    walls = {name: [wall for wall, _ in values] for name, values in seconds.items()}
    cpus = {name: [cpu for _, cpu in values] for name, values in seconds.items()}
    return {
        "rounds": rounds,
        "pairs_per_second": {name: spread([pairs / wall for wall in values]) for name, values in walls.items()},
        "step_seconds": {name: spread(values) for name, values in walls.items()},
        "step_cpu_seconds": {name: spread(values) for name, values in cpus.items()},
        "times_as_fast": spread([a / b for a, b in zip(walls["trl"], walls["rayalign"], strict=True)]),
        "times_as_fast_in_cpu_seconds": spread([a / b for a, b in zip(cpus["trl"], cpus["rayalign"], strict=True)]),
    }


def peak_of_steps(side: Side, device: torch.device, *, steps: int = 2) -> dict[str, float]:
    """MiB that steps take at their peak, above what model, adapter and batch hold before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(steps):
            side.model.zero_grad()
            side.step()
        peak = torch.cuda.max_memory_allocated()
    else:
        if not Path("/proc/self/clear_refs").exists():
            raise SystemExit("Peak memory is read from /proc, which this system does not have. Pass --no-memory.")
        ctypes.CDLL(None).malloc_trim(0)  # what loading left behind would hide a part of what the step takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _resident_bytes("VmRSS")
        for _ in range(steps):
            side.model.zero_grad()
            side.step()
        peak = _resident_bytes("VmHWM")
    return {"before_mib": round(before / 2**20, 1), "step_peak_mib": round((peak - before) / 2**20, 1)}


def _resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_memory(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """A side's peak in a process of its own, which loads nothing of the other side."""
    command = [sys.executable, __file__, "--memory_of", name, "--case", *arguments.case]
    command += ["--threads", str(arguments.threads), "--device", arguments.device]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def run_case(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    case, device = CASES[name], torch.device(arguments.device)
    pairs = draw_pairs(case.shape, list(case.responses))
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        folder = save_model(Path(temporary) / "model", case.shape)
        ours, theirs = Rayalign(folder, case, pairs, device), TRL(folder, case, pairs, device)
        for side in (ours, theirs):
            draw_adapter(side.model)
        agreement = compare(ours, theirs, dtype_on(device))
        seconds = measure_time({"trl": theirs, "rayalign": ours}, rounds=arguments.rounds, device=device, pairs=len(pairs))
    base = ours.policy.base
    image_token = base.config.image_token_id
    report = {
        "case": name,
        "model": {**asdict(case.shape), "parameters": sum(p.numel() for p in base.parameters())},
        "lora": {"rank": LORA_RANK, "target_modules": "ALL"},
        "gradient_checkpointing": case.gradient_checkpointing,
        "dtype": str(dtype_on(device)).removeprefix("torch."),
        "batch": {
            "pairs": len(pairs),
            "prompt_tokens": [len(p.prompt_ids) for p in ours.encoded],
            "image_tokens": [p.prompt_ids.count(image_token) for p in ours.encoded],
            "chosen_tokens": [len(p.chosen_ids) for p in ours.encoded],
            "rejected_tokens": [len(p.rejected_ids) for p in ours.encoded],
        },
        "agreement": agreement,
        "time": seconds,
    }
    del ours, theirs, base
    gc.collect()
    if arguments.memory:
        arguments = argparse.Namespace(**{**vars(arguments), "case": [name]})
        memory = {side: measure_memory(side, arguments) for side in SIDES}
        ratio = memory["trl"]["step_peak_mib"] / max(memory["rayalign"]["step_peak_mib"], 0.1)
        report["memory"] = {**memory, "times_less_memory": round(ratio, 2)}
    return report


def table_of(cases: Sequence[dict[str, Any]]) -> str:
    header = ["case", "prompt (image) tokens", "response tokens", "TRL, pairs/s", "rayalign, pairs/s", "times as fast"]
    header += ["in processor time", "TRL, step's peak", "rayalign, step's peak", "times less memory"]
    rows = []
    for case in cases:
        batch, seconds, memory = case["batch"], case["time"], case.get("memory")
        responses = batch["chosen_tokens"] + batch["rejected_tokens"]
        row = [
            case["case"],
            f"{max(batch['prompt_tokens'])} ({max(batch['image_tokens'])})",
            f"{min(responses)}-{max(responses)}",
            show(seconds["pairs_per_second"]["trl"]),
            show(seconds["pairs_per_second"]["rayalign"]),
            show(seconds["times_as_fast"]),
            show(seconds["times_as_fast_in_cpu_seconds"]),
        ]
        if memory:
            peaks = [memory[side]["step_peak_mib"] for side in ("trl", "rayalign")]
            row += [*(f"{peak:.0f} MiB" for peak in peaks), f"{memory['times_less_memory']:.3g}"]
        else:
            row += ["-", "-", "-"]
        rows.append(row)
    return markdown_table(header, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(DEFAULT_CASES))
    parser.add_argument("--rounds", type=int, help="timed steps of each side (default 5; tiny: 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory as well")
    parser.add_argument("--output", type=Path, default=RESULTS / "step.json")
    parser.add_argument("--memory_of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.case == ["tiny"] else 5)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # TRL and peft still use the older of transformers' two names.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        (name,) = arguments.case
        case, device = CASES[name], torch.device(arguments.device)
        pairs = draw_pairs(case.shape, list(case.responses))
        with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
            side = SIDES[arguments.memory_of](save_model(Path(temporary) / "model", case.shape), case, pairs, device)
            measured = peak_of_steps(side, device)
        print(json.dumps(measured))
        return
    facts = machine_facts(threads=arguments.threads)
    if arguments.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    cases = []
    for name in arguments.case:
        cases.append(run_case(name, arguments))
        write_json(arguments.output, {"machine": facts, "cases": cases})
    print(table_of(cases))


if __name__ == "__main__":
    main()
