"""Rows become results once each, whatever fails: a row, an actor's group, a run that was ended before."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayalign.config.endings import RunFailed
from rayalign.config.sections import ClusterConfig
from rayalign.data.attempts import Attempt
from rayalign.data.rows import Sources
from rayalign.evaluation import pool
from rayalign.evaluation.groups import Group, groups_of_datasets, groups_of_rows
from rayalign.evaluation.pool import do_group
from rayalign.evaluation.pool_folder import is_finished, read_results
from rayalign.evaluation.work import Result, Work
from rayalign.formats.records import RecordError
from rayalign.retries import StorageFailed
from rayalign.sources.files import resolve_dataset
from rayalign.storage import Store

SCHEMA = pa.schema([("id", pa.string()), ("position", pa.int64()), ("twice", pa.int64())])
ROWS = [{"id": f"r{n}", "number": n} for n in range(10)]


def twice(rows: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    if any(row["number"] == 3 for row in rows):
        raise RuntimeError("three can't be done")
    return [[{"twice": 2 * row["number"]}] for row in rows]


def test_a_group_is_written_once_however_often_it_is_done(tmp_path: Path) -> None:
    (group,) = groups_of_rows(ROWS)
    for _ in range(2):
        outcomes = do_group(group, Attempt(), twice, Store(str(tmp_path / "rows")), SCHEMA)
    assert [line["id"] for line in outcomes if line.get("reason")] == ["r3"]
    (table,) = read_results(Store(str(tmp_path)))
    assert table["twice"].to_pylist() == [0, 2, 4, 8, 10, 12, 14, 16, 18]
    assert table["position"].to_pylist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_groups_hold_all_rows_in_their_order_and_leave_out_what_is_done() -> None:
    groups = groups_of_rows(ROWS, size=4)
    assert [group.num_rows for group in groups] == [4, 4, 2]
    left = groups[1].without({"r5", "r6", "r9"})
    assert (left.keys, left.positions) == (("r4", "r7"), (4, 7))
    assert [row["number"] for row in left.read() if not isinstance(row, RecordError)] == [4, 7]
    with pytest.raises(ValueError, match="Two rows have the same id, r1"):
        groups_of_rows([ROWS[1], ROWS[1]])


def test_records_of_data_sets_are_read_where_they_are_worked_on(tmp_path: Path) -> None:
    lines = [json.dumps({"query": str(n)}) for n in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:3], "no json", *lines[3:]]) + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    sources = Sources(tuple(resolve_dataset(str(tmp_path / f"{name}.jsonl")) for name in "ab"), None, False)
    groups = groups_of_datasets(sources, seed=0, size=4)
    assert [group.num_rows for group in groups] == [4, 2, 4, 1]
    assert [position for group in groups for position in group.positions] == list(range(11))
    rows = [row for group in groups for row in group.read()]
    assert isinstance(rows[3], RecordError)
    read = [row for row in rows if not isinstance(row, RecordError)]
    assert [row["row"]["query"] for row in read] == [*"01234", *"01234"]
    assert {row["folder"] for row in read} == {str(tmp_path)}
    keys = [key for group in groups for key in group.keys]
    assert [row["id"] for row in read] == [key for i, key in enumerate(keys) if i != 3]
    (rest,) = groups[1].without({groups[1].keys[0]}).read()
    assert isinstance(rest, Mapping)
    assert rest["row"] == {"query": "4"}


def test_a_reason_with_half_a_character_is_told_all_the_same(tmp_path: Path) -> None:
    def work(rows: Sequence[Any]) -> list[Result]:
        return [RecordError("unknown format", "the row has the columns \ud800x", field="\ud800x") for _ in rows]

    (outcome,) = do_group(groups_of_rows(ROWS[:1])[0], Attempt(), work, Store(str(tmp_path)), SCHEMA)
    assert pa.Table.from_pylist([outcome], schema=pool.OUTCOME_SCHEMA)["field"].to_pylist() == ["?x"]


def test_data_without_a_record_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    sources = Sources((resolve_dataset(str(tmp_path / "empty.jsonl")),), None, False)
    with pytest.raises(ValueError, match=r"^--dataset .*empty\.jsonl: there is no record in it\.$"):
        groups_of_datasets(sources, seed=0)


@pytest.mark.parametrize("error", [StorageFailed("s3://b/f: the storage failed."), OSError(28, "No space left", "/disk/f")])
def test_what_ends_a_run_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def work(rows: Sequence[Any]) -> list[Result]:
        raise error

    def outcomes(groups: Sequence[Group], make_work: Any, output: Store, schema: Any, _: Any) -> Any:
        actor = pool.PoolActor(make_work, output, schema, 1)
        table = actor(pa.table({"group": [pool.cloudpickle.dumps(groups[0])]}))
        yield table.select(pool.OUTCOME_SCHEMA.names)

    monkeypatch.setattr(pool, "_outcomes", outcomes)
    own: dict[str, Any] = {"schema": pa.schema([("twice", pa.int64())]), "settings": {}, "cluster": ClusterConfig()}
    with pytest.raises(RunFailed) as caught:
        pool.run_pool(groups_of_rows(ROWS), lambda: work, Store(str(tmp_path)), **own)
    words = str(error).rstrip(".")
    assert str(caught.value) == f"{words}. What is done is kept in {tmp_path}; the same command goes on."


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """Runs pools in this process; the groups that were done."""
    worked: list[Group] = []

    def outcomes(groups: Sequence[Group], make_work: Callable[[], Work], output: Store, schema: Any, _: Any) -> Any:
        whole = pa.schema([("id", pa.string()), ("position", pa.int64()), *schema])
        for group in groups:
            worked.append(group)
            yield pa.Table.from_pylist(
                do_group(group, Attempt(), make_work(), output / "rows", whole), schema=pool.OUTCOME_SCHEMA
            )

    monkeypatch.setattr(pool, "_outcomes", outcomes)
    return worked


def test_the_same_command_goes_on_with_what_is_left(tmp_path: Path, without_ray: list[Group]) -> None:
    output = Store(str(tmp_path / "out"))
    settings: dict[str, Any] = {"output": output, "schema": pa.schema([("twice", pa.int64())]), "settings": {"seed": 1}}
    groups = groups_of_rows(ROWS, size=4)
    first = pool.run_pool(groups[:1], lambda: twice, cluster=ClusterConfig(), **settings)
    assert (first.num_rows, first.num_dropped) == (3, 1)
    del without_ray[:]
    second = pool.run_pool(groups, lambda: twice, cluster=ClusterConfig(), **settings)
    assert (second.num_rows, second.num_dropped) == (9, 1)
    assert [group.keys for group in without_ray] == [("r3",), ("r4", "r5", "r6", "r7"), ("r8", "r9")]
    (dropped,) = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    assert json.loads(dropped)["id"] == "r3"
    assert is_finished(output)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rows"] == 9
    assert sorted(n for table in read_results(output) for n in table["twice"].to_pylist()) == [0, 2, 4, *range(8, 19, 2)]


def test_a_folder_without_a_row_takes_other_settings(tmp_path: Path, without_ray: list[Group]) -> None:
    own: dict[str, Any] = {"schema": pa.schema([("twice", pa.int64())]), "cluster": ClusterConfig()}
    output = Store(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="Not one of 1 rows could be used"):
        pool.run_pool(groups_of_rows(ROWS[3:4]), lambda: twice, output, settings={"image_root": None}, **own)
    done = pool.run_pool(groups_of_rows(ROWS[4:5]), lambda: twice, output, settings={"image_root": "/data"}, **own)
    assert (done.num_rows, done.num_dropped) == (1, 0)
    with pytest.raises(ValueError, match="made with other settings:\n  image_root: /data -> None"):
        pool.run_pool(groups_of_rows(ROWS[4:5]), lambda: twice, output, settings={"image_root": None}, **own)


def test_a_run_of_which_nothing_comes_says_why(tmp_path: Path, without_ray: list[Group]) -> None:
    with pytest.raises(ValueError, match=r"Not one of 1 rows could be used\. The first: RuntimeError: three can't be done"):
        pool.run_pool(
            groups_of_rows([ROWS[3]]),
            lambda: twice,
            Store(str(tmp_path)),
            schema=pa.schema([("twice", pa.int64())]),
            settings={},
            cluster=ClusterConfig(),
        )
