"""POPE, HallusionBench and the questions of MMStar: twins of their files, and metrics worked out by hand."""

import json
from pathlib import Path

import pytest

from rayalign.evaluation.benchmarks.benchmark import Item, Said, image_folder
from rayalign.evaluation.benchmarks.hallusion_bench import HALLUSION_BENCH
from rayalign.evaluation.benchmarks.mmstar import MMSTAR
from rayalign.evaluation.benchmarks.pope import POPE
from rayalign.evaluation.questions import Answers, rights
from rayalign.storage import Store
from tests.evaluation.benchmarks.twins import items_of, picture, put_pictures, said, values, write_lines, write_parquet


def pope_rows(*labels: str) -> list[dict[str, object]]:
    return [
        {"question_id": n, "image": "COCO_val2014_1.jpg", "text": f"Is there a thing {n} in the image?", "label": label}
        for n, label in enumerate(labels, start=1)
    ]


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    write_lines(tmp_path / "coco_pope_random.json", pope_rows("yes", "no", "yes", "no"))
    write_lines(tmp_path / "coco_pope_adversarial.json", pope_rows("yes", "no"))
    (tmp_path / "coco_ground_truth_objects.json").write_text('{"image": "COCO_val2014_1.jpg", "objects": ["cat"]}\n')
    put_pictures(tmp_path / "val2014", "COCO_val2014_1.jpg")
    return tmp_path


def test_popes_metrics_are_those_of_its_own_script(pope: Path) -> None:
    contents = POPE.read(Store(str(pope)))
    assert len(contents.items) == 6
    assert image_folder(contents).name == "val2014"
    assert contents.items[0] == Item(
        "coco_pope_adversarial/1",
        "Is there a thing 1 in the image?",
        ("COCO_val2014_1.jpg",),
        ("Yes", "No"),
        "Yes",
        {"category": "adversarial"},
    )
    assert POPE.of_choices is not None
    found = values(
        POPE.of_choices(
            said(
                contents,
                {
                    "coco_pope_random/1": "Yes",  # right
                    "coco_pope_random/2": "Yes",  # wrong
                    "coco_pope_random/3": "No",  # wrong
                    "coco_pope_random/4": "No",  # right
                    "coco_pope_adversarial/1": "Yes",  # right
                    "coco_pope_adversarial/2": None,  # neither a no nor a not is a yes: wrong
                },
            )
        )
    )
    # Of yes: 2 hits, 2 false, 1 missed. Precision 2/4, recall 2/3, F1 = 2 * 1/2 * 2/3 / (7/6) = 4/7.
    assert found["accuracy"] == 0.5
    assert (found["precision"], found["recall"]) == pytest.approx((1 / 2, 2 / 3))
    assert found["f1"] == pytest.approx(4 / 7)
    assert found["yes_share"] == pytest.approx(4 / 6)
    # Adversarial alone: 1 hit, 1 false, none missed.
    assert found["f1/adversarial"] == pytest.approx(2 / 3)
    assert (found["yes_share/adversarial"], found["accuracy/random"]) == (1.0, 0.5)


def test_pope_is_read_from_the_hubs_parquet_files_too(tmp_path: Path) -> None:
    row = {"id": "0", "question_id": "1", "question": "Is there a cat?", "answer": "yes", "image_source": "COCO_1"}
    rows = [row | {"image": picture(), "category": "popular"}, row | {"image": picture(), "category": "random"}]
    write_parquet(tmp_path / "data" / "test-00000.parquet", rows)
    contents = POPE.read(Store(str(tmp_path)))
    assert [item.id for item in contents.items] == ["popular/1", "random/1"]
    assert all(isinstance(image, bytes) for item in contents.items for image in item.images)


def test_rows_that_can_not_be_asked_are_named_and_no_others_are_lost(pope: Path) -> None:
    with (pope / "coco_pope_random.json").open("a") as file:
        file.write('{"question_id": 5, "image": "a.jpg", "text": "Is it?", "label": "maybe"}\n{broken\n')
    contents = POPE.read(Store(str(pope)))
    assert len(contents.items) == 6
    assert [row.place for row in contents.left_out] == ["coco_pope_random.json, row 4", "coco_pope_random.json, row 5"]
    assert contents.left_out[0].reason == "label: expected yes or no, found 'maybe'"


def test_files_that_are_no_benchmark_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file for this benchmark\. It needs coco_pope_random\.json"):
        POPE.read(Store(str(tmp_path)))
    write_lines(tmp_path / "coco_pope_random.json", [{"query": "Is it?"}])
    with pytest.raises(ValueError) as caught:
        POPE.read(Store(str(tmp_path)))
    assert str(caught.value) == (
        f"{tmp_path}/coco_pope_random.json: holds no question that can be asked. First: coco_pope_random.json, row 0: "
        "question_id: the row has none of question_id, id; it has query."
    )


def test_images_that_are_not_there_are_told_with_where_they_were_looked_for(pope: Path) -> None:
    contents = POPE.read(Store(str(pope)))
    (pope / "val2014" / "COCO_val2014_1.jpg").unlink()
    with pytest.raises(ValueError) as caught:
        image_folder(contents)
    assert str(caught.value) == (
        f"The image COCO_val2014_1.jpg is in none of {pope}, {pope}/val2014, {pope}/images, {pope}/coco/val2014. Put the "
        "benchmark's images there, or pass --image_root."
    )


def test_the_image_folder_is_found_by_any_image_that_is_there(pope: Path) -> None:
    rows = [row | {"image": image} for row, image in zip(pope_rows(*["yes"] * 3), ("a.jpg", "b.jpg", "c.jpg"), strict=True)]
    for file in pope.glob("coco_pope_*.json"):
        write_lines(file, rows)
    put_pictures(pope / "images", "c.jpg")
    assert image_folder(POPE.read(Store(str(pope)))).name == "images"
    (pope / "images" / "c.jpg").unlink()
    with pytest.raises(ValueError, match=r"^The 3 images \(a\.jpg, \.\.\.\) are in none of "):
        image_folder(POPE.read(Store(str(pope))))


def hallusion_row(category: str, set_id: int, figure: int, question: int, answer: int) -> dict[str, object]:
    """As HallusionBench.json has them: texts, and a file name that is not read."""
    return {
        "category": category,
        "subcategory": "chart",
        "visual_input": "0" if figure == 0 and category == "VS" else "1",
        "set_id": str(set_id),
        "figure_id": str(figure),
        "question_id": str(question),
        "question": f"Question {question}?",
        "gt_answer": str(answer),
        "gt_answer_details": "",
        "filename": None,
    }


def test_hallusion_benchs_three_accuracies_are_worked_out_by_hand(tmp_path: Path) -> None:
    rows = [
        hallusion_row("VS", 0, 0, 0, 1),  # without a figure
        hallusion_row("VS", 0, 1, 0, 0),
        hallusion_row("VS", 0, 1, 1, 1),
        hallusion_row("VD", 0, 0, 0, 1),
        hallusion_row("VD", 0, 1, 0, 0),
    ]
    (tmp_path / "HallusionBench.json").write_text(json.dumps(rows))
    put_pictures(tmp_path / "hallusion_bench", "VS/chart/0_1.png", "VD/chart/0_0.png", "VD/chart/0_1.png")
    contents = HALLUSION_BENCH.read(Store(str(tmp_path)))
    assert [item.images for item in contents.items][:2] == [(), ("VS/chart/0_1.png",)]
    assert image_folder(contents).name == "hallusion_bench"
    assert HALLUSION_BENCH.of_choices is not None
    answers = {
        "VS_chart_0_0_0": None,  # no figure and no clear answer: right
        "VS_chart_0_1_0": "Yes",  # wrong
        "VS_chart_0_1_1": "Yes",  # right
        "VD_chart_0_0_0": "Yes",  # right
        "VD_chart_0_1_0": "No",  # right
    }
    found = values(HALLUSION_BENCH.of_choices(said(contents, answers)))
    # Questions: VS 0 (wrong about figure 1), VS 1 (right), VD 0 (right about both). Figures: VS 1 (one wrong), VD 0, VD 1.
    assert found == pytest.approx({"aAcc": 4 / 5, "aAcc/VD": 1.0, "aAcc/VS": 2 / 3, "qAcc": 2 / 3, "fAcc": 2 / 3})
    # A question about whose other figure nothing was said is neither right nor wrong.
    del answers["VD_chart_0_1_0"]
    found = values(HALLUSION_BENCH.of_choices(said(contents, answers)))
    assert found == pytest.approx({"aAcc": 3 / 4, "aAcc/VD": 1.0, "aAcc/VS": 2 / 3, "qAcc": 1 / 2, "fAcc": 1 / 2})


def test_mmstar_is_asked_with_and_without_its_picture(tmp_path: Path) -> None:
    question = "What is it?\nOptions: A: a cat, B: a dog, C: an ox, D: a car"
    row = {"question": question, "image": picture(), "l2_category": "recognition", "meta_info": {"source": "x"}}
    rows = [
        row | {"index": 0, "answer": "B", "category": "math"},
        row | {"index": 1, "answer": "A", "category": "logical reasoning"},
    ]
    write_parquet(tmp_path / "mmstar.parquet", rows)
    contents = MMSTAR.read(Store(str(tmp_path)))
    items = items_of(contents)
    assert items["0"].responses == ("A", "B", "C", "D")
    assert (len(items["0"].images), len(items["0/blind"].images)) == (1, 0)
    assert MMSTAR.of_choices is not None
    found = values(MMSTAR.of_choices(said(contents, {"0": "B", "1": "C", "0/blind": "A", "1/blind": None})))
    assert found == {
        "accuracy": 0.5,
        "accuracy/math": 1.0,
        "accuracy/logical reasoning": 0.0,
        "accuracy/blind": 0.0,
        "multimodal_gain": 0.5,
    }
    # What the picture adds is told of the question that was answered both ways, 1: wrong with it, right without.
    found = values(MMSTAR.of_choices(said(contents, {"0": "B", "1": "C", "1/blind": "A"})))
    assert (found["accuracy"], found["accuracy/blind"], found["multimodal_gain"]) == (0.5, 1.0, -1.0)
    assert "multimodal_gain" not in MMSTAR.of_choices(said(contents, {"0": "B", "1/blind": "A"}))


def test_mmstars_image_column_may_be_plain_bytes_and_a_foreign_answer_is_left_out(tmp_path: Path) -> None:
    row = {"question": "Which?\nOptions: A: one, B: two", "image": picture()["bytes"], "category": "math"}
    write_parquet(tmp_path / "mmstar.parquet", [row | {"index": 0, "answer": "A"}, row | {"index": 1, "answer": "E"}])
    contents = MMSTAR.read(Store(str(tmp_path)))
    assert [item.id for item in contents.items] == ["0", "0/blind"]
    assert contents.left_out[0].reason == "answer: the answer E is none of the options A, B"


def test_two_models_are_compared_by_what_each_benchmark_counts_as_right(pope: Path) -> None:
    by_id = {item.id: item for item in POPE.read(Store(str(pope))).items}
    found = rights(
        POPE, Answers(choices={"text": [Said(by_id["coco_pope_random/1"], None), Said(by_id["coco_pope_random/2"], None)]})
    )
    assert found == {"text": {"coco_pope_random/1": 1.0, "coco_pope_random/2": 0.0}}  # what is no no is a yes
    blind = Item("a", "?", (), ("Yes", "No"), "No", {"without_figure": True})
    assert rights(HALLUSION_BENCH, Answers(choices={"text": [Said(blind, None)]})) == {"text": {"a": 1.0}}
