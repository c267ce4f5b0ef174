import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayalign.algorithms import SFT
from rayalign.config.config import Config, config_from_mapping
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import RunData
from rayalign.data.store import EncodedPair, PreparedData
from rayalign.models.source import ModelSource
from rayalign.training.origin import SAMPLE_BYTES, SAMPLES, check_origin, fingerprint

WAY_OUT = "Bring it back as it was, or pass --overwrite true to start anew."


class Run:
    """A run of SFT, which has no reference, on a data file and a model folder that tests change."""

    def __init__(self, folder: Path, encoded: PreparedData) -> None:
        self.folder = folder / "run"
        self.data, self.held_out, self.model = folder / "d.jsonl", folder / "val.jsonl", folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        (self.model / "model.safetensors").write_bytes(bytes(3 * SAMPLES * SAMPLE_BYTES))
        (self.model / "README.md").write_text("old")
        for file in (self.data, self.held_out):
            file.write_text('{"query": "a", "response": "b"}\n')
            os.utime(file, ns=(10**18, 10**18))
        self.encoded, self.adapter = encoded, None

    def config(self, **values: Any) -> Config:
        of_run = {"output_dir": str(self.folder), "model": str(self.model), "dataset": str(self.data)}
        return config_from_mapping(SFT, {**of_run, "val_dataset": str(self.held_out), **values})

    def check(self, **values: Any) -> None:
        source = ModelSource(str(self.model), adapter=self.adapter)
        spec = EncoderSpec(str(self.model), responses="chosen")
        check_origin(self.config(**values), RunData(source, spec, self.encoded, None))

    def refusal(self) -> list[str]:
        before = (self.folder / "origin.json").read_bytes()
        with pytest.raises(ValueError) as caught:
            self.check()
        assert (self.folder / "origin.json").read_bytes() == before
        first, *lines, last = str(caught.value).splitlines()
        assert first == f"The unfinished run in {self.folder} began with something else:"
        assert last == WAY_OUT
        return [line.strip() for line in lines]


@pytest.fixture
def run(tmp_path: Path, prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData]) -> Run:
    run = Run(tmp_path, prepare_pairs([EncodedPair("a", [5], [6], [], [], [])]))
    run.check()
    run.check()  # nothing has changed
    return run


def test_other_training_data_is_refused(run: Run) -> None:
    run.data.write_text('{"query": "a", "response": "other"}\n')
    os.utime(run.data, ns=(10**18 + 5, 10**18 + 5))
    (line,) = run.refusal()
    assert line.startswith(f"dataset {run.data}: 32 bytes, version ")
    assert " -> 36 bytes, version " in line


def test_data_of_the_same_size_that_was_written_later_is_refused(run: Run) -> None:
    run.held_out.write_text('{"query": "a", "response": "c"}\n')
    (line,) = run.refusal()
    assert line.startswith(f"val_dataset {run.held_out}: 32 bytes, version ")


def test_a_data_file_more_or_less_is_refused(run: Run) -> None:
    folder = run.data.parent / "several"
    folder.mkdir()
    for name in "abcdefg":
        shutil.copy2(run.data, folder / f"{name}.jsonl")
    (run.folder / "origin.json").unlink()
    run.check(dataset=str(folder))
    before = (run.folder / "origin.json").read_bytes()
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))
    (folder / "a.jsonl").unlink()
    with pytest.raises(ValueError) as caught:
        run.check(dataset=str(folder))
    lines = str(caught.value).splitlines()
    assert lines[1].startswith(f"  dataset {folder}/a.jsonl: ")
    assert lines[1].endswith(" -> not there")
    assert lines[6:] == ["  and 2 more", WAY_OUT]
    assert (run.folder / "origin.json").read_bytes() == before


@pytest.mark.parametrize("where", [slice(0, 2**16), slice(2**20, 2**21), slice(-1, None)])
def test_another_training_of_the_base_model_is_refused(run: Run, where: slice) -> None:
    file = run.model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[where] = b"\1" * len(content[where])  # a matrix, or the last byte
    file.write_bytes(content)
    (line,) = run.refusal()
    size = 3 * SAMPLES * SAMPLE_BYTES
    assert line.startswith(f"model model.safetensors: {size} bytes, samples ")
    assert f" -> {size} bytes, samples " in line


def test_another_configuration_of_the_base_model_is_refused_and_another_description_is_not(run: Run) -> None:
    (run.model / "README.md").write_text("new")
    run.check()
    (run.model / "config.json").write_text('{"a": 1}')
    (line,) = run.refusal()
    assert line.startswith("model config.json: 2 bytes")


def test_another_adapter_to_begin_with_is_refused(run: Run) -> None:
    adapter = run.model.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    run.adapter = str(adapter)
    (line,) = run.refusal()
    assert line.startswith("adapter adapter_model.safetensors: not there -> 1 bytes")


def test_the_folder_of_a_model_may_move_and_its_times_may_change(run: Run) -> None:
    run.model = shutil.copytree(run.model, run.model.parent / "copy")
    run.check()


def test_records_that_are_encoded_otherwise_are_refused(
    run: Run, tmp_path: Path, prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData]
) -> None:
    run.encoded = PreparedData(run.encoded.store.parent / "another_key", "attempt", 1)
    assert run.refusal() == [
        "the same records are encoded otherwise: another processor, chat template or version of the libraries"
    ]


@pytest.mark.parametrize(
    ("note", "problem"),
    [
        (b"[]", "it holds no JSON object."),
        (b'{"dataset": {', "it is no JSON ("),
        (b"", "it is no JSON ("),
        (b"{}", "it does not tell what the run began with."),
        (b'{"dataset": 1, "val_dataset": {}, "encoded": {}, "model": {}, "adapter": {}}', "it does not tell what"),
    ],
)
def test_a_damaged_note_is_told_with_its_file(run: Run, note: bytes, problem: str) -> None:
    (run.folder / "origin.json").write_bytes(note)
    with pytest.raises(ValueError) as caught:
        run.check()
    assert str(caught.value).startswith(f"{run.folder}/origin.json is damaged: {problem}")
    assert str(caught.value).endswith(WAY_OUT)


def test_a_small_file_is_read_whole_and_a_large_one_in_parts(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(SAMPLES * SAMPLE_BYTES))
    before = fingerprint(small)
    small.write_bytes(bytes(SAMPLES * SAMPLE_BYTES // 2) + b"\1" + bytes(SAMPLES * SAMPLE_BYTES // 2 - 1))
    assert fingerprint(small) != before
    with large.open("wb") as file:
        file.truncate(2**36)  # 64 GiB without content: reading it whole would take a minute
    assert fingerprint(large).startswith(f"{2**36} bytes, samples ")
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    assert fingerprint(empty).startswith("0 bytes, samples ")
