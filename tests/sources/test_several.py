"""Data sets that are read together: splits that one of them mixes, and files that two of them hold."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rayalign.sources.files import resolve_dataset
from rayalign.sources.several import resolve_datasets
from rayalign.sources.splits import require_one_split


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"query": "a"}\n')
    return folder


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (
            ("data/train-0-of-1.parquet", "data/test-0-of-1.parquet", "data/validation-0-of-1.parquet"),
            "train, test, validation",
        ),
        (("train.jsonl", "val.jsonl"), "train, validation"),
        (("training/a.jsonl", "dev/a.jsonl"), "train, validation"),
        (("test_prefs-0.parquet", "train_sft-0.parquet"), "test, train"),
        (("en/eval.jsonl", "Train.JSONL"), "test, train"),
    ],
)
@pytest.mark.parametrize("root", ["/data", "s3://bucket/prefs", "/train"])
def test_files_of_several_splits_are_refused_with_one_to_name(root: str, names: Sequence[str], splits: str) -> None:
    files = [f"{root}/{name}" for name in names]
    of_train = next(file for file, name in zip(files, names, strict=True) if "train" in name.lower())
    with pytest.raises(ValueError) as caught:
        require_one_split("it", files)
    assert str(caught.value) == (
        f"Dataset 'it' holds the splits {splits}, of which not all are to be trained on, such as {', '.join(files)}. Name the "
        f"files to read, such as {of_train}, or a glob of them."
    )


@pytest.mark.parametrize(
    "names",
    [
        ("train-0-of-2.parquet", "train-1-of-2.parquet"),
        ("train.jsonl", "more.jsonl"),
        ("latest.jsonl", "trained.jsonl", "contest.jsonl"),  # of which no word is a split's name
        ("test.jsonl",),
        ("val/train-questions.jsonl", "train/train.jsonl"),  # the file's own name decides
        ("a.jsonl", "b.jsonl"),
    ],
)
def test_files_of_one_split_or_of_none_are_one_data_set(names: Sequence[str]) -> None:
    require_one_split("it", [f"/eval/of/val/{name}" for name in names])


def test_a_folder_and_a_glob_are_looked_at_and_a_file_is_not(tmp_path: Path) -> None:
    folder_of(tmp_path, "train.jsonl", "test.jsonl", "more/a.jsonl")
    for argument in (f"{tmp_path}", f"{tmp_path}/*.jsonl", f"{tmp_path}#1"):
        with pytest.raises(ValueError, match="holds the splits test, train"):
            resolve_dataset(argument)
    for argument in (f"{tmp_path}/test.jsonl", f"{tmp_path}/t*n.jsonl", f"{tmp_path}/more"):
        assert len(resolve_dataset(argument).files) == 1


def test_a_file_that_two_data_sets_hold_is_refused(tmp_path: Path) -> None:
    file = folder_of(tmp_path, "a.jsonl", "b.jsonl") / "a.jsonl"
    link = tmp_path.parent / f"{tmp_path.name}.jsonl"
    link.symlink_to(file)
    for one, other in ((file, file), (f"{file}#1", file), (file, tmp_path), (f"{tmp_path}/*", file), (link, file)):
        with pytest.raises(ValueError) as caught:
            resolve_datasets([str(one), str(other)])
        assert str(caught.value) == (
            f"Datasets '{one}' and '{other}' both hold {file}, whose records would be read twice. Name it once; NAME#N says "
            "how many of a data set's records there are."
        )
    assert [len(dataset.files) for dataset in resolve_datasets([str(file), f"{tmp_path}/b.jsonl"])] == [1, 1]
