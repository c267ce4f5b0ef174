"""How much work a process of a preparation gets."""

from pathlib import Path

import pytest
import ray

from rayalign.data import tasks
from rayalign.data.rows import Sources
from rayalign.sources.files import resolve_dataset


@pytest.mark.parametrize(("num_tasks", "processes"), [(1, 1), (4, 1), (5, 2), (400, 100)])
def test_a_process_is_started_for_each_four_tasks(num_tasks: int, processes: int) -> None:
    assert tasks.processes_for(num_tasks) == processes


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
