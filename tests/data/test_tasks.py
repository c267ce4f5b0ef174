"""How much work a process of a preparation gets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray

from rayalign.data import tasks
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.rows import Sources, rows_of_part
from rayalign.sources.files import resolve_dataset


@pytest.mark.parametrize(
    ("num_tasks", "of_texts", "of_pictures"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (4, 1, 2), (5, 2, 3), (400, 100, 200)]
)
def test_a_process_is_started_for_each_four_tasks_of_texts_and_two_of_pictures(
    num_tasks: int, of_texts: int, of_pictures: int
) -> None:
    assert tasks.processes_for(num_tasks, with_pictures=False) == of_texts
    assert tasks.processes_for(num_tasks, with_pictures=True) == of_pictures


@pytest.mark.parametrize(
    ("line", "has_pictures"),
    [
        ('{"query": "a", "response": "b"}', False),
        ('{"query": "a", "response": "b", "images": ["missing.png"]}', True),
        ('{"query": "<image>a", "response": "b"}', False),  # a broken record
        ("no JSON", False),
    ],
)
def test_the_first_row_tells_whether_there_are_pictures(
    model_folder: Callable[..., Path], tmp_path: Path, line: str, has_pictures: bool
) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{line}\n{{"query": "a", "response": "b"}}\n')
    sources = Sources((resolve_dataset(str(tmp_path / "rows.jsonl")),), None, False)
    spec = EncoderSpec(str(model_folder("llava")), responses="chosen")
    assert tasks.has_pictures(tasks.cut_into_tasks(sources, 0), sources, spec) == has_pictures


@pytest.mark.parametrize(("nodes", "asked"), [([8e9, 0.5e9], 2**30), ([0.5e9, 0.4e9], 500_000_000)])
def test_no_more_memory_is_asked_for_than_a_machine_has(
    monkeypatch: pytest.MonkeyPatch, nodes: list[float], asked: int
) -> None:
    alive = [{"Alive": True, "Resources": {"memory": memory}} for memory in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {}}])
    assert tasks.memory_of_a_task() == asked


def test_small_files_are_scanned_without_ray_and_large_ones_by_its_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"query": "a", "response": "b"}\n' * 600)
    sources = Sources((resolve_dataset(str(file)),), None, False, (), frozenset())
    assert [task.num_rows for task in tasks.cut_into_tasks(sources, 0)] == [256, 256, 88]
    assert not ray.is_initialized()
    monkeypatch.setattr(tasks, "SCANNED_HERE", file.stat().st_size - 1)
    asked: list[object] = []
    monkeypatch.setattr(ray, "remote", lambda function: asked.append(function) or pytest.fail("as it should"))
    with pytest.raises(pytest.fail.Exception, match="as it should"):
        tasks.cut_into_tasks(sources, 0)
    assert asked == [tasks._spans_of]


@pytest.mark.parametrize("draw", ["", "#100"])
def test_a_large_data_set_is_cut_into_larger_tasks_of_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: str
) -> None:
    (tmp_path / "rows").mkdir()
    for name, count in (("a", 70), ("b", 30), ("c", 200)):
        (tmp_path / "rows" / f"{name}.jsonl").write_text('{"query": "a"}\n' * count)
    sources = Sources((resolve_dataset(f"{tmp_path}/rows{draw}"),), None, False)
    monkeypatch.setattr(tasks, "SPAN_ROWS", 10)

    def cut(at_most: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
        monkeypatch.setattr(tasks, "MOST_TASKS", at_most)
        found = tasks.cut_into_tasks(sources, 0)
        parts = [part for task in found for part in task.parts]
        rows = [(part.file, row) for part in parts for row, _ in rows_of_part(part, sources)]
        assert len(rows) == sum(task.num_rows for task in found)
        return [[len(part.spans) for part in task.parts] for task in found], rows

    spans, rows = cut(1000)
    assert spans == [[1]] * len(spans)
    assert rows == sorted(rows)
    assert len(rows) == (100 if draw else 300)
    fewer, same_rows = cut(10)
    assert same_rows == rows
    assert sum(map(sum, fewer)) == len(spans)
    assert len(fewer) <= 10
    if not draw:  # 7, 3 and 20 spans
        assert fewer == [[3], [3], [1, 2], [1, 2], [3], [3], [3], [3], [3], [3]]


def test_many_small_files_are_no_more_tasks_than_one_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    for number in range(95):
        (tmp_path / "rows" / f"{number:02}.jsonl").write_text('{"query": "a"}\n' * (number % 3))
    sources = Sources((resolve_dataset(f"{tmp_path}/rows"),), None, False)
    monkeypatch.setattr(tasks, "MOST_TASKS", 10)
    found = tasks.cut_into_tasks(sources, 0)
    assert len(found) <= 10
    rows = [(part.file, row) for task in found for part in task.parts for row, _ in rows_of_part(part, sources)]
    assert rows == [(number, row) for number in range(95) for row in range(number % 3)]


def test_a_draw_is_the_same_today_as_when_a_run_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded when each span looked at the whole draw."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"query": "a"}\n' * 2000)
    sources = Sources((resolve_dataset(f"{file}#20"),), None, False)
    found = tasks.cut_into_tasks(sources, 7)
    wanted = tasks._draw(2000, sources.datasets[0], 7)
    assert wanted is not None
    parts = [part for task in found for part in task.parts]
    assert [row for part in parts for row, _ in rows_of_part(part, sources)] == wanted.tolist()
    assert [int(row) // 256 for row in wanted] == [
        number for part in parts for number in [part.spans[0].first_row // 256] * part.num_rows
    ]
    assert isinstance(parts[0].rows, np.ndarray)  # not a Python number each


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    """a.jsonl and b.jsonl of 300 rows each."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"query": "a"}\n' * 300)
    return tmp_path


def sides(folder: Path, training: str, held_out: str) -> tuple[Sources, Sources]:
    one, other = (Sources((resolve_dataset(f"{folder}/{name}"),), None, False) for name in (training, held_out))
    return one, other


@pytest.mark.parametrize(
    ("training", "held_out", "count", "total", "first"),
    [
        ("a.jsonl", "a.jsonl", 300, 300, 0),
        ("*.jsonl", "b.jsonl", 300, 300, 0),
        ("a.jsonl#100", "a.jsonl#100", 100, 100, None),  # the same draw
        ("a.jsonl#200", "a.jsonl#200", 200, 200, None),
        ("a.jsonl#299", "a.jsonl", 299, 300, None),
        ("*.jsonl", "link.jsonl", 300, 300, 0),
    ],
)
def test_held_out_rows_that_are_trained_on_are_refused(
    two_files: Path, training: str, held_out: str, count: int, total: int, first: int | None
) -> None:
    (two_files / "link.jsonl").symlink_to(two_files / "b.jsonl")
    with pytest.raises(ValueError) as caught:
        tasks.require_apart(*sides(two_files, training, held_out), seed=3)
    said = str(caught.value)
    assert said.startswith(
        f"--val_dataset {two_files}/{held_out}: {count} of its {total} records of files that --dataset reads, too, are trained "
        "on, such as row "
    )
    assert first is None or f"such as row {first} of {two_files}/" in said
    assert said.endswith(
        "Name other files, or leave --val_dataset out: --dataset_test_ratio of the records is held out then, and none of these "
        "is trained on."
    )


def test_other_files_and_other_rows_may_be_held_out(two_files: Path) -> None:
    tasks.require_apart(*sides(two_files, "a.jsonl", "b.jsonl"), seed=3)
    drawn = [tasks._draw(300, side.datasets[0], 3) for side in sides(two_files, "a.jsonl#2", "a.jsonl#1")]
    assert not set(drawn[0].tolist()) & set(drawn[1].tolist())  # of this seed
    tasks.require_apart(*sides(two_files, "a.jsonl#2", "a.jsonl#1"), seed=3)
