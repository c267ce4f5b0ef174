"""What `pipelines/plan.py` estimates against what a step takes: memory by tensors and by the process, and operations.

    python benchmarks/estimate.py                     # a model of 62 M parameters; some minutes on one core
    python benchmarks/estimate.py --case tiny         # a smoke test

The model is that of step.py's `medium` case. Tensors' bytes are counted as they are made and freed; the process's are the peak
of its resident memory during the step, less what was resident before.
"""

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import machine_facts, parser_of, peak_memory, set_up, table, write_json
from sides import Encoded
from synthetic import MEDIUM, SHORT_RESPONSES, TINY, TINY_RESPONSES, draw_pairs, save_model
from torch.utils.flop_counter import FlopCounterMode

from rayalign.algorithms import ALGORITHMS
from rayalign.config.config import Config
from rayalign.config.plan import PlanConfig
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.estimate import Estimate
from rayalign.estimate.lengths import ImageLook
from rayalign.estimate.meter import MORE_FLOPS, Meter, tensors_of
from rayalign.estimate.shapes import DataShapes, PairShape
from rayalign.estimate.vision import VisionCosts
from rayalign.models.processors import process_images
from rayalign.models.source import ModelSource
from rayalign.policy.loading import load_policy
from rayalign.training.loop import Trainer

CPU = torch.device("cpu")
ALL, FULL = TunerConfig(lora_target_modules=("ALL",)), TunerConfig(sft_type="full")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt."""

CASES = {"medium": (MEDIUM, SHORT_RESPONSES), "tiny": (TINY, TINY_RESPONSES)}
RUNS: dict[str, tuple[str, TunerConfig, bool]] = {
    "dpo, LoRA ALL": ("dpo", ALL, False),
    "dpo, LoRA ALL, checkpointing": ("dpo", ALL, True),
    "dpo, LoRA DEFAULT, checkpointing": ("dpo", TunerConfig(), True),
    "simpo, full": ("simpo", FULL, False),
    "simpo, full, checkpointing": ("simpo", FULL, True),
}
"""Algorithm, tuner, gradient checkpointing."""


def estimate_of(encoded: Encoded, config: Config) -> Estimate:
    spec = encoded.spec
    blueprint = Blueprint(spec.model_config, ModelSource(spec.model), config.model, config.tuner, config.algorithm.needs)
    look = ImageLook(
        lambda image: process_images(spec.processor, spec.family, spec.model_config, [image], alone=[True]).tensors,
        spec.family,
        spec.model_config,
        VisionCosts(blueprint.build(), spec.model_config),
        max_pixels=None,
    )
    shapes = tuple(
        PairShape(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids), images=tuple(look(image) for image in p.images))
        for p in encoded.pairs
    )
    return Estimate(config, PlanConfig(), blueprint, DataShapes(shapes, len(shapes), 0, 0, ""), "", "")


def measure(encoded: Encoded, config: Config) -> dict[str, float]:
    """MiB that a micro-batch takes above weights, gradients and the batch: by tensors, and by the process; and GFLOP."""
    source, needs = ModelSource(encoded.spec.model), config.algorithm.needs
    policy = load_policy(source, model=config.model, tuner=config.tuner, device=CPU, needs=needs)
    trainer = Trainer(policy, config.algorithm, config.optimizer, num_steps=2)

    def step() -> None:
        trainer.gradients([encoded.batch], encoded.counts)

    step()
    before, peak = peak_memory(step, CPU)
    with Meter([*tensors_of(policy.model), *encoded.batch.image_inputs.values()]) as meter:
        step()
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
        step()
    return {"tensors": meter.peak / 2**20, "process": (peak - before) / 2**20, "gflop": counter.get_total_flops() / 1e9}


def run_case(name: str, encoded: Encoded) -> dict[str, Any]:
    algorithm, tuner, checkpointing = RUNS[name]
    model = ModelConfig(gradient_checkpointing=checkpointing, dtype="float32")
    pairs = len(encoded.pairs)
    config = Config(ALGORITHMS[algorithm](), model=model, tuner=tuner, optimizer=OptimizerConfig(batch_size=pairs))
    found = estimate_of(encoded, config)
    pixels = pairs * sum(load.pixel_bytes for load in found.data.fullest.images)  # they are there before the step
    memory = found.memory
    mib = (memory.kept + memory.working + memory.images - pixels) / 2**20
    estimate = {"mib": mib, "gflop": pairs * found.flops().total / 1e9}
    return {"case": name, "estimate": estimate, "measured": measure(encoded, config)}


def main() -> None:
    parser = parser_of(__doc__, output="estimate.json")
    parser.add_argument("--case", choices=CASES, default="medium")
    arguments = parser.parse_args()
    set_up(threads=1)
    # The heap gives back at once what is freed; left alone, it keeps several hundred MiB that no tensor holds.
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        ctypes.CDLL(None).mallopt(option, 65_536)
    facts = machine_facts(threads=1)
    shape, responses = CASES[arguments.case]
    with tempfile.TemporaryDirectory() as temporary:
        encoded = Encoded(save_model(Path(temporary), shape), draw_pairs(shape.image_size, responses))
        cases = [run_case(name, encoded) for name in RUNS]
    tokens = [pair.num_tokens for pair in encoded.pairs]
    write_json(arguments.output, {"machine": facts, "model": arguments.case, "tokens": tokens, "cases": cases})
    columns = {
        "case": lambda case: case["case"],
        "estimate, MiB": lambda case: f"{case['estimate']['mib']:.0f}",
        "tensors, MiB": lambda case: f"{case['measured']['tensors']:.0f}",
        "process, MiB": lambda case: f"{case['measured']['process']:.0f}",
        "estimate / tensors": lambda case: f"{case['estimate']['mib'] / case['measured']['tensors']:.3f}",
        "estimate / process": lambda case: f"{case['estimate']['mib'] / max(case['measured']['process'], 0.01):.3f}",
        "GFLOP, estimate / counted": lambda case: f"{case['estimate']['gflop'] / case['measured']['gflop']:.3f}",
    }
    print(table(columns, cases))


if __name__ == "__main__":
    main()
