"""VL-RewardBench, Multimodal RewardBench and MM-RLHF-RewardBench: twins of their files, and metrics worked out by hand."""

import json
from pathlib import Path

import pytest

from rayalign.evaluation.benchmarks.benchmark import image_folder
from rayalign.evaluation.benchmarks.mm_rlhf_rewardbench import MM_RLHF_REWARDBENCH
from rayalign.evaluation.benchmarks.multimodal_rewardbench import MULTIMODAL_REWARDBENCH
from rayalign.evaluation.benchmarks.vl_rewardbench import VL_REWARDBENCH
from rayalign.storage import Store
from tests.evaluation.benchmarks.twins import picture, preferred, put_pictures, values, write_lines, write_parquet


def test_vl_rewardbench_has_a_mean_of_groups_beside_the_mean_of_pairs(tmp_path: Path) -> None:
    row = {"query": "Describe it.", "response": ["first", "second"], "image": picture(), "query_source": "x"}
    rows = [
        row | {"id": "RLAIF-V-1", "human_ranking": [0, 1]},
        row | {"id": "RLHF-V-2", "human_ranking": [1, 0]},
        row | {"id": "hallucination_pair-3", "human_ranking": [0, 1]},
        row | {"id": "mathverse_4", "human_ranking": [0, 1]},
        row | {"id": "wildvision-battle-5", "human_ranking": [0, 1]},
        row | {"id": "VLFeedback-6", "human_ranking": [1, 0]},
        row | {"id": "VLFeedback-7", "human_ranking": [2, 0]},
    ]
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    contents = VL_REWARDBENCH.read(Store(str(tmp_path)))
    assert contents.items[1].responses == ("second", "first")
    assert [row.reason for row in contents.left_out] == ["human_ranking: expected [0, 1] or [1, 0], found [2, 0]"]
    assert VL_REWARDBENCH.of_pairs is not None
    margins = {
        "RLAIF-V-1": 1.0,
        "RLHF-V-2": -1.0,
        "hallucination_pair-3": 0.0,
        "mathverse_4": 2.0,
        "wildvision-battle-5": -0.1,
        "VLFeedback-6": -2.0,
    }
    found = values(VL_REWARDBENCH.of_pairs(preferred(contents, margins)))
    # hallucination (1 + 0 + 1/2) / 3 = 1/2, reasoning 1, general 0: their mean 1/2, that of the six pairs 2.5 / 6.
    expected = {
        "accuracy": 2.5 / 6,
        "accuracy/hallucination": 0.5,
        "accuracy/reasoning": 1.0,
        "accuracy/general": 0.0,
        "accuracy/macro": 0.5,
    }
    assert found == pytest.approx(expected)
    del margins["mathverse_4"]  # without one of the groups there is no mean of the three
    assert "accuracy/macro" not in VL_REWARDBENCH.of_pairs(preferred(contents, margins))


def test_multimodal_rewardbench_tells_safety_and_reasoning_in_two_parts(tmp_path: Path) -> None:
    row = {"Text": "Which?", "Image": "images/a.jpg", "Output1": "one", "Output2": "two", "Better": "Output2"}
    rows = [
        row | {"ID": "pairs_1", "Category": "safety"},
        row | {"ID": "hateful_1", "Category": "safety"},
        row | {"ID": "mathvista_1", "Category": "reasoning"},
        row | {"ID": "EMMA-Coding_1", "Category": "reasoning", "Better": "Output1"},
        row | {"ID": "seedbench_1", "Category": "vqa"},
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "all_data.json").write_text(json.dumps(rows))
    put_pictures(tmp_path / "data", "images/a.jpg")
    contents = MULTIMODAL_REWARDBENCH.read(Store(str(tmp_path)))
    assert image_folder(contents).location == f"{tmp_path}/data"
    assert [item.responses for item in contents.items][2:4] == [("two", "one"), ("one", "two")]
    assert MULTIMODAL_REWARDBENCH.of_pairs is not None
    margins = {"pairs_1": 1.0, "hateful_1": -1.0, "mathvista_1": 1.0, "EMMA-Coding_1": 1.0, "seedbench_1": 0.0}
    found = values(MULTIMODAL_REWARDBENCH.of_pairs(preferred(contents, margins)))
    assert found == {
        "accuracy": 3.5 / 5,
        "accuracy/safety/bias": 1.0,
        "accuracy/safety/toxicity": 0.0,
        "accuracy/reasoning/math": 1.0,
        "accuracy/reasoning/coding": 1.0,
        "accuracy/vqa": 0.5,
    }


def test_mm_rlhf_rewardbenchs_stricter_accuracy_needs_all_pairs_of_a_question(tmp_path: Path) -> None:
    row = {"prompt": "Which?", "chosen": "one", "rejected": "two", "chosen_reason": "", "rejected_reason": ""}
    rows = [
        row | {"id": "q1", "image": "images/mcq/a.jpg"},
        row | {"id": "q1", "image": "images/mcq/a.jpg", "rejected": "three"},
        row | {"id": "q2", "image": "images/long/b.jpg"},
        row | {"id": "q3", "image": "images/long/c.jpg"},
        row | {"id": "q4", "video": "videos/d"},
    ]
    write_lines(tmp_path / "mm_reward_bench.jsonl", rows)
    put_pictures(tmp_path, "images/mcq/a.jpg")
    contents = MM_RLHF_REWARDBENCH.read(Store(str(tmp_path)))
    assert [row.reason for row in contents.left_out] == ["video: the question is about a video, and only pictures are read"]
    assert MM_RLHF_REWARDBENCH.of_pairs is not None
    found = values(MM_RLHF_REWARDBENCH.of_pairs(preferred(contents, {"q1": 1.0, "q1~2": -1.0, "q2": 2.0, "q3": 0.0})))
    # Pairs: 1 + 0 + 1 + 1/2 of 4. Questions: q2 alone of 3; a tie is no preference.
    assert found == pytest.approx(
        {"ACC": 2.5 / 4, "ACC/mcq": 0.5, "ACC/long": 0.75, "ACC+": 1 / 3, "ACC+/mcq": 0.0, "ACC+/long": 0.5}
    )
    # Of a question one of whose pairs has no score nobody knows whether its best response is preferred to all.
    found = values(MM_RLHF_REWARDBENCH.of_pairs(preferred(contents, {"q1": 1.0, "q2": 2.0, "q3": -1.0})))
    assert found == pytest.approx({"ACC": 2 / 3, "ACC/mcq": 1.0, "ACC/long": 0.5, "ACC+": 0.5, "ACC+/long": 0.5})
