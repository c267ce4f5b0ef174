"""Paths that all nodes must see: the look of one node, and the sentence about what several found."""

import os
import threading
import time
from pathlib import Path

import pytest
import ray

from rayalign import shared_paths
from rayalign.shared_paths import SharedFile, check_shared_paths, problem_of, unseen


def test_a_node_misses_what_is_not_there_and_what_has_another_size(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"12345")
    same, other = (SharedFile("--dataset rows.jsonl", str(tmp_path / "rows.jsonl"), size) for size in (5, 4))
    folder, gone = SharedFile("--image_root", str(tmp_path), None), SharedFile("--dataset b", str(tmp_path / "b"), None)
    assert unseen([same, other, folder, gone], seconds=0) == [other, gone]


def test_a_file_that_arrives_late_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "token"
    writer = threading.Timer(0.2, file.write_bytes, [b"here"])
    writer.start()
    assert unseen([SharedFile("--output_dir", str(file), 4)], seconds=10) == []
    writer.join()


def test_a_flag_whose_path_some_nodes_do_not_see_is_refused_with_their_names() -> None:
    token = SharedFile("--output_dir /data/run", f"/data/run/{shared_paths.TOKEN}1", 4)
    rows = [SharedFile("--dataset /data/rows", f"/data/rows/{n}.jsonl", 7) for n in range(5)]
    assert problem_of({"10.0.0.1": [], "10.0.0.2": [token], "10.0.0.3": [token]}, num_nodes=3) == (
        "--output_dir /data/run: 10.0.0.2, 10.0.0.3 (of 3 nodes) do not see what this machine writes there, so that the run's "
        "files would be scattered. Give a folder of a file system that all nodes mount at the same path, or a URL such as "
        "s3://bucket/runs/first."
    )
    assert problem_of({"10.0.0.1": [], "10.0.0.2": [*rows, token]}, num_nodes=2) == (
        "--dataset /data/rows: 10.0.0.2 (of 2 nodes) does not see the same there as this machine (looked for "
        "/data/rows/0.jsonl, /data/rows/1.jsonl, /data/rows/2.jsonl and 2 more). Put it on a file system that all nodes mount, "
        "copy it to the same path on each, or give a URL such as s3://bucket/folder."
    )
    assert problem_of({"10.0.0.1": [], "10.0.0.2": []}, num_nodes=2) is None


def test_nothing_is_looked_for_on_a_single_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True}
    monkeypatch.setattr(ray, "nodes", lambda: [alive, {**alive, "NodeID": "b", "Alive": False}])
    check_shared_paths([SharedFile("--dataset gone", "/no/such/file", 1)], {"--output_dir": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_a_folder_that_this_machine_can_not_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": name, "NodeManagerAddress": f"10.0.0.{name}", "Alive": True} for name in "12"]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    (tmp_path / "run").write_bytes(b"a file")
    with pytest.raises(ValueError) as caught:
        check_shared_paths([], {"--output_dir run": str(tmp_path / "run")})
    assert str(caught.value) == "--output_dir run: can't be written to from this machine (File exists)."


@pytest.mark.parametrize("kept", [(), ("run",)])
def test_the_look_leaves_the_folders_that_are_written_to_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: tuple[str, ...]
) -> None:
    for name in kept:
        (tmp_path / name).mkdir()
    nodes = [{"NodeID": name, "NodeManagerAddress": f"10.0.0.{name}", "Alive": True} for name in "12"]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    # Each node looks at this machine's disk; the second does not see what begins with a dot.
    monkeypatch.setattr(
        shared_paths,
        "_unseen_by",
        lambda nodes, sought, seconds: {"10.0.0.1": unseen(sought, 0), "10.0.0.2": [f for f in sought if "/." in f.path]},
    )
    with pytest.raises(ValueError, match=r"10\.0\.0\.2 \(of 2 nodes\) does not see what this machine writes there"):
        check_shared_paths([], {"--output_dir a": str(tmp_path / "run"), "--cache_dir b": str(tmp_path / "new" / "cache")})
    assert sorted(path.name for path in tmp_path.iterdir()) == list(kept)


def test_what_a_killed_command_left_in_a_folder_goes_with_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in ((f"{shared_paths.TOKEN}killed", 7200), (f"{shared_paths.TOKEN}looks", 60), ("rows.jsonl", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, times=(time.time() - seconds,) * 2)
    nodes = [{"NodeID": name, "NodeManagerAddress": f"10.0.0.{name}", "Alive": True} for name in "12"]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(shared_paths, "_unseen_by", lambda nodes, sought, seconds: {})
    check_shared_paths([], {"--output_dir": str(tmp_path)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{shared_paths.TOKEN}looks", "rows.jsonl"]
