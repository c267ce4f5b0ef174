"""A sweep whose driver is killed, continued by the same command and then by one that asks for more trials."""

import hashlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from rayalign.storage import Store
from rayalign.sweeps.hparams import SUFFIX
from rayalign.training.checkpoint_folder import newest_complete
from tests.cluster import Cluster

MOST_SECONDS = 180
ADAPTER = Path("model") / "adapter_model.safetensors"


def until(holds: Callable[[], bool], words: str) -> None:
    deadline = time.monotonic() + MOST_SECONDS
    while not holds():
        assert time.monotonic() < deadline, words
        time.sleep(0.02)


def trials_of(folder: Path, *, finished: bool) -> list[Path]:
    trials = sorted((folder / "trials").iterdir()) if (folder / "trials").exists() else []
    return [trial for trial in trials if (trial / "summary.json").exists() == finished]


def saved_step(trial: Path) -> int:
    """Of its newest whole checkpoint; 0 where there is none."""
    found = newest_complete(Store.at(str(trial / "checkpoints")))
    return found.step if found is not None else 0


def starts(trial: Path) -> int:
    """How often it was run."""
    return len(json.loads((trial / "times.json").read_text()))


def content_of(trial: Path) -> dict[str, str]:
    """Hashes of its files, but for the flags that the end of a sweep writes for TensorBoard."""
    files = [file for file in sorted(trial.rglob("*")) if file.is_file() and not file.name.endswith(SUFFIX)]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def steps_of(trial: Path) -> list[int]:
    """The steps whose lines the trial's metrics have, in the order of the file."""
    lines = map(json.loads, (trial / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def test_a_killed_sweep_keeps_what_is_finished_and_goes_on_with_the_others_from_their_checkpoints(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    words = (
        *("--rlhf_type", "dpo", "--model", model, "--dataset", records, "--output_dir", folder, "--max_steps", 30),
        *("--batch_size", 8, "--gradient_accumulation_steps", 1, "--dataset_test_ratio", 0.2, "--eval_steps", 30),
        *("--save_steps", 2, "--logging_steps", 1, "--lora_dropout", 0.1, "--scheduler", "none"),
        *("--search", "beta=loguniform:0.05:1", "learning_rate=loguniform:1e-4:1e-2", "--max_concurrent_trials", 2),
    )
    command = ("pipelines/tune.py", *words, "--num_samples")
    log = tmp_path / "killed.log"
    driver = cluster_of_four_cpus.start(*command, 4, log=log)
    try:
        until(
            lambda: (
                len(trials_of(folder, finished=True)) == 2
                and max(map(saved_step, trials_of(folder, finished=False)), default=0) > 4
            ),
            "two trials have finished, and a third has saved",
        )
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    finished, others = trials_of(folder, finished=True), trials_of(folder, finished=False)
    assert len(finished) in (2, 3), log.read_text()[-3000:]
    kept = {trial: content_of(trial) for trial in finished}
    under_way = [trial for trial in others if saved_step(trial)]
    assert under_way

    output = cluster_of_four_cpus.run(*command, 4)
    assert output.count(": Goes on (") >= len(under_way)
    assert len(trials_of(folder, finished=True)) == 4
    assert {trial: content_of(trial) for trial in finished} == kept
    assert [starts(trial) for trial in finished] == [1] * len(finished)
    for trial in under_way:
        assert starts(trial) == 2
        # Each step has one line: those up to the checkpoint are of the first start.
        assert steps_of(trial) == list(range(1, 31))

    # A trial that went on is, to the bit, one that was never disturbed.
    trial = under_way[0]
    flags = {**yaml.safe_load((trial / "config.yaml").read_text()), "output_dir": str(tmp_path / "alone"), "eval_answers": 0}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(flags))
    cluster_of_four_cpus.run("pipelines/dpo.py", "--config", tmp_path / "alone.yaml")
    assert (tmp_path / "alone" / ADAPTER).read_bytes() == (trial / ADAPTER).read_bytes()

    four = {trial: content_of(trial) for trial in trials_of(folder, finished=True)}
    cluster_of_four_cpus.run(*command, 6)
    six = trials_of(folder, finished=True)
    assert len(six) == 6
    assert {trial: content_of(trial) for trial in four} == four
    assert [starts(trial) for trial in six if trial not in four] == [1, 1]
    assert len(json.loads((folder / "sweep.json").read_text())["trials"]) == 6
