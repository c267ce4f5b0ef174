"""Proof that a change leaves the numbers alone: what every algorithm computes, to the bit, as one JSON file to compare.

    python tests/same_numbers.py before.json          # on the commit before
    python tests/same_numbers.py after.json           # on the commit after
    diff before.json after.json

Each algorithm trains a tiny model of two families for four steps on two workers. Of each run the file has the losses and
gradient norms as exact numbers, and hashes of the optimizer's moments after the first step (which are its gradients), and of
the result's weights. Numbers are equal on one machine with the same packages only.
"""

import hashlib
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's folder is on the path, and `tests` is not in it

from safetensors.torch import load_file

from tests.cluster import Cluster, running_cluster
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model

ALGORITHMS = ("sft", "rm", "dpo", "mdpo", "cpo", "orpo", "simpo", "kto")
FAMILIES = ("llava", "qwen2_vl")
WORDS = (
    *("--num_workers", 2, "--batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", 4, "--dataset_test_ratio", 0.2),
    *("--learning_rate", 1e-3, "--logging_steps", 1, "--eval_steps", 2, "--save_steps", 1, "--save_total_limit", 4),
)


def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_rows(folder / "data", 50, seed=1)
        models = {name: save_tiny_model(folder / name, name) for name in FAMILIES}
        (folder / "ray").mkdir()
        with running_cluster(folder / "ray", num_cpus=4) as cluster, ThreadPoolExecutor(2) as pool:
            names = [(family, algorithm) for family in FAMILIES for algorithm in ALGORITHMS]
            found = pool.map(lambda name: _numbers(cluster, models[name[0]], data, folder / "_".join(name), name[1]), names)
            numbers = {"/".join(name): of_run for name, of_run in zip(names, found, strict=True)}
    output.write_text(json.dumps(numbers, indent=1) + "\n")


def _numbers(cluster: Cluster, model: Path, data: Path, folder: Path, algorithm: str) -> dict[str, Any]:
    cluster.run(f"pipelines/{algorithm}.py", "--model", model, "--dataset", data, "--output_dir", folder, *WORDS)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (first,) = (folder / "checkpoints").glob("step_00000001_*")
    return {
        **{name: [line[name] for line in lines if name in line] for name in ("loss", "grad_norm", "eval_loss")},
        "state after the first step": _hash_of(first),
        "result": _hash_of(folder / "model"),
    }


def _hash_of(folder: Path) -> str:
    """Of every tensor's name and bytes."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{file.name}/{name}:{tensor.dtype}".encode() + tensor.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
