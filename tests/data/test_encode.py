import dataclasses
import io
import json
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.store import EncodedPair
from rayalign.formats.records import Message, PreferenceRecord, RecordError
from rayalign.images.fetch import image_hash
from rayalign.models import processors
from tests.tiny_families import TINY_FAMILIES, chat_template
from tests.tiny_models import noise_image

# Ids of the tiny tokenizer.
BOS, EOS, IMAGE, NEWLINE = 1, 2, 3, 202
USER = [281, 29, 224]  # "USER", ":", " "
ANSWER = [36, 277, 309, 29, 224]  # "A", "SS", "ISTANT", ":", " "
WHICH_DIGIT = [310, 270, 34]  # "Which", " digit", "?"
IT_IS_TWO = [44, 87, 271, 305, 17]  # "I", "t", " is", " two", "."
A_CAT = [68, 299]  # "a", " cat"

TEMPLATE = chat_template("<image>")
RED, BLUE = noise_image(30, 40, seed=1), noise_image(50, 20, seed=2)


def record(
    *turns: str, chosen: str = "It is two.", rejected: str | None = "a cat", system: str = "", label: bool | None = None
) -> PreferenceRecord:
    """`turns` are user, assistant, ..., user."""
    messages = [Message(role="user" if i % 2 == 0 else "assistant", content=text) for i, text in enumerate(turns)]
    opening = [Message(role="system", content=system)] if system else []
    marks = sum(text.count("<image>") for text in turns)
    return PreferenceRecord(
        id="r",
        messages=(*opening, *messages),
        images=("i.png",) * marks,
        chosen=chosen,
        rejected=rejected,
        label=label,
    )


def encode(folder: Path, given: PreferenceRecord, images: Sequence[bytes] = (), **settings: Any) -> EncodedPair:
    return Encoder(EncoderSpec(str(folder), **{"responses": "both", **settings})).encode(given, images)


@pytest.fixture
def llava(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


@pytest.fixture
def variant(llava: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model's folder with another chat template, or values changed in one of its JSON files."""

    def make(*, template: str = "", file: str = "", **values: Any) -> Path:
        folder = tmp_path / f"variant_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(llava, folder)
        if template:
            (folder / "chat_template.jinja").write_text(template)
        if file:
            (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
        return folder

    return make


def text_of(folder: Path, ids: Sequence[int]) -> str:
    return str(AutoTokenizer.from_pretrained(folder).decode(ids))


def test_a_question_about_an_image_becomes_these_ids(llava: Path) -> None:
    pair = encode(llava, record("<image>Which digit?"), [RED])
    # 28 x 28 pixels in patches of 7 are 16 image tokens.
    assert pair.prompt_ids == [BOS, *USER, *[IMAGE] * 16, NEWLINE, *WHICH_DIGIT, NEWLINE, *ANSWER]
    assert pair.chosen_ids == [*IT_IS_TWO, EOS]
    assert pair.rejected_ids == [*A_CAT, EOS]
    assert (pair.id, pair.margin) == ("r", 0.0)
    assert pair.images == [RED]
    assert pair.image_hashes == [image_hash(RED)]


def test_system_history_and_every_image_stand_in_the_prompt_in_order(llava: Path) -> None:
    given = record("<image>Which digit?", "It is two.", "<image>and <image>this?", system="describe")
    pair = encode(llava, given, [RED, BLUE, RED])
    images = "<image>" * 16 + "\n"
    assert text_of(llava, pair.prompt_ids) == (
        f"<s>SYSTEM: describe\nUSER: {images}Which digit?\nASSISTANT: It is two.</s>"
        f"USER: {images}and {images}this?\nASSISTANT: "
    )
    assert pair.images == [RED, BLUE, RED]
    assert pair.image_hashes == [image_hash(RED), image_hash(BLUE), image_hash(RED)]
    assert pair.chosen_ids == [*IT_IS_TWO, EOS]


def test_the_margin_travels_with_the_pair(llava: Path) -> None:
    assert encode(llava, record("Which digit?").model_copy(update={"margin": 1.5})).margin == 1.5


def test_sft_needs_and_keeps_no_rejected_response(llava: Path) -> None:
    pair = encode(llava, record("Which digit?", rejected=None), responses="chosen")
    assert pair.chosen_ids == [*IT_IS_TWO, EOS]
    assert pair.rejected_ids == []


@pytest.mark.parametrize(
    ("rejected", "label", "chosen_ids", "rejected_ids"),
    [
        (None, True, [*IT_IS_TWO, EOS], []),
        (None, False, [], [*IT_IS_TWO, EOS]),
        ("a cat", None, [*IT_IS_TWO, EOS], [*A_CAT, EOS]),
        ("a cat", True, [*IT_IS_TWO, EOS], [*A_CAT, EOS]),
    ],
)
def test_a_labelled_response_stands_on_the_side_of_its_label_and_a_pair_on_both(
    llava: Path, rejected: str | None, label: bool | None, chosen_ids: list[int], rejected_ids: list[int]
) -> None:
    pair = encode(llava, record("<image>Which digit?", rejected=rejected, label=label), [RED], responses="either")
    assert (pair.chosen_ids, pair.rejected_ids) == (chosen_ids, rejected_ids)
    assert pair.prompt_ids == [BOS, *USER, *[IMAGE] * 16, NEWLINE, *WHICH_DIGIT, NEWLINE, *ANSWER]


@pytest.mark.parametrize("label", [True, None])
def test_sft_takes_the_chosen_response_of_a_pair(llava: Path, label: bool | None) -> None:
    pair = encode(llava, record("Which digit?", label=label), responses="chosen")
    assert (pair.chosen_ids, pair.rejected_ids) == ([*IT_IS_TWO, EOS], [])


def test_a_pair_of_sft_keeps_its_rejected_response_for_evaluation_only(llava: Path) -> None:
    pair = encode(llava, record("Which digit?"), responses="chosen")
    assert (pair.rejected_ids, pair.eval_rejected_ids) == ([], [*A_CAT, EOS])
    both = encode(llava, record("Which digit?"))
    assert pair.as_evaluated().rejected_ids == both.rejected_ids
    assert both.eval_rejected_ids == []
    assert both.as_evaluated() == both


@pytest.mark.parametrize("rejected", ["a cat</s>", "a cat " * 50, "a cat " * 500])
def test_a_rejected_response_that_could_not_be_trained_on_is_no_reason_for_sft_to_drop_its_record(
    llava: Path, rejected: str
) -> None:
    pair = encode(llava, record("Which digit?", rejected=rejected), responses="chosen", max_length=40)
    assert (pair.chosen_ids, pair.eval_rejected_ids) == ([*IT_IS_TWO, EOS], [])
    with pytest.raises(RecordError):
        encode(llava, record("Which digit?", rejected=rejected), max_length=40)


WITHOUT_EOS = TEMPLATE.replace("'</s>' if message['role'] == 'assistant' else ", "")
WITHOUT_BOS = TEMPLATE.replace("{{ '<s>' if loop.first else '' }}", "")


@pytest.mark.parametrize("template", [TEMPLATE, WITHOUT_EOS])
def test_a_response_ends_with_eos_exactly_once_whatever_the_template_does(variant: Callable[..., Path], template: str) -> None:
    pair = encode(variant(template=template), record("Which digit?", chosen="It is two.", rejected="a cat"))
    assert pair.chosen_ids == [*IT_IS_TWO, EOS]
    assert pair.rejected_ids == [*A_CAT, EOS]


@pytest.mark.parametrize("template", [TEMPLATE, WITHOUT_BOS])
def test_a_prompt_begins_with_bos_exactly_once_whoever_adds_it(variant: Callable[..., Path], template: str) -> None:
    folder = variant(template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    pair = encode(folder, record("Which digit?"))
    assert pair.prompt_ids == [BOS, *USER, *WHICH_DIGIT, NEWLINE, *ANSWER]
    assert BOS not in [*pair.chosen_ids, *pair.rejected_ids]


def test_a_prompt_that_a_response_changes_is_the_one_that_generation_begins_from(variant: Callable[..., Path]) -> None:
    folder = variant(template=TEMPLATE.replace("ASSISTANT: {% endif %}", "ASSISTANT: now {% endif %}"))
    pair = encode(folder, record("Which digit?"))
    assert text_of(folder, pair.prompt_ids) == "<s>USER: Which digit?\nASSISTANT: now "
    assert (pair.chosen_ids, pair.rejected_ids) == ([*IT_IS_TWO, EOS], [*A_CAT, EOS])


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for m in messages %}{{ m.content | length }}{% endfor %}"])
def test_a_template_that_writes_no_texts_is_refused(variant: Callable[..., Path], template: str) -> None:
    folder = variant(template=template)
    with pytest.raises(ValueError, match="writes a question and its response in no form"):
        encode(folder, record("Which digit?"))


def test_a_conversation_that_the_template_refuses_is_dropped_with_the_templates_words(variant: Callable[..., Path]) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}"
    folder = variant(template=refusal + TEMPLATE)
    assert encode(folder, record("Which digit?")).chosen_ids == [*IT_IS_TWO, EOS]
    with pytest.raises(RecordError) as caught:
        encode(folder, record("Which digit?", system="Be brief."))
    assert caught.value.reason == "chat template"
    assert str(caught.value) == (
        "chosen: the model's chat template can't write this conversation: TemplateError: No system here"
    )


def test_of_several_templates_the_default_one_is_taken(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("qwen2"), folder)
    expected = encode(folder, record("Which digit?"))
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ 1 / 0 }}")
    assert encode(folder, record("Which digit?")) == expected
    (folder / "chat_template.jinja").rename(templates / "rag.jinja")
    with pytest.raises(ValueError) as caught:
        encode(folder, record("Which digit?"))
    assert str(caught.value) == (
        f"The model {folder} has the chat templates rag, tool_use, and none called default. Put the one to train with into its "
        "folder as chat_template.jinja."
    )


def with_tokenizer(folder: Path, change: Callable[[Any], None]) -> Path:
    """The folder, its tokenizer changed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_that_ends_each_text_does_not_end_the_prompt(variant: Callable[..., Path]) -> None:
    def change(tokenizer: Any) -> None:
        ends = TemplateProcessing(single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", BOS), ("</s>", EOS)])
        tokenizer.backend_tokenizer.post_processor = ends

    folder = with_tokenizer(variant(template=TEMPLATE.replace("<s>", "")), change)
    for given, images in ((record("Which digit?"), []), (record("<image>Which digit?"), [RED])):
        pair = encode(folder, given, images)
        assert pair.prompt_ids[0] == BOS
        assert pair.prompt_ids[-5:] == ANSWER
        assert pair.prompt_ids.count(EOS) == 0
        assert pair.chosen_ids == [*IT_IS_TWO, EOS]


def test_a_tokenizer_without_an_end_token_is_refused_in_words(variant: Callable[..., Path]) -> None:
    folder = variant(file="tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError) as caught:
        encode(folder, record("Which digit?"))
    assert str(caught.value) == (
        f"The tokenizer of {folder} names no end token, with which each response ends. Put its eos_token into "
        "tokenizer_config.json."
    )


@pytest.mark.parametrize(("prompt_ends_in", "response"), [(":", "_is</s>"), (": ", "is</s>")])
def test_a_response_has_the_ids_that_it_has_behind_its_prompt(
    variant: Callable[..., Path], prompt_ends_in: str, response: str
) -> None:
    """Tokenizers of SentencePiece's kind put a mark of a blank before each text; a response is not a text of its own."""

    def change(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])

    folder = with_tokenizer(variant(template=TEMPLATE.replace("ASSISTANT: ", f"ASSISTANT{prompt_ends_in}")), change)
    pair = encode(folder, record("Which digit?", chosen="is", rejected="It"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(pair.chosen_ids) == response  # and not "__is" or "_is"
    assert tokenizer.decode([*pair.prompt_ids, *pair.chosen_ids]).endswith("ASSISTANT:_is</s>")


def test_a_token_that_would_cross_into_the_response_leaves_the_prompt_as_generation_sees_it(llava: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llava)
    behind = tokenizer("ASSISTANT: is", add_special_tokens=False)["input_ids"]
    assert behind[:5] != ANSWER  # " is" is one token
    pair = encode(llava, record("Which digit?", chosen="is"))
    assert pair.prompt_ids[-5:] == ANSWER
    assert tokenizer.decode(pair.chosen_ids) == "is</s>"


@pytest.mark.parametrize("text", ["What does <pad> mean?", "It ended</s>, did it?", "<s>Which digit?"])
def test_a_text_that_holds_a_special_token_is_dropped(llava: Path, text: str) -> None:
    (token,) = re.findall("</?(?:pad|s)>", text)
    for given in (record(text), record("Which digit?", text, "Why?"), record("Which digit?", system=text)):
        with pytest.raises(RecordError) as caught:
            encode(llava, given)
        assert caught.value.reason == "special token in text"
        assert str(caught.value) == (
            f"messages: {token} is no text to this model: it marks a turn, an image or an end. Take it out of the text"
        )


# Prompt: BOS + 3 + 3 + newline + 5 = 13 ids; the longer response is 6 with EOS.
LENGTH = 19


@pytest.mark.parametrize("strategy", ["delete", "left", "right", "raise"])
def test_a_record_that_just_fits_is_left_alone(llava: Path, strategy: str) -> None:
    pair = encode(llava, record("Which digit?"), max_length=LENGTH, truncation_strategy=strategy)
    assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == (13, 6, 3)


@pytest.mark.parametrize(("strategy", "limit"), [("delete", LENGTH - 1), ("left", LENGTH - 1), ("right", 13)])
def test_a_record_that_is_too_long_and_cannot_be_cut_is_dropped(llava: Path, strategy: str, limit: int) -> None:
    with pytest.raises(RecordError) as caught:
        encode(llava, record("Which digit?"), max_length=limit, truncation_strategy=strategy)
    assert caught.value.reason == "too long"
    assert str(caught.value) == f"messages: 19 tokens, --max_length is {limit}"


def test_raise_stops_the_run_with_what_can_be_done(llava: Path) -> None:
    with pytest.raises(ValueError) as caught:
        encode(llava, record("Which digit?"), max_length=18, truncation_strategy="raise")
    assert not isinstance(caught.value, RecordError)
    assert str(caught.value) == (
        "Record r has 19 tokens and --max_length is 18. "
        "Raise --max_length, lower --max_pixels, or choose another --truncation_strategy."
    )


def test_left_drops_the_oldest_rounds_with_their_images_and_keeps_the_system_message(llava: Path) -> None:
    given = record("<image>one", "two", "<image>three <image>", "four", "<image>five", system="describe")
    images = [RED, BLUE, noise_image(9, 9), noise_image(8, 8)]
    whole = encode(llava, given, images)
    shorter = encode(llava, given, images, max_length=len(whole.prompt_ids) + 5, truncation_strategy="left")
    mark = "<image>" * 16 + "\n"
    assert text_of(llava, shorter.prompt_ids) == (
        f"<s>SYSTEM: describe\nUSER: {mark}three {mark}\nASSISTANT: four</s>USER: {mark}five\nASSISTANT: "
    )
    assert json.loads(shorter.conversation) == [
        ["system", "describe"],
        ["user", "<image>three <image>"],
        ["assistant", "four"],
        ["user", "<image>five"],
    ]
    assert shorter.images == images[1:]
    assert shorter.image_hashes == [image_hash(content) for content in images[1:]]
    shortest = encode(llava, given, images, max_length=70, truncation_strategy="left")
    assert text_of(llava, shortest.prompt_ids) == f"<s>SYSTEM: describe\nUSER: {mark}five\nASSISTANT: "
    assert shortest.images == images[3:]
    assert shortest.chosen_ids == whole.chosen_ids


def test_right_cuts_the_tails_of_the_responses_only(llava: Path) -> None:
    pair = encode(llava, record("Which digit?"), max_length=15, truncation_strategy="right")
    assert len(pair.prompt_ids) == 13
    assert pair.chosen_ids == IT_IS_TWO[:2]
    assert pair.rejected_ids == A_CAT


def test_answers_that_right_makes_identical_are_dropped(llava: Path) -> None:
    given = record("Which digit?", chosen="It is two.", rejected="It is a cat.")
    with pytest.raises(RecordError) as caught:
        encode(llava, given, max_length=16, truncation_strategy="right")
    assert caught.value.reason == "identical responses"
    assert str(caught.value) == "rejected: the responses are the same after the cut to 16 tokens"
    assert encode(llava, given, max_length=16, truncation_strategy="right", responses="chosen").chosen_ids == [44, 87, 271]


@pytest.mark.parametrize(("label", "side"), [(True, "chosen"), (False, "rejected")])
@pytest.mark.parametrize("strategy", ["delete", "left", "right", "raise"])
def test_a_single_response_counts_and_is_cut_like_the_side_it_stands_on(
    llava: Path, strategy: str, label: bool, side: str
) -> None:
    given = record("one?", "two", "Which digit?", rejected=None, label=label)
    whole = encode(llava, given, responses="either")
    length = whole.num_tokens
    assert length == len(whole.prompt_ids) + 6
    assert encode(llava, given, responses="either", max_length=length, truncation_strategy=strategy) == whole

    def cut() -> EncodedPair:
        return encode(llava, given, responses="either", max_length=length - 1, truncation_strategy=strategy)

    match strategy:
        case "left":
            assert cut() == encode(llava, record("Which digit?", rejected=None, label=label), responses="either")
        case "right":
            shorter = vars(cut())
            assert shorter[f"{side}_ids"] == IT_IS_TWO  # the end mark is what goes
            assert shorter == vars(whole) | {f"{side}_ids": IT_IS_TWO}
        case _:
            with pytest.raises(ValueError) as caught:
                cut()
            assert str(caught.value).startswith(
                f"messages: {length} tokens" if strategy == "delete" else f"Record r has {length} tokens"
            )


@pytest.mark.parametrize(("responses", "length"), [("both", LENGTH), ("either", LENGTH), ("chosen", 16)])
def test_the_longest_response_that_a_row_holds_counts_for_max_length(llava: Path, responses: str, length: int) -> None:
    given = record("Which digit?", chosen="a cat", rejected="It is two.")  # 3 and 6 ids; the prompt has 13
    encode(llava, given, responses=responses, max_length=length)
    with pytest.raises(RecordError) as caught:
        encode(llava, given, responses=responses, max_length=length - 1)
    assert str(caught.value) == f"messages: {length} tokens, --max_length is {length - 1}"


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_response_that_holds_the_end_mark_is_dropped(llava: Path, side: str) -> None:
    with pytest.raises(RecordError) as caught:
        encode(llava, record("Which digit?", **{side: "It is </s> two."}))
    assert caught.value.reason == "special token in text"
    assert str(caught.value).startswith(f"{side}: </s> is no text to this model")


def test_a_fault_of_a_single_bad_response_is_told_of_its_side(llava: Path) -> None:
    with pytest.raises(RecordError) as caught:
        encode(llava, record("Which digit?", chosen="It is </s> two.", rejected=None, label=False), responses="either")
    assert str(caught.value).startswith("rejected: </s> is no text to this model")


def test_a_processor_whose_patch_size_does_not_fit_the_model_is_found_out(variant: Callable[..., Path]) -> None:
    folder = variant(file="processor_config.json", patch_size=14)
    with pytest.raises(RecordError) as caught:
        encode(folder, record("<image>Which digit?"), [RED])
    assert caught.value.reason == "image token mismatch"
    assert str(caught.value) == (
        "images: 4 image tokens in the prompt, but the model makes 16 features of the 1 images; "
        "the processor's settings (patch_size, vision_feature_select_strategy) don't fit the model"
    )


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_batch_sees_images_at_the_size_that_the_encoder_counted(model_folder: Callable[..., Path], family: str) -> None:
    big = noise_image(120, 90)
    counts = set()
    for max_pixels in (None, 30 * 30, 3000):
        spec = EncoderSpec(str(model_folder(family)), responses="both", max_pixels=max_pixels)
        pair = Encoder(spec).encode(record("<image>Which digit?"), [big])
        images = image_processing(spec)([big], [True])
        count = pair.prompt_ids.count(IMAGE)
        assert images.lengths == (count,)
        counts.add((count, float(images.tensors["pixel_values"].sum())))
    assert len(counts) == 3


LYING = noise_image(40, 150, seed=3)


@pytest.mark.parametrize("max_pixels", [None, 700])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_ids_of_a_prompt_with_images_are_the_processors_own(
    model_folder: Callable[..., Path], family: str, max_pixels: int | None
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.effect_noise((120, 30), 60).convert("RGB").save(file, "JPEG", exif=exif)
    standing = file.getvalue()
    encoder = Encoder(EncoderSpec(str(model_folder(family)), responses="both", max_pixels=max_pixels))
    assert encoder._by_shape is not None
    for images in ([standing], [LYING, RED], [BLUE, standing, LYING]):
        given = record("<image>" * len(images) + "Which digit?")
        pair = encoder.encode(given, images)
        row = encoder.plain_row(given, images, "chosen")["input_ids"][0].tolist()
        assert [*pair.prompt_ids, *pair.chosen_ids] == row


def test_no_picture_of_a_record_is_resized_for_its_ids(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(EncoderSpec(str(llava), responses="both"))
    encoder.encode(record("<image>Which digit?"), [RED])
    monkeypatch.setattr(Image.Image, "resize", lambda *arguments, **options: pytest.fail("a picture was resized"))
    assert encoder.encode(record("<image>Which digit?"), [LYING]).prompt_ids.count(IMAGE) == 16
    with pytest.raises(RecordError, match="not a whole PNG") as caught:
        encoder.encode(record("<image>Which digit?"), [LYING[:3000]])
    assert caught.value.reason == "image unreadable"


def test_a_processor_of_another_kind_writes_prompts_itself(variant: Callable[..., Path], llava: Path) -> None:
    folder = variant()
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"] |= {"image_processor_type": "ViTImageProcessor", "size": {"height": 28, "width": 28}}
    file.write_text(json.dumps(settings))
    encoder = Encoder(EncoderSpec(str(folder), responses="both"))
    assert encoder._by_shape is None
    given = record("<image>Which <image> digit?")
    assert encoder.encode(given, [LYING, RED]).prompt_ids == encode(llava, given, [LYING, RED]).prompt_ids
    with pytest.raises(RecordError, match="not a whole PNG"):
        encoder.encode(given, [LYING[:3000], RED])


def test_the_fingerprint_depends_on_contents_and_settings_but_not_on_the_folder(
    llava: Path, variant: Callable[..., Path]
) -> None:
    spec = EncoderSpec(str(llava), responses="both")
    same = [
        spec,
        dataclasses.replace(spec, model=str(variant())),
        dataclasses.replace(spec, model=str(variant(file="config.json", transformers_version="5.99.0", dtype="bfloat16"))),
    ]
    assert len({s.fingerprint() for s in same}) == 1
    more_tokens = variant()
    tokenizer = AutoTokenizer.from_pretrained(more_tokens)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(more_tokens)
    folders = [
        more_tokens,
        variant(template=TEMPLATE + " "),
        variant(file="config.json", image_token_index=4),
        variant(file="processor_config.json", patch_size=14),
    ]
    others = [
        *(dataclasses.replace(spec, model=str(folder)) for folder in folders),
        dataclasses.replace(spec, max_length=1024),
        dataclasses.replace(spec, max_pixels=1000),
        dataclasses.replace(spec, responses="chosen"),
        dataclasses.replace(spec, responses="either"),
        dataclasses.replace(spec, truncation_strategy="left"),
    ]
    assert len({s.fingerprint() for s in (spec, *others)}) == 1 + len(others)


def test_a_spec_pickles_without_its_processor(llava: Path) -> None:
    spec = EncoderSpec(str(llava), responses="both", max_pixels=500)
    fingerprint = spec.fingerprint()
    packed = pickle.dumps(spec)
    assert len(packed) < 1000
    assert pickle.loads(packed) == spec
    assert pickle.loads(packed).fingerprint() == fingerprint


def png_of(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("given", "images", "reason", "words"),
    [
        (record("a" * 70_000), [], "too long", "messages: 70015 bytes of text; --max_length 1024 holds 65536 at the most"),
        (record("why?", chosen="é" * 40_000), [], "too long", "80009 bytes"),
        (record("<image>" * 3), [png_of(6000, 8000)] * 3, "images too large", "3 pictures of 144000000 pixels together"),
        (
            record("<image>"),
            [png_of(1, 8000)],
            "image too long",
            "images: a picture of 1 x 8000 pixels would be resized to 28 x 224000; crop it",
        ),
    ],
)
def test_what_is_too_large_is_refused_before_work_is_done_on_it(
    llava: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: PreferenceRecord,
    images: list[bytes],
    reason: str,
    words: str,
) -> None:
    monkeypatch.setattr(processors, "MAX_RESIZED_PIXELS", 2**20)
    encoder = Encoder(EncoderSpec(str(llava), responses="both", max_length=1024))
    monkeypatch.setattr(encoder.chat_template, "render", lambda *arguments, **options: pytest.fail("work was done"))
    with pytest.raises(RecordError) as caught:
        encoder.encode(given, images)
    assert caught.value.reason == reason
    assert words in str(caught.value)
