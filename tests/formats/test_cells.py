"""What is read of messages and their parts, what is refused beside it, and columns that say the same thing twice."""

from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from rayalign.formats.columns import unread_columns
from rayalign.formats.parse import parse_row
from rayalign.formats.records import PreferenceRecord, RecordError

SYSTEM = {"role": "system", "content": "Be brief."}
OTHER_SYSTEM = {"role": "system", "content": "Be long."}
EMPTY_SYSTEM = {"role": "system", "content": " "}
USER = {"role": "user", "content": "Q?"}
CHOSEN = {"role": "assistant", "content": "A."}
REJECTED = {"role": "assistant", "content": "B."}
PNG = b"\x89PNG\r\n\x1a\n"


def parse(row: dict[str, Any]) -> PreferenceRecord:
    return parse_row(row, id="a:0")


def error_of(row: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(RecordError) as caught:
        parse(row)
    return caught.value.reason, str(caught.value)


def with_keys(user: dict[str, Any], assistant: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER | user, CHOSEN | assistant], "rejected_response": "B."}


@pytest.mark.parametrize(
    ("user", "assistant", "key"),
    [
        ({}, {"reasoning_content": "Hm."}, "reasoning_content"),
        ({}, {"thinking": "Hm."}, "thinking"),
        ({}, {"function_call": {"name": "f"}}, "function_call"),
        ({}, {"tool_calls": [{}]}, "tool_calls"),
        ({"tool_call_id": "1"}, {}, "tool_call_id"),
        ({}, {"refusal": "No."}, "refusal"),
        ({"video": "a.mp4"}, {}, "video"),
        ({"audio_path": "a.wav"}, {}, "audio_path"),
    ],
)
def test_content_under_a_key_that_nothing_reads_drops_the_record(
    user: dict[str, Any], assistant: dict[str, Any], key: str
) -> None:
    words = f"messages: a message holds {key!r}, which can't be trained on; take it out, or write what it says into the content"
    assert error_of(with_keys(user, assistant)) == ("unsupported content", words)


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, False, 0, float("nan")])
def test_a_key_with_nothing_under_it_is_no_content(nothing: Any) -> None:
    keys = dict.fromkeys(("reasoning_content", "function_call", "tool_calls", "refusal", "video", "audio"), nothing)
    row = with_keys(keys, keys)
    assert parse(row).chosen == "A."
    assert unread_columns(row) == ()


@pytest.mark.parametrize("key", ["loss", "weight", "loss_scale"])
def test_a_response_that_shall_be_trained_in_part_or_not_drops_the_record(key: str) -> None:
    for whole in (1, 1.0, True, None):
        assert parse(with_keys({}, {key: whole})).chosen == "A."
    for part in (0, 0.5, False, 2):
        words = f"messages: {key!r} of the last message is {part!r}, and the whole response is trained; take it out"
        assert error_of(with_keys({}, {key: part})) == ("unsupported content", words)
    history = [USER, {**CHOSEN, key: 0}]  # what was said before is not trained
    assert parse({"messages": [*history, USER, CHOSEN], "rejected_response": "B."}).chosen == "A."


def test_other_keys_are_named_with_the_columns_that_are_not_read() -> None:
    user = {"role": "user", "content": [{"type": "text", "text": "Q?", "lang": "en", "image": None}], "name": "Ann"}
    row = {"messages": [user, {**CHOSEN, "name": "Bot", "id": 7}], "rejected_response": "B.", "source": "x"}
    row["images"] = [{"path": "a.png", "caption": "A cat."}]
    assert parse(row).messages[0].content == "<image>Q?"
    assert unread_columns(row) == (
        "source",
        "'name' in messages",
        "'lang' in messages",
        "'id' in messages",
        "'caption' in images",
    )


def test_of_keys_that_mean_the_same_the_filled_one_is_read() -> None:
    merged = {"role": None, "content": None, "from": "human", "value": "Q?"}
    assert parse({"messages": [merged, {**CHOSEN, "from": None, "value": ""}]}).messages[0].content == "Q?"
    same = {"role": "user", "from": "human", "content": "Q?", "value": "Q?"}
    assert parse({"messages": [same, CHOSEN]}).messages[0].content == "Q?"
    words = "messages: a message has both 'content' and 'value', and they differ; keep one"
    assert error_of({"messages": [{**USER, "value": "Other?"}, CHOSEN]}) == ("ambiguous message", words)
    words = "messages: a message has both 'role' and 'from', and they differ; keep one"
    assert error_of({"messages": [{**USER, "from": "gpt"}, CHOSEN]}) == ("ambiguous message", words)


@pytest.mark.parametrize(
    ("part", "reason", "words"),
    [
        (
            {"type": "text", "text": "Q?", "image": "a.png"},
            "unsupported content",
            "a part of the type 'text' holds an image and a text; give each a part of its own",
        ),
        (
            {"type": "image", "image": "a.png", "text": "A caption."},
            "unsupported content",
            "a part of the type 'image' holds an image and a text; give each a part of its own",
        ),
        (
            {"type": "image", "image": "a.png", "url": "b.png"},
            "ambiguous images",
            "a part of a message holds two images, and they differ; keep one",
        ),
        (
            {"type": "text", "text": "Q?", "video": "a.mp4"},
            "unsupported content",
            "a part of a message holds 'video', which can't be trained on; take it out, or write what it says into the content",
        ),
        (
            {"type": "image", "image": "a.png", "picture": "b.png"},
            "unsupported content",
            "a part of a message holds pictures under 'picture'; put them into 'images' of the row, or into the message's "
            "content",
        ),
    ],
)
def test_a_part_holds_one_text_or_one_image(part: dict[str, Any], reason: str, words: str) -> None:
    row = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Q?"}]}, CHOSEN]}
    assert error_of(row) == (reason, f"messages: {words}")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "bytes": PNG, "path": "a.png", "url": None},
        {"type": "image", "image": {"bytes": PNG, "path": "a.png"}, "text": None},
        {"type": "image", "image": PNG, "bytes": PNG},
        {"type": "image_url", "image_url": {"url": PNG}},
    ],
)
def test_a_part_with_the_bytes_of_an_image_and_its_name_is_one_image(part: dict[str, Any]) -> None:
    row = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Q?"}]}, CHOSEN]}
    record = parse(row)
    assert (record.images, record.messages[0].content) == ((PNG,), "<image>Q?")


WITH_SYSTEM: dict[str, Any] = {
    "ms-swift 4": lambda system: {"messages": [*system, USER, CHOSEN], "rejected_messages": [*system, USER, REJECTED]},
    "ShareGPT": lambda system: {"conversations": [*system, USER], "chosen": "A.", "rejected": "B."},
    "TRL": lambda system: {"prompt": [*system, USER], "chosen": "A.", "rejected": "B."},
    "TRL, the prompt in the responses": lambda system: {
        "chosen": [*system, USER, CHOSEN],
        "rejected": [*system, USER, REJECTED],
    },
}


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_the_system_column_and_a_system_message_are_one(name: str) -> None:
    def record(*system: dict[str, Any]) -> PreferenceRecord:
        return parse({**WITH_SYSTEM[name](system), "system": "Be brief."})

    expected = record()
    assert [m.role for m in expected.messages] == ["system", "user"]
    assert (expected.messages[0].content, expected.chosen, expected.rejected) == ("Be brief.", "A.", "B.")
    assert record(SYSTEM) == expected
    assert record(EMPTY_SYSTEM) == expected
    with pytest.raises(RecordError, match=r"the row has both 'system' and a system message in '.*', and they differ") as caught:
        record(OTHER_SYSTEM)
    assert (caught.value.reason, caught.value.field) == ("ambiguous system", "system")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"messages": [USER, CHOSEN], "rejected_messages": [USER, REJECTED], "rejected_response": "C."},
            "rejected_response: the row has both 'rejected_messages' and 'rejected_response', and they differ; keep one",
        ),
        (
            {"conversations": [USER], "chosen": "A.", "rejected": "B.", "rejected_response": "C."},
            "rejected_response: the row has both 'rejected' and 'rejected_response', and they differ; keep one",
        ),
        (
            {"prompt": "Q?", "chosen": "A.", "completion": "C.", "rejected": "B."},
            "completion: the row has both 'chosen' and 'completion', and they differ; keep one",
        ),
    ],
)
def test_two_columns_for_one_response_must_agree(row: dict[str, Any], words: str) -> None:
    reason, said = error_of(row)
    assert (reason, said) == ("ambiguous responses" if "prompt" in row else "ambiguous rejected responses", words)
    second = said.partition(":")[0]
    for agreeing in ("A." if second == "completion" else "B.", ""):
        record = parse({**row, second: agreeing})
        assert (record.chosen, record.rejected) == ("A.", "B.")


SEVERAL_TURNS = [USER, CHOSEN, {"role": "user", "content": "Sure?"}]


@pytest.mark.parametrize("prompt", ["Q?", " Q?\n", "Sure?", "<image>Q?", [USER], [USER, CHOSEN]])
def test_a_prompt_beside_conversations_is_what_they_begin_with_or_end_in(prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": [*SEVERAL_TURNS, CHOSEN], "rejected": [*SEVERAL_TURNS, REJECTED]}
    assert [m.content for m in parse(row).messages] == ["Q?", "A.", "Sure?"]


def test_a_prompt_beside_conversations_with_another_question_drops_the_record() -> None:
    row = {"prompt": "Other?", "chosen": [*SEVERAL_TURNS, CHOSEN], "rejected": [*SEVERAL_TURNS, REJECTED]}
    words = "prompt: the text is neither the first nor the last question of 'chosen'; take it out, or make them the same"
    assert error_of(row) == ("prompts differ", words)
    assert error_of({**row, "prompt": [{"role": "user", "content": "Other?"}]})[0] == "roles not alternating"


def test_images_of_a_prompt_and_of_conversations_that_repeat_it_must_agree() -> None:
    def asked(image: str | None) -> list[dict[str, Any]]:
        part = {"type": "image", "image": image}
        return [{"role": "user", "content": [part, {"type": "text", "text": "Q?"}]}]

    def row(*images: str | None) -> dict[str, Any]:
        first, second, third = images
        return {"prompt": asked(first), "chosen": [*asked(second), CHOSEN], "rejected": [*asked(third), REJECTED]}

    for images in (("a.png",) * 3, ("a.png", None, None), (None, "a.png", "a.png"), (None, "a.png", None)):
        assert parse(row(*images)).images == ("a.png",)
    assert error_of(row("a.png", "b.png", "b.png")) == (
        "prompts differ",
        "prompt: its images are others than those of 'chosen'",
    )
    assert error_of(row(None, "a.png", "b.png"))[0] == "prompts differ"


def test_numbers_may_be_decimal_and_nan_counts_as_absent() -> None:
    pair = {"query": "Q?", "response": "A.", "rejected_response": "B."}
    assert parse({**pair, "margin": Decimal("0.5")}).margin == 0.5
    assert parse({"query": "Q?", "response": "A.", "label": Decimal(1)}).label is True
    for nan in (float("nan"), np.float32("nan")):
        record = parse({**pair, "margin": nan, "label": nan, "system": nan, "images": nan, "messages": nan})
        assert (record.margin, record.label, len(record.messages), record.images) == (None, None, 1, ())
        assert unread_columns({**pair, "notes": nan}) == ()
