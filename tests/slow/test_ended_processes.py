"""A response at which the process ends that scores it costs only itself."""

import json
from pathlib import Path

import pytest

from tests.cluster import running_cluster

WORDS = "the process ended 2 times over it: a crash, or the machine's memory was full"

SCORER = """
import os

def score(rows):
    if any(row["query"] == "end" for row in rows):
        os._exit(3)
    return [float(len(row["response"])) for row in rows]
"""


def test_a_record_that_ends_the_process_that_scores_it_is_dropped(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "own_scorer.py").write_text(SCORER)
    rows = [{"query": "end" if n == 5 else f"Which is {n}?", "response": "x" * n} for n in range(1, 20)]
    output, data = tmp_path / "scores", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--scorer", f"python={tmp_path / 'own_scorer.py'}:score", "--dataset", data, "--output_dir", output)
    with running_cluster(tmp_path_factory.mktemp("ray"), num_cpus=2) as cluster:
        cluster.run("pipelines/score.py", *words)
    dropped = json.loads((output / "dropped.jsonl").read_text())
    assert (dropped["id"], dropped["reason"], dropped["detail"]) == ("rows.jsonl:4", "process ended", WORDS)
    assert json.loads((output / "summary.json").read_text())["rows"] == 18
    assert not (output / "attempts").exists()
