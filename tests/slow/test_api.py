"""The verbs of a trained model from Python: each returns what it made, and prints nothing."""

import json
from pathlib import Path

from tests.cluster import Cluster

SCRIPT = """
import json, sys
import rayalign

model, records, out, scorer = sys.argv[1:]
found = rayalign.evaluate(model=model, dataset=records, image_checks="none", output_dir=f"{out}/evaluation")
responses = rayalign.generate(
    model=model, dataset=[records], n=2, temperature=1.0, max_new_tokens=4, output_dir=f"{out}/responses"
)
scores = rayalign.score(scorer=scorer, dataset=responses.dataset, output_dir=f"{out}/scores")
print(json.dumps({
    "table": found.table.splitlines()[0].split(),
    "records": found.metrics["model"]["dataset"]["records"],
    "responses": sum(table.num_rows for table in responses.tables(["response"])),
    "prompts": [responses.num_rows, responses.num_dropped],
    "scores": sorted({type(score).__name__ for table in scores.tables() for score in table["score"].to_pylist()}),
}))
"""


def test_a_model_is_evaluated_and_its_responses_scored_from_python(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def length(rows):\n    return [len(row['response']) for row in rows]\n")
    scorer = f"python={tmp_path / 'mine.py'}:length"
    said = cluster_of_four_cpus.run("-c", SCRIPT, model, records, tmp_path, scorer)
    assert "metric [95 % interval]" not in said.splitlines()
    assert json.loads(said.splitlines()[-1]) == {
        "table": ["metric", "[95", "%", "interval]", "model"],
        "records": 50,
        "responses": 2 * 51,
        "prompts": [51, 1],
        "scores": ["float"],
    }
