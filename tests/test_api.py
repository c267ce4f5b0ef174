"""rayalign from Python: the names at the top of the package, flags as keywords, and what is said of mistakes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rayalign
from rayalign.algorithms import ALGORITHMS
from rayalign.api import Plan
from rayalign.config import command_line
from rayalign.config.inference import InferenceConfig
from rayalign.config.inference_verbs import GenerateConfig
from rayalign.config.plan import PlanConfig
from rayalign.estimate.plan import plan_run
from rayalign.evaluation.evaluate import Evaluation
from rayalign.evaluation.pool import PoolResult
from rayalign.storage import Store
from rayalign.training.driver import Result

LLAVA = "llava1_6-mistral-7b-instruct"
HEAVY = {"ray", "torch", "transformers", "numpy", "pyarrow", "pydantic", "yaml"}


def words_of(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_rayalign_loads_nothing() -> None:
    loaded = words_of("import sys, rayalign; print(*{name.split('.')[0] for name in sys.modules})")
    assert "rayalign" in loaded
    assert HEAVY.isdisjoint(loaded)


def test_the_functions_are_seen_before_they_are_loaded() -> None:
    found = words_of("import sys, rayalign; print(*dir(rayalign), *(name in sys.modules for name in ['rayalign.api', 'ray']))")
    assert set(rayalign.__all__) <= set(found)
    assert {"train", "plan", "load_policy", "export", "Result", "Plan", "LoadedPolicy"} <= set(rayalign.__all__)
    assert {"evaluate", "generate", "score", "iterate", "Evaluation", "PoolResult", "Round"} <= set(rayalign.__all__)
    assert found[-2:] == ["False", "False"]


def test_every_name_loads_and_is_documented() -> None:
    for name in set(rayalign.__all__) - {"__version__"}:
        assert getattr(rayalign, name).__doc__
    with pytest.raises(AttributeError, match="module 'rayalign' has no attribute 'trian'"):
        rayalign.trian  # noqa: B018  # it is the look-up that raises


def refusal(*arguments: Any, **flags: Any) -> str:
    with pytest.raises(ValueError) as caught:
        rayalign.train(*arguments, **flags)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"beta": -1}, ("--beta", "-1")),
        ({"beta": "high"}, ("--beta", "high")),
        ({"btea": 0.1}, ("--btea", "0.1")),
        ({"simpo_gamma": 1}, ("--simpo_gamma", "1")),
        ({"num_workers": 0, "dataset": ["a.jsonl"]}, ("--num_workers", "0", "--dataset", "a.jsonl")),
        ({"loss_type": ["sigmoid", "sigmod"]}, ("--loss_type", "sigmoid", "sigmod")),
        ({"plugin": "gone.py"}, ("--plugin", "gone.py")),
        ({"config": "gone.yaml"}, ("--config", "gone.yaml")),
    ],
)
def test_a_mistake_is_a_value_error_with_the_sentence_of_the_command_line(
    flags: dict[str, Any], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line.parse(ALGORITHMS, words, prog="pipelines/dpo.py", description="", algorithm="dpo")
    said = capsys.readouterr().err.removeprefix("pipelines/dpo.py: error: ").removesuffix("\n(--help lists every flag)\n")
    assert refusal("dpo", **flags) == said


def test_an_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    assert refusal("dpoo") == (f"--rlhf_type dpoo: must be one of {', '.join(ALGORITHMS)}. Did you mean dpo?")


def test_a_file_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rlhf_type: kto\n")
    assert refusal("dpo", config=tmp_path / "run.yaml") == (
        f"The algorithm is dpo, and the files {tmp_path}/run.yaml hold rlhf_type: kto. Give one of them."
    )


def test_values_are_those_of_the_command_line_and_win_over_files(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rlhf_type: dpo\nbeta: 0.5\nseed: 7\ndataset: [a.jsonl]\n")
    config, _ = command_line.build(
        ALGORITHMS, "dpo", {"beta": 0.2, "loss_type": "sigmoid,sft", "rpo_alpha": 0}, files=[str(tmp_path / "run.yaml")]
    )
    words = f"--config {tmp_path}/run.yaml --beta 0.2 --loss_type sigmoid sft --rpo_alpha 0".split()
    assert config == command_line.parse(ALGORITHMS, words, prog="pipelines/dpo.py", description="")


def test_paths_are_taken_as_text(tmp_path: Path) -> None:
    model = tmp_path / "gone"
    assert (
        refusal("dpo", model=model, dataset=[tmp_path / "a.jsonl"])
        == f"--model {model}: there is no such folder (looked for {model})."
    )


def test_a_dry_run_is_a_plan() -> None:
    assert refusal("dpo", dry_run=True) == "dry_run=True trains nothing: call rayalign.plan with the same flags."


def test_a_plan_has_the_text_of_the_verb_and_its_figures(tmp_path: Path) -> None:
    row = '{"query": "Which colour is it?", "response": "It is red.", "rejected_response": "It is blue."}\n'
    (tmp_path / "pairs.jsonl").write_text(row * 64)
    flags: dict[str, Any] = {"model_type": LLAVA, "dataset": tmp_path / "pairs.jsonl", "dataset_test_ratio": 0}
    found = rayalign.plan("dpo", **flags, gpu_memory_gb=24, price_per_hour=2.0)
    config, _ = command_line.build(ALGORITHMS, "dpo", {**flags, "dataset": os.fspath(flags["dataset"])})
    assert found.text == plan_run(config, PlanConfig(gpu_memory_gb=24, price_per_hour=2.0))
    assert isinstance(found, Plan)
    assert (found.steps, found.gpus_per_worker, found.gpus) == (4, 1, 1)
    assert found.trainable_parameters == 4_718_592  # as tests/estimate counts them
    assert 15e9 < found.memory_bytes < 24e9  # 7.6 G weights in bfloat16, and little else
    assert found.hours is not None
    assert found.cost == pytest.approx(2.0 * found.hours)
    with pytest.raises(ValueError) as caught:
        rayalign.plan("dpo", **flags, mfu=2)
    assert str(caught.value) == "--mfu 2.0: must be at most 1."


SHARED = {"model": "./gone/model", "output_dir": "out"}


@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        ("evaluate", {"benchmark": "pope:x"}, "Unknown flag --benchmark. Did you mean --benchmarks?"),
        ("evaluate", {"benchmarks": ["popo:x"]}, "--benchmarks popo:x: there is no benchmark popo. Did you mean pope?"),
        ("evaluate", {}, "Nothing to evaluate on: pass --dataset with preference data, --benchmarks, or both."),
        ("generate", {"n": 0}, "--n 0: must be at least 1."),
        ("generate", {"dataset": "a.jsonl"}, "--model ./gone/model: there is no such folder"),
        ("score", {"dataset": ["a.jsonl"], "scorer": "judg=x"}, "--scorer judg=x: must be one of "),
        ("score", {"config": "gone.yaml"}, "--config gone.yaml: "),
    ],
)
def test_the_verbs_of_a_trained_model_refuse_what_the_command_line_refuses(
    verb: str, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        getattr(rayalign, verb)(**SHARED, **flags)
    assert str(caught.value).startswith(message)


def test_rounds_refuse_what_the_command_line_refuses(tmp_path: Path) -> None:
    for flags, message in (
        ({"num_rounds": 0}, "--num_rounds 0: must be at least 1."),
        ({"dataset": "a.jsonl"}, "No model given: pass --model FOLDER_OR_HUB_ID, or --model_type with a registered name."),
    ):
        with pytest.raises(ValueError) as caught:
            rayalign.iterate("dpo", output_dir=tmp_path, **flags)
        assert str(caught.value) == message


def test_the_flags_of_verbs_are_those_of_the_command_line_and_win_over_files(tmp_path: Path) -> None:
    (tmp_path / "verb.yaml").write_text("n: 2\nseed: 7\ndataset: [a.jsonl]\n")
    sections = (InferenceConfig, GenerateConfig)
    files = [str(tmp_path / "verb.yaml")]
    found = command_line.build_sections(
        sections, {"n": 4, "temperature": "0.5", "dataset": ["b.jsonl", "c.jsonl"]}, files=files
    )
    words = f"--config {tmp_path}/verb.yaml --n 4 --temperature 0.5 --dataset b.jsonl c.jsonl".split()
    assert found == command_line.parse_sections(sections, words, prog="rayalign", description="", example="")


def test_results_say_where_everything_is(tmp_path: Path) -> None:
    result = PoolResult(Store("s3://bucket/out"), 3, 1)
    assert (result.output_dir, result.dataset) == ("s3://bucket/out", "s3://bucket/out/rows")
    (tmp_path / "metrics.json").write_text('{"model": {}}')
    found = Evaluation(Store(str(tmp_path)), "table")
    assert (found.output_dir, found.page, found.metrics) == (str(tmp_path), f"{tmp_path}/evaluation.html", {"model": {}})


def test_a_result_says_where_everything_is() -> None:
    result = Result(Store("s3://bucket/run"), {"eval_loss": 0.5, "steps": 3}, {"eval_loss": 0.5})
    assert (result.output_dir, result.model_dir) == ("s3://bucket/run", "s3://bucket/run/model")
    assert (result.report, result.metrics) == ("s3://bucket/run/report.html", {"eval_loss": 0.5})


def test_an_export_is_refused_as_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        rayalign.export(tmp_path, tmp_path / "out", layout="vlm")  # type: ignore[arg-type]
    assert str(caught.value) == "--layout vlm: must be one of transformers, vllm, value_head, trl, ms_swift. Did you mean vllm?"
    with pytest.raises(ValueError) as caught:
        rayalign.export(tmp_path, tmp_path)
    assert str(caught.value) == f"--output_dir {tmp_path} holds the model that is exported. Choose another folder."
