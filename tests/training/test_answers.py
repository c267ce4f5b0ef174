import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.store import EncodedPair, PreparedData, shard_name
from rayalign.policy import generation
from rayalign.policy.policy import Policy
from rayalign.report.conversations import Answers
from rayalign.storage import Store
from rayalign.training import answers
from rayalign.training.answers import ANSWERS, ask, read_answers, sample_of
from tests.sharded_steps import together
from tests.tiny_models import encode_pair, make_policy, noise_image, wake_adapters


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [
        (10, 4, [0, 3, 6, 9]),
        (10, 1, [0]),
        (10, 0, []),
        (3, 4, [0, 1, 2]),
        (1, 4, [0]),
        (0, 4, []),
        (1000, 3, [0, 499, 999]),
    ],
)
def test_the_sample_is_spread_over_the_held_out_rows(rows: int, count: int, expected: list[int]) -> None:
    assert sample_of(np.arange(100, 100 + rows), count).tolist() == [100 + row for row in expected]


class Asked:
    """A policy with its prepared pairs, asked as a run asks it."""

    def __init__(self, folder: Path, run: Path, prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData]) -> None:
        pairs = [
            encode_pair(folder, str(i), f"Which {i}?", "two", "a cat", images=[noise_image(30, 30, seed=i)]) for i in range(3)
        ]
        self.policy: Any = wake_adapters(make_policy(folder))
        self.spec, self.data, self.run = EncoderSpec(str(folder), responses="both"), prepare_pairs(pairs), Store(str(run))

    def ask(self, moment: answers.Moment, rows: Sequence[int] = (0, 1, 2), *, rank: int = 0, workers: int = 1) -> None:
        ask(moment, self.policy, self.spec, self.data, np.array(rows), folder=self.run, rank=rank, workers=workers)


@pytest.fixture
def asked(
    model_folder: Callable[..., Path], tmp_path: Path, prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData]
) -> Asked:
    return Asked(model_folder("llava"), tmp_path / "run", prepare_pairs)


def test_answers_before_stay_and_answers_after_follow_the_policy(asked: Asked) -> None:
    asked.ask("before")
    before = read_answers(asked.run)
    assert list(before.before) == ["0", "1", "2"]
    assert before.after == {}
    wake_adapters(asked.policy, scale=0.5, seed=3)
    asked.ask("before")  # as a run does that is started again before its first checkpoint
    assert read_answers(asked.run) == before
    asked.ask("after")
    after = read_answers(asked.run)
    assert after.before == before.before
    assert after.after != before.before
    wake_adapters(asked.policy, scale=0.5, seed=4)
    asked.ask("after")
    assert read_answers(asked.run).after != after.after


def test_every_worker_answers_its_share(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    asked.ask("before")
    whole = read_answers(asked.run).before
    shares: list[Any] = []
    monkeypatch.setattr(answers, "gather", lambda value, group=None: shares.append(value) or [value or Answers()])
    for rank in (0, 1):
        asked.ask("after", rank=rank, workers=2)
    found = [texts for texts, _ in shares[1::2]]  # after what is known before
    assert [list(texts) for texts in found] == [["0", "2"], ["1"]]
    assert {**found[0], **found[1]} == whole


def test_a_policy_that_fails_is_named_and_nothing_is_raised(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    working: Policy = asked.policy
    asked.ask("before")
    asked.policy = None
    asked.ask("after")
    kept = read_answers(asked.run)
    assert len(kept.before) == 3
    assert kept.after == {}
    assert kept.failed.startswith("AttributeError: 'NoneType' object has no attribute")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"The model could not be asked for answers of its own, for the report: {kept.failed}"
    asked.policy = working
    asked.ask("after")
    assert read_answers(asked.run).failed == ""


def alone_of(rank: int, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    """Rank 1 fails while rank 0 waits for it in a forward. Returns how often each was asked, and what ended it."""
    run, calls = Store(str(folders["run"])), 0

    def generate(*args: object, **options: object) -> list[str]:
        nonlocal calls
        calls += 1
        if rank == 1:
            raise MemoryError("no room")
        dist.all_reduce(torch.zeros(1))
        return []

    nothing: Any = None
    prepared: Any = SimpleNamespace(reader=lambda: SimpleNamespace(read=lambda rows: pa.record_batch({})))
    rows = np.array([0])
    told = ""
    with mock.patch.object(answers, "PATIENCE", 1.0), mock.patch.object(generation, "generate_answers", generate):
        try:
            ask("before", nothing, nothing, prepared, rows, folder=run, rank=rank, workers=2, together=True)
        except RuntimeError as error:
            told = str(error)
    return {"calls": torch.tensor(calls), "told": torch.tensor(list(told.encode()))}


def test_a_worker_that_alone_fails_of_those_that_answer_together_ends_a_start_and_the_next_does_not_ask(
    tmp_path: Path, asked: Asked
) -> None:
    run = tmp_path / "shared"
    run.mkdir()
    other = together(alone_of, 2, {"run": run}, tmp_path)[1]
    assert int(other["calls"]) == 1
    assert bytes(other["told"].tolist()).decode() == (
        "This worker alone could not answer held-out prompts, and the others wait for it (MemoryError: no room). A new start "
        "leaves the answers out."
    )
    kept = read_answers(Store(str(run)))
    assert (kept.before, kept.gave_up) == ({}, True)
    asked.run = Store(str(run))
    asked.ask("before")
    asked.ask("after")
    assert read_answers(asked.run) == kept


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", '{"before": 7}', '{"before": {"a": 1}}', '{"failed": 3}', '{"before": null}', "\xff"]
)
def test_answers_that_are_damaged_count_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / ANSWERS).write_bytes(content.encode("latin-1"))
    assert read_answers(Store(str(tmp_path))) == Answers()


def test_answers_are_kept_beside_damaged_ones(asked: Asked) -> None:
    Path(asked.run.location).mkdir()
    (Path(asked.run.location) / ANSWERS).write_text('{"before": 7}')
    asked.ask("after", rows=[1])
    assert list(read_answers(asked.run).after) == ["1"]


def test_storage_that_fails_ends_no_run(asked: Asked, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    asked.run = Store(str(tmp_path / "file"))
    asked.ask("before", rows=[0])
    assert "The model's own answers could not be kept" in caplog.text
    (Path(asked.data.folder.location) / shard_name(0)).unlink()
    asked.run = Store(str(tmp_path / "run"))
    asked.ask("before", rows=[0])
    assert json.loads((tmp_path / "run" / ANSWERS).read_text())["failed"].startswith("DamagedFile")
