"""What `pipelines/plan.py` foretells against what a step takes: memory by tensors and by the process, and operations.

    python benchmarks/sizing.py                     # a model of 62 M parameters; some minutes on one core

The model is that of step.py's `medium` case. Tensors' bytes are counted as they are made and freed; the process's are the peak
of its resident memory during the step, less what was resident before.
"""

import argparse
import ctypes
import gc
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine_facts, markdown_table, write_json
from synthetic import RawPair, Shape, draw_pairs, save_model
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging as transformers_logging

from rayalign.algorithms import ALGORITHMS
from rayalign.config.config import Config
from rayalign.config.sections import ModelConfig, OptimizerConfig, PlanConfig, TunerConfig
from rayalign.data.batch import assemble
from rayalign.data.encode import Encoder, EncoderSpec, image_processing
from rayalign.data.sampler import StepCounts
from rayalign.data.store import EncodedPair
from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.estimate import Estimate
from rayalign.estimate.lengths import ImageLook
from rayalign.estimate.meter import CPU_FLOPS, Meter, tensors_of
from rayalign.estimate.shapes import DataShapes, PairShape
from rayalign.estimate.vision import VisionCosts
from rayalign.formats.records import IMAGE_MARK, Message, PreferenceRecord
from rayalign.models.processors import process_images
from rayalign.models.source import ModelSource
from rayalign.policy.loading import load_policy
from rayalign.training.loop import Trainer

MEDIUM = Shape(512, 8, 8, vocabulary=32_000, vision_hidden=256, vision_layers=6, tile=154, grid=(2, 2))
RESPONSES = [(80, 60), (60, 85)]
ALL, FULL = TunerConfig(lora_target_modules=("ALL",)), TunerConfig(sft_type="full")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt."""

CASES: dict[str, tuple[str, TunerConfig, bool]] = {
    "dpo, LoRA ALL": ("dpo", ALL, False),
    "dpo, LoRA ALL, checkpointing": ("dpo", ALL, True),
    "dpo, LoRA DEFAULT, checkpointing": ("dpo", TunerConfig(), True),
    "simpo, full": ("simpo", FULL, False),
    "simpo, full, checkpointing": ("simpo", FULL, True),
}
"""Algorithm, tuner, gradient checkpointing."""


def encode(spec: EncoderSpec, raw: Sequence[RawPair]) -> list[EncodedPair]:
    encoder = Encoder(spec)
    pairs = []
    for i, pair in enumerate(raw):
        message = Message(role="user", content=IMAGE_MARK + pair.question)
        record = PreferenceRecord(id=str(i), messages=(message,), images=("i",), chosen=pair.chosen, rejected=pair.rejected)
        pairs.append(encoder.encode(record, [pair.image_bytes()]))
    return pairs


def foretell(spec: EncoderSpec, config: Config, pairs: Sequence[EncodedPair]) -> Estimate:
    blueprint = Blueprint(spec.model_config, ModelSource(spec.model), config.model, config.tuner, config.algorithm.needs)
    look = ImageLook(
        lambda image: process_images(spec.processor, spec.family, spec.model_config, [image], alone=[True]).tensors,
        spec.family,
        spec.model_config,
        VisionCosts(blueprint.build(), spec.model_config),
        max_pixels=None,
    )
    shapes = tuple(
        PairShape(
            len(pair.prompt_ids),
            len(pair.chosen_ids),
            len(pair.rejected_ids),
            images=tuple(look(image) for image in pair.images),
        )
        for pair in pairs
    )
    return Estimate(config, PlanConfig(), blueprint, DataShapes(shapes, len(shapes), 0, 0, ""), "", "")


def measure(spec: EncoderSpec, config: Config, pairs: Sequence[EncodedPair]) -> dict[str, float]:
    """MiB that a micro-batch takes above weights, gradients and the batch: by tensors, and by the process; and GFLOP."""
    needs = config.algorithm.needs
    policy = load_policy(
        ModelSource(spec.model), model=config.model, tuner=config.tuner, device=torch.device("cpu"), needs=needs
    )
    trainer = Trainer(policy, config.algorithm, config.optimizer, num_steps=2)
    sides = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    counts = StepCounts(len(pairs), len(sides), sum(sides[::2]), sum(sides[1::2]))
    batch = assemble(pairs, layout=spec.layout, process_images=image_processing(spec))
    trainer.gradients([batch], counts)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident("VmRSS")
    trainer.gradients([batch], counts)
    by_process = resident("VmHWM") - before
    with Meter([*tensors_of(policy.model), *batch.image_inputs.values()]) as meter:
        trainer.gradients([batch], counts)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_FLOPS)
    with counter:
        trainer.gradients([batch], counts)
    return {"tensors": meter.peak / 2**20, "process": by_process / 2**20, "gflop": counter.get_total_flops() / 1e9}


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_case(name: str, spec: EncoderSpec, pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    algorithm, tuner, checkpointing = CASES[name]
    model = ModelConfig(gradient_checkpointing=checkpointing, dtype="float32")
    config = Config(ALGORITHMS[algorithm](), model=model, tuner=tuner, optimizer=OptimizerConfig(batch_size=len(pairs)))
    found = foretell(spec, config, pairs)
    pixels = len(pairs) * sum(load.pixel_bytes for load in found.data.fullest.images)  # they are there before the step
    memory = found.memory
    told = (memory.kept + memory.working + memory.images - pixels) / 2**20
    return {
        "case": name,
        "told": {"mib": told, "gflop": len(pairs) * found.flops().total / 1e9},
        "measured": measure(spec, config, pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "sizing.json")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # peft still uses the older of transformers' two names.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    torch.set_num_threads(1)
    # The heap gives back at once what is freed; left alone, it keeps several hundred MiB that no tensor holds.
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        ctypes.CDLL(None).mallopt(option, 65_536)
    facts = machine_facts(threads=1)
    with tempfile.TemporaryDirectory() as temporary:
        spec = EncoderSpec(str(save_model(Path(temporary), MEDIUM)), responses="both")
        pairs = encode(spec, draw_pairs(MEDIUM, RESPONSES))
        cases = [run_case(name, spec, pairs) for name in CASES]
    write_json(arguments.output, {"machine": facts, "tokens": [pair.num_tokens for pair in pairs], "cases": cases})
    header = ["case", "told, MiB", "tensors, MiB", "process, MiB", "told / tensors", "told / process", "GFLOP, told / counted"]
    rows = []
    for case in cases:
        told, measured = case["told"], case["measured"]
        ratios = (told["mib"] / measured["tensors"], told["mib"] / measured["process"], told["gflop"] / measured["gflop"])
        sizes = (told["mib"], measured["tensors"], measured["process"])
        rows.append([case["case"], *(f"{size:.0f}" for size in sizes), *(f"{ratio:.3f}" for ratio in ratios)])
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
