"""Three rounds of the SFT model's own responses against one round with as many pairs drawn at once, on the quickstart's task.

`pipelines/iterate.py` does the rounds: it samples responses, scores them by `honest.py`, pairs the best with the worst, and
trains by DPO; each round goes on from the one before. Prints a table in Markdown and writes it to rounds.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import stages
from judge import Scores, load, score
from stages import stage
from task import QUESTION

ROUNDS = 3
PROMPTS = 600
RESPONSES = 4
"""To each prompt in a round. The one round draws as many as all rounds together, and makes as many pairs of them."""
STEPS = 20
"""Optimizer steps of a round, of 32 pairs each; the one round has as many as all rounds together."""


def write_prompts(task: stages.Task, path: Path) -> None:
    """The prompts of some training pictures, each with its digits, which the scorer alone reads."""
    rows = zip(task.training.files[:PROMPTS], task.training.digits[:PROMPTS].tolist(), strict=True)
    lines = [json.dumps({"query": QUESTION, "images": [file], "digits": digits}) for file, digits in rows]
    path.write_text("".join(line + "\n" for line in lines))


def iterate(task: stages.Task, name: str, *, rounds: int, responses: int, pairs_per_prompt: int, steps: int) -> Path:
    """Runs pipelines/iterate.py from the SFT model; returns its folder."""
    folder = task.folder / name
    stages.pipeline(
        "iterate",
        *("--model", task.folder / "sft" / "model", "--dataset", task.folder / "prompts.jsonl"),
        *("--val_dataset", task.folder / "held_out_pairs.jsonl", "--output_dir", folder, "--rlhf_type", "dpo"),
        *(
            "--num_rounds",
            rounds,
            "--n",
            responses,
            "--pairs_per_prompt",
            pairs_per_prompt,
            "--temperature",
            stages.TEMPERATURE,
        ),
        *("--scorer", f"python={Path(__file__).with_name('honest.py')}:digits_right", "--max_new_tokens", 16),
        *("--prompts_per_step", 32, "--beta", 0.1, "--rpo_alpha", 0.1, "--learning_rate", stages.RATE, "--max_steps", steps),
        *(*stages.ONE_WORKER, "--overwrite", "false"),
    )
    return folder


def judged(task: stages.Task, model: Path) -> Scores:
    loaded = load(task.folder / "base", model)
    return score(loaded, task.processor, task.held_out_pixels, task.held_out.digits, task.held_out_pairs)


def markdown(table: dict[str, dict[str, Any]]) -> str:
    lines = ["| | pairs | steps | preference accuracy | digits right | responses right |", "|---|---|---|---|---|---|"]
    for name, line in table.items():
        figures = " | ".join(f"{line[key]:.3f}" for key in ("preference", "digits", "answers"))
        lines.append(f"| {name} | {line['pairs']} | {line['steps']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=stages.ROOT / "output" / "rounds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, started = options.output_dir.resolve(), time.monotonic()
    with stages.cluster():
        task = stages.prepare(folder, options.seed)
        write_prompts(task, folder / "prompts.jsonl")
        with stage(f"{ROUNDS} rounds"):
            several = iterate(task, "rounds", rounds=ROUNDS, responses=RESPONSES, pairs_per_prompt=1, steps=STEPS)
        with stage("One round with as many responses, pairs and steps"):
            every = {"responses": ROUNDS * RESPONSES, "pairs_per_prompt": ROUNDS, "steps": ROUNDS * STEPS}
            at_once = iterate(task, "at_once", rounds=1, **every)
    table: dict[str, dict[str, Any]] = {"SFT, where all start": {**judged(task, folder / "sft" / "model")._asdict()}}
    table["SFT, where all start"] |= {"pairs": 0, "steps": 0}
    pairs = 0
    for found in json.loads((several / "rounds.json").read_text()):
        pairs += found["pairs"]
        line = judged(task, Path(found["model"]))._asdict()
        table[f"round {found['number']}"] = {**line, "pairs": pairs, "steps": STEPS * found["number"]}
    (found,) = json.loads((at_once / "rounds.json").read_text())
    line = judged(task, Path(found["model"]))._asdict()
    table["one round with all at once"] = {**line, "pairs": found["pairs"], "steps": ROUNDS * STEPS}
    summary = {"seed": options.seed, "seconds": round(time.monotonic() - started), "table": table}
    (folder / "rounds.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{markdown(table)}\n\n{summary['seconds']} s in all; pairs and steps are counted from the SFT model on")


if __name__ == "__main__":
    main()
