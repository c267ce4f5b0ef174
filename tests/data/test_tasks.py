"""How much work a process of a preparation gets."""

from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from rayalign.data import tasks
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.rows import Sources
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
    assert [task.span.num_rows for task in tasks.cut_into_tasks(sources, 0)] == [256, 256, 88]
    assert not ray.is_initialized()
    monkeypatch.setattr(tasks, "SCANNED_HERE", file.stat().st_size - 1)
    asked: list[object] = []
    monkeypatch.setattr(ray, "remote", lambda function: asked.append(function) or pytest.fail("as it should"))
    with pytest.raises(pytest.fail.Exception, match="as it should"):
        tasks.cut_into_tasks(sources, 0)
    assert asked == [tasks._spans_of]
