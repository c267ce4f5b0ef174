"""Ray Data for real: mixed sources into one prepared data set, and its streams in sampler order."""

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from rayalign.config.sections import DataConfig
from rayalign.data.checked import DamagedFile
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import prepare
from rayalign.data.sampler import SamplerSettings, StepSampler
from rayalign.data.store import PreparedData
from rayalign.data.stream import fetch_pairs, pairs_in_order
from rayalign.storage import Store
from tests.cluster import Cluster
from tests.tiny_data import write_rows


@pytest.fixture(scope="module", autouse=True)
def driver(cluster_of_four_cpus: Cluster) -> Iterator[None]:
    """This process as a driver of the cluster."""
    ray.init(address=cluster_of_four_cpus.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def spec(model: Path) -> EncoderSpec:
    return EncoderSpec(model=str(model), responses="both")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native/train.jsonl (30 rows, a broken line), rlaif/*.parquet (2 x 6 rows, one picture cut in half), swift4.json (4)."""
    folder = tmp_path_factory.mktemp("sources")
    write_rows(folder / "native", 30, extra_lines=("{broken",))
    (folder / "rlaif").mkdir()
    for part in range(2):
        rows = [
            {
                "ds_name": "tests",
                "idx": part * 6 + i,
                "question": f"What is shown in {part * 6 + i}?",
                "chosen": "A red square.",
                "rejected": "A blue circle.",
                "image": {"bytes": png() if (part, i) != (1, 2) else png()[:40], "path": "x.png"},
            }
            for i in range(6)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "rlaif" / f"part{part}.parquet", row_group_size=4)
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello to you."}]
    swift4 = [{"messages": turns, "rejected_response": f"Go away {i}."} for i in range(4)]
    (folder / "swift4.json").write_text(json.dumps(swift4))
    return folder


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (40, 40), (220, 30, 30)).save(content, "PNG")
    return content.getvalue()


def prepare_all(sources: Path, spec: EncoderSpec, cache: Path, *, config: DataConfig | None = None) -> PreparedData:
    arguments = [f"{sources}/native#20", f"{sources}/rlaif/*.parquet", f"{sources}/swift4.json"]
    return prepare(arguments, spec, config or DataConfig(max_dropped_fraction=0.5), Store.at(str(cache)))


def test_several_sources_and_formats_become_one_data_set(sources: Path, spec: EncoderSpec, tmp_path: Path) -> None:
    data = prepare_all(sources, spec, tmp_path)
    dropped = data.dropped()
    reasons = [line["reason"] for line in dropped if line["file"].endswith("part1.parquet")]
    assert reasons == ["image unreadable"]
    # 20 drawn rows of 31, 12 and 4: what is missing is listed.
    assert data.num_rows + len(dropped) == 36
    index = data.index()
    order = list(zip(index["dataset"].to_pylist(), index["file"].to_pylist(), index["source_row"].to_pylist(), strict=True))
    assert order == sorted(order)
    assert len(set(index["id"].to_pylist())) == data.num_rows
    (pair,) = data.reader().read([data.num_rows - 5]).to_pylist()
    assert pair["id"].endswith("part1.parquet:5")
    assert pair["images"] == [png()]


def test_the_cache_is_used_until_something_that_counts_changes(sources: Path, spec: EncoderSpec, tmp_path: Path) -> None:
    first = prepare_all(sources, spec, tmp_path)
    assert prepare_all(sources, spec, tmp_path) == first
    other_draw = prepare_all(sources, spec, tmp_path, config=DataConfig(max_dropped_fraction=0.5, data_seed=7))
    assert other_draw.store != first.store
    assert other_draw.index()["source_row"].to_pylist() != first.index()["source_row"].to_pylist()
    os.utime(sources / "swift4.json", (1, 1))
    assert prepare_all(sources, spec, tmp_path).store != first.store


def test_exactly_the_damaged_shards_are_made_anew(
    sources: Path, spec: EncoderSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rayalign")
    data = prepare_all(sources, spec, tmp_path)
    right, rows = data.reader().read(range(data.num_rows)), range(data.num_rows)
    shards = sorted(Path(data.folder.location).glob("shard_*.arrow"))
    assert len(shards) == 6  # of 3 files, two of which have 2 row groups
    shards[0].unlink()
    content = bytearray(shards[2].read_bytes())
    content[len(content) // 2] ^= 1
    shards[2].write_bytes(content)
    before = {shard.name: shard.stat().st_mtime_ns for shard in shards if shard.exists()}
    with pytest.raises(DamagedFile, match=r"shard_000002\.arrow is damaged: .* The same command makes it anew"):
        data.reader().read([row for row, shard in enumerate(data.index()["shard"].to_pylist()) if shard == 2])
    caplog.clear()
    assert prepare_all(sources, spec, tmp_path) == data
    (words,) = (line for line in caplog.messages if "encoding again" in line)
    assert words == f"Data: encoding again 2 of the shards, which are damaged or missing: {shards[0]}"
    assert data.reader().read(rows).equals(right)
    after = {shard.name: shard.stat().st_mtime_ns for shard in shards}
    assert {name for name in after if after[name] != before.get(name)} == {shards[0].name, shards[2].name}
    assert not list(Path(data.folder.location).glob("mended_*"))


def test_everything_is_made_anew_where_the_index_is_damaged_or_a_shard_would_be_another(
    spec: EncoderSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def prepare_these() -> PreparedData:
        return prepare([str(file)], spec, DataConfig(), Store.at(str(tmp_path / "cache")))

    file = write_rows(tmp_path / "rows", 6)
    first = prepare_these()
    index = Path(first.folder.location) / "index.arrow"
    index.write_bytes(index.read_bytes()[:-1])
    second = prepare_these()
    assert f"Data: encoding anew what was encoded before: {index} is damaged" in caplog.text
    assert second.attempt != first.attempt
    Image.new("RGB", (50, 50)).save(next(file.parent.glob("*.png")))
    (Path(second.folder.location) / "shard_000000.arrow").write_bytes(b"")
    third = prepare_these()
    assert "Data: that gives other pairs than before: encoding everything anew" in caplog.text
    assert third.attempt != second.attempt
    assert third.damaged_shards() == []
    assert third.index()["id"].equals(second.index()["id"])


def test_a_draw_larger_than_its_data_set_is_refused(sources: Path, spec: EncoderSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        prepare([f"{sources}/swift4.json#5"], spec, DataConfig(), Store.at(str(tmp_path)))
    assert str(caught.value) == f"--dataset {sources}/swift4.json#5: 5 records are asked for, and there are 4."


def test_an_error_for_the_user_arrives_without_rays_layers(sources: Path, spec: EncoderSpec, tmp_path: Path) -> None:
    short = EncoderSpec(model=spec.model, responses="both", max_length=8, truncation_strategy="raise")
    with pytest.raises(ValueError) as caught:
        prepare([f"{sources}/swift4.json"], short, DataConfig(), Store.at(str(tmp_path)))
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith("Record swift4.json:")


def test_workers_stream_exactly_their_part_of_the_plan_from_any_step(
    sources: Path, spec: EncoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayalign.data.sampler.CHUNK_PAIRS", 4)  # all but the first fetch come through Ray Data
    data = prepare_all(sources, spec, tmp_path)
    settings = SamplerSettings(global_batch_size=8, batch_size=2, num_workers=2, num_epochs=3, max_steps=None, seed=3)
    sampler = StepSampler(data.token_counts(), settings)
    ids = np.array(data.index()["id"].to_pylist())
    for rank, start in ((0, 0), (1, 0), (1, sampler.num_steps - 4)):
        expected = [
            (step, tuple(ids[rows])) for step in range(start, sampler.num_steps) for rows in sampler.micro_batches(step, rank)
        ]
        tables = fetch_pairs(data, sampler, rank=rank, start_step=start)
        stream = pairs_in_order(tables, sampler, spec, rank=rank, start_step=start)
        assert [(step, batch.ids) for step, batch in stream] == expected
