"""The published tokenizers have their published ids, and the families' processors find their image tokens in them."""

from typing import Any

import pytest

from tests.real.tokenizers import real_tokenizer

pytestmark = pytest.mark.slow

SENTENCE = "Wie viele Äpfel sind 12345 🍎?\n\n  def f(x):\n\treturn x  # 图像里有一只猫"
QUESTION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who is it?"}]},
]
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}Who is it?<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {
    "smollm2": CHATML.format("<image>\n"),
    "qwen2": CHATML.format("<|vision_start|><|image_pad|><|vision_end|>"),
    "internvl": CHATML.format("<IMG_CONTEXT>\n"),
    "mistral": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST][IMG]Who is it?[/INST]",
}
ANSWERED = {
    "smollm2": "A cat.<|im_end|>\n",
    "qwen2": "A cat.<|im_end|>\n",
    "internvl": "A cat.<|im_end|>\n",
    "mistral": "A cat.</s>",
}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("smollm2", {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<image>": 49152}),
        ("qwen2", {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<|vision_end|>": 151653}),
        ("qwen2", {"<|image_pad|>": 151655, "<|video_pad|>": 151656}),
        ("internvl", {"<|im_end|>": 151645, "<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667}),
        (
            "mistral",
            {"<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4, "[IMG]": 10, "<pad>": 11, "[IMG_BREAK]": 12, "[IMG_END]": 13},
        ),
    ],
)
def test_special_tokens_have_their_published_ids(name: str, tokens: dict[str, int]) -> None:
    tokenizer = real_tokenizer(name)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in tokens} == tokens
    assert [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens] == [
        [number] for number in tokens.values()
    ]


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("smollm2", [1348, 314, 253, 1028, 282, 216, 33, 34]),
        ("qwen2", [1986, 374, 264, 1273, 315, 220, 16, 17]),
        ("mistral", [4380, 1395, 1261, 2688, 1307, 1032, 1049, 1050]),
    ],
)
def test_text_becomes_these_tokens_and_comes_back(name: str, ids: list[int]) -> None:
    tokenizer = real_tokenizer(name)
    assert tokenizer("This is a test of 12", add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]) == SENTENCE


@pytest.mark.parametrize("name", PROMPTS)
def test_the_chat_template_begins_an_answer_where_the_prompt_ends(name: str) -> None:
    tokenizer = real_tokenizer(name)
    assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False) == PROMPTS[name]
    assert tokenizer.apply_chat_template([*QUESTION, ANSWER], tokenize=False) == PROMPTS[name] + ANSWERED[name]


def test_internvls_processor_finds_its_tokens_by_name() -> None:
    tokenizer = real_tokenizer("internvl")
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    assert [getattr(tokenizer, name) for name in names] == ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    assert tokenizer.context_image_token_id == 151667
