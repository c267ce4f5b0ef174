"""One DPO step of a 7B LLaVA-NeXT on a GPU: pairs per second, the share of the card's peak, and memory, against TRL's step.

    python benchmarks/gpu.py                                  # some minutes on a card of 80 GB; --layers 16 for 24 GB
    python benchmarks/gpu.py --device cpu --shape tiny        # a rehearsal without a GPU, under a minute

Needs no Ray and nothing from a model hub: weights, token ids and pictures are random. All ways to compute the step share one
model and one adapter, and their losses and gradients are compared before anything is timed: first in float32, in a model of the
same widths with few layers, then in the one that is timed. A step starts from tensors that lie on the device and ends with the
gradients. `new lengths`: the first step on rows of other lengths, which is what each step of a run is.
"""

import argparse
import contextlib
import functools
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from gpu_model import ALGORITHM, IMAGES, RESPONSES_OF, TUNER, Bench, Way, make_config, make_model
from measuring import (
    DTYPES,
    in_turn,
    machine_facts,
    parse_on_device,
    parser_of,
    peak_memory,
    ratios,
    seconds_of,
    set_up,
    show,
    spread,
    table,
    write_json,
)
from sides import Encoded, adapter_of, batch_facts
from synthetic import RawPair, draw_pairs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rayalign.config.sections import ModelConfig, OptimizerConfig
from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.dry_run import DryRun
from rayalign.estimate.flops import Polynomial
from rayalign.estimate.meter import MORE_FLOPS, Meter, tensors_of
from rayalign.estimate.passes import Pass
from rayalign.estimate.vision import VisionCosts
from rayalign.models.source import ModelSource
from rayalign.training.mfu import peak_tflops
from rayalign.training.optimizer import make_optimizer

EXACT_LAYERS = 2
"""Of the language model whose steps are compared in float32."""

TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.15)}
"""How far a way may be from the one it is compared with: its loss, absolutely, and its gradient (all adapters' as one vector),
by the length of the difference over the length of the gradient. float32: sums in another order, of log-probabilities of order
1,000. bfloat16 has three digits, each layer rounds anew, and a loss holds the log-probabilities of several hundred tokens: at
32 layers two right ways are up to 0.03 apart in loss and 0.05 in gradient, so only gross mistakes would be seen. That is why
the same code is held to the float32 tolerances first."""

T = TypeVar("T")


def if_it_fits(action: Callable[[], T]) -> T | None:
    """What an action returns; None where the device's memory does not suffice."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return action()
    release_memory()
    return None


def release_memory() -> None:
    """Gives the device what nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(bench: Bench, ways: Sequence[Way]) -> tuple[list[Way], list[dict[str, Any]]]:
    """The ways that fit into memory, and how far each is from the first of them; raises SystemExit where one computes something
    else."""
    loss_tolerance, gradient_tolerance = TOLERANCES[bench.dtype]
    adapter = adapter_of(bench.model)
    expected: dict[str, Tensor] = {}
    fitting, report = [], []
    for way in ways:
        bench.enter(way)
        bench.model.zero_grad()
        release_memory()
        loss = if_it_fits(lambda: bench.step().item())
        if loss is None:
            continue
        fitting.append(way)
        if not expected:
            expected = {name: parameter.grad.clone() for name, parameter in adapter.items() if parameter.grad is not None}
            expected_loss = loss
        distances = [(p.grad - expected[name]).norm() ** 2 for name, p in adapter.items() if p.grad is not None]
        norm = torch.stack([gradient.norm() ** 2 for gradient in expected.values()]).sum().sqrt()
        found = {
            "loss": loss,
            "loss_difference": abs(loss - expected_loss),
            "gradient_distance": (torch.stack(distances).sum().sqrt() / norm).item(),
        }
        report.append({**asdict(way), **found})
        # Written so that a NaN is no agreement.
        agrees = found["loss_difference"] <= loss_tolerance and found["gradient_distance"] <= gradient_tolerance
        if not agrees or len(distances) != len(adapter):
            raise SystemExit(
                "The ways do not compute the same step, so their speed can't be compared; the first one is the measure of the "
                f"others: {json.dumps(report)}"
            )
    bench.model.zero_grad()
    if not fitting:
        raise SystemExit("No way fits into the device's memory. Lower --batch_size or --layers.")
    return fitting, report


def time_ways(bench: Bench, ways: Sequence[Way], *, rounds: int) -> dict[Way, list[float]]:
    """Seconds of a step, in turn, after a round for warming up. A way that the others leave no room for is not among them."""
    lost: set[Way] = set()

    def take_turn(way: Way) -> float:
        if way in lost:
            return 0.0
        bench.enter(way)
        bench.model.zero_grad()
        gc.collect()
        step = functools.partial(seconds_of, bench.step, bench.device)
        # Once more where the first time failed on memory that was free, but in pieces.
        taken = if_it_fits(step) or if_it_fits(step)
        if taken is None:
            lost.add(way)
            return 0.0
        return taken.wall

    turns = {str(number): functools.partial(take_turn, way) for number, way in enumerate(ways)}
    seconds = in_turn(turns, rounds=rounds + 1)
    return {way: of_way[1:] for way, of_way in zip(ways, seconds.values(), strict=True) if way not in lost}


def time_new_lengths(bench: Bench, ways: Sequence[Way], batches: Sequence[Sequence[RawPair]]) -> dict[Way, list[float]]:
    """Seconds of each way's first step on batches whose rows have lengths that were not there before, as in a run."""
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for number, pairs in enumerate(batches):
        bench.take(pairs)
        for way in [*ways[number:], *ways[:number]]:
            bench.enter(way)
            bench.model.zero_grad()
            taken = if_it_fits(functools.partial(seconds_of, bench.step, bench.device))
            if taken is not None:
                seconds[way].append(taken.wall)
    return {way: of_way for way, of_way in seconds.items() if of_way}


def peak_of(bench: Bench, way: Way) -> dict[str, float]:
    """GiB that a step takes at its peak above model, adapters and batches, and with them."""
    bench.enter(way)
    bench.model.zero_grad()
    release_memory()
    if bench.device.type == "cuda":
        before, whole = peak_memory(bench.step, bench.device)
    else:
        there = [*tensors_of(bench.model), *(t for b in bench.batches.values() for t in b.image_inputs.values())]
        before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in there}.values())
        with Meter(there) as meter:
            bench.step()
        whole = before + meter.peak
    return {"above_model_gib": (whole - before) / 2**30, "whole_gib": whole / 2**30}


def done_flops(bench: Bench, way: Way) -> int | None:
    """Operations that a step really runs, recomputation included; of attention those for every query and key that a kernel is
    given. None where attention runs in kernels that are not counted."""
    if way.attention not in ("sdpa", "eager"):
        return None
    bench.enter(way)
    bench.model.zero_grad()
    release_memory()
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
        bench.step()
    flops: int = counter.get_total_flops()
    return flops


class Needed:
    """Operations that the step of some pairs needs, whoever computes it: each image and each prompt token once for both
    responses, attention only where a token sees another, output head where a response is predicted, nothing recomputed."""

    def __init__(self, config: Any) -> None:
        source = ModelSource("")
        blueprint = Blueprint(config, source, ModelConfig(gradient_checkpointing=False), TUNER, ALGORITHM.needs)
        dry_run = DryRun(blueprint)
        skeleton = blueprint.build()
        self._read, self._train = Polynomial.of(dry_run, Pass()), Polynomial.of(dry_run, Pass(trains=True))
        self._head = 2.0 * skeleton.head.numel()
        self._vision = VisionCosts(skeleton, config)

    def __call__(self, encoded: Encoded, *, reference: bool) -> float:
        """Of one step; with the reference's forward in it or not."""
        return sum(self._of_pair(pair, encoded, reference=reference) for pair in encoded.pairs)

    def _of_pair(self, pair: Any, encoded: Encoded, *, reference: bool) -> float:
        prompt, responses = len(pair.prompt_ids), [len(pair.chosen_ids), len(pair.rejected_ids)]
        seen = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
        # A forward's two products of attention have four in the backward; fused kernels' recomputation is none that is needed.
        train = self._train.per_token * pair.num_tokens + 3 * self._read.per_square * seen + 2 * self._head * sum(responses)
        read = self._read.per_token * pair.num_tokens + self._read.per_square * seen + self._head * sum(responses)
        images = encoded.process_images(pair.images, [True] * len(pair.images))
        load = self._vision.load(images.tensors, sum(images.lengths))
        return train + reference * read + load.tower_flops + load.aligner_flops


def time_parts(bench: Bench, *, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of what surrounds the step, and of forwards that tell what adapters cost."""
    way = Way("rayalign", ModelConfig().attn_implementation, checkpointing=True, reference="stored")
    bench.enter(way)
    bench.model.zero_grad()
    bench.step()
    bench.enter(replace(way, checkpointing=False))
    policy, batch, device = bench.policy, bench.batches["stored"], bench.device
    images = policy.image_features(batch)
    # A rate that leaves the weights what they are.
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-12))
    learning = list(policy.trainable.values())
    pairs = len(bench.encoded.pairs)
    contents = [content for pair in bench.encoded.pairs for content in pair.images]

    def forward() -> None:
        with torch.no_grad():
            policy.token_logps(batch, images)

    def forward_by_peft() -> None:
        bench.let_peft_compute(True)
        forward()
        bench.let_peft_compute(False)

    def forward_without_adapters() -> None:
        with policy.reference_weights():
            forward()

    actions: dict[str, tuple[Callable[[], Any], int]] = {
        "image processing, a pair": (lambda: bench.encoded.process_images(contents, [True] * len(contents)), pairs),
        "forward, a pair: adapters off": (forward_without_adapters, pairs),
        "forward, a pair: adapters on": (forward, pairs),
        "forward, a pair: adapters on, peft's arithmetic": (forward_by_peft, pairs),
        "clipping of gradients": (lambda: nn.utils.clip_grad_norm_(learning, 1.0), 1),
        "optimizer's update": (optimizer.step, 1),
    }
    if device.type == "cuda":
        pinned = bench.encoded.batch.pin_memory()
        actions |= {
            "pinning of a batch": (bench.encoded.batch.pin_memory, 1),
            "copy of a batch": (lambda: bench.encoded.batch.to(device), 1),
            "copy of a pinned batch": (lambda: pinned.to(device), 1),
        }

    def take_turn(action: Callable[[], Any], share: int) -> float:
        gc.collect()
        return seconds_of(action, device).wall / share

    turns = {name: functools.partial(take_turn, *action) for name, action in actions.items()}
    seconds = {name: values[1:] for name, values in in_turn(turns, rounds=rounds + 1).items()}
    if device.type == "cuda":
        begun = []
        for _ in range(rounds):
            begun.append(seconds_of(lambda: pinned.to(device)).wall)
            torch.cuda.synchronize()
        seconds["copy of a pinned batch, until the host goes on"] = begun
    return {name: spread([1e3 * value for value in values]) for name, values in seconds.items()}


def ways_of(arguments: argparse.Namespace, dtype: torch.dtype) -> list[Way]:
    """All ways that are compared; the least likely to be wrong or to run out of memory come first."""
    found = []
    # Flash attention's own kernels know no float32.
    theirs = arguments.trl_attn_implementation if dtype == torch.bfloat16 else "sdpa"
    for checkpointing in (True, False):
        if arguments.trl:
            # TRL's default is autocast; without it the arithmetic is ours.
            for autocast in (False, True) if dtype == torch.bfloat16 else (False,):
                found.append(Way("trl", theirs, checkpointing, autocast=autocast))
        for attention in arguments.attn_implementation:
            found += [Way("rayalign", attention, checkpointing), Way("rayalign", attention, checkpointing, "stored")]
    return found


def pairs_of(case: str, config: Any, arguments: argparse.Namespace, *, number: int = 0) -> list[RawPair]:
    """The case's batch; with a `number`, another one, whose pictures are a little smaller and whose responses are longer."""
    tile, responses = config.vision_config.image_size, RESPONSES_OF[arguments.shape]
    height, width = (round(tile * side) - 7 * number for side in IMAGES[case])
    of_batch = [responses[i % len(responses)] for i in range(arguments.batch_size)]
    return draw_pairs((height, width), [(chosen + number, rejected + 2 * number) for chosen, rejected in of_batch])


def compare_exactly(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The comparison in float32, of the first case's batch and a model with few layers."""
    config = make_config(arguments.shape, EXACT_LAYERS)
    bench = Bench(make_model(config, device=torch.device(arguments.device), dtype=torch.float32), config, folder)
    bench.take(pairs_of(arguments.case[0], config, arguments))
    return compare(bench, ways_of(arguments, torch.float32))[1]


def run_case(name: str, bench: Bench, needed: Needed, arguments: argparse.Namespace) -> dict[str, Any]:
    bench.take(pairs_of(name, bench.config, arguments))
    pairs = arguments.batch_size
    fitting, agreement = compare(bench, ways_of(arguments, bench.dtype))
    seconds = time_ways(bench, fitting, rounds=arguments.rounds)
    peak = arguments.peak_tflops
    measured = []
    for way, taken in seconds.items():
        useful = needed(bench.encoded, reference=way.reference == "computed")
        done = done_flops(bench, way)
        rivals = [
            of_other for other, of_other in seconds.items() if (other.side, other.checkpointing) == ("trl", way.checkpointing)
        ]
        fastest = min(rivals, key=median, default=None)
        measured.append(
            {
                **asdict(way),
                "way": way.name,
                "pairs_per_second": spread([pairs / value for value in taken]),
                "step_seconds": spread(taken),
                "times_as_fast_as_trl": ratios(fastest, taken) if fastest else None,
                "needed_tflop_per_pair": useful / pairs / 1e12,
                "done_of_needed": None if done is None else done / useful,
                "mfu": spread([useful / value / (peak * 1e12) for value in taken]) if peak else None,
                **peak_of(bench, way),
            }
        )
    report = {
        "case": name,
        "batch": batch_facts(bench.encoded.rows(), bench.config.image_token_id),
        "agreement": agreement,
        "ways": measured,
        "out_of_memory": [asdict(way) for way in ways_of(arguments, bench.dtype) if way not in seconds],
        "milliseconds": time_parts(bench, rounds=arguments.rounds),
    }
    others = [pairs_of(name, bench.config, arguments, number=1 + number) for number in range(arguments.rounds)]
    of_new = time_new_lengths(bench, [*seconds], others)
    for line, way in zip(measured, seconds, strict=True):
        line["pairs_per_second_new_lengths"] = spread([pairs / value for value in of_new[way]]) if way in of_new else None
    return report


def peak_tflops_of(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return peak_tflops(name)


def tables_of(cases: Sequence[dict[str, Any]]) -> str:
    """The ways, and what surrounds the step."""

    def figure(name: str) -> Callable[[tuple[str, dict[str, Any]]], str]:
        return lambda line: f"{line[1][name]:.3g}" if line[1].get(name) is not None else "-"

    def spread_of(name: str) -> Callable[[tuple[str, dict[str, Any]]], str]:
        return lambda line: show(line[1].get(name))

    columns: dict[str, Callable[[tuple[str, dict[str, Any]]], str]] = {
        "case": lambda line: line[0],
        "way": lambda line: line[1]["way"],
        "attention": lambda line: line[1]["attention"],
        "checkpointing": lambda line: "yes" if line[1]["checkpointing"] else "no",
        "pairs/s": lambda line: show(line[1]["pairs_per_second"]) if "pairs_per_second" in line[1] else "out of memory",
        "pairs/s, new lengths": spread_of("pairs_per_second_new_lengths"),
        "times as fast as TRL": spread_of("times_as_fast_as_trl"),
        "MFU": spread_of("mfu"),
        "needed, TFLOP/pair": figure("needed_tflop_per_pair"),
        "done / needed": figure("done_of_needed"),
        "peak above model, GiB": figure("above_model_gib"),
        "peak, GiB": figure("whole_gib"),
    }
    lines = []
    for case in cases:
        lost = [{**way, "way": Way(**way).name} for way in case["out_of_memory"]]
        lines += [(case["case"], way) for way in [*case["ways"], *lost]]
    parts = dict.fromkeys(name for case in cases for name in case["milliseconds"])
    of_parts: dict[str, Callable[[str], str]] = {"milliseconds": lambda name: name}
    of_parts |= {case["case"]: lambda name, case=case: show(case["milliseconds"].get(name)) for case in cases}
    return f"{table(columns, lines)}\n\n{table(of_parts, [*parts])}"


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, output="gpu.json", threads=1)
    parser.add_argument("--shape", choices=RESPONSES_OF, default="7b")
    parser.add_argument("--layers", type=int, help="layers of the language model, where the card is too small for all of them")
    parser.add_argument("--case", nargs="+", choices=IMAGES, default=["small", "photo"], help="how large pictures are")
    parser.add_argument("--batch_size", type=int, default=2, help="pairs of the step")
    kernels = get_args(get_type_hints(ModelConfig)["attn_implementation"])
    parser.add_argument("--attn_implementation", nargs="+", choices=kernels, default=[ModelConfig().attn_implementation])
    parser.add_argument("--trl", action=argparse.BooleanOptionalAction, default=True, help="measure TRL's step as well")
    parser.add_argument("--trl_attn_implementation", default="sdpa", help="such as flash_attention_2, where that is installed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="of the frozen weights (default: bfloat16; on cpu float32)")
    parser.add_argument("--peak_tflops", type=float, help="dense bfloat16 peak of the device; known for some by their names")
    parser.add_argument("--rounds", type=int, help="timed steps of each way (default 5; tiny: 2)")
    arguments = parse_on_device(parser)
    arguments.rounds = arguments.rounds or (2 if arguments.shape == "tiny" else 5)
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    arguments.peak_tflops = arguments.peak_tflops or peak_tflops_of(torch.device(arguments.device))
    return arguments


def main() -> None:
    arguments = parse_arguments()
    set_up(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # the tower's first layer would round to three digits in the float32 comparison
    dtype = DTYPES[arguments.dtype]
    config = make_config(arguments.shape, arguments.layers)
    report: dict[str, Any] = {
        "machine": machine_facts(threads=arguments.threads, device=arguments.device),
        "model": {"shape": arguments.shape, "layers": config.text_config.num_hidden_layers, "dtype": arguments.dtype},
        "lora": {"rank": TUNER.lora_rank, "target_modules": "ALL"},
        "peak_tflops": arguments.peak_tflops,
    }
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        needed = Needed(config)
        if dtype != torch.float32:
            report["agreement_in_float32"] = compare_exactly(arguments, Path(temporary))
        release_memory()
        model = make_model(config, device=torch.device(arguments.device), dtype=dtype)
        bench = Bench(model, config, Path(temporary))
        gc.collect()
        gc.freeze()  # collections between timed steps then look through what steps leave behind, not through all modules
        report["model"]["parameters"] = sum(p.numel() for p in bench.model.parameters())
        report["cases"] = []
        for name in arguments.case:
            report["cases"].append(run_case(name, bench, needed, arguments))
            write_json(arguments.output, report)
    print(tables_of(report["cases"]))


if __name__ == "__main__":
    main()
