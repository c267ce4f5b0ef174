"""Two rounds of a tiny model, killed in each stage and continued by the same command, end as two that were left alone."""

import json
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
from safetensors.torch import load_file

from tests.cluster import RUN_SECONDS, running_cluster
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model

KILLED_AT = (
    "round_1/responses/settings.json",
    "round_1/scores/settings.json",
    "round_1/pairs/rows",
    "round_1/train/config.yaml",
    "round_2/scores/settings.json",
)
"""What each stage writes first, in the order of the stages: the command is killed when it is there."""


def test_rounds_that_were_killed_end_as_those_that_were_not(tmp_path: Path, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]  # pytest's factory
    records, model = write_rows(tmp_path / "data", 40), save_tiny_model(tmp_path / "model")
    ends = {"eos_token_id": list(range(2, 300, 4))}  # a model of random weights would hardly ever end a response
    (model / "generation_config.json").write_text(json.dumps(ends))
    (tmp_path / "mine.py").write_text("def letters(rows):\n    return [len(set(row['response'])) for row in rows]\n")

    def words(name: str) -> tuple[object, ...]:
        return (
            *("pipelines/iterate.py", "--rlhf_type", "dpo", "--model", model, "--dataset", records, "--val_dataset", records),
            *("--num_rounds", 2, "--n", 3, "--temperature", 1, "--max_new_tokens", 12, "--max_steps", 3, "--batch_size", 4),
            *("--gradient_accumulation_steps", 1, "--scorer", f"python={tmp_path / 'mine.py'}:letters"),
            *("--report_to", "none", "--output_dir", tmp_path / name),
        )

    with running_cluster(tmp_path_factory.mktemp("ray"), num_cpus=3) as cluster:
        cluster.run(*words("whole"))
        for place in KILLED_AT:
            process = cluster.start(*words("killed"))
            deadline = time.monotonic() + RUN_SECONDS
            while not (tmp_path / "killed" / place).exists():
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, place
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        cluster.run(*words("killed"))
    assert (tmp_path / "killed" / "rounds.html").exists()
    models = []
    for name in ("whole", "killed"):
        folder = tmp_path / name / "round_2"
        pairs = pq.read_table(folder / "pairs" / "rows").to_pylist()
        assert {pair["lineage"]["round"] for pair in pairs} == {2}
        assert all(pair["lineage"]["chosen_score"] > pair["lineage"]["rejected_score"] for pair in pairs)
        texts = [(pair["response"], pair["rejected_response"]) for pair in pairs]
        models.append((texts, load_file(folder / "train" / "model" / "adapter_model.safetensors")))
    assert models[0][0] == models[1][0]
    assert all(weight.equal(models[1][1][key]) for key, weight in models[0][1].items())
