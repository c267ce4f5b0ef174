"""The whole DPO job of a 7B LLaVA-NeXT on one GPU: `pipelines/dpo.py` as its users start it, from photos to an adapter.

    python benchmarks/gpu_job.py                                  # some minutes on a card of 80 GB, 16 GB of disk
    python benchmarks/gpu_job.py --device cpu --shape tiny        # a rehearsal without a GPU

Needs Ray, and nothing from a model hub: weights are random, written to a folder once and loaded from it by each process, as a
user's are. Photos and responses are those of gpu.py's case `photo`, so that the pairs per second of the job's last steps
compare with those of the bare step there.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_model import RESPONSES_OF, TUNER, make_config, make_model
from job import ROOT, refuse_other_rays, run_command
from measuring import machine_facts, parse_on_device, parser_of, table, write_json
from synthetic import PHOTO_SIZE, draw_pairs, save_processor, write_pairs


def save_model(folder: Path, shape: str, device: torch.device) -> Path:
    config = make_config(shape, None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(config, device=device, dtype=dtype).unload()
    model.save_pretrained(folder)
    save_processor(folder, config)
    return folder


def write_records(folder: Path, arguments: argparse.Namespace) -> Path:
    folder.mkdir()
    responses = itertools.islice(itertools.cycle(RESPONSES_OF[arguments.shape]), arguments.pairs)
    width, height = PHOTO_SIZE
    write_pairs(folder, draw_pairs((height, width), [*responses]))
    return folder / "pairs.jsonl"


def run_job(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds by stages, and what the log says of the steps."""
    model = save_model(folder / "model", arguments.shape, torch.device(arguments.device))
    output = folder / "run"
    flags: dict[str, Any] = {
        "model": model,
        "dataset": write_records(folder / "data", arguments),
        "output_dir": output,
        "dataset_test_ratio": 0.1,
        "rpo_alpha": 0,
        "lora_target_modules": "ALL",
        "lora_rank": TUNER.lora_rank,
        "lora_alpha": TUNER.lora_alpha,
        "gradient_checkpointing": "true" if arguments.gradient_checkpointing else "false",
        "batch_size": arguments.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": arguments.steps,
        "logging_steps": max(1, arguments.steps // 4),
        "save_steps": arguments.steps,
        "eval_steps": arguments.steps,
        "num_workers": 1,
        "gpus_per_worker": int(arguments.device == "cuda"),
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    run_command([sys.executable, str(ROOT / "pipelines" / "dpo.py"), *words], cwd=folder, environment={})
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    return {"seconds": summary["seconds"], "stage_seconds": summary["stage_seconds"], "metrics": lines}


def tables_of(report: dict[str, Any]) -> str:
    stages = [*report["stage_seconds"].items(), ("whole", report["seconds"])]
    steps: Sequence[dict[str, Any]] = [line for line in report["metrics"] if "loss" in line]
    names = ("loss", "rewards/margins", "grad_norm", "pairs_per_second", "tokens_per_second", "data_wait_fraction")
    of_steps: dict[str, Any] = {"step": lambda line: line["step"]}
    of_steps |= {name: lambda line, name=name: f"{line[name]:.4g}" for name in names}
    of_stages = {"stage": lambda part: part[0], "seconds": lambda part: f"{part[1]:.1f}"}
    return f"{table(of_stages, stages)}\n\n{table(of_steps, steps)}"


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, output="gpu_job.json")
    parser.add_argument("--shape", choices=RESPONSES_OF, default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=2, help="pairs of a step")
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    return parse_on_device(parser)


def main() -> None:
    arguments = parse_arguments()
    refuse_other_rays()
    facts = machine_facts(threads=1, device=arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        found = run_job(Path(temporary), arguments)
    settings = {name: getattr(arguments, name) for name in ("shape", "pairs", "batch_size", "gradient_checkpointing")}
    report = {"machine": facts, "job": settings, **found}
    write_json(arguments.output, report)
    print(tables_of(report))


if __name__ == "__main__":
    main()
