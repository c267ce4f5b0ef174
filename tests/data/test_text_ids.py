from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from rayalign.data.text_ids import TextIds
from tests.tiny_families import make_tokenizer

RESPONSES = {"chosen": "is two.</s>", "rejected": "is a cat</s>"}
BOS, EOS = 1, 2


class Counted:
    """A tokenizer that notes the texts of each call."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.calls: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        self.calls.append(text)
        return self.tokenizer(text, **options)


@pytest.mark.parametrize(
    ("prompt", "crosses", "num_calls"),
    [("ASSISTANT:\n", False, 1), ("ASSISTANT: ", True, 2)],  # " is" is a token
)
def test_a_prompt_and_its_responses_are_tokenized_together_and_once(prompt: str, crosses: bool, num_calls: int) -> None:
    counted = Counted(make_tokenizer())
    texts = TextIds(counted)
    counted.calls.clear()
    ids, found = texts.prompt_and_responses(prompt, RESPONSES)
    assert len(counted.calls) == num_calls
    plain = counted.tokenizer
    assert ids == plain(prompt)["input_ids"]
    before = "\n" if crosses else prompt
    for side, text in RESPONSES.items():
        behind = plain(before + text)["input_ids"][len(plain(before)["input_ids"]) :]
        assert found[side] == (behind, crosses)
    assert texts.responses(prompt, RESPONSES) == found


@pytest.mark.parametrize(("before", "behind"), [("<s>", ""), ("", "</s>"), ("<s>", "</s>"), ("", "")])
@pytest.mark.parametrize("prompt", ["Which digit?\n", "<s>Which digit?\n"])
def test_what_a_tokenizer_puts_around_a_text_stands_before_a_prompt_once_and_never_behind(
    before: str, behind: str, prompt: str
) -> None:
    tokenizer = make_tokenizer()
    around = TemplateProcessing(single=f"{before} $A {behind}".strip(), special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = around
    ids, found = TextIds(tokenizer).prompt_and_responses(prompt, RESPONSES)
    question = tokenizer("Which digit?\n", add_special_tokens=False)["input_ids"]
    assert ids == ([BOS] if before or prompt.startswith("<s>") else []) + question
    assert [response.ids.count(EOS) for response in found.values()] == [1, 1]


def test_a_special_token_in_a_text_is_found() -> None:
    texts = TextIds(make_tokenizer({"image_token": "<|image|>"}))
    assert texts.special_token_in("What is <|image|>?") == "<|image|>"
    assert texts.special_token_in("What is <image|>?") is None
