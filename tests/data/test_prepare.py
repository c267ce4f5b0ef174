"""What an encoded data set is kept under, and how its tasks' outcomes become one (Ray's part of the preparation:
tests/integration)."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayalign.algorithms.dpo import DPO
from rayalign.config.config import Config
from rayalign.config.plugins import Plugin
from rayalign.config.sections import DataConfig, ModelConfig, RunConfig
from rayalign.data import prepare, shards, tasks
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import cache_key
from rayalign.data.rows import OUTCOME_SCHEMA, PrepareTask, Sources, write_task
from rayalign.data.shards import shard_name
from rayalign.data.store import PreparedData
from rayalign.storage import Store


def test_data_read_by_another_plugin_are_other_data(model_folder: Callable[..., Path]) -> None:
    spec = EncoderSpec(str(model_folder("llava")), responses="both")

    def key(*texts: str) -> str:
        plugins = tuple(Plugin("/anywhere/my_format.py", text) for text in texts)
        return cache_key(Sources((), None, False, plugins), spec, DataConfig())

    assert key("FORMATS = (1,)") == key("FORMATS = (1,)")
    assert len({key(), key("FORMATS = (1,)"), key("FORMATS = (2,)")}) == 3


def test_renamed_columns_are_other_data_and_none_are_the_data_of_before(model_folder: Callable[..., Path]) -> None:
    spec = EncoderSpec(str(model_folder("llava")), responses="both")

    def key(*columns: tuple[str, str]) -> str:
        return cache_key(Sources((), None, False, (), columns), spec, DataConfig())

    assert key() == cache_key(Sources((), None, False), spec, DataConfig())
    assert key(("a", "images"), ("b", "query")) == key(("b", "query"), ("a", "images"))
    assert len({key(), key(("a", "images")), key(("a", "image")), key(("b", "images"))}) == 4


@pytest.mark.parametrize(("num_rows", "val_dataset", "said"), [(40, (), True), (40, ("b.jsonl",), False), (60, (), False)])
def test_a_run_that_holds_nothing_out_says_so(
    model_folder: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
    val_dataset: tuple[str, ...],
    said: bool,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").touch()
    data = PreparedData(Store("/nowhere"), "attempt", num_rows)
    monkeypatch.setattr(prepare, "prepare", lambda *_: data)  # which would need a cluster
    flags = DataConfig(dataset=("a.jsonl",), val_dataset=val_dataset)
    prepare.prepare_run(
        Config(DPO(), model=ModelConfig(model=str(model_folder("llava"))), data=flags, run=RunConfig(output_dir="out"))
    )
    words = [record.getMessage() for record in caplog.records if "held out" in record.getMessage()]
    assert words == (
        [
            "Data: nothing is held out, so that nothing is evaluated: 0.01 of 40 records is less than one. Pass --val_dataset, "
            "or a larger --dataset_test_ratio such as 0.1."
        ]
        if said
        else []
    )


def test_a_run_that_would_train_on_held_out_records_is_refused_before_anything_is_encoded(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prepare, "prepare", lambda *_: pytest.fail("nothing is encoded"))
    (tmp_path / "rows.jsonl").write_text('{"query": "a"}\n' * 3)
    flags = DataConfig(dataset=(f"{tmp_path}",), val_dataset=(f"{tmp_path}/rows.jsonl#2",))
    with pytest.raises(ValueError, match="2 of its 2 records of files that --dataset reads, too, are trained on"):
        prepare.prepare_run(
            Config(DPO(), model=ModelConfig(model=str(model_folder("llava"))), data=flags, run=RunConfig(output_dir="out"))
        )


@pytest.fixture
def without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process, as the cluster's would: a shard is full with every second row."""

    def encode(
        cut: Sequence[PrepareTask],
        sources: Sources,
        spec: EncoderSpec,
        folder: Store,
        progress: object,
        *,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[pa.Table]:
        for number in range(len(cut)) if numbers is None else numbers:
            lines = write_task(cut[number], folder, itertools.count(number, len(cut)), sources, spec)
            yield pa.Table.from_pylist(lines, schema=OUTCOME_SCHEMA)

    monkeypatch.setattr(prepare, "_encode", encode)
    monkeypatch.setattr(tasks, "SPAN_ROWS", 5)
    monkeypatch.setattr(shards, "SHARD_BYTES", 200)


@pytest.mark.usefixtures("without_a_cluster")
def test_a_task_that_wrote_several_shards_is_mended_as_a_whole(
    model_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"query": f"What is {i}?", "response": "a", "rejected_response": "b"}) + "\n" for i in range(12))
    )
    spec = EncoderSpec(str(model_folder("llava")), responses="both")

    def prepared(**flags: Any) -> PreparedData:
        return prepare.prepare([str(file)], spec, DataConfig(**flags), Store(str(tmp_path / "cache")))

    data = prepared()
    assert data.shards() == [0, 1, 2, 3, 4, 6, 7]  # of three tasks of 5, 5 and 2 rows: every third is a task's
    right, folder = data.reader().read(range(12)), Path(data.folder.location)
    before = {shard: (folder / shard_name(shard)).read_bytes() for shard in data.shards()}
    (folder / shard_name(4)).unlink()
    (folder / shard_name(7)).write_bytes(b"")
    assert prepared() == data
    assert f"encoding again 2 of the shards, which are damaged or missing: {folder / shard_name(4)}" in caplog.text
    assert {shard: (folder / shard_name(shard)).read_bytes() for shard in data.shards()} == before
    assert data.reader().read(range(12)).equals(right)
    assert data.damaged_shards() == []
    assert not list(folder.glob("mended_*"))


@pytest.mark.usefixtures("without_a_cluster")
def test_dropped_rows_are_listed_and_counted_whatever_task_met_them(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    row = {"query": "Which?", "response": "a", "rejected_response": "b"}
    for name in ("a", "b"):
        lines = [json.dumps(row | {"source": "x"}) if i % 4 else "{broken" for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    spec = EncoderSpec(str(model_folder("llava")), responses="both")
    arguments = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    data = prepare.prepare(arguments, spec, DataConfig(max_dropped_fraction=0.5), Store(str(tmp_path / "cache")))
    assert [(line["dataset"], line["row"]) for line in data.dropped()] == [(name, row) for name in arguments for row in (0, 4)]
    assert data.num_rows == 12
    assert [words for _, words in data.remarks() if "not read" in words] == [
        f"{name}: columns that are not read: source." for name in arguments
    ]


ROW = {"query": "Which?", "response": "a", "rejected_response": "b"}


@dataclass(frozen=True)
class Preparation:
    """Prepares files of a folder for one model, with one cache."""

    folder: Path
    spec: EncoderSpec

    def write(self, name: str, *rows: object) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *names: str, limit: float = 0.05) -> PreparedData:
        config = DataConfig(max_dropped_fraction=limit)
        return prepare.prepare([f"{self.folder}/{name}" for name in names], self.spec, config, Store(f"{self.folder}/cache"))

    def lines(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        return [message.replace(f"{self.folder}/", "") for message in caplog.messages]

    def refusal(self, *names: str, limit: float = 0.05) -> str:
        with pytest.raises(ValueError) as caught:
            self.run(*names, limit=limit)
        return str(caught.value).replace(f"{self.folder}/", "")


@pytest.fixture
def preparation(without_a_cluster: None, model_folder: Callable[..., Path], tmp_path: Path) -> Preparation:
    return Preparation(tmp_path, EncoderSpec(str(model_folder("llava")), responses="both"))


def test_each_data_set_of_a_mix_is_held_to_the_limit(preparation: Preparation, caplog: pytest.LogCaptureFixture) -> None:
    preparation.write("big.jsonl", *[ROW] * 99, ROW | {"response": "b"})
    preparation.write("bad.jsonl", *[ROW] * 9, {"instruction": "x"})
    table = (
        "big.jsonl: 1 of 100 records dropped (1.0%):\n         1  identical responses\n"
        "bad.jsonl: 1 of 10 records dropped (10.0%):\n         1  unknown format"
    )
    said = preparation.refusal("big.jsonl", "bad.jsonl")
    assert said.startswith(
        f"{table}\nThat is more of bad.jsonl than --max_dropped_fraction 0.05 allows. First: bad.jsonl, row 9: unknown format ("
    )
    assert said.endswith("Fix the data, or raise the limit.")
    assert preparation.run("big.jsonl", "bad.jsonl", limit=0.1).num_rows == 108
    assert [line for line in preparation.lines(caplog) if "dropped" in line] == [
        "Data: big.jsonl: 1 of 100 records dropped (1.0%): 1 identical responses",
        "Data: bad.jsonl: 1 of 10 records dropped (10.0%): 1 unknown format",
    ]


@pytest.mark.parametrize("limit", [0.05, 1.0])
def test_a_data_set_of_which_nothing_is_left_is_refused(preparation: Preparation, limit: float) -> None:
    preparation.write("big.jsonl", *[ROW] * 100)
    preparation.write("bad.jsonl", *[{"instruction": "x"}] * 4)
    said = preparation.refusal("big.jsonl", "bad.jsonl", limit=limit)
    assert said.startswith(
        "bad.jsonl: 4 of 4 records dropped (100.0%):\n         4  unknown format\nNothing is left of bad.jsonl. First: "
        "bad.jsonl, row 0: unknown format ("
    )
    assert said.endswith("Fix the data, or leave this data set out.")


@pytest.mark.parametrize("names", [("a.jsonl",), ("full.jsonl", "a.jsonl"), ("full.jsonl", "header.csv")])
def test_a_data_set_without_records_is_refused_before_anything_is_encoded(
    preparation: Preparation, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(prepare, "_encode", lambda *_, **__: pytest.fail("nothing is encoded"))
    preparation.write("full.jsonl", ROW)
    preparation.write("a.jsonl")
    (preparation.folder / "header.csv").write_text("query,response,rejected_response\n")
    assert preparation.refusal(*names) == f"Dataset '{names[-1]}' holds no records. Name another, or leave it out."


def test_what_was_encoded_before_is_held_to_the_limit_of_now(
    preparation: Preparation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparation.write("rows/a.jsonl", *[ROW] * 6, *[{"instruction": "x"}] * 2)
    preparation.write("b.jsonl", *[ROW] * 3, "no object")
    first = preparation.run("rows", "b.jsonl", limit=0.5)
    monkeypatch.setattr(prepare, "_encode", lambda *_, **__: pytest.fail("it is encoded already"))
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert preparation.run("rows/*.jsonl", "b.jsonl", limit=0.25) == first  # the same files under another name
    assert [line for line in preparation.lines(caplog) if "dropped" in line] == [
        "Data: rows/*.jsonl: 2 of 8 records dropped (25.0%): 2 unknown format",
        "Data: b.jsonl: 1 of 4 records dropped (25.0%): 1 not an object",
    ]
    said = preparation.refusal("rows", "b.jsonl", limit=0.2)
    assert "That is more of rows than --max_dropped_fraction 0.2 allows. First: rows/a.jsonl, row 6: unknown format (" in said
    assert said.endswith(
        "Fix the data, or raise the limit. (So it was when they were encoded; after a change of pictures alone, delete "
        f"cache/{first.store.name}.)"
    )


def test_pictures_that_nothing_reads_end_a_run_on_data_encoded_before(preparation: Preparation) -> None:
    preparation.write("a.jsonl", *[ROW] * 8, *[ROW | {"image_path": "0.png"}] * 2)
    first = preparation.run("a.jsonl", limit=0.5)
    assert preparation.refusal("a.jsonl") == (
        "a.jsonl: 2 of 10 records have what looks like their picture in a column that no record format reads: image_path. Pass "
        "--columns image_path=images, or take the column out of the rows. (So it was when they were encoded; after a change of "
        f"pictures alone, delete cache/{first.store.name}.)"
    )
