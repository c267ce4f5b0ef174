"""How far steps of a policy that is sharded over 2 and 4 processes are from those of one process that holds it whole.

python -m tests.sharded_table      # prints the table of docs/cluster.md, in some minutes
"""

import dataclasses
import functools
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rayalign.algorithms import CPO, DPO, KTO, MDPO, ORPO, RM, SFT, SimPO
from tests.sharded_steps import FULL, LORA, Case, Deal, differences, steps_of, together
from tests.tiny_models import save_tiny_model

FAMILIES = ("llava", "qwen2_vl")
DEALS: tuple[tuple[Deal, ...], ...] = ((((3,), (0,)), ((1,),), ((2,),), ()), ((), ((0, 1, 2, 3),), (), ()))
ALGORITHMS = {
    "DPO": DPO(),
    "AOT": DPO(rpo_alpha=0.0, loss_type=("aot", "aot_unpaired")),
    "mDPO": MDPO(),
    "CPO": CPO(),
    "ORPO": ORPO(),
    "SimPO": SimPO(),
    "KTO": KTO(),
    "reward model": RM(),
    "SFT": SFT(),
}
TUNERS = {
    "adapters": LORA,
    "all weights": FULL,
    "all weights and the tower's": dataclasses.replace(FULL, freeze_vit=False, freeze_aligner=False),
}
OF_FOUR = {
    f"{dtype} {family} {tuner} {algorithm}": Case(
        ALGORITHMS[algorithm],
        family,
        TUNERS[tuner],
        DEALS[number % 2],
        dtype,
        checkpointing=number % 3 > 0,
        recomputed=1 if number % 6 == 1 else None,
        scattered=number % 4 > 1,
        group_size=2 if number % 5 > 2 else None,
        sync_each_batch=number % 7 > 2,
    )
    for dtype in (torch.float64, torch.float32)
    for number, (family, tuner, algorithm) in enumerate(itertools.product(FAMILIES, TUNERS, ALGORITHMS))
}
"""Of four processes, with checkpointing and without, uneven micro-batches and idle processes, all four or two with a model, and
gradients added up in each micro-batch or once a step."""


def cases_of(num_workers: int) -> dict[str, Case]:
    """Those of four processes, or the same work of two."""
    if num_workers == 4:
        return OF_FOUR
    return {
        name: dataclasses.replace(
            case, deals=((*case.deals[0], *case.deals[1]), (*case.deals[2], *case.deals[3])), group_size=None
        )
        for name, case in OF_FOUR.items()
    }


def of_workers(num_workers: int, folders: Mapping[str, Path], out: Path) -> list[dict[str, Tensor]]:
    """What each of so many processes has of all cases."""
    return together(functools.partial(steps_of, cases_of(num_workers)), num_workers, folders, out)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folders = {family: save_tiny_model(place / family, family) for family in FAMILIES}
        found: dict[tuple[str, torch.dtype, str, int], float] = {}
        for num_workers in (2, 4):
            (out := place / f"of {num_workers}").mkdir()
            workers = of_workers(num_workers, folders, out)
            for name, case in cases_of(num_workers).items():
                algorithm = next(key for key in ALGORITHMS if name.endswith(f" {key}"))
                for worker in workers:
                    for kind, apart in differences(case, name, worker, folders[case.family]).items():
                        key = (algorithm, case.dtype, kind, num_workers)
                        found[key] = max(found.get(key, 0.0), apart)
    sys.stdout.write(table(found) + "\n")


def table(found: Mapping[tuple[str, torch.dtype, str, int], float]) -> str:
    columns: Sequence[tuple[torch.dtype, str]] = [
        (dtype, kind) for dtype in (torch.float64, torch.float32) for kind in ("gradient", "weight")
    ]
    lines = ["| | " + " | ".join(f"{kind}s, {str(dtype).removeprefix('torch.')}" for dtype, kind in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for algorithm in ALGORITHMS:
        cells = [" / ".join(f"{found[algorithm, dtype, kind, n]:.0e}" for n in (2, 4)) for dtype, kind in columns]
        lines.append(f"| {algorithm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
