"""A row at which the process ends that works on it, as by a crash in a library, costs only itself."""

import json
from pathlib import Path
from typing import Any

from tests.cluster import Cluster

WORDS = "the process ended 2 times over it: a crash, or the machine's memory was full"

FORMAT = """
import os
from rayalign.formats.parse import Format
from rayalign.formats.records import Message, build_record

def parse(row, *, id):
    if row["ask"] == "end":
        os._exit(3)
    asked = Message(role="user", content=row["ask"])
    return build_record(id=id, messages=[asked], images=[], chosen=row["good"], rejected=None)

FORMATS = (Format("mine", "ask, good", {"ask", "good"}.issubset, parse),)
"""

SCORER = """
import os

def score(rows):
    if any(row["query"] == "end" for row in rows):
        os._exit(3)
    return [float(len(row["response"])) for row in rows]
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_that_ends_the_process_that_encodes_it_is_dropped(
    cluster_of_four_cpus: Cluster, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "own_format.py").write_text(FORMAT)
    rows = [{"ask": "end" if n == 5 else f"Which is {n}?", "good": "It is two."} for n in range(30)]
    output, data = tmp_path / "run", write_rows(tmp_path / "rows.jsonl", rows)
    words = ("--rlhf_type", "sft", "--plugin", tmp_path / "own_format.py", "--model", model, "--dataset", data)
    flags = ("--max_steps", 1, "--num_workers", 1, "--eval_steps", 1000, "--report_to", "none")
    cluster_of_four_cpus.run("pipelines/rlhf.py", *words, *flags, "--output_dir", output)
    (dropped,) = read_lines(output / "dropped.jsonl")
    assert (dropped["row"], dropped["reason"], dropped["detail"]) == (5, "process ended", WORDS)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["training_records"] + summary["held_out_records"] == 29


def test_a_record_that_ends_the_process_that_scores_it_is_dropped(cluster_of_four_cpus: Cluster, tmp_path: Path) -> None:
    (tmp_path / "own_scorer.py").write_text(SCORER)
    rows = [{"query": "end" if n == 5 else f"Which is {n}?", "response": "x" * n} for n in range(1, 20)]
    output, data = tmp_path / "scores", write_rows(tmp_path / "rows.jsonl", rows)
    words = ("--scorer", f"python={tmp_path / 'own_scorer.py'}:score", "--dataset", data, "--output_dir", output)
    cluster_of_four_cpus.run("pipelines/score.py", *words)
    (dropped,) = read_lines(output / "dropped.jsonl")
    assert (dropped["id"], dropped["reason"], dropped["detail"]) == ("rows.jsonl:4", "process ended", WORDS)
    assert json.loads((output / "summary.json").read_text())["rows"] == 18
    assert not (output / "attempts").exists()
