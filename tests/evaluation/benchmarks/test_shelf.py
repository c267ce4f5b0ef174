"""The names and folders of --benchmarks."""

import pytest

from rayalign.config.evaluate import EvaluateConfig
from rayalign.evaluation.benchmarks.shelf import BENCHMARKS, parse_benchmarks


def test_benchmarks_are_named_with_the_folders_of_their_files() -> None:
    assert parse_benchmarks(("pope:/data/pope", "VL-RewardBench:s3://bucket/vlrb")) == {
        "pope": "/data/pope",
        "vl_rewardbench": "s3://bucket/vlrb",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("popee:/x",), "--benchmarks popee:/x: there is no benchmark popee. Did you mean pope?"),
        (("chair",), "--benchmarks chair: where are its files? Write chair:FOLDER; it needs synonyms.txt"),
        (("pope:/a", "pope:/b"), "--benchmarks pope:/b: pope is there twice. Give it once."),
    ],
)
def test_what_names_no_benchmark_is_refused(arguments: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_benchmarks(arguments)
    assert str(caught.value).startswith(expected)


def test_each_benchmark_has_metrics_of_its_questions() -> None:
    for name, benchmark in BENCHMARKS.items():
        assert any((benchmark.of_choices, benchmark.of_pairs, benchmark.of_texts)), name
        assert benchmark.judge_prompt is None or benchmark.of_texts is not None, name


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        EvaluateConfig(image_checks=("none", "shuffled"))
    assert str(caught.value) == "--image_checks none shuffled: none stands alone."
    with pytest.raises(ValueError) as caught:
        EvaluateConfig(judge_url="http://localhost/v1")
    assert str(caught.value) == "--judge_url and --judge_model belong together: give both."
