import contextlib
import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rayalign.storage import Store, is_url


@pytest.fixture(params=["path", "file URL"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.at(str(tmp_path) if request.param == "path" else f"file://{tmp_path}")


def names(stores: list[Store], folder: Store) -> list[str]:
    return [store.location.removeprefix(folder.location + "/") for store in stores]


def test_what_is_written_can_be_read(folder: Store) -> None:
    file = folder / "deep" / "er" / "file.bin"
    file.write_bytes(b"\x00\xff one")
    assert file.read_bytes() == b"\x00\xff one"
    file.write_bytes(b"two")
    assert file.read_bytes() == b"two"
    (folder / "value.json").write_json({"a": [1, None, "ü"]})
    assert (folder / "value.json").read_json() == {"a": [1, None, "ü"]}


def test_a_write_that_fails_leaves_the_old_content_and_nothing_beside_it(tmp_path: Path) -> None:
    """A full disk, as a limit on the size of a file shows it."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "file").write_bytes(b"new" * 1000)
    text = f"""
import resource, signal
from pathlib import Path
from rayalign.storage import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Store({str(target)!r})
(folder / "file").write_bytes(b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for write in (lambda: (folder / "file").write_bytes(b"new" * 1000), lambda: folder.upload(Path({str(source)!r}))):
    try:
        write()
    except OSError as error:
        print(error.errno)
"""
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert ended.stdout == f"{errno.EFBIG}\n" * 2
    assert {file.name: file.read_bytes() for file in target.iterdir()} == {"file": b"old"}


def test_some_files_of_a_folder_are_copied_by_name(folder: Store, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(name.encode())
    folder.download(tmp_path / "copy", ["a", "c"])
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == ["a", "c"]


def test_compressed_content_is_read_as_it_is(folder: Store) -> None:
    file = folder / "data.gz"
    file.write_bytes(b"not really gzip")
    assert file.read_bytes() == b"not really gzip"


def test_a_failed_write_leaves_the_old_content(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "file"
    file.write_bytes(b"old")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        file.write_bytes(b"new")
    assert file.read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["disk", "object store"])
def test_a_file_that_is_written_bit_by_bit_is_there_when_it_is_whole(tmp_path: Path, bucket: Path, kind: str) -> None:
    file = Store(str(tmp_path / "folder" / "file")) if kind == "disk" else Store("s3://bucket/folder/file")
    file.parent.make_dir()  # which no object store needs, and the folder that stands for one does
    with file.writing() as content:
        content.write(b"first ")
        assert not file.exists()
        content.write(b"words")
    assert file.read_bytes() == b"first words"
    with contextlib.suppress(KeyError), file.writing() as content:
        content.write(b"other")
        raise KeyError
    assert file.read_bytes() == b"first words"
    assert [some.name for some in file.parent.list()] == ["file"]


def test_a_write_puts_the_whole_file_in_place_at_once(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace = os.replace

    def look_first(source: Path, target: Path) -> None:
        seen.append((Path(source).read_bytes(), Path(target).exists(), Path(source).parent == Path(target).parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_first)
    (folder / "file").write_bytes(b"whole")
    assert seen == [(b"whole", False, True)]  # complete, under another name beside it
    assert names(folder.list(), folder) == ["file"]


def test_a_file_that_does_not_exist_says_so(folder: Store) -> None:
    assert not (folder / "nothing").exists()
    with pytest.raises(FileNotFoundError):
        (folder / "nothing").read_bytes()


def test_a_folder_lists_what_is_in_it_by_name(folder: Store) -> None:
    for name in ("b", "a", "c/d", "c/e/f"):
        (folder / name).write_bytes(b"")
    assert names(folder.list(), folder) == ["a", "b", "c"]
    assert names(folder.list(recursive=True), folder) == ["a", "b", "c", "c/d", "c/e", "c/e/f"]
    assert (folder / "c").is_dir()
    assert not (folder / "a").is_dir()
    assert (folder / "nothing").list() == []


def test_deleting_takes_a_file_or_a_whole_folder_and_nothing_else(folder: Store) -> None:
    for name in ("keep", "file", "folder/a", "folder/b/c"):
        (folder / name).write_bytes(b"")
    (folder / "file").delete()
    (folder / "folder").delete()
    (folder / "nothing").delete()
    assert names(folder.list(recursive=True), folder) == ["keep"]


def test_a_folder_goes_up_and_comes_down_with_everything_in_it(folder: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    (source / "one").write_bytes(b"1")
    (source / "inner" / "two").write_bytes(b"2")
    target.mkdir()
    (folder / "remote").upload(source)
    (folder / "remote").download(target)
    assert (target / "one").read_bytes() == b"1"
    assert (target / "inner" / "two").read_bytes() == b"2"


def test_making_a_folder_twice_is_fine(folder: Store) -> None:
    for _ in range(2):
        (folder / "a" / "b").make_dir()
    assert (folder / "a" / "b").is_dir()


def test_what_is_in_a_folder_has_the_options_of_its_url() -> None:
    store = Store.at("s3://bucket/runs/first?region=eu-west-1&scheme=http")
    inside = store / "model" / "config.json"
    assert inside.location == "s3://bucket/runs/first/model/config.json?region=eu-west-1&scheme=http"
    assert (store.name, inside.name) == ("first", "config.json")
    assert inside.parent.parent == store
    assert store.parent.location == "s3://bucket/runs?region=eu-west-1&scheme=http"
    assert (Store.at("/data/what?") / "now").location == "/data/what?/now"


def test_names_parents_and_children() -> None:
    store = Store.at("s3://bucket/run/")
    assert store.location == "s3://bucket/run"
    assert (store / "model").location == "s3://bucket/run/model"
    assert (store.name, store.parent.location) == ("run", "s3://bucket")
    assert store.local_path is None
    bucket = Store.at("s3://bucket")
    assert (bucket.name, bucket.parent) == ("bucket", bucket)
    assert Store.at("file:///runs").parent.location == "file:///runs"
    assert is_url("gs://bucket")
    assert not is_url("/a/b")


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store.at("output/run").location == str(tmp_path / "output" / "run")
    assert Store.at("~/run").location == str(tmp_path / "home" / "run")
    assert Store.at("file:///data/x").local_path == Path("/data/x")


def test_a_store_pickles_by_its_location(folder: Store) -> None:
    assert pickle.loads(pickle.dumps(folder)) == folder


@pytest.mark.parametrize("name", ["with space", "50%", "a+b", "ü", "a#b"])
def test_odd_names_work(folder: Store, name: str) -> None:
    (folder / name / "file").write_bytes(b"x")
    assert (folder / name / "file").read_bytes() == b"x"
    assert names(folder.list(), folder) == [name]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is no JSON"),
        (b'{"a": ', "it is no JSON"),
        (b"\xff", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[]", "it holds no JSON object."),
        (b"1", "it holds no JSON object."),
    ],
)
def test_a_damaged_json_file_is_told_by_its_name(folder: Store, content: bytes, problem: str) -> None:
    (folder / "note.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        (folder / "note.json").read_json_object()
    assert str(caught.value).startswith(f"{folder.location}/note.json is damaged: {problem}")
