"""Every chat template x kind of conversation: what is written is what the record says, or the record is dropped."""

from collections.abc import Callable, Sequence

import pytest

from rayalign.data.chat_template import ChatTemplate, Turns
from rayalign.formats.records import Message, RecordError
from tests.data.chat_templates import OWN, templates_of_trl
from tests.data.conftest import OUTCOMES
from tests.data.more_chat_templates import MORE
from tests.tiny_families import make_tokenizer

TOKENIZER = make_tokenizer()
TEMPLATES = {**OWN, **MORE, **templates_of_trl()}
RESPONSE = "Red."

Conversation = tuple[list[tuple[str, str]], str]
CONVERSATIONS: dict[str, Conversation] = {
    "plain": ([("user", "Which colour?")], RESPONSE),
    "system": ([("system", "Be brief."), ("user", "Which colour?")], RESPONSE),
    "empty system": ([("system", ""), ("user", "Which colour?")], RESPONSE),
    "history": ([("user", "Which shape?"), ("assistant", "A round one."), ("user", "Which colour?")], RESPONSE),
    "think": ([("user", "Which colour?")], "<think>\nI look.\n</think>\n\nRed."),
    "think earlier": (
        [("user", "Which shape?"), ("assistant", "<think>\nHm.\n</think>\n\nRound."), ("user", "Which colour?")],
        RESPONSE,
    ),
    "white space": ([("user", "  Which colour?\n")], " Red. \n"),
    "markup": ([("user", "Is {{ 2 }} < '3' & \\n?")], "{'type': 'text'}\n\"Yes\""),
}

# Where a template can't write a conversation: its own words, or what it leaves out.
NO_SYSTEM = "TemplateError: System role not supported"
NO_THOUGHTS = "the response 'I look.' does not stand in what it writes"
THOUGHTS_MOVE = "it writes what comes before a response by what the response is"
OPENS_A_THOUGHT = "it opens a thought (<think>) where the model responds, and this response closes none"
NO_THOUGHT_OF_ITS_OWN = [conversation for conversation in CONVERSATIONS if conversation != "think"]
DROPPED = {
    ("gemma", "system"): NO_SYSTEM,
    ("Molmo", "system"): "TemplateError: Conversation roles must alternate",
    **{(name, "think"): NO_THOUGHTS for name in ("deepseek_r1_distill", "deepseekv3")},
    **{(name, "think"): THOUGHTS_MOVE for name in ("qwen3_5_nothink", "MiniCPM-V 4.5")},
    **{
        (name, conversation): OPENS_A_THOUGHT
        for name in ("Step3", "deepseek_r1_distill", "deepseekv3", *(name for name in TEMPLATES if name.startswith("nemotron")))
        for conversation in NO_THOUGHT_OF_ITS_OWN
    },
}
DROPPED_WITH_PICTURE = {
    ("Llama 3.2 Vision", "system"): "TemplateError: Prompting with images is incompatible with system messages."
}


def template_of(text: str, *, image_token: str | None = "<image>") -> ChatTemplate:
    def apply(turns: Turns, begin_response: bool) -> str:
        written = TOKENIZER.apply_chat_template(
            list(turns), chat_template=text, add_generation_prompt=begin_response, tokenize=False
        )
        assert isinstance(written, str)
        return written

    return ChatTemplate(apply, model="M", image_token=image_token)


def messages_of(turns: Sequence[tuple[str, str]], *, picture: bool) -> list[Message]:
    """The messages, the first question with a picture."""
    first = next(i for i, (role, _) in enumerate(turns) if role == "user")
    marked = [("<image>" if picture and i == first else "") + text for i, (_, text) in enumerate(turns)]
    return [Message.model_validate({"role": role, "content": text}) for (role, _), text in zip(turns, marked, strict=True)]


@pytest.mark.parametrize("picture", [True, False], ids=["with a picture", "text only"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_written_as_it_is_or_dropped(
    name: str, conversation: str, picture: bool, record_property: Callable[[str, object], None]
) -> None:
    template = template_of(TEMPLATES[name])
    turns, response = CONVERSATIONS[conversation]
    messages = messages_of(turns, picture=picture)
    expected = (DROPPED | DROPPED_WITH_PICTURE if picture else DROPPED).get((name, conversation))
    record_property(OUTCOMES, (name, conversation, "-" if expected else "+"))
    if expected is not None:
        with pytest.raises(RecordError) as caught:
            template.render(messages, response, side="chosen")
        assert caught.value.reason == "chat template"
        assert expected in str(caught.value)
        return
    rendered = template.render(messages, response, side="chosen")
    for _, text in turns:
        assert text.split("</think>")[-1].strip() in rendered.prompt
    answer = response.split("</think>")[-1].strip()
    thoughts = "I look." if "think" in response else ""
    assert rendered.response.index(thoughts) <= rendered.response.index(answer)
    assert rendered.response.count(answer) == 1
    assert "'type': 'text', 'text'" not in rendered.prompt + rendered.response  # a list of parts, as Python writes it
    assert RESPONSE not in rendered.prompt


@pytest.mark.parametrize("name", [name for name in TEMPLATES if (name, "plain") not in DROPPED])
def test_an_empty_system_message_is_none(name: str) -> None:
    template = template_of(TEMPLATES[name])
    without, empty = (CONVERSATIONS[c][0] for c in ("plain", "empty system"))
    first, second = (template.render(messages_of(turns, picture=True), RESPONSE, side="chosen") for turns in (without, empty))
    assert first == second


@pytest.mark.parametrize(
    ("name", "prompt", "response"),
    [
        ("LLaVA 1.5", "USER: <image>\nWhich colour? ASSISTANT:", " Red. "),
        # The prompt is what generation begins from; the response what the template writes from its first letter on.
        (
            "LLaVA-OneVision",
            "<|im_start|>user <image>\nWhich colour?<|im_end|><|im_start|>assistant\n",
            "Red.<|im_end|>",
        ),
        (
            "GLM-4.1V",
            "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>Which colour?<|assistant|>\n",
            "Red.",
        ),
        ("Pixtral, Mistral 3", "<s>[INST][IMG]Which colour?[/INST]", "Red.</s>"),
        ("FastVLM", "<|im_start|>user\n<image>Which colour?<|im_end|>\n<|im_start|>assistant\n", "Red.<|im_end|>\n"),
        ("PaliGemma", "<image>Which colour?", "Red."),
        ("Molmo", "User: <image>Which colour? Assistant:", " Red."),
        ("Phi-4-multimodal", "<|user|><image>Which colour?<|end|><|assistant|>", "Red.<|end|><|endoftext|>"),
        ("Idefics2", "User:<image>Which colour?<end_of_utterance>\nAssistant:", " Red.<end_of_utterance>\n"),
        ("DeepSeek-VL2", "<|User|>: <image>\nWhich colour?\n\n<|Assistant|>:", " Red.<｜end▁of▁sentence｜>"),
        # A thought that the prompt opens is closed by what the template puts before the response.
        (
            "Qwen3-VL Thinking",
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which colour?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n",
            "\n</think>\n\nRed.<|im_end|>\n",
        ),
        (
            "qwen3_vl",
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which colour?<|im_end|>\n<|im_start|>assistant\n",
            "Red.<|im_end|>\n",
        ),
    ],
)
def test_prompt_and_response_are_what_generation_begins_from_and_what_follows(name: str, prompt: str, response: str) -> None:
    rendered = template_of(TEMPLATES[name]).render(
        messages_of(CONVERSATIONS["plain"][0], picture=True), RESPONSE, side="chosen"
    )
    assert (rendered.prompt, rendered.response) == (prompt, response)


def test_a_system_message_that_moves_once_there_is_a_response_stays_in_the_prompt() -> None:
    turns = [("system", "Be brief."), *CONVERSATIONS["history"][0]]
    rendered = template_of(OWN["Pixtral, Mistral 3"]).render(messages_of(turns, picture=True), RESPONSE, side="chosen")
    assert rendered.prompt == "<s>[INST][IMG]Which shape?[/INST]A round one.</s>[INST]Be brief.\n\nWhich colour?[/INST]"
    assert rendered.response == "Red.</s>"


def test_a_thought_that_the_prompt_opens_ends_in_the_response() -> None:
    template = template_of(MORE["Step3"])
    turns, response = CONVERSATIONS["think"]
    rendered = template.render(messages_of(turns, picture=True), response, side="chosen")
    assert rendered.prompt == "<|BOT|>human\n<im_patch>Which colour?<|EOT|><|BOT|>assistant\n<think>\n"
    assert rendered.response == "I look.\n</think>\n\nRed.<|EOT|>"
    with pytest.raises(RecordError) as caught:
        template.render(messages_of(turns, picture=True), RESPONSE, side="rejected")
    assert str(caught.value) == (
        "rejected: the model's chat template can't write this conversation: it opens a thought (<think>) where the model "
        "responds, and this response closes none; write the thought into it, or give the model's folder a chat_template.jinja "
        "that opens none"
    )
    other_marks = template_of(MORE["Step3"].replace("<think>", "◁think▷"))
    with pytest.raises(RecordError, match="it opens a thought"):
        other_marks.render(messages_of(turns, picture=True), response, side="chosen")


def test_what_a_templates_author_refuses_is_not_got_around_by_another_form_of_the_question() -> None:
    """As plain strings, the pictures would be out of the template's sight. A form of the other messages may help."""
    turns = CONVERSATIONS["system"][0]
    template = template_of(MORE["Llama 3.2 Vision"])
    with pytest.raises(RecordError, match=r"Prompting with images is incompatible with system messages\."):
        template.render(messages_of(turns, picture=True), RESPONSE, side="chosen")
    assert "Be brief." in template.render(messages_of(turns, picture=False), RESPONSE, side="chosen").prompt
    only_strings = (
        "{% if m.role == 'system' and m.content is not string %}{{ raise_exception('Plain text, please') }}{% endif %}"
    )
    template = template_of(MORE["Ovis 2"].replace("{% for m in messages %}", "{% for m in messages %}" + only_strings))
    assert template.render(messages_of(turns, picture=True), RESPONSE, side="chosen").prompt.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhich colour?"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}{{ m.role }} {% endfor %}", "does not stand in what it writes"),
        ("{% for m in messages %}{{ m.content | string | upper }}{% endfor %}", "does not stand in what it writes"),
        ("{{ messages[0].content.nothing.at_all }}", "UndefinedError"),
        ("{{ raise_exception('Not for you.') }}", "TemplateError: Not for you."),
    ],
)
def test_a_template_that_writes_no_form_of_contents_as_it_is_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="The chat template of M writes a question and its response in no form") as caught:
        template_of(text)
    assert reason in str(caught.value)


def test_a_language_models_contents_are_plain_strings_first() -> None:
    either = "{% for m in messages %}{{ m.content if m.content is string else 'P' + m.content[-1].text }}|{% endfor %}"
    messages = messages_of([("user", "Which colour?")], picture=False)
    assert template_of(either, image_token=None).render(messages, RESPONSE, side="chosen").prompt == "Which colour?|"
    assert template_of(either).render(messages, RESPONSE, side="chosen").prompt.startswith("P")


def test_the_responses_of_a_record_share_one_rendering_of_its_prompt() -> None:
    written = []

    def apply(turns: Turns, begin_response: bool) -> str:
        written.append(begin_response)
        return "".join(f"{turn['content']}|" for turn in turns)

    template = ChatTemplate(apply, model="M", image_token=None)
    for question in ("Which colour?", "Which size?"):
        messages = [Message(role="user", content=question)]
        written.clear()
        rendered = [
            template.render(messages, response, side=side) for side, response in (("chosen", "red"), ("rejected", "blue"))
        ]
        assert [both.prompt for both in rendered] == [f"{question}|"] * 2
        assert [both.response for both in rendered] == ["red|", "blue|"]
        assert written == [True, False, False]
