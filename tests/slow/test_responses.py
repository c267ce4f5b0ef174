"""The verbs generate and score on a cluster, as a person runs them: a row is done once, and again where its result is gone."""

from pathlib import Path

import pyarrow.parquet as pq

from tests.cluster import Cluster


def test_responses_are_generated_by_two_workers_completed_and_scored(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path: Path
) -> None:
    folder, rows = tmp_path / "responses", tmp_path / "responses" / "rows"
    generate = (
        *("pipelines/generate.py", "--model", model, "--dataset", records, "--output_dir", folder, "--num_workers", 2),
        *("--n", 2, "--temperature", 1, "--max_new_tokens", 8),
    )
    output = cluster_of_four_cpus.run(*generate)
    assert "1 of 52 prompts dropped" in output  # a broken line; a prompt without a response is no fault here
    whole = pq.read_table(rows).sort_by([("position", "ascending"), ("sample", "ascending")])
    assert whole.num_rows == 2 * 51
    next(rows.iterdir()).unlink()
    cluster_of_four_cpus.run(*generate)
    assert pq.read_table(rows).sort_by([("position", "ascending"), ("sample", "ascending")]).equals(whole)
    (tmp_path / "mine.py").write_text("def length(rows):\n    return [len(row['response']) for row in rows]\n")
    score = ("pipelines/score.py", "--scorer", f"python={tmp_path / 'mine.py'}:length")
    cluster_of_four_cpus.run(*score, "--dataset", rows, "--output_dir", tmp_path / "scores")
    scored = pq.read_table(tmp_path / "scores" / "rows")
    assert scored.num_rows == sum(bool(text) for text in whole["response"].to_pylist())
    assert all(line["score"] == len(line["response"]) for line in scored.to_pylist())
