import dataclasses
import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayalign.algorithms import DPO
from rayalign.config.config import config_from_mapping
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import RunData
from rayalign.data.store import EncodedPair, PairReader, PreparedData
from rayalign.models.source import ModelSource
from rayalign.report.page import Times
from rayalign.storage import Store
from rayalign.training.answers import ANSWERS
from rayalign.training.run_report import Background, keep_scores, read_scores, write_report

PAIR = EncodedPair("0", [310, 270, 34], [44, 87, 271, 305, 17, 2], [68, 299, 2], [], [])


@pytest.fixture
def data(model_folder: Callable[..., Path], prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData]) -> RunData:
    asked = [json.dumps([["system", "Be brief."], ["user", f"Which {i}?"]]) for i in range(60)]
    pairs = [dataclasses.replace(PAIR, id=str(i), conversation=asked[i]) for i in range(60)]
    return RunData(ModelSource("m"), EncoderSpec(str(model_folder("llava")), responses="both"), prepare_pairs(pairs), None)


def write(run: Path, data: RunData, scores: dict[str, dict[str, float]]) -> str:
    config = config_from_mapping(DPO, {"output_dir": str(run), "model": "m", "dataset": "d.jsonl"})
    metrics = [{"step": 0, "eval_loss": 0.7}, {"step": 20, "loss": 0.6}, {"step": 20, "eval_loss": 0.5}]
    write_report(Store(str(run)), config, data, scores, metrics=metrics, num_steps=120, times=Times(75.0, {"training": 60.0}))
    return (run / "report.html").read_text()


TOKENS = {"tokens/chosen": 6, "tokens/rejected": 3}
SCORES = {str(i): {"rewards/chosen": i / 10, "rewards/rejected": 2.0, **TOKENS} for i in range(50)}


def test_a_run_that_goes_on_has_a_page_that_says_how_far_it_is(tmp_path: Path, data: RunData) -> None:
    (tmp_path / ANSWERS).write_text(json.dumps({"before": {"30": "own words"}, "failed": ""}))
    page = write(tmp_path, data, SCORES)
    for words in (
        "Not finished, step 20 of 120.",
        "1 min 15 s",
        "own words",
        "Which 30?",
        "Which 49?",
        "Be brief.",
        "It is two.",
    ):
        assert words in page
    assert 'Held-out pairs</div><div class="value"><span>50</span>' in page


def test_only_the_records_that_are_shown_are_read(tmp_path: Path, data: RunData, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = [], PairReader.read

    def note(reader: PairReader, rows: Any) -> Any:
        read.extend(rows)
        return original(reader, rows)

    monkeypatch.setattr(PairReader, "read", note)
    write(tmp_path, data, SCORES)
    assert read == [*range(8), *range(42, 50)]


def test_a_run_without_held_out_records_has_a_page(tmp_path: Path, data: RunData) -> None:
    page = write(tmp_path, data, {})
    assert "Not finished, step 20 of 120." in page
    assert "Worst and best" not in page


def test_a_side_without_tokens_has_no_log_prob_per_token(tmp_path: Path, data: RunData) -> None:
    scores = {"3": {"logps/chosen": -6.0, "logps/rejected": 0.0, "tokens/chosen": 6, "tokens/rejected": 0}}
    assert "chosen</b> · reward -1 · 6 tokens" in write(tmp_path, data, scores)


def test_a_pair_of_sft_is_shown_with_the_response_that_it_is_compared_with(
    tmp_path: Path, data: RunData, prepare_pairs: Callable[[Sequence[EncodedPair]], PreparedData]
) -> None:
    pair = dataclasses.replace(PAIR, rejected_ids=[], eval_rejected_ids=PAIR.rejected_ids)
    of_sft = dataclasses.replace(data, spec=dataclasses.replace(data.spec, responses="chosen"), training=prepare_pairs([pair]))
    page = write(tmp_path, of_sft, {"0": {"logps/chosen": -6.0, "logps/rejected": -9.0, **TOKENS}})
    assert "rejected</b> · log-prob per token -3 · 3 tokens" in page
    assert "a cat" in page


@pytest.mark.parametrize("error", [ValueError("damaged"), OSError("storage"), MemoryError(), KeyError("id"), RecursionError()])
def test_what_fails_in_the_background_is_logged_once_and_raised_never(
    caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail() -> None:
        raise error

    background = Background()
    for _ in range(3):
        background.run(fail)
        background.wait()
    why = " (storage)" if isinstance(error, OSError) else ""  # which needs no traceback
    assert [record.getMessage() for record in caplog.records] == [
        f"The report could not be written{why}; the run goes on without it"
    ]
    assert ("Traceback" in caplog.text) == (not why)
    done = threading.Event()
    background.run(done.set)
    background.wait()
    assert done.is_set()


def test_what_comes_while_the_background_is_busy_does_not_wait_and_is_left_out() -> None:
    background, go_on, done = Background(), threading.Event(), []
    background.wait()  # for nothing
    background.run(lambda: done.append(go_on.wait(60)))
    background.run(lambda: done.append("left out"))
    assert done == []
    go_on.set()
    background.wait()
    background.run(lambda: done.append("next"))
    background.wait()
    assert done == [True, "next"]


def test_scores_come_back_from_a_run_s_folder_as_they_were(tmp_path: Path) -> None:
    scores = {"a": {"loss": 0.1 + 0.2, "logps/chosen": -1e30, "rewards/margins": math.inf}, "b": {}}
    keep_scores(Store(str(tmp_path)), scores)
    assert read_scores(Store(str(tmp_path))) == scores
