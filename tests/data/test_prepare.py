"""What an encoded data set is kept under, and how its tasks' outcomes become one (Ray's part of the preparation:
tests/integration)."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
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
    with pytest.raises(prepare.TooManyDropped, match="4 of 16 records dropped"):
        prepare.prepare(arguments, spec, DataConfig(max_dropped_fraction=0.1), Store(str(tmp_path / "other")))
