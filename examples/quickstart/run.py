"""The whole way in one command: data, a small VLM, SFT, preference pairs of its own mistakes, DPO, and what each step changed.

The training is done by pipelines/sft.py and pipelines/dpo.py, on a local Ray with two workers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Set before Ray and transformers are loaded: nothing is downloaded, and the pipelines join this process's cluster.
os.environ.update({"HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"})

import numpy as np
import ray
import torch
from transformers.utils import logging as transformers_logging

from judge import Scores, ask, load, preference, read_pixels, sample_pairs, score, shuffled
from small_vlm import build_processor, read_captions, train_on_captions
from task import careless_labels, make_pictures, split_scans, text_only_accuracy, write_answers, write_pairs

ROOT = Path(__file__).parents[2]
TRAINING_PICTURES, PAIR_PICTURES, HELD_OUT_PICTURES = 3000, 1500, 800
CARELESS = 0.65
"""Share of the digits that SFT's labels get wrong: the SFT model learns to say look-alikes."""
WRONG_VOTES = 0.1
"""Share of the training pairs that the judge gets wrong."""
TEMPERATURE = 0.8
STEPS_SFT, STEPS_DPO = 150, 80
WORKERS = ("--num_workers", 2, "--batch_size", 16, "--gradient_accumulation_steps", 1, "--gradient_checkpointing", "false")
RARELY = ("--logging_steps", 10, "--eval_steps", 1000, "--save_steps", 1000, "--overwrite", "true")


@contextmanager
def stage(name: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"== {name}", flush=True)
    yield
    print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)


def pipeline(name: str, *words: object) -> None:
    """Runs one of pipelines/*.py with two workers, as on a command line."""
    command = [sys.executable, f"pipelines/{name}.py", *map(str, (*words, *WORKERS, *RARELY))]
    print("python", *command[1:], flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "quickstart")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, seed = options.output_dir.resolve(), options.seed
    folder.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    started = time.monotonic()

    with stage("Pictures of digits, and a small VLM trained on captions"):
        training_scans, held_out_scans = split_scans(seed)
        pictures = make_pictures(folder, "train", training_scans, TRAINING_PICTURES, 1000 + seed)
        held_out = make_pictures(folder, "held_out", held_out_scans, HELD_OUT_PICTURES, 2000 + seed)
        processor = build_processor()
        pixels, held_out_pixels = (read_pixels(processor, folder, some) for some in (pictures, held_out))
        base = train_on_captions(processor, pixels, pictures.digits, seed=seed)
        reads = read_captions(base, processor, held_out_pixels, held_out.digits)
        print(f"The base model reads {reads:.1%} of held-out digits")
        if reads < 0.9:
            sys.exit("error: the base model did not learn to see, so there is nothing to align; try another --seed.")
        base.save_pretrained(folder / "base")
        processor.save_pretrained(folder / "base")
        write_answers(folder / "sft.jsonl", pictures, careless_labels(pictures.digits, CARELESS, 3000 + seed))

    cluster = ray.init(num_cpus=3, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    os.environ["RAY_ADDRESS"] = cluster.address_info["gcs_address"]
    with stage("SFT on answers with careless labels"):
        model = ("--model", folder / "base", "--lora_target_modules", "ALL")
        words = ("--dataset", folder / "sft.jsonl", "--learning_rate", 2e-3, "--max_steps", STEPS_SFT)
        pipeline("sft", *model, *words, "--output_dir", folder / "sft")

    with stage("Preference pairs of the SFT model's own answers"):
        sft = load(folder / "base", folder / "sft" / "model")
        judged = {"temperature": TEMPERATURE, "seed": 10 + seed, "wrong_votes": WRONG_VOTES}
        pairs = sample_pairs(sft, processor, pixels[:PAIR_PICTURES], pictures.digits[:PAIR_PICTURES], **judged)
        held_out_pairs = sample_pairs(sft, processor, held_out_pixels, held_out.digits, temperature=TEMPERATURE, seed=20 + seed)
        write_pairs(folder / "pairs.jsonl", pictures, pairs)
        write_pairs(folder / "held_out_pairs.jsonl", held_out, held_out_pairs)
        text_only = text_only_accuracy(pairs, held_out_pairs)
        print(f"{len(pairs.picture)} training pairs, {len(held_out_pairs.picture)} held out")

    model = ("--model", folder / "sft" / "model")
    words = ("--learning_rate", 1e-3, "--max_steps", STEPS_DPO)
    data = ("--dataset", folder / "pairs.jsonl", "--val_dataset", folder / "held_out_pairs.jsonl")
    with stage("Control: SFT goes on, on the chosen answers of the pairs"):
        pipeline("sft", *model, *words, *data, "--output_dir", folder / "sft_continued")
    with stage("DPO on the pairs"):
        pipeline("dpo", *model, *words, *data, "--beta", 0.1, "--rpo_alpha", 0.1, "--output_dir", folder / "dpo")
    ray.shutdown()

    with stage("Scores on held-out handwriting"):
        models = {"base": None, "SFT": "sft", "SFT continued (control)": "sft_continued", "DPO": "dpo"}
        table: dict[str, Scores] = {}
        for name, run in models.items():
            judged_model = load(folder / "base", folder / run / "model" if run else None)
            table[name] = score(judged_model, processor, held_out_pixels, held_out.digits, held_out_pairs)
        other = shuffled(held_out_pixels, seed)
        wrong = np.array([found or [-1] * 4 for found in ask(judged_model, processor, other)]) == held_out.digits
        table["DPO, pictures shuffled"] = Scores(
            *preference(judged_model, processor, other, held_out_pairs), float(wrong.mean()), float(wrong.all(1).mean())
        )

    summary = {"text_only": text_only, "seconds": time.monotonic() - started, "seed": seed}
    (folder / "table.json").write_text(json.dumps({**summary, "table": {k: v._asdict() for k, v in table.items()}}, indent=2))
    print(f"\n{'held out':<26}{'preference':>12}{'margin':>9}{'digits':>9}{'answers':>9}")
    for name, line in table.items():
        print(f"{name:<26}{line.preference:>12.3f}{line.margin:>9.2f}{line.digits:>9.3f}{line.answers:>9.3f}")
    print(f"{'a text-only classifier':<26}{text_only:>12.3f}\n")
    print(
        "preference: share of the pairs whose chosen answer is the more probable; margin: mean of log p(chosen) - log "
        "p(rejected);"
    )
    print("digits, answers: shares that greedy decoding gets right.")
    print(f"Report: {folder / 'dpo' / 'report.html'}")
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
