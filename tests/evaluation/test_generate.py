"""Prompts of any record format are responded to; what can't be used is named; what comes out is a data set again."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from rayalign.algorithms import SFT, Needs
from rayalign.config.config import Config
from rayalign.config.inference import InferenceConfig
from rayalign.config.inference_verbs import GenerateConfig
from rayalign.config.plugins import find_plugin
from rayalign.config.sections import DataConfig, ModelConfig, OptimizerConfig
from rayalign.data.attempts import Attempt
from rayalign.data.rows import Sources
from rayalign.evaluation.generate import RESPONSE_SCHEMA, make_generator, respond, run
from rayalign.evaluation.groups import groups_of_datasets
from rayalign.evaluation.loaded_model import load_model
from rayalign.evaluation.pool import do_group
from rayalign.evaluation.pool_folder import read_results
from rayalign.evaluation.prompts import PLACEHOLDER, prompt_columns, prompt_of
from rayalign.evaluation.start import config_of, files_of_data, sources_of
from rayalign.evaluation.work import results_of
from rayalign.formats.parse import parse_row
from rayalign.formats.records import RecordError
from rayalign.policy.generation import Sampling
from rayalign.policy.policy import Policy
from rayalign.policy.saving import save_policy
from rayalign.sources.files import resolve_dataset
from rayalign.storage import Store
from tests.tiny_models import make_policy, noise_image

NOWHERE = Sources((), None, False)
PAIR = {"query": "<image>Which?", "response": "One.", "rejected_response": "Two.", "images": ["a.png"]}


def row_of(raw: Mapping[str, Any], folder: str = "/data") -> dict[str, Any]:
    return {"id": "a.jsonl:0", "folder": folder, "row": raw}


@pytest.mark.parametrize(
    "raw",
    [
        PAIR,
        {"query": "Which?", "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "<image>Which?"}], "images": ["a.png"]},
        {"conversations": [{"from": "human", "value": "<image>Which?"}], "images": ["a.png"]},
        {"prompt": "Which?", "image": "a.png"},
        {"prompt": [{"role": "user", "content": "Which?"}], "images": ["a.png"]},
        {"prompt": "Which?", "chosen": "One.", "rejected": "Two.", "images": ["a.png"]},
        {"question": "Which?", "image": {"path": "a.png", "bytes": None}},
    ],
)
def test_a_prompt_is_taken_from_any_format_with_or_without_responses(raw: Mapping[str, Any]) -> None:
    record = prompt_of(row_of(raw), NOWHERE, text_only=False)
    assert (record.chosen, record.rejected, record.images) == (PLACEHOLDER, None, ("a.png",))
    assert [(message.role, message.content) for message in record.messages] == [("user", "<image>Which?")]


def test_the_columns_of_a_prompt_are_a_record_again_with_whole_paths_and_what_else_its_row_held() -> None:
    raw = {
        "system": "Be short.",
        "history": [["Hello.", "Hello."], ["<image>And?", "So."]],
        "query": "Which?",
        "images": ["sub/a.png"],
        "digits": [1, 2],
    }
    row = row_of(raw)
    record = prompt_of(row, NOWHERE, text_only=False)
    columns = prompt_columns(record, row, NOWHERE)
    assert columns["images"] == [{"bytes": None, "path": "/data/sub/a.png"}]
    assert json.loads(columns["extra"]) == {"digits": [1, 2]}
    again = parse_row({**columns, "response": PLACEHOLDER}, id=record.id)
    assert again.messages == record.messages
    assert prompt_columns(again, row_of({**columns}), NOWHERE) == columns
    elsewhere = prompt_columns(record, row, Sources((), "s3://bucket/pictures", False))
    assert elsewhere["images"][0]["path"] == "s3://bucket/pictures/sub/a.png"
    inside = prompt_of(row_of({"query": "Which?", "images": [{"bytes": b"\x89PNG"}]}), NOWHERE, text_only=False)
    assert prompt_columns(inside, row_of({}), NOWHERE)["images"] == [{"bytes": b"\x89PNG", "path": None}]


TURN = {"role": "user", "content": "Which?"}
ANSWER = {"role": "assistant", "content": ""}
MERGED_TURN = {"role": None, "content": None, "from": "human", "value": "Which?"}


@pytest.mark.parametrize(
    "raw",
    [
        {"query": "Which?", "response": ""},
        {"query": "Which?", "response": 5, "label": "maybe", "margin": "wide"},
        {"query": "Which?", "response": "One.", "rejected_response": "One."},
        {"query": "Which?", "response": "Two <image>.", "rejected_response": "</s>"},
        {"query": "Which?", "response": "One.", "rejected_response": "Two.", "rejected_images": ["b.png"]},
        {"messages": [TURN, ANSWER], "rejected_messages": [ANSWER]},
        {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": ""}]},
        {"conversations": [{"from": "human", "value": "Which?"}], "chosen": {"from": "gpt", "value": ""}, "rejected": 3},
        {"prompt": "Which?", "chosen": "One.", "rejected": "One."},
        {"prompt": [TURN], "chosen": [ANSWER], "rejected": [ANSWER]},
        {"chosen": [TURN, ANSWER], "rejected": [TURN, ANSWER]},
        {"prompt": [TURN], "completion": [ANSWER], "label": True},
        {"prompt": "Which?", "completion": ""},
        {"question": "Which?", "chosen": "", "rejected": ""},
        {"prompt": "Which?", "chosen": "One.", "completion": "Two."},
        {"query": "Which?", "response": "One.", "chosen": math.nan},
        {"messages": [MERGED_TURN, {**MERGED_TURN, "from": "gpt"}]},
        {"conversations": [MERGED_TURN, {**MERGED_TURN, "from": "gpt"}]},
    ],
)
def test_what_is_wrong_with_a_rows_own_responses_costs_no_prompt(raw: Mapping[str, Any]) -> None:
    record = prompt_of(row_of({**raw, "images": ["a.png"]}), NOWHERE, text_only=False)
    assert (record.chosen, record.rejected, record.label, record.images) == (PLACEHOLDER, None, None, ("a.png",))
    assert [(message.role, message.content) for message in record.messages] == [("user", "<image>Which?")]


def test_a_row_that_holds_no_prompt_is_refused_in_words() -> None:
    with pytest.raises(RecordError, match="known formats"):
        prompt_of(row_of({"text": "Which?"}), NOWHERE, text_only=False)


def test_contradicting_flags_are_refused() -> None:
    with pytest.raises(ValueError, match="all responses to a prompt would be the same"):
        GenerateConfig(n=2)
    with pytest.raises(ValueError, match="nothing is drawn"):
        GenerateConfig(top_p=0.9)


@pytest.fixture
def generated(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`generated(size, batch_size)`: the lines of the responses to five prompts, done in groups of some size."""
    (tmp_path / "a.png").write_bytes(noise_image(30, 40))
    rows = [{"query": f"Which digit is number {i}?", "images": ["a.png"] if i % 2 else []} for i in range(5)]
    rows[3]["images"] = ["gone.png"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = Sources((resolve_dataset(str(tmp_path / "prompts.jsonl")),), None, False)
    schema = pa.schema([("id", pa.string()), ("position", pa.int64()), *RESPONSE_SCHEMA])

    def make(size: int, batch_size: int) -> list[dict[str, Any]]:
        model = ModelConfig(model=str(model_folder("llava")), gradient_checkpointing=False)
        config = Config(SFT(), DataConfig(), model, optimizer=OptimizerConfig(batch_size=batch_size))
        work = make_generator(config, sources, Sampling(n=2, temperature=1.0, max_new_tokens=6))
        output = Store(str(tmp_path / f"out_{size}_{batch_size}"))
        outcomes = [
            line
            for group in groups_of_datasets(sources, seed=0, size=size)
            for line in do_group(group, Attempt(), work, output / "rows", schema)
        ]
        assert [(line["id"], line["reason"]) for line in outcomes if "reason" in line] == [("prompts.jsonl:3", "image missing")]
        return [line for table in read_results(output) for line in table.to_pylist()]

    return make


def test_responses_do_not_depend_on_groups_and_batches(generated: Callable[..., list[dict[str, Any]]]) -> None:
    lines = generated(5, 4)
    assert [(line["id"], line["sample"]) for line in lines] == [(f"prompts.jsonl:{i}", k) for i in (0, 1, 2, 4) for k in (0, 1)]
    assert len({line["response"] for line in lines}) > 4
    assert generated(2, 1) == lines


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prompt_whose_response_becomes_no_numbers_is_dropped_alone(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    model = load_model(
        Config(SFT(), model=ModelConfig(model=str(model_folder("llava")), gradient_checkpointing=False)),
        NOWHERE,
        responses="chosen",
    )
    work = functools.partial(respond, model, Sampling(temperature=1.0, max_new_tokens=6), 4)
    rows = [row_of({"query": query}) for query in ("Which digit is it?", "describe the cat.", "Is it the same?")]
    before = results_of(work, rows)
    first, *others = (set(model.encoder.tokenizer.encode(line["response"])) for (line,) in before)
    odd = first.difference(*others).pop()  # behind this token there are no numbers
    behind = Policy.logits_behind_tokens

    def broken(policy: Policy, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits = behind(policy, tokens, *rest)
        logits[tokens[:, 0] == odd, 3] = value
        return logits

    monkeypatch.setattr(Policy, "logits_behind_tokens", broken)
    dropped, *after = results_of(work, rows)
    assert after == before[1:]
    assert isinstance(dropped, RecordError)
    assert str(dropped) == (
        "FloatingPointError: what the model makes of a response are no numbers: its weights are damaged, or too large for its "
        "type (--dtype)"
    )


def test_a_reward_model_is_refused_before_any_worker_loads_it(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "rm"
    save_policy(make_policy(model_folder("llava"), needs=Needs(head="value")), folder)
    (tmp_path / "prompts.jsonl").write_text('{"query": "Which?"}\n')
    flags = InferenceConfig(model=str(folder), dataset=(str(tmp_path / "prompts.jsonl"),), output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"^--model .*/rm: is a reward model, which scores responses and writes none\.$"):
        run(flags, GenerateConfig())


OWN_FORMAT = """
from rayalign.formats.parse import Format
from rayalign.formats.records import Message, PreferenceRecord

def parse(cells, *, id):
    messages = (Message(role="user", content=cells["asked"]),)
    return PreferenceRecord(id=id, messages=messages, chosen=cells.get("said") or "none", images=())

FORMATS = (Format("ours", "asked", lambda columns: "asked" in columns, parse, {"asked", "said", "query"}),)
"""


def test_a_plugins_format_reads_prompts(tmp_path: Path) -> None:
    (tmp_path / "ours.py").write_text(OWN_FORMAT)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    flags = InferenceConfig(dataset=(str(tmp_path / "rows.jsonl"),), output_dir=str(tmp_path / "out"))
    sources = sources_of(config_of(flags, (find_plugin(str(tmp_path / "ours.py")),)))
    row = row_of({"asked": "Which?", "said": "This.", "query": "no", "right": 2})
    record = prompt_of(row, sources, text_only=False)
    assert ([message.content for message in record.messages], record.chosen) == (["Which?"], "Yes.")
    assert json.loads(prompt_columns(record, row, sources)["extra"]) == {"right": 2}
    ((name, _),) = files_of_data(sources)["plugins"]
    assert name == "ours"
    plain = prompt_of(row_of({"query": "Which?"}), sources, text_only=False)
    assert plain.messages[0].content == "Which?"
