"""How near our DPO step comes to the machine's peak in products of matrices, and what the rest of its time goes into.

    python benchmarks/peak.py                                            # medium, float32 and bfloat16; minutes on one core
    python benchmarks/peak.py --case tiny --dtype float32 --rounds 1     # a smoke test

The share of the peak compares the operations that the step needs with what products of square matrices would do in its time.
Few of a step's products have such a shape, so the products' share of the step is the time that they take one by one, each shape
by itself, over the step's. All are measured in turn, since the clock of a machine moves; shares are taken within a round. On
the CPU: processor seconds on one thread, wall seconds on several. A step has no optimizer's update in it.
"""

import contextlib
import gc
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import DTYPES, machine_facts, parser_of, ratios, seconds_of, set_up, show, spread, table, write_json
from sides import Rayalign, Side, draw_adapter
from step import CASES
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rayalign.estimate.meter import FLOPS

SQUARE = 2048

OPERATORS = {
    "products of matrices": "mm addmm addmm_ bmm baddbmm baddbmm_ mv addmv dot mkldnn_convolution _slow_conv2d_forward",
    "norms and other arithmetic": "add add_ sub sub_ mul mul_ div div_ neg neg_ pow rsqrt sqrt exp exp_ log silu silu_ "
    "silu_backward gelu gelu_backward sigmoid sigmoid_ tanh native_layer_norm _softmax sum mean max amax logsumexp logaddexp "
    "softplus sin cos where log_sigmoid_forward _fused_rms_norm _fused_rms_norm_backward native_layer_norm_backward "
    "threshold_backward addcmul _log_softmax",
    "copies": "copy_ cat clone fill_ zero_ index index_select index_put_ index_add_ _index_put_impl_ gather scatter_ "
    "masked_scatter masked_scatter_ masked_fill masked_fill_ constant_pad_nd slice_backward repeat select_backward embedding "
    "_to_copy contiguous stack narrow_copy slice_scatter",
}
GROUP_OF = {operator: group for group, operators in OPERATORS.items() for operator in operators.split()}
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
        return median_seconds(lambda: self.func(*self.args, **self.kwargs), at_least=0.01)

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


def processor_seconds(run: Callable[[], Any]) -> float:
    """Wall seconds where there are several threads."""
    taken = seconds_of(run)
    return taken.cpu if torch.get_num_threads() == 1 else taken.wall


def median_seconds(run: Callable[[], Any], *, at_least: float) -> float:
    """Median of three runs, or of as many as fill `at_least` seconds, after one that does not count."""
    run()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < at_least:
        taken.append(processor_seconds(run))
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
        peaks.append(2 * SQUARE**3 / 1e9 / median_seconds(lambda: a @ b.T, at_least=1.0))
        side.model.zero_grad()
        gc.collect()
        steps.append(processor_seconds(side.step))
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
        "products_share_of_step": ratios(bounds, steps),
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
    group = GROUP_OF.get(operator, "rest")
    if group == "products of matrices":
        return group
    if "_scaled_dot_product" in operator:
        return "attention"
    of_head = any(isinstance(shape, list) and len(shape) > 1 and shape[-1] == vocabulary for shape in shapes)
    return "softmax of the head" if of_head else group


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
        side = Rayalign(case.job(Path(temporary), dtype=dtype))
        draw_adapter(side.model)
        side.step()
        groups = profile(side, case.shape.vocabulary)
        measured = measure(side, products_of(side), rounds=rounds, dtype=DTYPES[dtype])
        return {"case": name, "dtype": dtype, **measured, "profile": groups}


def main() -> None:
    parser = parser_of(__doc__, output="peak.json", rounds=5, threads=1)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["medium"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES])
    arguments = parser.parse_args()
    set_up(arguments.threads)
    facts = machine_facts(threads=arguments.threads)
    steps = [run_case(name, dtype, arguments.rounds) for name in arguments.case for dtype in arguments.dtype]
    write_json(arguments.output, {"machine": facts, "steps": steps})
    case = {"case": lambda step: f"{step['case']}, {step['dtype']}"}
    shares = {
        "step, s": lambda step: show(step["step_seconds"]),
        "GFLOP needed": lambda step: f"{step['needed_gflop']:.4g}",
        "GFLOP/s": lambda step: show(step["step_gflop_per_second"]),
        "square products, GFLOP/s": lambda step: show(step["peak_gflop_per_second"]),
        "share of the peak": lambda step: show(step["share_of_peak"]),
        "its products alone, s": lambda step: show(step["products_alone_seconds"]),
        "products' share of the step": lambda step: show(step["products_share_of_step"]),
    }
    percents = {group: lambda step, group=group: f"{step['profile']['percent'][group]:.1f}%" for group in GROUPS}
    print(table(case | shares, steps), table(case | percents, steps), sep="\n\n")


if __name__ == "__main__":
    main()
