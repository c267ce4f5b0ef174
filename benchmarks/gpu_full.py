"""Full fine-tuning steps of a 7B LLaVA-NeXT on one GPU, whole and sharded (--strategy fsdp, one worker): seconds, pairs per
second, and memory beside what the plan says.

    python benchmarks/gpu_full.py                                  # a card of 141 GB; --layers 14 for 80 GB
    python benchmarks/gpu_full.py --device cpu --shape tiny        # a rehearsal without a GPU

Needs no Ray and nothing from a model hub. A step is DPO's with the reference's log-probabilities stored, from a batch on the
host to the updated weights: float32 weights, gradients and moments, arithmetic in bfloat16. One worker's sharded step takes
every path but the wire, so that the difference is what gathering and summing cost a card by itself.
"""

import argparse
import contextlib
import dataclasses
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_model import ALGORITHM, IMAGES, RESPONSES_OF, make_config
from measuring import (
    machine_facts,
    parse_on_device,
    parser_of,
    peak_memory,
    seconds_of,
    set_up,
    show,
    spread,
    table,
    write_json,
)
from sides import Encoded, batch_facts
from synthetic import draw_pairs, save_processor

from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig, ModelConfig, OptimizerConfig, TunerConfig
from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.memory import MicroBatch
from rayalign.estimate.meter import Meter, tensors_of
from rayalign.estimate.shapes import PairShape
from rayalign.estimate.vision import VisionCosts
from rayalign.estimate.worker_memory import WorkerMemory
from rayalign.models.registry import find_family
from rayalign.models.source import ModelSource
from rayalign.policy.fused_norms import fuse_norms
from rayalign.policy.policy import Policy
from rayalign.policy.prepare import model_options, prepare_model
from rayalign.policy.sharding import mesh_of_workers, shard_policy
from rayalign.training.lockstep import Fillers
from rayalign.training.loop import Trainer


def trainer_of(config: Any, run: Config, encoded: Encoded, device: torch.device) -> Trainer:
    """A policy with random weights, all of them trained, and its optimizer."""
    family = find_family(config.model_type)
    dtype = getattr(torch, run.model.dtype_on(device.type))
    options = {**model_options(family, run.model, run.tuner, dtype), "dtype": torch.float32}
    with torch.device(device):
        base = family.auto_class.from_config(config, **options)
        needs = ALGORITHM.needs
        model = prepare_model(base, ModelSource(""), model=run.model, tuner=run.tuner, family=family, needs=needs, dtype=dtype)
    fuse_norms(base)
    policy = Policy(model, family, dtype=dtype)
    fillers = None
    if run.cluster.shards_models:
        shard_policy(policy, mesh_of_workers(device), device=device, needs=needs)
        fillers = Fillers(encoded.spec, needs)
    return Trainer(policy, ALGORITHM, run.optimizer, num_steps=100, fillers=fillers)


def measure(trainer: Trainer, encoded: Encoded, device: torch.device, *, rounds: int) -> dict[str, Any]:
    """Seconds of a step, and the bytes of its tensors at their peak, optimizer included."""
    batch = dataclasses.replace(encoded.batch, reference_logps=torch.full([len(encoded.batch.targets)], -1.0))
    steps = iter(range(rounds + 2))

    def step() -> None:
        result = trainer.step(next(steps), [batch], encoded.counts)
        assert torch.isfinite(result.grad_norm)

    step()  # makes moments
    seconds = [seconds_of(step, device).wall for _ in range(rounds)]
    if device.type == "cuda":
        whole = peak_memory(step, device)[1]
    else:
        moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
        there = [*tensors_of(trainer.policy.model), *moments]
        with Meter(there) as meter:
            step()
        whole = sum(tensor.numel() * tensor.element_size() for tensor in there) + meter.peak
    return {
        "step_seconds": spread(seconds),
        "pairs_per_second": spread([len(encoded.pairs) / value for value in seconds]),
        "gib": whole / 2**30,
    }


def planned(config: Any, run: Config, encoded: Encoded) -> int:
    """Bytes of tensors by the plan."""
    blueprint = Blueprint(config, ModelSource(""), run.model, run.tuner, ALGORITHM.needs)
    worker = WorkerMemory(run, blueprint, has_images=True)
    costs = VisionCosts(worker.skeleton, config)
    shapes = []
    for pair in encoded.pairs:
        images = encoded.process_images(pair.images, [True] * len(pair.images))
        load = costs.load(images.tensors, sum(images.lengths))
        tokens = [len(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
        shapes.append(PairShape(*tokens, sum(images.lengths), (load,)))
    longest = max(shapes, key=lambda shape: shape.prompt + shape.chosen + shape.rejected)
    return worker.of(MicroBatch(len(shapes), longest, longest), worker.most_recomputed).tensors


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, output="gpu_full.json", threads=1)
    parser.add_argument("--shape", choices=RESPONSES_OF, default="7b")
    parser.add_argument("--layers", type=int, help="layers of the language model, where the card is too small for all of them")
    parser.add_argument("--case", choices=IMAGES, default="photo", help="how large pictures are")
    parser.add_argument("--batch_size", type=int, default=2, help="pairs of the step")
    parser.add_argument("--strategy", nargs="+", choices=["ddp", "fsdp"], default=["fsdp", "ddp"])
    parser.add_argument("--freeze_vit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps")
    return parse_on_device(parser)


def main() -> None:
    arguments = parse_arguments()
    set_up(arguments.threads)
    device = torch.device(arguments.device)
    config = make_config(arguments.shape, arguments.layers)
    layers = config.text_config.num_hidden_layers
    report: dict[str, Any] = {
        "machine": machine_facts(threads=arguments.threads, device=arguments.device),
        "model": {"shape": arguments.shape, "layers": layers, "freeze_vit": arguments.freeze_vit},
        "strategies": [],
    }
    tuner = TunerConfig(sft_type="full", freeze_vit=arguments.freeze_vit, freeze_aligner=arguments.freeze_vit)
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        config.save_pretrained(temporary)
        save_processor(Path(temporary), config)
        height, width = (round(config.vision_config.image_size * side) for side in IMAGES[arguments.case])
        responses = RESPONSES_OF[arguments.shape]
        of_batch = [responses[i % len(responses)] for i in range(arguments.batch_size)]
        encoded = Encoded(Path(temporary), draw_pairs((height, width), of_batch))
        report["batch"] = batch_facts(encoded.rows(), config.image_token_id)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{temporary}/meeting", rank=0, world_size=1)
        for strategy in arguments.strategy:
            run = Config(
                ALGORITHM,
                model=ModelConfig(gradient_checkpointing=True),
                tuner=tuner,
                optimizer=OptimizerConfig(learning_rate=1e-7),
                cluster=ClusterConfig(strategy=strategy, num_workers=1),
            )
            plan = planned(config, run, encoded) / 2**30
            line: dict[str, Any] = {"strategy": strategy, "planned_gib": plan}
            try:
                trainer = trainer_of(config, run, encoded, device)
                line["parameters"] = sum(p.numel() for p in trainer.policy.model.parameters())
                line |= measure(trainer, encoded, device, rounds=arguments.rounds)
            except torch.OutOfMemoryError as error:
                line["out_of_memory"] = str(error).partition(". GPU")[0]
            report["strategies"].append(line)
            write_json(arguments.output, report)
            trainer = None  # type: ignore[assignment]  # its memory is the next one's
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        dist.destroy_process_group()
    columns = {
        "--strategy": lambda line: line["strategy"],
        "seconds a step": lambda line: show(line["step_seconds"]) if "gib" in line else "out of memory",
        "pairs/s": lambda line: show(line.get("pairs_per_second")),
        "peak of tensors, GiB": lambda line: f"{line['gib']:.4g}" if "gib" in line else "-",
        "planned, GiB": lambda line: f"{line['planned_gib']:.4g}",
    }
    print(table(columns, report["strategies"]))


if __name__ == "__main__":
    main()
