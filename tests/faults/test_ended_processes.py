"""A record at which the process ends that encodes it, as by a crash in a library, costs only itself."""

import json
from pathlib import Path

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


def test_a_record_that_ends_the_process_that_encodes_it_is_dropped(
    cluster_of_four_cpus: Cluster, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "own_format.py").write_text(FORMAT)
    rows = [{"ask": "end" if n == 5 else f"Which is {n}?", "good": "It is two."} for n in range(30)]
    output, data = tmp_path / "run", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--rlhf_type", "sft", "--plugin", tmp_path / "own_format.py", "--model", model, "--dataset", data)
    flags = ("--max_steps", 1, "--num_workers", 1, "--eval_steps", 1000, "--report_to", "none")
    cluster_of_four_cpus.run("pipelines/rlhf.py", *words, *flags, "--output_dir", output)
    dropped = json.loads((output / "dropped.jsonl").read_text())
    assert (dropped["row"], dropped["reason"], dropped["detail"]) == (5, "process ended", WORDS)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["training_records"] + summary["held_out_records"] == 29
