"""Renamed columns, columns that nothing reads, and what looks like a picture among them."""

from typing import Any

import numpy as np
import pytest

from rayalign.formats.columns import parse_renames, renamed, require_pictures_read, unread_columns
from rayalign.formats.parse import FORMATS, Format, parse_row
from rayalign.formats.pictures import looks_like_picture
from rayalign.formats.records import RecordError
from tests.formats.test_formats import SAME_PAIR

PAIR = {"query": "Which?", "response": "Red.", "rejected_response": "Blue."}
PNG = b"\x89PNG\r\n\x1a\n"


def test_renames_are_pairs_of_a_name_in_the_rows_and_one_that_a_format_reads() -> None:
    assert parse_renames(("image_path=images", " ask = query ", "a=b=history")) == (
        ("image_path", "images"),
        ("ask", "query"),
        ("a=b", "history"),
    )


@pytest.mark.parametrize("argument", ["images", "=images", "image_path=", "=", "", '{"image_path": "images"}'])
def test_a_rename_without_two_names_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="expected FROM=TO, the column's name in the rows and the name that a record format"):
        parse_renames((argument,))


def test_a_new_name_that_no_format_reads_is_refused_with_those_that_are_read() -> None:
    with pytest.raises(ValueError) as caught:
        parse_renames(("image_path=imags",))
    assert str(caught.value) == (
        "--columns image_path=imags: no record format reads a column imags. Did you mean image? Known are "
        "chat_template_kwargs, chosen, completion, conversations, history, image, images, label, margin, messages, prompt, "
        "query, question, rejected, rejected_image, rejected_images, rejected_messages, rejected_response, response, system."
    )
    with pytest.raises(ValueError, match="a is renamed twice"):
        parse_renames(("a=images", "a=query"))


@pytest.mark.parametrize("argument", ["a=images b=query", "a=images,b=query", "a=images\nb=query"])
def test_several_renames_in_one_word_are_refused(argument: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_renames((argument,))
    assert str(caught.value) == (
        f"--columns {argument}: these are several renames in one word. Make each a word of its own (--columns a=images "
        "b=query), and in YAML an item of a list ([a=images, b=query])."
    )
    assert parse_renames(("my image=images",)) == (("my image", "images"),)


@pytest.mark.parametrize("name", ["video_path", "audio_paths", "Video URL"])
def test_a_column_called_after_videos_or_sounds_drops_a_record_without_pictures(name: str) -> None:
    record, row = parse_row(PAIR, id="a"), {**PAIR, name: "a.mp4"}
    with pytest.raises(RecordError) as caught:
        require_pictures_read(row, record)
    assert caught.value.reason == "unsupported content"
    assert str(caught.value) == (
        f"{name}: this looks like a video or a sound, and records hold text and images only; take the column out of the rows"
    )
    require_pictures_read(row, parse_row({**PAIR, "images": "frame.png"}, id="a"))
    require_pictures_read({**PAIR, name: 5, "video_id": "x"}, record)


def test_a_plugins_format_takes_new_names_of_its_own() -> None:
    def format_with(reads: frozenset[str] | None) -> Format:
        return Format("mine", "ask", {"ask"}.issubset, lambda row, id: None, reads)  # type: ignore[arg-type, return-value]

    assert parse_renames(("q=ask",), (format_with(None),)) == (("q", "ask"),)
    assert parse_renames(("q=ask",), (format_with(frozenset({"ask"})),)) == (("q", "ask"),)
    with pytest.raises(ValueError, match="no record format reads a column ask"):
        parse_renames(("q=ask",), (format_with(frozenset({"answer"})),))


@pytest.mark.parametrize(
    ("renames", "row", "expected"),
    [
        ("image_path=images", {"image_path": "a.png", "x": 1}, {"images": "a.png", "x": 1}),
        ("image_path=images", {"image_path": "a.png", "images": []}, {"images": "a.png"}),
        ("image_path=images", {"image_path": "a.png", "images": None}, {"images": "a.png"}),
        ("image_path=images", {"image_path": None, "images": ["a.png"]}, {"images": ["a.png"]}),
        ("image_path=images", {"image_path": "", "images": ["a.png"]}, {"images": ["a.png"]}),
        ("image_path=images", {"image_path": np.array(["a.png"]), "images": ["a.png"]}, {"images": np.array(["a.png"])}),
        ("chosen=rejected rejected=chosen", {"chosen": "a", "rejected": "b"}, {"chosen": "b", "rejected": "a"}),
        ("a=images b=images", {"b": "b.png"}, {"images": "b.png"}),
        ("a=images", {"a": '["a.png", "b.png"]'}, {"images": ["a.png", "b.png"]}),
        ("a=images", {"a": "[1].png"}, {"images": "[1].png"}),
        ("a=history", {"a": '[["q", "r"]]'}, {"history": [["q", "r"]]}),
        ("a=query", {"a": "[1]"}, {"query": "[1]"}),
        ("a=margin", {"a": "1.5"}, {"margin": 1.5}),
        ("a=label", {"a": "True"}, {"label": True}),
        ("a=label", {"a": 0}, {"label": 0}),
        ("a=images", {"x": 1}, {"x": 1}),
    ],
)
def test_cells_go_under_their_new_names(renames: str, row: dict[str, Any], expected: dict[str, Any]) -> None:
    before = dict(row)
    assert renamed(row, parse_renames(renames.split())) == expected
    assert row == before


def test_two_columns_that_differ_are_no_one_column() -> None:
    with pytest.raises(RecordError) as caught:
        renamed({"image_path": "a.png", "images": ["b.png"]}, (("image_path", "images"),))
    assert (caught.value.reason, str(caught.value)) == (
        "ambiguous columns",
        "images: --columns image_path=...: the row has a 'images' already, and they differ; rename one of them",
    )


UNREAD = {"RLAIF-V": ("ds_name", "idx", "origin_dataset", "image_path"), "TRL, the prompt once more as text": ("messages",)}


@pytest.mark.parametrize("name", SAME_PAIR)
def test_each_format_says_which_columns_it_reads(name: str) -> None:
    assert unread_columns(SAME_PAIR[name]) == UNREAD.get(name, ())


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_a_row_without_a_column_that_its_format_reads_is_another_record(format: Format) -> None:
    """What a format says it reads is what it reads: nothing else, and all of it."""
    assert format.reads is not None

    class Watched(dict[str, Any]):
        def __contains__(self, name: object) -> bool:
            asked.add(str(name))
            return super().__contains__(name)

        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return super().get(name, default)

        def __getitem__(self, name: str) -> Any:
            asked.add(name)
            return super().__getitem__(name)

    asked: set[str] = set()
    for row in SAME_PAIR.values():
        columns = {name: value for name, value in row.items() if value is not None}
        if next(other for other in FORMATS if other.matches(columns.keys())) is format:
            format.parse(Watched(columns), id="a")
    assert asked <= format.reads
    assert format.reads - asked <= {"rejected_images", "rejected_image", "completion", "rejected_response"}


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        (PAIR | {"id": 7, "source": "x"}, ("id", "source")),
        (PAIR | {"id": None}, ()),
        (PAIR | {"sytem": "Be brief."}, ("sytem",)),
        ({"prompt": "Which?", "chosen": "Red.", "rejected": "Blue.", "history": [["a", "b"]]}, ("history",)),
        (PAIR | {"videos": []}, ()),
        ({"what": "ever"}, ()),
    ],
)
def test_columns_that_a_rows_format_does_not_read_are_found(row: dict[str, Any], unread: tuple[str, ...]) -> None:
    assert unread_columns(row) == unread


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_path", "a.png"),
        ("img", "a"),
        ("picture", "a"),
        ("image_url", "https://host/a"),
        ("photo", b"abc"),
        ("images_path", ["a", "b"]),
        ("ImageFile", "a"),
        ("image_0", "a"),
        ("Images", [{"bytes": PNG, "path": None}]),
        ("pics", [["a"]]),
        ("screenshot", {"bytes": PNG}),
        ("local_image_path", "a"),
        ("where", "coco/a.jpg"),
        ("where", "/data/my pictures/a.JPEG"),
        ("where", "https://host/a.webp?size=1"),
        ("where", "s3://bucket/a.tiff"),
        ("where", ["a.png", "b.gif"]),
        ("what", PNG),
        ("what", {"bytes": PNG, "path": None}),
        ("what", {"bytes": None, "path": "a.bmp"}),
        ("what", "data:image/png;base64,iVBORw0KGgo="),
        ("what", "/9j/" + "A" * 100),
    ],
)
def test_what_looks_like_a_picture_is_found_by_name_or_value(name: str, value: Any) -> None:
    assert looks_like_picture(name, value)
    record = parse_row(PAIR, id="a")
    with pytest.raises(RecordError) as caught:
        require_pictures_read(PAIR | {"id": 1, name: value}, record)
    assert (caught.value.reason, caught.value.field) == ("picture not read", name)
    assert caught.value.words.endswith(f"pass --columns {name}=images, or take the column out of the rows")
    with_picture = PAIR | {"images": ["a.png"]}
    require_pictures_read(with_picture | {name: value}, parse_row(with_picture, id="a"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_id", 7),
        ("image_caption", "A cat."),
        ("num_images", 2),
        ("has_image", True),
        ("image_path", ""),
        ("image_path", " "),
        ("image_path", []),
        ("image_size", [640, 480]),
        ("imagination", "a"),
        ("picturesque", "a"),
        ("note", "Look at cat.png"),
        ("note", "png"),
        ("note", "a.png\nb"),
        ("what", ["a.png", "b"]),
        ("what", b"abc"),
        ("what", "/9j/ is how base64 of a JPEG begins"),
        ("file" * 1000, "a"),
        ("path" * 100_000 + "x", "a"),
    ],
)
def test_what_is_no_picture_is_let_through(name: str, value: Any) -> None:
    assert not looks_like_picture(name, value)
    require_pictures_read(PAIR | {name: value}, parse_row(PAIR, id="a"))


@pytest.mark.parametrize("column", ["rejected_images", "rejected_image"])
@pytest.mark.parametrize("name", SAME_PAIR)
def test_other_images_for_the_rejected_response_are_refused_in_every_format(name: str, column: str) -> None:
    row = SAME_PAIR[name]
    assert parse_row(row | {column: ["cat.png"]}, id="a:0") == parse_row(row, id="a:0")
    for other in ("dog.png", ["dog.png"], ["cat.png", "cat.png"], [{"path": "dog.png"}], [b"dog"]):
        with pytest.raises(RecordError) as caught:
            parse_row({**row, column: other}, id="a:0")
        assert (caught.value.reason, str(caught.value)) == (
            "unsupported content",
            f"{column}: the rejected response has other images than the chosen one",
        )


def test_other_images_inside_rejected_messages_are_refused() -> None:
    def messages(path: str, text: str) -> list[dict[str, Any]]:
        asked = [{"type": "image", "image": path}, {"type": "text", "text": "Which?"}]
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]

    row = {"messages": messages("a.png", "Red."), "rejected_messages": messages("a.png", "Blue.")}
    assert parse_row(row, id="a").images == ("a.png",)
    with pytest.raises(RecordError, match="rejected_messages: the rejected response has other images than the chosen one"):
        parse_row(row | {"rejected_messages": messages("b.png", "Blue.")}, id="a")


@pytest.mark.parametrize("key", ["images", "image", "image_url", "pictures"])
@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
def test_pictures_in_a_key_of_a_message_are_not_left_out(column: str, key: str) -> None:
    def row(**more: Any) -> dict[str, Any]:
        asked = {"role": "user", "content": "Which?", **more}
        if column == "messages":
            return {"messages": [asked, {"role": "assistant", "content": "Red."}], "rejected_response": "Blue."}
        return {column: [asked], "chosen": "Red.", "rejected": "Blue."}

    assert parse_row(row(**{key: None}, weight=1.0), id="a").chosen == "Red."
    with pytest.raises(RecordError) as caught:
        parse_row(row(**{key: ["a.png"]}), id="a")
    assert (caught.value.reason, caught.value.field) == ("unsupported content", column)
    assert caught.value.words.startswith(f"a message holds pictures under {key!r}; put them into 'images' of the row")
