"""Three rounds of the SFT model's own responses against one round with as many drawn at once, on the quickstart's task.

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
PROMPTS = 1000
RESPONSES = 4
"""To each prompt in a round. The one round draws as many as all rounds together: to thrice the prompts, or thrice as many to
each, which make up to three pairs."""
STEPS = 12
"""Optimizer steps of a round, of 32 pairs each; the one round has as many as all rounds together."""
RATE = 5e-4


def write_prompts(task: stages.Task, path: Path, *, count: int = PROMPTS) -> None:
    """The prompts of some training pictures, each with its digits, which the scorer alone reads."""
    rows = zip(task.training.files[:count], task.training.digits[:count].tolist(), strict=True)
    lines = [json.dumps({"query": QUESTION, "images": [file], "digits": digits}) for file, digits in rows]
    path.write_text("".join(line + "\n" for line in lines))


def iterate(
    task: stages.Task,
    name: str,
    *,
    model: Path,
    rounds: int,
    responses: int,
    pairs_per_prompt: int,
    steps: int,
    prompts: str = "prompts.jsonl",
) -> Path:
    """Runs pipelines/iterate.py from a model; returns its folder."""
    folder = task.folder / name
    stages.pipeline(
        "iterate",
        *("--model", model, "--dataset", task.folder / prompts),
        *("--val_dataset", task.folder / "held_out_pairs.jsonl", "--output_dir", folder, "--rlhf_type", "dpo"),
        *("--num_rounds", rounds, "--n", responses, "--pairs_per_prompt", pairs_per_prompt),
        *("--scorer", f"python={Path(__file__).with_name('honest.py')}:digits_right", "--max_new_tokens", 16),
        *("--temperature", stages.TEMPERATURE, "--prompts_per_step", 32, "--seed", task.seed),
        *("--beta", 0.1, "--rpo_alpha", 0.1, "--learning_rate", RATE, "--max_steps", steps),
        *stages.ONE_WORKER,
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
    sft = folder / "sft" / "model"
    table: dict[str, dict[str, Any]] = {}

    def add(name: str, model: Path, *, pairs: int, steps: int) -> None:
        table[name] = {**judged(task, model)._asdict(), "pairs": pairs, "steps": steps}

    with stages.cluster():
        task = stages.prepare(folder, options.seed)
        write_prompts(task, folder / "prompts.jsonl")
        write_prompts(task, folder / "more_prompts.jsonl", count=ROUNDS * PROMPTS)
        with stage(f"{ROUNDS} rounds"):
            one: dict[str, Any] = {"model": sft, "responses": RESPONSES, "pairs_per_prompt": 1}
            several = iterate(task, "rounds", **one, rounds=ROUNDS, steps=STEPS)
        with stage("One round, with as many steps"):
            thrice = {"responses": ROUNDS * RESPONSES, "pairs_per_prompt": ROUNDS}
            at_once = {
                "one round, 3 x the prompts": iterate(
                    task, "prompts", **one, rounds=1, steps=ROUNDS * STEPS, prompts="more_prompts.jsonl"
                ),
                "one round, 3 x the responses": iterate(task, "responses", **{**one, **thrice}, rounds=1, steps=ROUNDS * STEPS),
            }
    add("SFT, where all start", sft, pairs=0, steps=0)
    pairs = 0
    for found in json.loads((several / "rounds.json").read_text()):
        pairs += found["pairs"]
        add(f"round {found['number']}", Path(found["model"]), pairs=pairs, steps=STEPS * found["number"])
    for name, output in at_once.items():
        (found,) = json.loads((output / "rounds.json").read_text())
        add(name, Path(found["model"]), pairs=found["pairs"], steps=ROUNDS * STEPS)
    summary = {"seed": options.seed, "seconds": round(time.monotonic() - started), "table": table}
    (folder / "rounds.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{markdown(table)}\n\n{summary['seconds']} s in all; pairs and steps are counted from the SFT model on")


if __name__ == "__main__":
    main()
