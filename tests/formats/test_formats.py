"""Every record format, on literal rows: the same pair comes out of each."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from rayalign.formats.parse import FORMATS, parse_row
from rayalign.formats.records import Message, PreferenceRecord, RecordError

PNG = b"\x89PNG\r\n\x1a\n"

PAIR = PreferenceRecord(
    id="a:0",
    messages=(Message(role="system", content="Be brief."), Message(role="user", content="<image>What is this?")),
    images=("cat.png",),
    chosen="A cat.",
    rejected="A dog.",
)

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is this?"}
MARKED_USER = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]}
CHOSEN = {"role": "assistant", "content": "A cat."}
REJECTED = {"role": "assistant", "content": "A dog."}


def parse(row: dict[str, Any]) -> PreferenceRecord:
    return parse_row(row, id="a:0")


SAME_PAIR: dict[str, dict[str, Any]] = {
    "ms-swift 2": {
        "system": "Be brief.",
        "query": "What is this?",
        "response": "A cat.",
        "rejected_response": "A dog.",
        "images": ["cat.png"],
    },
    "ms-swift 2, one image as a string, empty cells": {
        "system": "Be brief.",
        "query": "What is this?",
        "response": "A cat.",
        "rejected_response": "A dog.",
        "images": "cat.png",
        "history": [],
        "margin": None,
        "label": None,
    },
    "ms-swift 4": {"messages": [SYSTEM, USER, CHOSEN], "rejected_response": "A dog.", "images": ["cat.png"]},
    "ms-swift 4, system beside, the same rejected_images": {
        "system": "Be brief.",
        "messages": [USER, CHOSEN],
        "rejected_response": [REJECTED],
        "images": [{"path": "cat.png", "bytes": None}],
        "rejected_images": ["cat.png"],
    },
    "ms-swift 4, rejected_messages": {
        "messages": [SYSTEM, USER, CHOSEN],
        "rejected_messages": [SYSTEM, USER, REJECTED],
        "images": ["cat.png"],
    },
    "TRL plain": {
        "system": "Be brief.",
        "prompt": "What is this?",
        "chosen": "A cat.",
        "rejected": "A dog.",
        "images": ["cat.png"],
    },
    "TRL conversational": {
        "prompt": [SYSTEM, MARKED_USER],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
        "rejected": [REJECTED],
        "image": "cat.png",
    },
    "TRL, image named in the content": {
        "prompt": [
            SYSTEM,
            {"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is this?"}]},
        ],
        "chosen": [CHOSEN],
        "rejected": [REJECTED],
    },
    "TRL, the prompt inside chosen and rejected": {
        "chosen": [SYSTEM, USER, CHOSEN],
        "rejected": [SYSTEM, USER, REJECTED],
        "images": ["cat.png"],
    },
    "TRL, the prompt once more as text": {
        "prompt": "What is this?",
        "chosen": [SYSTEM, USER, CHOSEN],
        "rejected": [SYSTEM, USER, REJECTED],
        "messages": [SYSTEM, USER, CHOSEN],
        "images": ["cat.png"],
    },
    "TRL, the prompt once more as messages": {
        "prompt": [SYSTEM, USER],
        "chosen": [SYSTEM, USER, CHOSEN],
        "rejected": [SYSTEM, USER, REJECTED],
        "images": ["cat.png"],
    },
    "RLAIF-V": {
        "ds_name": "x",
        "system": "Be brief.",
        "question": "What is this?",
        "chosen": "A cat.",
        "rejected": "A dog.",
        "image": {"bytes": None, "path": "cat.png"},
        "idx": "7",
        "origin_dataset": "y",
        "image_path": "elsewhere.png",
    },
    "ShareGPT": {
        "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>What is this?"}],
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
        "images": ["cat.png"],
    },
    "ShareGPT, responses as text": {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "What is this?"}],
        "chosen": "A cat.",
        "rejected": [{"from": "gpt", "value": "A dog."}],
        "images": ["cat.png"],
    },
}


@pytest.mark.parametrize("name", SAME_PAIR)
def test_every_format_gives_the_same_record(name: str) -> None:
    assert parse(SAME_PAIR[name]) == PAIR


@pytest.mark.parametrize("name", SAME_PAIR)
def test_rows_of_numpy_arrays_give_the_same_record(name: str) -> None:
    def as_arrays(value: Any) -> Any:
        if isinstance(value, list):
            array = np.empty(len(value), dtype=object)
            array[:] = [as_arrays(item) for item in value]
            return array
        return {key: as_arrays(item) for key, item in value.items()} if isinstance(value, dict) else value

    assert parse(as_arrays(SAME_PAIR[name])) == PAIR


def test_every_format_has_an_example_above() -> None:
    assert {name.split(",")[0].removesuffix(" plain").removesuffix(" conversational") for name in SAME_PAIR} == {
        f.name for f in FORMATS
    }


def test_history_becomes_messages_and_holds_the_first_image() -> None:
    record = parse({"query": "Sure?", "response": "Yes.", "history": [["What?", "A cat."]], "images": "cat.png"})
    assert [(m.role, m.content) for m in record.messages] == [
        ("user", "<image>What?"),
        ("assistant", "A cat."),
        ("user", "Sure?"),
    ]
    assert record.rejected is None


def test_images_may_be_bytes_of_any_kind() -> None:
    row = {"query": "a", "response": "b", "images": [PNG, bytearray(PNG), memoryview(PNG), {"bytes": PNG, "path": "x.png"}]}
    assert parse(row).images == (PNG, PNG, PNG, PNG)


def test_a_record_without_images_is_legal() -> None:
    assert parse({"query": "a", "response": "b", "images": []}).images == ()
    assert parse({"query": "a", "response": "b", "images": ""}).images == ()


@pytest.mark.parametrize("label", [True, 1, np.int64(1), 1.0])
@pytest.mark.parametrize(
    "row",
    [
        {"query": "a", "response": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": "b"},
    ],
)
def test_a_kto_row_has_one_response_and_a_label(row: dict[str, Any], label: Any) -> None:
    record = parse({**row, "label": label})
    assert (record.chosen, record.rejected, record.label) == ("b", None, True)


TEXTS_WITH_THEIR_PROMPT = [
    # TRL's documentation has this row, and the same one with a prompt of its own.
    ("The sky is blue.", "The sky is green.", "The sky is"),
    ("\n\nHuman: Why?\n\nAssistant: So.", "\n\nHuman: Why?\n\nAssistant: It is.", "\n\nHuman: Why?\n\nAssistant:"),
    ("Why?\nSo.", "Why?\nIt is.", "Why?\n"),
    # TRL splits in the middle of these words.
    ("The sky is blue.", "The sky is black.", "The sky is"),
    ("The sky is it.", "The skylight is.", "The"),
    ("The sky is", "The sky is blue.", "The sky"),
]


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), TEXTS_WITH_THEIR_PROMPT)
def test_plain_texts_are_split_where_they_begin_to_differ(chosen: str, rejected: str, prompt: str) -> None:
    record = parse({"chosen": chosen, "rejected": rejected, "image": "a.png", "system": "Be brief.", "score_chosen": 8.5})
    assert record.messages == (Message(role="system", content="Be brief."), Message(role="user", content="<image>" + prompt))
    assert (record.chosen, record.rejected) == (chosen[len(prompt) :], rejected[len(prompt) :])


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), TEXTS_WITH_THEIR_PROMPT[:3])
def test_plain_texts_are_split_as_trl_splits_them(chosen: str, rejected: str, prompt: str) -> None:
    from trl import extract_prompt

    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert split == {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def test_trl_is_imported_for_no_row_but_plain_texts_with_their_prompt() -> None:
    pair = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    rows = [*SAME_PAIR.values(), {"prompt": "a", **pair}, {"prompt": "a", "completion": "b", "label": True}]
    script = (
        "import sys; from rayalign.formats.parse import parse_row\n"
        "for row, is_needed in eval(sys.stdin.read()):\n"
        "    parse_row(row, id='a:0'); assert ('trl' in sys.modules) == is_needed, row"
    )
    given = repr([*((row, False) for row in rows), (pair, True)])
    subprocess.run([sys.executable, "-c", script], input=given, text=True, check=True)


def test_margin_is_read() -> None:
    assert parse({**SAME_PAIR["ms-swift 4"], "margin": np.float32(0.5)}).margin == 0.5


HOSTILE: list[tuple[dict[str, Any], str, str]] = [
    (
        {"response": "b", "rejected_response": "c"},
        "missing field",
        "query: the row has no such column or an empty cell there; it has response, rejected_response",
    ),
    (
        {"query": None, "response": "b"},
        "missing field",
        "query: the row has no such column or an empty cell there; it has response",
    ),
    ({"query": ["a"], "response": "b"}, "wrong type", "query: expected text, found list ['a']"),
    ({"query": "a", "response": {"x": "y" * 99}}, "wrong type", f"response: expected text, found dict {{'x': '{'y' * 53}..."),
    ({"query": "a", "response": "b", "rejected_response": 5}, "wrong type", "rejected_response: expected text, found int 5"),
    ({"query": "a\ud800", "response": "b"}, "not UTF-8", "query: half a surrogate pair at character 1"),
    ({"query": "a", "response": "b\ud800"}, "not UTF-8", "response: half a surrogate pair at character 1"),
    ({"query": "a", "response": "b", "history": "x"}, "wrong type", "history: expected a list of [query, response] pairs"),
    ({"query": "a", "response": "b", "history": [["x"]]}, "wrong type", "history: expected a list of [query, response] pairs"),
    ({"query": "a", "response": "b", "history": [["x", None]]}, "wrong type", "history: expected text, found NoneType None"),
    (
        {"query": "a", "response": "b", "images": [3]},
        "wrong type",
        "images: expected a path, URL, base64 text or bytes, found int 3",
    ),
    (
        {"query": "a", "response": "b", "image": {"bytes": None, "path": None}},
        "image missing",
        "image: an image has neither bytes nor a path",
    ),
    ({"query": "a", "response": "b", "images": [""]}, "image missing", "images: an image is empty"),
    (
        {"query": "a", "response": "b", "images": ["x.png"], "image": "y.png"},
        "ambiguous images",
        "image: the row has both 'images' and 'image', and they differ; keep one",
    ),
    ({"query": "a", "response": "b", "label": "maybe"}, "wrong type", "label: expected true or false, found 'maybe'"),
    ({"query": "a", "response": "b", "label": 2}, "wrong type", "label: expected true or false, found 2"),
    ({"query": "a", "response": "b", "margin": "big"}, "wrong type", "margin: expected a number, found 'big'"),
    ({"query": "a", "response": "b", "margin": 10**400}, "bad margin", "margin: the number is too large"),
    (
        {"query": "a", "response": "b", "margin": float("inf")},
        "bad margin",
        "margin: inf is no number between -1e+06 and 1e+06",
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "history": [["d", "e"]]},
        "unsupported content",
        "history: TRL's records have none, so the turns before would be left out; put them into the messages",
    ),
    ({"query": "a", "response": "b", "videos": ["x.mp4"]}, "unsupported content", "videos: records hold text and images only"),
    ({"messages": "a"}, "wrong type", "messages: expected a list of messages, found str 'a'"),
    ({"messages": [USER]}, "missing field", "messages: the last message must be the assistant's response"),
    ({"messages": []}, "missing field", "messages: the last message must be the assistant's response"),
    ({"messages": [CHOSEN]}, "missing field", "messages: there is no question to respond to"),
    (
        {"messages": [{"role": "tool", "content": "x"}, CHOSEN]},
        "unknown role",
        "messages: 'tool' is none of system, user, human, assistant, gpt",
    ),
    (
        {"messages": [{"role": ["user"], "content": "x"}, CHOSEN]},
        "unknown role",
        "messages: ['user'] is none of system, user, human, assistant, gpt",
    ),
    ({"messages": [{"role": "user"}, CHOSEN]}, "wrong type", "messages: expected text, found NoneType None"),
    (
        {"messages": [USER, {**CHOSEN, "tool_calls": [{}]}]},
        "unsupported content",
        "messages: a message holds 'tool_calls', which can't be trained on; take it out, or write what it says into the "
        "content",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}, CHOSEN]},
        "unsupported content",
        "messages: expected a text or image part, found {'type': 'video'}",
    ),
    (
        {"messages": [USER, CHOSEN], "rejected_response": "x", "images": ["a.png"], "rejected_images": ["b.png"]},
        "unsupported content",
        "rejected_images: the rejected response has other images than the chosen one",
    ),
    (
        {"messages": [USER, CHOSEN], "rejected_messages": [{"role": "user", "content": "Other?"}, REJECTED]},
        "prompts differ",
        "rejected_messages: only the last response may differ from 'messages'",
    ),
    (
        {"messages": [USER, CHOSEN], "rejected_response": "A cat. "},
        "identical responses",
        "rejected_response: the response equals messages, so there is nothing to prefer",
    ),
    (
        {"chosen": "The sky is blue."},
        "missing field",
        "prompt: 'chosen' is plain text, so the question must stand in a column of its own",
    ),
    (
        {"chosen": [USER, CHOSEN], "rejected": "A dog."},
        "missing field",
        "prompt: 'rejected' is plain text, so the question must stand in a column of its own",
    ),
    (
        {"chosen": "It is blue.", "rejected": "It is green.", "instruction": "What is the sky?", "score": 0.5, "notes": ""},
        "missing field",
        "prompt: 'chosen' is plain text, and the question may stand in instruction; call its column 'prompt', or leave out "
        "columns that aren't needed, if 'chosen' and 'rejected' begin with it",
    ),
    (
        {"chosen": "It is blue.", "rejected": "It is green.", "messages": [USER], "topic": "sky"},
        "missing field",
        "prompt: 'chosen' is plain text, and the question may stand in messages or topic; call its column 'prompt', or leave "
        "out columns that aren't needed, if 'chosen' and 'rejected' begin with it",
    ),
    *(
        (
            {"chosen": chosen, "rejected": rejected},
            "missing field",
            "prompt: the row has no prompt, and 'chosen' and 'rejected' don't begin with the same text; give the question a "
            "column of its own, called 'prompt'",
        )
        # The last: TRL itself would split before the last character of the first text.
        for chosen, rejected in [("", ""), ("blue", "black"), ("blue", "blues"), (" a", " b"), ("yes ", "no ")]
    ),
    (
        {"chosen": "The sky is blue.", "rejected": "The sky is blue."},
        "identical responses",
        "rejected: the response equals chosen, so there is nothing to prefer",
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "chat_template_kwargs": {"enable_thinking": False}},
        "unsupported content",
        "chat_template_kwargs: a row can't change the chat template",
    ),
    (
        {"chosen": [USER, CHOSEN], "rejected": [{"role": "user", "content": "Other?"}, REJECTED]},
        "prompts differ",
        "rejected: only the last response may differ from 'chosen'",
    ),
    (
        {"prompt": [MARKED_USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
        "image mark count",
        "images: the text holds 1 <image> marks, and the number of images is 0",
    ),
    (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": [{"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}],
        },
        "wrong type",
        "chosen: expected one response, found a conversation of 3 messages",
    ),
    (
        {"question": "a", "chosen": "b", "rejected": "b"},
        "identical responses",
        "rejected: the response equals chosen, so there is nothing to prefer",
    ),
    (
        {"instruction": "a", "output": "b"},
        "unknown format",
        "the row has the columns instruction, output; known formats: "
        "ms-swift 4 (messages, rejected_response (or rejected_messages)); ShareGPT (conversations, chosen, rejected); "
        "RLAIF-V (question, chosen, rejected, image); TRL (prompt, chosen, rejected); "
        "ms-swift 2 (query, response, rejected_response)",
    ),
    ({}, "unknown format", "the row has the columns (none); known formats: "),
]


@pytest.mark.parametrize(("row", "reason", "words"), HOSTILE)
def test_an_unusable_row_is_a_record_error_that_says_why(row: dict[str, Any], reason: str, words: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse(row)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(words)


def test_a_cell_that_is_nested_without_end_drops_its_row() -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    with pytest.raises(RecordError) as caught:
        parse_row({"query": "q", "response": "a", "rejected_response": "b", "more": deep}, id="r")
    assert caught.value.reason == "nested too deeply"
    assert str(caught.value) == "more: lists and objects stand more than 32 deep in each other"
