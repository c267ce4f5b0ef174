"""The verb evaluate on two workers: an adapter beside its base model, on preference data and on a benchmark, ended and
continued."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayalign.config.sections import TunerConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.policy.saving import save_policy
from tests.cluster import Cluster, running_cluster
from tests.evaluation.benchmarks.twins import put_pictures, write_lines
from tests.evaluation.test_judge import Handler, Server
from tests.tiny_data import write_rows
from tests.tiny_models import make_policy, save_tiny_model, wake_adapters


@pytest.fixture
def tiny_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("ray"), num_cpus=4) as cluster:
        yield cluster


def test_two_models_are_evaluated_side_by_side_and_nothing_is_computed_twice(tiny_cluster: Cluster, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "llava")
    records = write_rows(tmp_path / "data", 50, extra_lines=("{broken", '{"query": "no answers"}'))
    adapter = tmp_path / "model"
    save_policy(wake_adapters(make_policy(model, tuner=TunerConfig(lora_target_modules=("ALL",), lora_rank=4))), adapter)
    EncoderSpec(str(model), responses="both").processor.save_pretrained(adapter)
    pope = tmp_path / "pope"
    row = {"image": "a.jpg", "text": "Is there a cat?"}
    rows = [row | {"question_id": n, "label": "yes" if n % 2 else "no"} for n in range(4)]
    write_lines(pope / "coco_pope_random.json", [*rows, row | {"question_id": 9, "label": "no", "image": "gone.jpg"}])
    put_pictures(pope / "val2014", "a.jpg")
    words = ("--model", adapter, "--compare", model, "--dataset", records, "--benchmarks", f"pope:{pope}", "--num_workers", 2)
    out = tmp_path / "out"

    said = tiny_cluster.run("pipelines/evaluate.py", *words, "--output_dir", out)
    assert "accuracy/implicit_reward " in said
    assert "compare: 50 records, 2 dropped" in said
    assert "model: POPE: 5 questions, 1 unanswered, 0 rows left out" in said
    found = json.loads((out / "metrics.json").read_text())
    assert found["model"]["reference"] == str(model)
    assert found["compare"]["reference"] is None
    assert found["model"]["dataset"]["dropped"] == {"broken JSON": 1, "missing field": 1}
    assert found["comparison"]["dataset"]["records"] == 50
    table = pq.read_table(out / "records.parquet")
    assert len(set(table["id"].to_pylist())) == 50
    # The second model is the first one's reference.
    for mine, base in zip(table["reference_chosen"].to_pylist(), table["compare_chosen"].to_pylist(), strict=True):
        assert abs(mine - base) < 1e-3  # float32 in other batches

    before = {file: file.stat().st_mtime_ns for file in (out / "scores").rglob("*.parquet")}
    lost = next(file for file in before if "pope_compare" in str(file))
    lost.unlink()
    shutil.copy(out / "metrics.json", tmp_path / "first.json")
    tiny_cluster.run("pipelines/evaluate.py", *words, "--output_dir", out)
    after = {file: file.stat().st_mtime_ns for file in (out / "scores").rglob("*.parquet")}
    assert {file for file in before if before[file] != after[file]} == {lost}
    assert json.loads((out / "metrics.json").read_text()) == json.loads((tmp_path / "first.json").read_text())


def test_scorers_are_evaluated_in_a_models_place(tiny_cluster: Cluster, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "llava")
    records = write_rows(tmp_path / "data", 50, extra_lines=("{broken",))
    (tmp_path / "rules.py").write_text("def length(rows):\n    return [len(row['response']) for row in rows]\n")
    pairs = [
        {
            "id": f"mmmu-{n}",
            "query": "Which?",
            "response": ["a bee", "no"],
            "human_ranking": [n % 2, 1 - n % 2],
            "image": "a.jpg",
        }
        for n in range(3)
    ]
    write_lines(tmp_path / "bench" / "bench.jsonl", pairs)
    put_pictures(tmp_path / "bench", "a.jpg")
    scorers = ("--scorer", f"python={tmp_path / 'rules.py'}:length", f"likelihood={model}")
    data = ("--dataset", records, "--benchmarks", f"vl_rewardbench:{tmp_path / 'bench'}")
    out = tmp_path / "out"

    said = tiny_cluster.run("pipelines/evaluate.py", *scorers, *data, "--num_workers", 2, "--output_dir", out)
    assert "scorer: 50 records, 1 dropped" in said
    found = json.loads((out / "metrics.json").read_text())["scorer"]
    assert found["benchmarks"]["vl_rewardbench"]["metrics"]["python"]["accuracy"]["value"] == pytest.approx(2 / 3)
    metrics = found["dataset"]["metrics"]
    # The length prefers the longer one; the likelihood is that of the model evaluated by itself.
    assert metrics["accuracy/python"]["value"] == metrics["accuracy/by_length_alone"]
    assert {"accuracy/likelihood", "margin/ensemble", "length_correlation/ensemble"} <= metrics.keys()
    own = ("--model", model, "--dataset", records, "--image_checks", "none", "--output_dir", tmp_path / "own")
    tiny_cluster.run("pipelines/evaluate.py", *own)
    alone = json.loads((tmp_path / "own" / "metrics.json").read_text())["model"]["dataset"]["metrics"]
    assert metrics["margin/likelihood"]["value"] == pytest.approx(alone["margin/likelihood"]["value"], abs=1e-4)
    assert "characters of chosen" in (out / "evaluation.html").read_text()


def test_a_judge_rates_the_answers_to_a_benchmark_and_is_not_asked_twice(tiny_cluster: Cluster, tmp_path: Path) -> None:
    model, bench, out = save_tiny_model(tmp_path / "llava"), tmp_path / "bench", tmp_path / "out"
    row = {"question_type": "attribute", "question_topic": "animal", "image_content": ["Cat"], "gt_answer": "A cat."}
    rows = [row | {"image_id": str(n), "image_src": f"https://host/{n}.jpg", "question": f"Question {n}?"} for n in range(3)]
    bench.mkdir()
    (bench / "response_template.json").write_text(json.dumps([row | {"model_answer": ""} for row in rows]))
    (bench / "eval_gpt4.py").write_text("template = '''Contents {}\nQ {}\nGold {}\nSaid {}'''\n")
    put_pictures(bench / "images", "0.jpg", "1.jpg")
    with Server(("127.0.0.1", 0), Handler) as judge:
        judge.asked, judge.body = [], json.dumps({"choices": [{"message": {"content": "Good.\nRating: 4"}}]}).encode()
        threading.Thread(target=judge.serve_forever, args=(0.02,), daemon=True).start()
        words = ("--model", model, "--benchmarks", f"mmhal_bench:{bench}", "--judge_url", judge.url, "--judge_model", "judge")
        for _ in range(2):
            tiny_cluster.run("pipelines/evaluate.py", *words, "--output_dir", out)
        judge.shutdown()
    assert len(judge.asked) == 2
    assert all("Gold A cat." in asked["messages"][0]["content"] for asked in judge.asked)
    found = json.loads((out / "metrics.json").read_text())["model"]["benchmarks"]["mmhal_bench"]
    # Of the two that were answered; the question whose picture is missing is told.
    assert found["metrics"]["text"]["score"]["value"] == 4.0
    assert len((out / "judgements" / "mmhal_bench_model.jsonl").read_text().splitlines()) == 2
