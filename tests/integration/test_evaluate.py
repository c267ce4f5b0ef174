"""The verb evaluate on the cluster: a model on preference data and on a benchmark, with rows that can't be used."""

import json
from pathlib import Path

from tests.cluster import Cluster
from tests.evaluation.benchmarks.twins import put_pictures, write_lines


def test_a_model_is_evaluated_on_data_and_a_benchmark_and_no_row_is_lost_silently(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path: Path
) -> None:
    pope, row = tmp_path / "pope", {"image": "a.jpg", "text": "Is there a cat?"}
    rows = [row | {"question_id": n, "label": "yes" if n % 2 else "no"} for n in range(4)]
    write_lines(pope / "coco_pope_random.json", [*rows, row | {"question_id": 9, "label": "no", "image": "gone.jpg"}])
    put_pictures(pope / "val2014", "a.jpg")
    words = ("--model", model, "--dataset", records, "--benchmarks", f"pope:{pope}", "--image_checks", "none")
    said = cluster_of_four_cpus.run("pipelines/evaluate.py", *words, "--output_dir", tmp_path / "out")
    assert "model: 50 records, 2 dropped" in said
    assert "model: POPE: 5 questions, 1 unanswered, 0 rows left out" in said
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["model"]
    assert found["dataset"]["dropped"] == {"broken JSON": 1, "missing field": 1}
    assert found["dataset"]["metrics"]["accuracy/likelihood"]["records"] == 50
    assert found["benchmarks"]["pope"]["metrics"].keys() == {"log-probs", "text"}
    assert (tmp_path / "out" / "evaluation.html").exists()
