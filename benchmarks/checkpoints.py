"""For how long the training stands still for its checkpoints, of full fine-tuning with --save_steps 50.

    python benchmarks/checkpoints.py                                       # five minutes on two idle cores
    python benchmarks/checkpoints.py --case tiny --save_steps 5 --steps 15     # a smoke test

A checkpoint holds the weights and AdamW's two moments, so three times the trained weights. The run itself tells how long it
stood still for each, and for how long altogether.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from job import ROOT
from measuring import machine_facts, parser_of, table, write_json
from synthetic import RECORDS_CASES, SHORT, RecordsCase, save_model, write_records

CASES = {"tiny": RECORDS_CASES["tiny"], "short": RecordsCase(SHORT, (60, 120))}
LINE = re.compile(r"Checkpoint of step (\d+): written in ([\d.]+) s; the training stood still for ([\d.]+) s")


def measure(folder: Path, case: RecordsCase, *, steps: int, save_steps: int) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "model": save_model(folder / "model", case.shape),
        "dataset": write_records(folder / "data", pairs=64, words=case.words),
        "output_dir": folder / "run",
        "sft_type": "full",
        "freeze_vit": "false",
        "freeze_aligner": "false",
        "num_workers": 1,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "save_steps": save_steps,
        "eval_steps": 1_000_000,
        "dataset_test_ratio": 0,
        "logging_steps": 10,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    env = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    command = [sys.executable, str(ROOT / "pipelines" / "dpo.py"), *words]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    told = {int(step): (float(written), float(still)) for step, written, still in LINE.findall(done.stdout + done.stderr)}
    seconds = json.loads((folder / "run" / "summary.json").read_text())["stage_seconds"]
    newest = max((folder / "run" / "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    still, training = seconds["checkpoints"], seconds["training"]
    return {
        "megabytes": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / 1e6,
        "checkpoints": [{"step": step, "written": told[step][0], "stood_still": told[step][1]} for step in sorted(told)],
        "training_seconds": training,
        "stood_still_seconds": still,
        "stood_still_share": still / (training + still),
    }


def main() -> None:
    parser = parser_of(__doc__, output="checkpoints.json")
    parser.add_argument("--case", choices=CASES, default="short", help="a model and the responses' lengths")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of the run")
    parser.add_argument("--save_steps", type=int, default=50)
    arguments = parser.parse_args()
    facts = machine_facts(threads=1)
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(Path(temporary), CASES[arguments.case], steps=arguments.steps, save_steps=arguments.save_steps)
    job = {"case": arguments.case, "steps": arguments.steps, "save_steps": arguments.save_steps}
    write_json(arguments.output, {"machine": facts, "job": job, **found})
    columns = {
        "step": lambda line: str(line["step"]),
        "written in, s": lambda line: f"{line['written']:.2f}",
        "stood still, s": lambda line: f"{line['stood_still']:.2f}",
    }
    print(table(columns, found["checkpoints"]))
    print(
        f"\n{found['megabytes']:,.0f} MB each; stood still for {found['stood_still_seconds']:.1f} s of "
        f"{found['training_seconds'] + found['stood_still_seconds']:.0f}: {100 * found['stood_still_share']:.1f} %"
    )


if __name__ == "__main__":
    main()
