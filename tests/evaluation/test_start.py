"""What verbs that run a model over records begin with: their data, and a folder for the results that is none of the data's."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayalign.config.inference import InferenceConfig
from rayalign.config.inference_verbs import GenerateConfig, ScoreConfig
from rayalign.data.rows import Sources
from rayalign.evaluation import generate, score
from rayalign.evaluation.prompts import prompt_columns, prompt_of
from rayalign.evaluation.score import candidates_of
from rayalign.evaluation.start import config_of, datasets_of, pictures_of_rows, sources_of
from rayalign.formats.records import RecordError
from rayalign.images.fetch import fetch_images
from rayalign.sources.files import Dataset, SourceFile, read_rows
from rayalign.storage import Store
from tests.tiny_models import noise_image


@pytest.mark.parametrize(
    ("dataset", "output", "problem"),
    [
        ("resp/rows", "resp", "holds {here}/resp/rows/a.jsonl, which is read for --dataset {here}/resp/rows"),
        ("resp/rows#1", "resp/rows", "holds {here}/resp/rows/a.jsonl, which is read for --dataset {here}/resp/rows#1"),
        ("resp/rows/*.jsonl", "link", "holds {here}/resp/rows/a.jsonl, which is read for --dataset {here}/resp/rows/*.jsonl"),
        ("resp", "resp/rows/out", "lies in the folder of --dataset {here}/resp, and its results would be taken for records"),
        ("resp/rows/a.jsonl", "resp/rows/out", None),
        ("resp/rows", "resp/rows2", None),
    ],
)
def test_an_output_folder_that_is_holds_or_lies_in_the_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, output: str, problem: str | None
) -> None:
    (tmp_path / "resp" / "rows").mkdir(parents=True)
    (tmp_path / "resp" / "rows" / "a.jsonl").write_text("{}\n")
    (tmp_path / "link").symlink_to(tmp_path / "resp")
    monkeypatch.chdir(tmp_path)
    config = config_of(InferenceConfig(dataset=(dataset,), output_dir=output))
    if problem is None:
        assert sources_of(config).datasets
        return
    with pytest.raises(ValueError) as caught:
        sources_of(config)
    words = problem.format(here=tmp_path)
    assert str(caught.value) == f"--output_dir {tmp_path}/{output}: {words}. Choose a folder beside the data."


def rows_of(*arguments: str, image_root: str | None = None) -> list[Any]:
    """The prompts' columns of all rows of data sets, as `generate` writes them."""
    sources = sources_of(config_of(InferenceConfig(dataset=arguments, image_root=image_root, output_dir="/tmp/out")))
    rows = [row for dataset in sources.datasets for file in dataset.files for row in read_file(dataset, file)]
    return [prompt_columns(prompt_of(row, sources, text_only=False), row, sources) for row in rows]


def read_file(dataset: Dataset, file: SourceFile) -> Iterator[dict[str, Any]]:
    folder = dataset.folder_of(file).location
    return ({"id": f"{file.name}:{number}", "folder": folder, "row": row} for number, row in read_rows(file))


def write_pool(folder: Path, rows: list[Any], settings: dict[str, Any]) -> str:
    """The folder of a pool with these rows; what --dataset takes."""
    (folder / "rows").mkdir(parents=True)
    lines = [{**row, "response": "A cat.", "sample": 0, "is_ended": True} for row in rows]
    pq.write_table(pa.Table.from_pylist(lines), folder / "rows" / "0.parquet")
    (folder / "settings.json").write_text(json.dumps(settings))
    return f"{folder}/rows"


def fetched(argument: str) -> list[bytes]:
    """The images of all rows of a data set, as `score` fetches them."""
    sources = sources_of(config_of(InferenceConfig(dataset=(argument,), output_dir="/tmp/out")))
    (dataset,) = sources.datasets
    candidates = [each for file in dataset.files for row in read_file(dataset, file) for each in candidates_of(row, sources)]
    return [
        image
        for found in candidates
        for image in fetch_images(found.record.images, folder=Store(found.folder), image_root=None, allow_urls=False)
    ]


@pytest.mark.parametrize("image_root", [None, "pictures"])
def test_the_images_of_a_pools_rows_are_found_where_its_settings_say_they_lie(tmp_path: Path, image_root: str | None) -> None:
    """The README's generate and score: the responses' folder holds no image, and names those of the prompts."""
    root = tmp_path / (image_root or "data")
    for folder in {tmp_path / "data", root}:
        folder.mkdir()
    (root / "cat.png").write_bytes(noise_image(8, 8))
    (tmp_path / "data" / "prompts.jsonl").write_text('{"query": "<image>Which?", "images": ["cat.png"]}\n')
    given = image_root and str(root)
    prompts = (f"{tmp_path}/data/prompts.jsonl",)
    sources = sources_of(config_of(InferenceConfig(dataset=prompts, image_root=given, output_dir="/tmp/out")))
    settings = {"verb": "generate", **pictures_of_rows(sources)}
    assert settings["image_root"] == str(root)
    responses = write_pool(tmp_path / "responses", rows_of(*prompts, image_root=given), settings)
    assert fetched(responses) == fetched(f"{responses}/*.parquet") == [noise_image(8, 8)]
    # The rows of scores name the same images, and their settings the same folder.
    again = sources_of(config_of(InferenceConfig(dataset=(responses,), output_dir="/tmp/out")))
    assert pictures_of_rows(again) == {"image_root": str(root)}
    (row,) = rows_of(responses)
    assert row["images"] == [{"bytes": None, "path": f"{root}/cat.png"}]


@pytest.mark.parametrize("verb", ["generate", "score"])
def test_generate_and_score_note_where_the_images_of_their_rows_lie(
    tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """By what they hand to the pool, which needs a cluster."""
    (tmp_path / "prompts.jsonl").write_text('{"query": "Which?", "response": "This."}\n')
    module: Any = {"generate": generate, "score": score}[verb]
    monkeypatch.setattr(module, "on_cluster", lambda config, model: contextlib.nullcontext(config))
    monkeypatch.setattr(module, "groups_of_datasets", lambda sources, seed: [])
    monkeypatch.setattr(module, "run_pool", lambda *_, settings, **__: settings)
    model = str(model_folder("llava"))
    named = {"model": model} if verb == "generate" else {}
    flags = InferenceConfig(dataset=(f"{tmp_path}/prompts.jsonl",), output_dir=f"{tmp_path}/out", **named)
    own = GenerateConfig() if verb == "generate" else ScoreConfig(scorer=(f"likelihood={model}",))
    assert module.run(flags, own)["image_root"] == str(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"verb": "generate", "image_root": "{here}/data/inner"}, "{here}/data/cat.png leads out of {here}/data/inner"),
        ({"verb": "generate", "image_root": "/"}, "{here}/data/cat.png leads out of {here}/responses/rows"),
        ({"image_root": "{here}/data"}, "{here}/data/cat.png leads out of {here}/responses/rows"),  # no pool's
        ({"verb": "generate"}, "{here}/data/cat.png leads out of {here}/responses/rows"),
    ],
)
def test_no_image_is_read_from_outside_of_the_folder_that_a_pools_settings_name(
    tmp_path: Path, settings: dict[str, str], words: str
) -> None:
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "data" / "cat.png").write_bytes(noise_image(8, 8))
    row = {"query": "<image>Which?", "images": [{"bytes": None, "path": f"{tmp_path}/data/cat.png"}]}
    told = {name: value.format(here=tmp_path) for name, value in settings.items()}
    with pytest.raises(RecordError) as caught:
        fetched(write_pool(tmp_path / "responses", [row], told))
    assert words.format(here=tmp_path) in str(caught.value)


def test_a_users_own_settings_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("{}\n")
    for text in ("no json", "[1]", "{}"):
        (tmp_path / "settings.json").write_text(text)
        (dataset,) = datasets_of([f"{tmp_path}/rows"])
        assert dataset.pictures is None


def test_data_of_two_disks_have_no_folder_for_all_images(tmp_path: Path) -> None:
    here = Dataset("a", "a", (SourceFile("/data/a.jsonl", 1, ""),), None)
    there = Dataset("b", "b", (SourceFile("s3://bucket/b.jsonl", 1, ""),), None)
    assert pictures_of_rows(Sources((here, there), None, False)) == {}
    assert pictures_of_rows(Sources((there,), None, False)) == {"image_root": "s3://bucket"}
    assert pictures_of_rows(Sources((here, there), "/all", False)) == {"image_root": "/all"}
