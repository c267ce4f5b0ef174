"""CHAIR, AMBER and MMHal-Bench: twins of their files, and metrics worked out by hand."""

import json
from pathlib import Path

import pytest

from rayalign.evaluation.benchmarks.amber import AMBER
from rayalign.evaluation.benchmarks.benchmark import Said, image_folder
from rayalign.evaluation.benchmarks.chair import CHAIR, named_in, read_synonyms
from rayalign.evaluation.benchmarks.mmhal_bench import MMHAL_BENCH, rating_in
from rayalign.evaluation.benchmarks.vocabulary import Vocabulary
from rayalign.evaluation.exams import read_exam
from rayalign.storage import Store
from tests.evaluation.benchmarks.twins import items_of, put_pictures, said, values

SYNONYMS = """person, girl, man, child, people
dog, puppy
cat, kitten
tie
traffic light, street light
toilet
train
"""


@pytest.fixture
def chair(tmp_path: Path) -> Path:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 10, "name": "traffic light"}]
    images = [{"id": n, "file_name": f"COCO_val2014_{n}.jpg"} for n in (1, 2, 3)]
    boxes = [{"image_id": 1, "category_id": 1}, {"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 10}]
    captions = [{"image_id": 1, "caption": "Two girls and a kitten."}, {"image_id": 2, "caption": "A street light."}]
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "instances_val2014.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": categories})
    )
    (folder / "captions_val2014.json").write_text(json.dumps({"annotations": captions}))
    put_pictures(tmp_path / "val2014", "COCO_val2014_1.jpg", "COCO_val2014_2.jpg")
    return tmp_path


def test_chairs_objects_are_those_of_boxes_and_of_captions(chair: Path) -> None:
    contents = CHAIR.read(Store(str(chair)))
    assert {item.id: item.facts["objects"] for item in contents.items} == {
        "1": ["cat", "dog", "person"],
        "2": ["traffic light"],
    }  # the third picture is not in the folder
    assert image_folder(contents).name == "val2014"


def test_chair_counts_objects_that_are_not_there(chair: Path) -> None:
    contents = CHAIR.read(Store(str(chair)))
    assert CHAIR.of_texts is not None
    texts = {
        # person, dog, dog, person, and twice a tie, which is not there
        "1": "Two men with a puppy and a baby dog. The men wear ties, one tie is red.",
        "2": "Street lights.",
    }
    found = values(CHAIR.of_texts(said(contents, texts), contents.shared))
    # One of 2 captions; 2 of 6 + 1 names; 2 + 1 of 3 + 1 objects; 17 and 2 words.
    assert found == pytest.approx({"CHAIR_s": 1 / 2, "CHAIR_i": 2 / 7, "recall": 3 / 4, "words": 9.5})


def test_chair_takes_no_captions_without_objects_for_hallucinations(chair: Path) -> None:
    contents = CHAIR.read(Store(str(chair)))
    assert CHAIR.of_texts is not None
    found = values(CHAIR.of_texts(said(contents, {"1": "A nice scene.", "2": ""}), contents.shared))
    assert found == {"CHAIR_s": 0.0, "CHAIR_i": 0.0, "recall": 0.0, "words": 1.5}


def test_names_are_found_in_plural_and_the_longest_first(tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    vocabulary = read_synonyms(Store(str(tmp_path / "synonyms.txt")))
    text = (
        "Children, a baby kitten, puppies, bow ties, traffic lights, a toilet seat, passenger trains; no wolves, catch, glass."
    )
    assert vocabulary.find(text) == ["person", "cat", "dog", "tie", "traffic light", "toilet", "train"]
    assert Vocabulary({"knife": "knife", "bus": "bus"}).find("knives and buses, a bus") == ["knife", "bus", "bus"]


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("the dog's bowl, the dogs' bowls", ["dog", "dog"]),
        ("men, women, firemen, grandchildren, people", ["person"] * 5),
        (
            "Buses and a bus, glasses and a wine glass, knives, sheep, scissors, geese",
            ["bus", "bus", "cup", "cup", "knife", "sheep", "scissors", "bird"],
        ),
        (
            "couches, benches, skis, pastries, loaves, oxen, mice, teddy bears",
            ["couch", "bench", "skis", "cake", "bread", "cow", "mouse", "bear"],
        ),
        (
            "a baby, a baby elephant, adult zebras, a baby animal, a bear cub, a passenger jet",
            ["person", "elephant", "zebra", "bear", "airplane"],
        ),
        ("a toilet with its seat up", ["toilet"]),
        ("two seats", ["chair"]),
        ("the catcher runs to home plate; a plate", ["plate"]),
        ("catch, busy, glossy, manage, bearing", []),
    ],
)
def test_chairs_names_are_found_as_the_benchmarks_own_script_finds_them(tmp_path: Path, text: str, objects: list[str]) -> None:
    lines = (
        *("person, man, woman, fireman, grandchild, child, people, baby, adult, passenger", "bird, goose", "elephant", "zebra"),
        *("dog", "cat", "bear, teddy bear", "sheep", "cow, ox", "mouse", "bus", "cup, glass, wine glass", "knife", "scissors"),
        *("couch", "bench", "skis, ski", "cake, pastry", "bread, loaf", "airplane, jet", "toilet", "chair, seat", "plate"),
    )
    (tmp_path / "synonyms.txt").write_text("\n".join(lines))
    assert named_in(text, read_synonyms(Store(str(tmp_path / "synonyms.txt")))) == objects


def test_a_category_without_a_name_is_refused(chair: Path) -> None:
    (chair / "synonyms.txt").write_text("person, girl\ndog\n")
    with pytest.raises(ValueError) as caught:
        CHAIR.read(Store(str(chair)))
    assert str(caught.value) == "synonyms.txt has no name for COCO's category traffic light. Take the benchmark's own file."


@pytest.fixture
def amber(tmp_path: Path) -> Path:
    annotations = [
        {"id": 1, "type": "generative", "truth": ["beach", "dog"], "hallu": ["ball", "sea"]},
        {"id": 2, "type": "generative", "truth": ["car"], "hallu": ["road"]},
        {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 5, "type": "relation", "truth": "no"},
    ]
    related = {"beach": ["sand"], "dog": ["puppy"], "ball": [], "sea": ["water"], "car": [], "road": ["street"], "cat": []}
    queries = [
        {"id": n, "image": f"AMBER_{n}.jpg", "query": "Describe this image." if n < 3 else "Is it?"} for n in range(1, 6)
    ]
    (tmp_path / "data" / "query").mkdir(parents=True)
    for name, content in (("annotations", annotations), ("relation", related), ("query/query_all", queries)):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "data" / "safe_words.txt").write_text("water\nscene\n")
    put_pictures(tmp_path / "image", *(f"AMBER_{n}.jpg" for n in range(1, 6)))
    return tmp_path


def test_ambers_descriptions_are_compared_with_what_is_there(amber: Path) -> None:
    contents = AMBER.read(Store(str(amber)))
    assert AMBER.of_texts is not None
    texts = {
        "1": "Puppies on the sand by the water play with a ball; a cat looks on.",  # dog, beach, safe, imagined, wrong
        "2": "A car.",
    }
    found = values(AMBER.of_texts(said(contents, texts), contents.shared))
    # Named: puppy, sand, water, ball, cat, car; ball and cat are not there. Covered: dog, beach, car of 3. 1 of 2 descriptions.
    # Imagined: ball of ball, sea and road.
    assert found == pytest.approx({"CHAIR": 2 / 6, "Cover": 1.0, "Hal": 0.5, "Cog": 1 / 3})


def test_ambers_yes_no_part_is_about_denying(amber: Path) -> None:
    contents = AMBER.read(Store(str(amber)))
    assert items_of(contents)["3"].query == "Is it? Please answer yes or no."
    assert AMBER.of_choices is not None
    found = values(AMBER.of_choices(said(contents, {"3": "No", "4": "No", "5": "Yes"})))
    # No is said twice, rightly once; two answers are no.
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert (found["precision"], found["recall"], found["f1"]) == (0.5, 0.5, 0.5)
    assert (found["accuracy/existence"], found["accuracy/attribute"], found["accuracy/relation"]) == (1.0, 0.0, 0.0)


def test_an_annotation_of_amber_that_lacks_something_costs_its_own_question(amber: Path) -> None:
    file = amber / "data" / "annotations.json"
    first, second, third, fourth, fifth = json.loads(file.read_text())
    del first["hallu"], second["id"], third["truth"], fourth["type"]
    file.write_text(json.dumps([first, second, third, fourth, fifth]))
    contents = AMBER.read(Store(str(amber)))
    assert [item.id for item in contents.items] == ["5"]
    assert [row.reason for row in contents.left_out] == [
        "hallu: the row has none of hallu; it has id, type, truth",
        "id: annotations.json has no truth of the question 2",
        "truth: the row has none of truth; it has id, type",
        "type: the row has none of type; it has id, truth",
    ]
    file.write_text(json.dumps([{**first, "hallu": 7}, fifth]))
    contents = AMBER.read(Store(str(amber)))
    assert contents.left_out[0].reason.startswith("TypeError: ")


def test_files_of_another_layout_are_refused_in_words(chair: Path) -> None:
    (chair / "annotations" / "captions_val2014.json").write_text("{}")
    with pytest.raises(ValueError) as caught:
        read_exam("chair", str(chair), image_root=None, max_questions=None, seed=0)
    assert str(caught.value) == (
        f"--benchmarks chair:{chair}: its files hold something else than this benchmark's (KeyError: 'annotations'). It needs "
        f"{CHAIR.files}."
    )
    (chair / "annotations" / "captions_val2014.json").write_text('{"annotations": ["A cat."]}')
    with pytest.raises(ValueError, match=r"^--benchmarks chair:.*: its files hold something else .*\(TypeError: "):
        read_exam("chair", str(chair), image_root=None, max_questions=None, seed=0)


@pytest.fixture
def mmhal(tmp_path: Path) -> Path:
    rows = [
        {
            "question_type": kind,
            "question_topic": "animal",
            "image_id": str(n),
            "image_src": f"https://host/path/{n}_o.jpg",
            "image_content": ["Cat", "Mat"],
            "question": f"Question {n}?",
            "gt_answer": f"Answer {n}.",
            "model_answer": "",
        }
        for n, kind in enumerate(("attribute", "attribute", "counting"))
    ]
    (tmp_path / "response_template.json").write_text(json.dumps(rows))
    (tmp_path / "eval_gpt4.py").write_text(
        "import openai\ntemplate = '''Contents {}\nQ {}\nGold {}\nSaid {}'''\nraise SystemExit\n"
    )
    put_pictures(tmp_path / "images", "0_o.jpg")
    return tmp_path


def test_mmhals_judge_gets_the_benchmarks_own_prompt_which_is_not_run(mmhal: Path) -> None:
    contents = MMHAL_BENCH.read(Store(str(mmhal)))
    assert MMHAL_BENCH.judge_prompt is not None
    prompt = MMHAL_BENCH.judge_prompt(Said(contents.items[0], "A {cat}."), contents.shared)
    assert prompt == "Contents Cat, Mat\nQ Question 0?\nGold Answer 0.\nSaid A {cat}."


def test_mmhals_ratings_below_three_are_hallucinations(mmhal: Path) -> None:
    contents = MMHAL_BENCH.read(Store(str(mmhal)))
    assert MMHAL_BENCH.of_texts is not None
    judgements = {
        "0/attribute": "Good.\nRating: 6, very informative",
        "1/attribute": "Rating: 2",
        "2/counting": "I can't tell.",
    }
    found = values(MMHAL_BENCH.of_texts(said(contents, judgements), contents.shared))
    # 6, 2, and 0 for the one without a rating.
    assert found == pytest.approx(
        {"score": 8 / 3, "hallucination_rate": 2 / 3, "unrated": 1.0, "score/attribute": 4.0, "score/counting": 0.0}
    )


def test_a_rating_must_be_the_only_one() -> None:
    assert rating_in("Analysis: fine.\n- Rating: 5, very informative") == 5
    assert rating_in("**Rating: 4**") == 4
    assert rating_in("Rating: 5 or rating: 3") is None
    assert rating_in("Rating: 10") is None


def test_a_file_without_a_prompt_is_refused(mmhal: Path) -> None:
    (mmhal / "eval_gpt4.py").write_text("template = 'only {}'\n")
    with pytest.raises(ValueError) as caught:
        MMHAL_BENCH.read(Store(str(mmhal)))
    assert str(caught.value) == (
        f"{mmhal}/eval_gpt4.py: holds no template = '...' with four {{}}. Take the benchmark's own file."
    )
