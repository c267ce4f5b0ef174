"""The whole way in one command: data, a small VLM, SFT, preference pairs of its own mistakes, DPO, and what each step changed.

The training is done by pipelines/sft.py and pipelines/dpo.py, on a local Ray with two workers.
"""

import argparse
import json
import time
from pathlib import Path

import stages
from judge import Scores, load, score, shuffled
from stages import stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=stages.ROOT / "output" / "quickstart")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, seed = options.output_dir.resolve(), options.seed
    started = time.monotonic()

    with stages.cluster():
        task = stages.prepare(folder, seed)
        with stage("Control: SFT goes on, on the chosen answers of the pairs"):
            stages.align(task, "sft", "sft_continued")
        with stage("DPO on the pairs"):
            stages.align(task, "dpo", "dpo", "--beta", 0.1, "--rpo_alpha", 0.1)

    with stage("Scores on held-out handwriting"):
        models = {"base": None, "SFT": "sft", "SFT continued (control)": "sft_continued", "DPO": "dpo"}
        table: dict[str, Scores] = {}
        for name, run in models.items():
            judged_model = load(folder / "base", folder / run / "model" if run else None)
            table[name] = score(judged_model, task.processor, task.held_out_pixels, task.held_out.digits, task.held_out_pairs)
        other = shuffled(task.held_out_pixels, seed)
        table["DPO, pictures shuffled"] = score(judged_model, task.processor, other, task.held_out.digits, task.held_out_pairs)

    summary = {"text_only": task.text_only, "seconds": time.monotonic() - started, "seed": seed}
    (folder / "table.json").write_text(json.dumps({**summary, "table": {k: v._asdict() for k, v in table.items()}}, indent=2))
    print(f"\n{'held out':<26}{'preference':>12}{'margin':>9}{'digits':>9}{'answers':>9}")
    for name, line in table.items():
        print(f"{name:<26}{line.preference:>12.3f}{line.margin:>9.2f}{line.digits:>9.3f}{line.answers:>9.3f}")
    print(f"{'a text-only classifier':<26}{task.text_only:>12.3f}\n")
    print(
        "preference: share of the pairs whose chosen answer is the more probable; margin: mean of log p(chosen) - log "
        "p(rejected);"
    )
    print("digits, answers: shares that greedy decoding gets right.")
    print(f"Report: {folder / 'dpo' / 'report.html'}")
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
