"""Benchmarks beside the training: which checkpoints are judged, once each, what comes of it, and what is refused."""

import dataclasses
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rayalign.algorithms import DPO, RM, Algorithm
from rayalign.config.config import Config, config_from_mapping
from rayalign.config.inference import InferenceConfig
from rayalign.config.serving import ExportConfig
from rayalign.data.rows import Sources
from rayalign.evaluation.exams import answers_in, figures_of, figures_to_come, read_exam
from rayalign.evaluation.loaded_model import load_model
from rayalign.evaluation.pair_scores import PairScorer, Scoring
from rayalign.evaluation.start import config_of
from rayalign.storage import Store
from rayalign.training import benchmarks, checkpoint_export
from rayalign.training.benchmark_results import RESULTS, BenchmarkResults, best_of
from rayalign.training.benchmarks import MOST_TRIES, check_benchmarks, judge_checkpoint, judged_beside
from rayalign.training.best import Best, best_checkpoint, is_of_benchmark
from rayalign.training.checkpoint_folder import (
    Checkpoint,
    FetchedCheckpoint,
    delete_newer,
    prune_checkpoints,
    whole_checkpoints,
)
from rayalign.training.metrics import read_metrics
from tests.evaluation.benchmarks.twins import put_pictures, write_lines
from tests.training.test_checkpoint_export import write_run

FIGURES = {10: 0.5, 20: 0.75}


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pope")
    rows = [
        {"question_id": n, "image": "a.jpg", "text": f"Is there a {what}?", "label": "yes" if n % 2 else "no"}
        for n, what in enumerate(("cat", "dog", "digit two"))
    ]
    write_lines(folder / "coco_pope_random.json", rows)
    put_pictures(folder / "val2014", "a.jpg")
    return folder


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "LOOK_SECONDS", 0.01)


def config_for(folder: Path, pope: Path, algorithm: type[Algorithm] = DPO, **flags: Any) -> Config:
    own = {"metric_for_best_model": "pope/accuracy", "report_to": "none", **flags}
    return config_from_mapping(algorithm, {"output_dir": str(folder), "eval_benchmarks": f"pope:{pope}", **own})


def with_checkpoints(folder: Path, *steps: int) -> Store:
    """Checkpoints that are whole by their manifests and sizes."""
    for step in steps:
        place = folder / "checkpoints" / f"step_{step:08d}_a"
        place.mkdir(parents=True)
        names = ("trainable.safetensors", "optimizer.safetensors", "state.json")
        for name in names:
            (place / name).write_text("{}")
        (place / "manifest.json").write_text(json.dumps({name: {"size": 2, "sha256": ""} for name in names}))
    return Store(str(folder))


def steps_in(folder: Store) -> list[int]:
    return [checkpoint.step for checkpoint in whole_checkpoints(folder / "checkpoints")]


class Judge:
    """Gives each checkpoint its figure, and remembers which ones it was asked for."""

    def __init__(self, figures: Mapping[int, float] = FIGURES) -> None:
        self.asked: list[int] = []
        self._figures = figures

    def __call__(self, checkpoint: Checkpoint, is_over: Callable[[], bool]) -> Mapping[str, float]:
        self.asked.append(checkpoint.step)
        return {"pope/accuracy": self._figures[checkpoint.step], "pope/f1": 0.25}


def judge_all(config: Config, judge: Judge) -> BenchmarkResults:
    with judged_beside(config, judge) as results:
        pass
    return results


def test_each_checkpoint_is_judged_once_and_its_figures_are_told_at_its_own_step(tmp_path: Path, pope: Path) -> None:
    folder, judge = with_checkpoints(tmp_path, 10, 20), Judge()
    config = config_for(tmp_path, pope, report_to="tensorboard")
    results = judge_all(config, judge)
    assert judge.asked == [10, 20]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"eval/pope/accuracy") == 2
    expected = [{"step": step, "eval_pope/accuracy": value, "eval_pope/f1": 0.25} for step, value in FIGURES.items()]
    assert results.lines() == expected
    assert read_metrics(folder / "metrics.jsonl") == expected
    judge_all(config, judge)
    assert judge.asked == [10, 20]
    assert read_metrics(folder / "metrics.jsonl") == expected
    assert list((tmp_path / "tensorboard").iterdir()) == [events]


def test_the_best_checkpoint_by_a_benchmark_is_marked_and_kept(tmp_path: Path, pope: Path) -> None:
    folder = with_checkpoints(tmp_path, 10, 20, 30)
    config = config_for(tmp_path, pope)
    results = judge_all(config, Judge({10: 0.5, 20: 0.75, 30: 0.75}))
    best = best_checkpoint(folder)
    assert best is not None
    assert best.name == "step_00000020_a"
    assert best_of(results.read(), config.run) == Best("eval_pope/accuracy", 20, 0.75, None, since=1)
    prune_checkpoints(folder / "checkpoints", keep=1, best=best, waits=results.waits)
    assert steps_in(folder) == [30, 20]


def test_a_checkpoint_without_the_deciding_figure_is_no_candidate(tmp_path: Path, pope: Path) -> None:
    run = config_for(tmp_path, pope).run
    figures = {10: {"eval_mmstar/accuracy": 0.9}, 20: {"eval_pope/accuracy": 0.5}, 30: {}}
    assert best_of(figures, run) == Best("eval_pope/accuracy", 20, 0.5)
    assert best_of({10: figures[10]}, run) == Best()


def test_a_checkpoint_that_waits_for_its_judgement_is_never_deleted(tmp_path: Path, pope: Path) -> None:
    folder = with_checkpoints(tmp_path, 10, 20, 30)
    results = BenchmarkResults(config_for(tmp_path, pope))
    (first, second, third) = reversed(whole_checkpoints(folder / "checkpoints"))
    results.write(second, {"eval_pope/accuracy": 0.5})
    prune_checkpoints(folder / "checkpoints", keep=1, waits=results.waits)
    assert steps_in(folder) == [30, 10]
    delete_newer(folder / "checkpoints", FetchedCheckpoint(third.store, 30, tmp_path))
    assert steps_in(folder) == [30, 10]
    results.write(first, {}, problem="no room")
    prune_checkpoints(folder / "checkpoints", keep=1, waits=results.waits)
    assert steps_in(folder) == [30]


def _end_after(begun: threading.Event) -> None:
    assert begun.wait(30)
    raise KeyboardInterrupt


def test_after_a_kill_what_was_not_judged_is_judged_and_nothing_else(tmp_path: Path, pope: Path) -> None:
    with_checkpoints(tmp_path, 10, 20)
    config, judge = config_for(tmp_path, pope), Judge()
    begun = threading.Event()

    def killed_at_20(checkpoint: Checkpoint, is_over: Callable[[], bool]) -> Mapping[str, float]:
        if checkpoint.step == 20:
            begun.set()
            while not is_over():
                pass
            raise RuntimeError("nobody waits")
        return judge(checkpoint, is_over)

    with pytest.raises(KeyboardInterrupt), judged_beside(config, killed_at_20):
        _end_after(begun)
    assert BenchmarkResults(config).read().keys() == {10}
    with_checkpoints(tmp_path, 30)  # the run has gone on
    judge._figures = {20: 0.5, 30: 0.5}
    judge_all(config, judge)
    assert judge.asked == [10, 20, 30]


def test_a_checkpoint_that_cannot_be_judged_is_passed_over_with_a_warning(
    tmp_path: Path, pope: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, config, judge = with_checkpoints(tmp_path, 10, 20), config_for(tmp_path, pope), Judge({20: 0.5})
    results = judge_all(config, judge)
    assert judge.asked == [10, 20, *[10] * (MOST_TRIES - 1)]
    assert "Warning: the benchmarks of the checkpoint of step 10 failed: KeyError: 10" in caplog.messages
    assert results.read() == {20: {"eval_pope/accuracy": 0.5, "eval_pope/f1": 0.25}}
    assert json.loads(next((tmp_path / RESULTS).glob("step_00000010_*")).read_text())["problem"] == "KeyError: 10"
    best = best_checkpoint(folder)
    assert best is not None
    assert best.name == "step_00000020_a"
    (tmp_path / "checkpoints" / "step_00000010_a").rename(tmp_path / "checkpoints" / "step_00000010_b")  # it came again
    judge._figures = FIGURES
    assert judge_all(config, judge).read().keys() == {10, 20}


def test_other_questions_are_asked_anew(tmp_path: Path, pope: Path) -> None:
    with_checkpoints(tmp_path, 10)
    judge = Judge()
    asked: tuple[dict[str, Any], ...] = ({}, {"max_eval_questions": 2}, {"data_seed": 7}, {"max_eval_questions": 2})
    for flags in asked:
        judge_all(config_for(tmp_path, pope, **flags), judge)
    assert judge.asked == [10, 10, 10]


def test_without_benchmarks_nothing_is_written_and_nothing_is_kept(tmp_path: Path, pope: Path) -> None:
    folder, judge = with_checkpoints(tmp_path, 10), Judge()
    config = config_for(tmp_path, pope, eval_benchmarks=(), metric_for_best_model="eval_loss")
    results = judge_all(config, judge)
    assert not judge.asked
    assert not results.waits(whole_checkpoints(folder / "checkpoints")[0])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}


@pytest.mark.parametrize(("algorithm", "ways"), [(DPO, {"", "text/"}), (RM, {""})])
def test_a_checkpoints_figures_are_those_of_its_model_in_the_verb_evaluate(
    tmp_path: Path, model_folder: Callable[..., Path], pope: Path, algorithm: type[Algorithm], ways: set[str]
) -> None:
    model = model_folder("llava")
    run = tmp_path / "run"
    config = write_run(run, model, algorithm, eval_benchmarks=f"pope:{pope}")
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, gpus_per_worker=0.0))
    checkpoint_export.run(ExportConfig(checkpoint="last", run_dir=str(run), output_dir=str(tmp_path / "model")))
    flags = config_of(InferenceConfig(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out")))
    sources = Sources((), None, allow_image_urls=False)
    exam = read_exam("pope", str(pope), image_root=None, max_questions=None, seed=42)
    figures = benchmarks._figures(exam, PairScorer(load_model(flags, sources), Scoring(flags, sources, None, ())))
    found = judge_checkpoint(config, whole_checkpoints(Store(str(run)) / "checkpoints")[0].store)
    assert found == figures
    assert found.keys() == {
        f"pope/{way}{name}" for way in ways for name in ("accuracy", "precision", "recall", "f1", "yes_share")
    }
    assert found.keys() == set(figures_to_come(exam, is_reward_model=algorithm is RM))


def test_a_question_that_cannot_be_asked_leaves_the_others(tmp_path: Path, pope: Path) -> None:
    exam = read_exam("pope", str(pope), image_root=None, max_questions=None, seed=42)
    assert figures_of(exam, answers_in(exam, benchmarks._table([]))) == {}


def refusal(config: Config) -> str:
    with pytest.raises(ValueError) as caught:
        check_benchmarks(config)
    return str(caught.value)


def test_a_runs_benchmarks_are_looked_at_before_it_begins(tmp_path: Path, pope: Path) -> None:
    check_benchmarks(config_for(tmp_path, pope))
    gone = tmp_path / "gone"
    assert refusal(config_for(tmp_path, pope, eval_benchmarks=f"pope:{gone}")).startswith(
        f"--eval_benchmarks pope:{gone}: {gone}: holds no file for this benchmark."
    )
    assert refusal(config_for(tmp_path, pope, eval_benchmarks="popo:here")) == (
        "--eval_benchmarks popo:here: there is no benchmark popo. Did you mean pope?"
    )
    assert refusal(config_for(tmp_path, pope, metric_for_best_model="pope/acuracy")).startswith(
        "--metric_for_best_model pope/acuracy: an evaluation has no such metric."
    )
    assert refusal(config_for(tmp_path, pope, load_best_model_at_end=True)) == (
        "--load_best_model_at_end true with --metric_for_best_model pope/accuracy: benchmarks are evaluated beside the "
        "training, which does not wait for them. Leave one of the two out; `rayalign export --checkpoint best` writes the best "
        "model."
    )
    assert refusal(config_for(tmp_path, pope, early_stopping_patience=2)).startswith("--early_stopping_patience 2 with")


def test_a_benchmark_that_a_run_cannot_be_judged_by_is_refused(tmp_path: Path, pope: Path) -> None:
    row = {"question_type": "t", "image_id": "1", "image_src": "http://host/a.jpg", "image_content": ["Cat"]}
    (tmp_path / "response_template.json").write_text(json.dumps([row | {"question": "Which?", "gt_answer": "A cat."}]))
    (tmp_path / "eval_gpt4.py").write_text("template = '{} {} {} {}'\n")
    put_pictures(tmp_path / "images", "a.jpg")
    assert refusal(config_for(tmp_path, pope, eval_benchmarks=f"mmhal_bench:{tmp_path}")) == (
        "--eval_benchmarks mmhal_bench: its answers are rated by a judge, which no run waits for. Leave it out; the verb "
        "evaluate takes it, with --judge_url."
    )


@pytest.mark.parametrize(
    ("metric", "is_it"),
    [("pope/accuracy", True), ("eval_pope/text/f1", True), ("eval_loss", False), (None, False), ("mmstar/accuracy", False)],
)
def test_a_benchmarks_metric_is_told_from_others_by_its_name(
    tmp_path: Path, pope: Path, metric: str | None, is_it: bool
) -> None:
    assert is_of_benchmark(config_for(tmp_path, pope, metric_for_best_model=metric).run) == is_it
