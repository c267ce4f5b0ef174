"""What the verb evaluate refuses before it takes any resource, and which reference a model gets."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rayalign.config.evaluate import EvaluateConfig
from rayalign.config.inference import InferenceConfig
from rayalign.evaluation.evaluate import run
from tests.evaluation.benchmarks.twins import put_pictures, write_lines


def refusal(flags: InferenceConfig, evaluation: EvaluateConfig = EvaluateConfig()) -> str:  # noqa: B008  # frozen
    with pytest.raises(ValueError) as caught:
        run(flags, evaluation)
    return str(caught.value)


def test_there_must_be_something_to_evaluate_on(tmp_path: Path) -> None:
    assert refusal(InferenceConfig(model="m", output_dir=str(tmp_path / "out"))) == (
        "Nothing to evaluate on: pass --dataset with preference data, --benchmarks, or both."
    )


def test_a_benchmarks_files_are_read_first(tmp_path: Path) -> None:
    flags = InferenceConfig(model="m", output_dir=str(tmp_path / "out"))
    said = refusal(flags, EvaluateConfig(benchmarks=(f"amber:{tmp_path}",)))
    assert said.startswith(f"--benchmarks amber:{tmp_path}: {tmp_path}: holds no annotations.json. It needs annotations.json,")
    write_lines(tmp_path / "coco_pope_random.json", [{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "no"}])
    said = refusal(flags, EvaluateConfig(benchmarks=(f"pope:{tmp_path}",)))
    assert said.startswith(f"--benchmarks pope:{tmp_path}: The image a.jpg is in none of {tmp_path}, {tmp_path}/val2014,")


def test_a_benchmark_with_a_judge_needs_one(tmp_path: Path) -> None:
    row = {"question_type": "t", "image_id": "1", "image_src": "http://host/a.jpg", "image_content": ["Cat"]}
    rows = [row | {"question": "Which?", "gt_answer": "A cat."}]
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    (tmp_path / "eval_gpt4.py").write_text("template = '{} {} {} {}'\n")
    put_pictures(tmp_path / "images", "a.jpg")
    said = refusal(
        InferenceConfig(model="m", output_dir=str(tmp_path / "out")), EvaluateConfig(benchmarks=(f"mmhal_bench:{tmp_path}",))
    )
    assert said == "--benchmarks mmhal_bench: its answers are rated by a judge. Pass --judge_url and --judge_model."


def test_a_second_model_and_a_reference_are_refused_by_their_own_flags(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"query": "a", "response": "b", "rejected_response": "c"}\n')
    flags = InferenceConfig(model=str(model_folder("llava")), dataset=(str(data),), output_dir=str(tmp_path / "out"))
    gone = str(tmp_path / "gone")
    assert refusal(flags, EvaluateConfig(compare=gone)) == f"--compare {gone}: there is no such folder (looked for {gone})."
    said = refusal(flags, EvaluateConfig(ref_model=gone))
    assert (
        said == f"--ref_model {gone}: there is no such folder (looked for {gone}). It names the reference; none: no reference."
    )
