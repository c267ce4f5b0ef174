"""How near our DPO step comes to the machine's peak in products of matrices, and what the rest of its time goes into.

    python benchmarks/peak.py                                            # medium, float32 and bfloat16; minutes on one core
    python benchmarks/peak.py --case tiny --dtype float32 --rounds 1     # a smoke test

The share of the peak compares the operations that the step needs with what products of square matrices would do in its time.
Few of a step's products have such a shape, so the products' share of the step is the time that they take one by one, each shape
by itself, over the step's. All are measured in turn, since the clock of a machine moves; shares are taken within a round. On
the CPU: processor seconds on one thread, wall seconds on several. A step has no optimizer's update in it.
"""

import argparse
import contextlib
import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import RESULTS, machine_facts, markdown_table, show, spread, write_json
from sides import Rayalign, Side
from step import CASES, DTYPES, draw_adapter
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.utils import logging as transformers_logging

from rayalign.estimate.meter import FLOPS

CPU = torch.device("cpu")
SQUARE = 2048

PRODUCTS = {
    "mm",
    "addmm",
    "addmm_",
    "bmm",
    "baddbmm",
    "baddbmm_",
    "mv",
    "addmv",
    "dot",
    "mkldnn_convolution",
    "_slow_conv2d_forward",
}
ARITHMETIC = {
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "neg_", "pow", "rsqrt", "sqrt", "exp", "exp_", "log"),
    *(
        "silu",
        "silu_",
        "silu_backward",
        "gelu",
        "gelu_backward",
        "sigmoid",
        "sigmoid_",
        "tanh",
        "native_layer_norm",
        "_softmax",
    ),
    *("sum", "mean", "max", "amax", "logsumexp", "logaddexp", "softplus", "sin", "cos", "where", "log_sigmoid_forward"),
    *(
        "_fused_rms_norm",
        "_fused_rms_norm_backward",
        "native_layer_norm_backward",
        "threshold_backward",
        "addcmul",
        "_log_softmax",
    ),
}
COPIES = {
    *(
        "copy_",
        "cat",
        "clone",
        "fill_",
        "zero_",
        "index",
        "index_select",
        "index_put_",
        "index_add_",
        "_index_put_impl_",
        "gather",
    ),
    *(
        "scatter_",
        "masked_scatter",
        "masked_scatter_",
        "masked_fill",
        "masked_fill_",
        "constant_pad_nd",
        "slice_backward",
        "repeat",
    ),
    *("select_backward", "embedding", "_to_copy", "contiguous", "stack", "narrow_copy", "slice_scatter"),
}
GROUPS = ("products of matrices", "attention", "softmax of the head", "norms and other arithmetic", "copies", "rest")


@dataclass
class Call:
    """A product of matrices, a convolution or attention that a step computes `times` times in the same shapes and types."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operations: int
    times: int = 0

    def seconds_alone(self) -> float:
        """Median of what it takes by itself, its operands in reach."""
        return seconds_of(lambda: self.func(*self.args, **self.kwargs), at_least=0.01)

    def __str__(self) -> str:
        shapes = [list(leaf.shape) for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        return f"{self.func} {' '.join(map(str, shapes))}"


class Products(TorchDispatchMode):
    """Within it, `calls` fills with the step's products; each keeps the operands of the first of its kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.calls: dict[Any, Call] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if operations := operations_of(func, args, kwargs, out):
            leaves = tree_leaves((args, kwargs))
            key = (func, *((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else repr(v) for v in leaves))
            if key not in self.calls:
                args, kwargs = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))
                self.calls[key] = Call(func, args, kwargs, operations)
            self.calls[key].times += 1
        return out


def operations_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """What a call needs, two operations for each product of two numbers; 0 for all that multiplies no matrices.

    Attention, of whatever kernel, is two products of all its queries with all its keys, or half of them where it is causal, and
    twice as much backward: the weights that kernels compute again there are not needed.
    """
    if not isinstance(func, torch._ops.OpOverload):
        return 0
    if "_scaled_dot_product" in str(func):
        named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        products: int = 4 * named["query"].numel() * named["key"].shape[-2]
        return products * (2 if "backward" in str(func) else 1) // (2 if named.get("is_causal") else 1)
    count = FLOPS.get(func.overloadpacket)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def seconds_once(run: Callable[[], Any]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def seconds_of(run: Callable[[], Any], *, at_least: float) -> float:
    """Median of three runs, or of as many as fill `at_least` seconds, after one that does not count."""
    run()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < at_least:
        taken.append(seconds_once(run))
    return median(taken)


def products_of(side: Side) -> list[Call]:
    side.model.zero_grad()
    with Products() as products:
        side.step()
    return list(products.calls.values())


def measure(side: Side, calls: Sequence[Call], *, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """The square product, the step and its products in turn."""
    a, b = torch.randn(2, SQUARE, SQUARE, dtype=dtype)
    needed = sum(call.times * call.operations for call in calls) / 1e9
    peaks, steps = [], []
    alone: list[list[float]] = []
    for _ in range(rounds):
        peaks.append(2 * SQUARE**3 / 1e9 / seconds_of(lambda: a @ b.T, at_least=1.0))
        side.model.zero_grad()
        gc.collect()
        steps.append(seconds_once(side.step))
        with torch.no_grad():
            alone.append([call.seconds_alone() for call in calls])
    bounds = [sum(call.times * second for call, second in zip(calls, seconds, strict=True)) for seconds in alone]
    slowest = sorted(zip(calls, map(median, zip(*alone, strict=True)), strict=True), key=lambda pair: -pair[0].times * pair[1])
    return {
        "rounds": rounds,
        "needed_gflop": round(needed, 3),
        "peak_gflop_per_second": spread(peaks),
        "step_seconds": spread(steps),
        "step_gflop_per_second": spread([needed / step for step in steps]),
        "share_of_peak": spread([needed / step / peak for step, peak in zip(steps, peaks, strict=True)]),
        "products_alone_seconds": spread(bounds),
        "products_share_of_step": spread([bound / step for step, bound in zip(steps, bounds, strict=True)]),
        "products": [
            {
                "call": str(call),
                "times": call.times,
                "seconds_of_step": float(f"{call.times * second:.4g}"),
                "gflop_per_second": float(f"{call.operations / 1e9 / second:.4g}"),
            }
            for call, second in slowest
        ],
    }


def group_of(name: str, shapes: Sequence[Any], vocabulary: int) -> str:
    """Where a profiled event belongs: what it does over [tokens, vocabulary], but for products, is the head's softmax."""
    operator = name.removeprefix("aten::")
    if operator in PRODUCTS:
        return "products of matrices"
    if "_scaled_dot_product" in operator:
        return "attention"
    if any(isinstance(shape, list) and len(shape) > 1 and shape[-1] == vocabulary for shape in shapes):
        return "softmax of the head"
    if operator in ARITHMETIC:
        return "norms and other arithmetic"
    return "copies" if operator in COPIES else "rest"


def profile(side: Side, vocabulary: int) -> dict[str, Any]:
    """Percent of a step by group, each event without those that it calls; `rest` is Python, autograd, views and allocation."""
    side.model.zero_grad()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded, record_function("step"):
        side.step()
    events = recorded.events() or []
    if any(event.name.startswith("Torch-Compiled Region") for event in events):
        raise SystemExit("The step runs compiled code, whose products of matrices can't be told apart.")
    total = next(event.cpu_time_total for event in events if event.name == "step")
    groups, rest = dict.fromkeys(GROUPS, 0.0), dict[str, float]()
    for event in events:
        percent = 100 * event.self_cpu_time_total / total
        group = group_of(event.name, event.input_shapes, vocabulary)
        groups[group] += percent
        if group == "rest":
            rest[event.name] = rest.get(event.name, 0.0) + percent
    largest = sorted(rest, key=lambda name: -rest[name])[:8]
    return {
        "seconds": round(total / 1e6, 4),
        "percent": {group: round(percent, 2) for group, percent in groups.items()},
        "most_of_the_rest": {name: round(rest[name], 2) for name in largest},
    }


def run_case(name: str, dtype: str, rounds: int) -> dict[str, Any]:
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        side = Rayalign(case.job(Path(temporary) / "model", "dpo", dtype=DTYPES[dtype], device=CPU))
        draw_adapter(side.model)
        side.step()
        groups = profile(side, case.shape.vocabulary)
        measured = measure(side, products_of(side), rounds=rounds, dtype=DTYPES[dtype])
        return {"case": name, "dtype": dtype, **measured, "profile": groups}


def tables_of(steps: Sequence[Mapping[str, Any]]) -> str:
    header = ["case", "step, s", "GFLOP needed", "GFLOP/s", "square products, GFLOP/s", "share of the peak"]
    header += ["its products alone, s", "products' share of the step"]
    shares = [
        [
            f"{step['case']}, {step['dtype']}",
            show(step["step_seconds"]),
            f"{step['needed_gflop']:.4g}",
            show(step["step_gflop_per_second"]),
            show(step["peak_gflop_per_second"]),
            show(step["share_of_peak"]),
            show(step["products_alone_seconds"]),
            show(step["products_share_of_step"]),
        ]
        for step in steps
    ]
    percents = [
        [f"{step['case']}, {step['dtype']}", *(f"{step['profile']['percent'][group]:.1f}%" for group in GROUPS)]
        for step in steps
    ]
    return "\n\n".join([markdown_table(header, shares), markdown_table(["case", *GROUPS], percents)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["medium"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "peak.json")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # peft still uses the older of transformers' two names.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    torch.set_num_threads(arguments.threads)
    facts = machine_facts(threads=arguments.threads)
    steps = [run_case(name, dtype, arguments.rounds) for name in arguments.case for dtype in arguments.dtype]
    write_json(arguments.output, {"machine": facts, "steps": steps})
    print(tables_of(steps))


if __name__ == "__main__":
    main()
