"""What the quickstart and the comparison of algorithms share: a seed's data, models and pairs, and the pipelines' runs.

Import it before anything that loads Ray or transformers: it sets the environment of this process and of the pipelines.
"""

import os

# Nothing is downloaded, and the pipelines join this process's cluster.
os.environ.update({"HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"})

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from judge import load, read_pixels, sample_pairs
from small_vlm import build_processor, read_captions, train_on_captions
from task import (
    Pairs,
    Pictures,
    careless_labels,
    make_pictures,
    split_scans,
    text_only_accuracy,
    write_answers,
    write_pairs,
)

ROOT = Path(__file__).parents[2]
TRAINING_PICTURES, PAIR_PICTURES, HELD_OUT_PICTURES = 3000, 1500, 800
CARELESS = 0.65
"""Share of the digits that SFT's labels get wrong: the SFT model learns to say look-alikes."""
WRONG_VOTES = 0.1
"""Share of the training pairs that the judge gets wrong."""
TEMPERATURE = 0.8
SFT_STEPS, SFT_RATE = 150, 2e-3
STEPS, RATE = 80, 1e-3
"""Of everything that goes on from the SFT model, where nothing else is said."""
TWO_WORKERS, ONE_WORKER = ("--num_workers", 2, "--batch_size", 16), ("--num_workers", 1, "--batch_size", 32)
"""Either way a step has 32 pairs and makes the same update; two are faster where there are cores for them."""
WHOLE = ("--gradient_accumulation_steps", 1, "--gradient_checkpointing", "false")
RARELY = ("--logging_steps", 10, "--eval_steps", 1000, "--save_steps", 1000, "--overwrite", "true")


class Task(NamedTuple):
    """One seed's task. Its folder holds `base`, the SFT model's run `sft`, `pairs.jsonl` and `held_out_pairs.jsonl`.

    Pixels are [n, 3, side, side]; `text_only` is the accuracy of a classifier that sees no picture.
    """

    folder: Path
    seed: int
    processor: Any
    training: Pictures
    training_pixels: Tensor
    training_pairs: Pairs
    held_out: Pictures
    held_out_pixels: Tensor
    held_out_pairs: Pairs
    text_only: float


SECONDS: dict[str, float] = {}
"""What each stage took that this process has done."""


@contextmanager
def stage(name: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"== {name}", flush=True)
    yield
    SECONDS[name] = time.monotonic() - started
    print(f"== {name}: {SECONDS[name]:.0f} s", flush=True)


@contextmanager
def cluster() -> Iterator[None]:
    """A local Ray cluster with room for two workers, which the pipelines started within it join."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    context = ray.init(num_cpus=3, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    try:
        yield
    finally:
        ray.shutdown()


def command(name: str, *words: object) -> list[str]:
    """The command line of one of pipelines/*.py, to be run from `ROOT`; it is printed, too."""
    line = [sys.executable, f"pipelines/{name}.py", *map(str, words)]
    print("python", *line[1:], flush=True)
    return line


def beside(usual: Sequence[object], words: Sequence[object]) -> tuple[object, ...]:
    """The usual flags, each with its value, that `words` do not give, and these."""
    kept = [pair for pair in zip(usual[::2], usual[1::2], strict=True) if pair[0] not in words]
    return (*itertools.chain.from_iterable(kept), *words)


def pipeline(name: str, *words: object) -> float:
    """Runs a training, with two workers if no other number is given; returns the seconds that it took."""
    started = time.monotonic()
    subprocess.run(command(name, *beside((*TWO_WORKERS, *WHOLE, *RARELY), words)), cwd=ROOT, check=True)
    return time.monotonic() - started


def prepare(folder: Path, seed: int) -> Task:
    """Makes the pictures, a VLM that sees them, its SFT model, and preference pairs of that model's own answers."""
    folder.mkdir(parents=True, exist_ok=True)
    with stage("Pictures of digits, and a small VLM trained on captions"):
        training_scans, held_out_scans = split_scans(seed)
        training = make_pictures(folder, "train", training_scans, TRAINING_PICTURES, 1000 + seed)
        held_out = make_pictures(folder, "held_out", held_out_scans, HELD_OUT_PICTURES, 2000 + seed)
        processor = build_processor()
        pixels, held_out_pixels = (read_pixels(processor, folder, some) for some in (training, held_out))
        base = train_on_captions(processor, pixels, training.digits, seed=seed)
        reads = read_captions(base, processor, held_out_pixels, held_out.digits)
        print(f"The base model reads {reads:.1%} of held-out digits")
        if reads < 0.9:
            sys.exit("error: the base model did not learn to see, so there is nothing to align; try another --seed.")
        base.save_pretrained(folder / "base")
        processor.save_pretrained(folder / "base")
        write_answers(folder / "sft.jsonl", training, careless_labels(training.digits, CARELESS, 3000 + seed))

    with stage("SFT on answers with careless labels"):
        model = ("--model", folder / "base", "--lora_target_modules", "ALL")
        words = ("--dataset", folder / "sft.jsonl", "--learning_rate", SFT_RATE, "--max_steps", SFT_STEPS)
        pipeline("sft", *model, *words, "--output_dir", folder / "sft")

    with stage("Preference pairs of the SFT model's own answers"):
        sft = load(folder / "base", folder / "sft" / "model")
        some, votes = slice(PAIR_PICTURES), {"temperature": TEMPERATURE, "seed": 10 + seed, "wrong_votes": WRONG_VOTES}
        pairs = sample_pairs(sft, processor, pixels[some], training.digits[some], **votes)
        held_out_pairs = sample_pairs(sft, processor, held_out_pixels, held_out.digits, temperature=TEMPERATURE, seed=20 + seed)
        write_pairs(folder / "pairs.jsonl", training, pairs)
        write_pairs(folder / "held_out_pairs.jsonl", held_out, held_out_pairs)
        text_only = text_only_accuracy(pairs, held_out_pairs)
        print(f"{len(pairs.picture)} training pairs, {len(held_out_pairs.picture)} held out")
    held = (held_out, held_out_pixels, held_out_pairs)
    return Task(folder, seed, processor, training, pixels, pairs, *held, text_only)


def align(task: Task, name: str, run: str, *words: object, records: str = "pairs.jsonl") -> float:
    """Goes on from the SFT model with pipelines/NAME.py; `words` are flags beside or instead of the usual ones. Returns the
    seconds that it took; the result is in the task's folder under `run`."""
    model = ("--model", task.folder / "sft" / "model")
    data = ("--dataset", task.folder / records, "--val_dataset", task.folder / "held_out_pairs.jsonl")
    usual = ("--learning_rate", RATE, "--max_steps", STEPS)
    return pipeline(name, *model, *data, "--output_dir", task.folder / run, *beside(usual, words))
