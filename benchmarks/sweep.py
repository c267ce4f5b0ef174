"""What a sweep costs beside its trials run alone: `pipelines/tune.py` on short trials of a tiny model, against the same trials
as commands of their own, one after another.

    python benchmarks/sweep.py                     # six minutes a round on two cores
    python benchmarks/sweep.py --rounds 1 --trials 4

Either side begins with records that are not encoded. Alone, the first command encodes them and the others find them. Seconds
are of wall time, and of the processors over all processes of a command. The adapters must be equal to the bit.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job import ROOT
from measuring import machine_facts, parser_of, ratios, show, spread, table, write_json
from start import run_command
from synthetic import RECORDS_CASES, save_model, write_records

ADAPTER = Path("model") / "adapter_model.safetensors"


def command_of(pipeline: str, flags: Mapping[str, Any]) -> list[str]:
    words = [word for name, value in flags.items() for word in (f"--{name}", *map(str, _listed(value)))]
    return [sys.executable, str(ROOT / "pipelines" / f"{pipeline}.py"), *words]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


def flags_of(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": folder / "model",
        "dataset": folder / "data" / "pairs.jsonl",
        "max_steps": arguments.steps,
        "eval_steps": max(1, arguments.steps // 3),
        "num_workers": 1,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "eval_on_start": "false",
        "eval_answers": 0,
        "learning_rate": 1e-3,
    }


def alone(folder: Path, arguments: argparse.Namespace, betas: Sequence[float], number: int) -> dict[str, float]:
    sums = {"seconds": 0.0, "processor": 0.0}
    for place, beta in enumerate(betas):
        output = {"output_dir": folder / f"alone{number}" / str(place), "cache_dir": folder / f"cache_alone{number}"}
        found = run_command(command_of("dpo", {**flags_of(folder, arguments), **output, "beta": beta}), folder)
        sums["seconds"] += found["marks"]["exit"]
        sums["processor"] += sum(found["processor"].values())
    return sums


def together(folder: Path, arguments: argparse.Namespace, betas: Sequence[float], number: int) -> dict[str, float]:
    search = {"rlhf_type": "dpo", "search": (f"beta=grid:{','.join(map(str, betas))}",), "scheduler": "none"}
    output = {"output_dir": folder / f"sweep{number}", "cache_dir": folder / f"cache_sweep{number}"}
    found = run_command(command_of("tune", {**flags_of(folder, arguments), **output, **search}), folder)
    return {"seconds": found["marks"]["exit"], "processor": sum(found["processor"].values())}


def check_equal(folder: Path, number: int) -> None:
    trials = sorted((folder / f"sweep{number}" / "trials").iterdir())
    for place, trial in enumerate(trials):
        if (trial / ADAPTER).read_bytes() != (folder / f"alone{number}" / str(place) / ADAPTER).read_bytes():
            raise SystemExit(f"{trial.name} is not the adapter of the same flags run alone.")


def main() -> None:
    parser = parser_of(__doc__, output="sweep.json", rounds=2)
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    betas = [round(0.05 * (k + 1), 2) for k in range(arguments.trials)]
    found: dict[str, list[dict[str, float]]] = {"alone": [], "sweep": []}
    facts = machine_facts(threads=1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, case = Path(temporary), RECORDS_CASES["tiny"]
        save_model(folder / "model", case.shape)
        write_records(folder / "data", pairs=arguments.records, words=case.words)
        for number in range(arguments.rounds):
            found["alone"].append(alone(folder, arguments, betas, number))
            found["sweep"].append(together(folder, arguments, betas, number))
            check_equal(folder, number)
    ratio = {
        kind: ratios([run[kind] for run in found["sweep"]], [run[kind] for run in found["alone"]])
        for kind in ("seconds", "processor")
    }
    settings = {"records": arguments.records, "trials": arguments.trials, "steps": arguments.steps}
    write_json(arguments.output, {"machine": facts, **settings, "runs": found, "sweep_over_alone": ratio})
    columns = {"": lambda side: side} | {
        kind: lambda side, kind=kind: show(spread([run[kind] for run in found[side]])) for kind in ("seconds", "processor")
    }
    print(table(columns, [*found]))
    print(
        f"\nthe sweep over its trials alone: {show(ratio['seconds'])} of the time, {show(ratio['processor'])} of the processor"
    )


if __name__ == "__main__":
    main()
