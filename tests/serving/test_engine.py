"""The engine's responses: those of transformers' own `generate`, alone and in a batch, with and without adapters."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rayalign.config.sections import TunerConfig
from rayalign.formats.records import IMAGE_MARK, Message, RecordError
from rayalign.images.fetch import open_image
from rayalign.models.processors import load_processor
from rayalign.models.source import ModelSource
from rayalign.policy.saving import save_policy
from rayalign.policy.sequences import Sequences
from rayalign.serving.engine import Engine
from rayalign.serving.loading import load_engine
from rayalign.serving.merge import write_merged
from rayalign.serving.response import GenerationFailed, Piece, Prompt, Sampling, draw
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_models import make_policy, noise_image, wake_adapters

RED, BLUE = noise_image(40, 30, seed=1), noise_image(20, 60, seed=2)
QUESTIONS: Sequence[tuple[str, tuple[bytes, ...]]] = (
    ("Which digit is it?", (RED,)),
    ("Describe the image. A cat sits on the mat, and the mat is as long as the cat.", (BLUE,)),
    ("Which?", ()),
    ("Describe the cat.", ()),
)


def load(folder: Path, *, max_length: int = 512, **adapters: Path) -> Engine:
    return load_engine(
        ModelSource(str(folder)),
        "base",
        {name: str(path) for name, path in adapters.items()},
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_length=max_length,
        max_pixels=None,
        max_batch_size=8,
    )


def prompt_of(engine: Engine, question: str, images: Sequence[bytes]) -> Prompt:
    return engine.prepare([Message(role="user", content=IMAGE_MARK * len(images) + question)], images)


def text_of(pieces: Any) -> str:
    return "".join(piece.text for piece in pieces)


class Talk:
    """Responses that are asked for by number, and what comes of them: `found[i]` is what has come of response i, `events` in
    which order pieces came and responses ended."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt]) -> None:
        self.engine, self.prompts = engine, prompts
        self.found = [""] * len(prompts)
        self.events: list[tuple[str, int]] = []
        self.ended = [threading.Event() for _ in prompts]

    def ask(self, i: int, sampling: Sampling, name: str = "base", *, then: Callable[[], None] = lambda: None) -> None:
        """`then` is called once, when the response has two tokens."""
        num_pieces = 0

        def on_piece(piece: Piece | GenerationFailed) -> None:
            nonlocal num_pieces
            num_pieces += 1
            failed = isinstance(piece, GenerationFailed)
            self.found[i] += f"failed: {piece}" if isinstance(piece, GenerationFailed) else piece.text
            self.events.append(("piece", i))
            if num_pieces == 2:
                then()
            if failed or piece.finish_reason:
                self.events.append(("end", i))
                self.ended[i].set()

        self.engine.submit(name, self.prompts[i], sampling, on_piece)

    def responses(self) -> list[str]:
        assert all(event.wait(60) for event in self.ended)
        return self.found


def together(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, names: Sequence[str] = ()) -> list[str]:
    """The responses to prompts that are asked for at once."""
    talk = Talk(engine, prompts)
    for i in range(len(prompts)):
        talk.ask(i, sampling, names[i] if names else "base")
    return talk.responses()


def one_after_another_joins(engine: Engine, prompts: Sequence[Prompt], lengths: Sequence[int]) -> Talk:
    """The responses to prompts, each of which is asked for when the one before has two tokens."""
    talk = Talk(engine, prompts)

    def ask(i: int) -> None:
        if i < len(prompts):
            talk.ask(i, Sampling(max_new_tokens=lengths[i]), then=lambda: ask(i + 1))

    ask(0)
    talk.responses()
    return talk


class ShownIds:
    """Decodes tokens as their numbers, so that special ones and broken characters are seen, too."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(f"{i}." for i in ids)


def show_each_token(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses are the numbers of their tokens, a piece each, of which none ends them."""
    monkeypatch.setattr(engine, "_tokenizer", ShownIds())
    monkeypatch.setattr(engine, "_ends", frozenset())


def nothing_runs(engine: Engine) -> bool:
    """Whether that is so before long: the last one leaves after it was told its end."""
    deadline = time.monotonic() + 30
    while engine.num_open and time.monotonic() < deadline:
        time.sleep(0.01)
    return engine.num_open == 0


def by_transformers(folder: Path, question: str, images: Sequence[bytes], max_new_tokens: int) -> str:
    """The ids that a user of transformers gets from the same folder, greedily, by the processor's own chat template."""
    processor = load_processor(str(folder))
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
    arrays = processor(
        text=[text], images=[[open_image(image) for image in images]], add_special_tokens=False, return_tensors="np"
    )
    inputs = {name: torch.as_tensor(value) for name, value in arrays.items() if name != "labels"}
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return "".join(f"{i}." for i in ids[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_greedy_response_is_the_same_alone_and_beside_others_whenever_they_come_and_go(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    engine = load(model_folder(family))
    show_each_token(engine, monkeypatch)
    prompts = [prompt_of(engine, question, images) for question, images in QUESTIONS]
    assert len({prompt.num_tokens for prompt in prompts}) == len(prompts)
    greedy = Sampling(max_new_tokens=8)
    alone = [text_of(engine.respond("base", prompt, greedy)) for prompt in prompts]
    assert len(set(alone)) >= (1 if family == "paligemma" else 3)  # whose tiny model repeats one token
    assert together(engine, prompts, greedy) == alone
    # Whoever joins while others run, and stays when they leave, gets the same.
    lengths = [3, 8, 3, 6]
    joined = one_after_another_joins(engine, prompts, lengths)
    assert joined.found == [".".join(text.split(".")[:n]) + "." for text, n in zip(alone, lengths, strict=True)]
    assert joined.events.index(("piece", 2)) < joined.events.index(("end", 1))
    if load_processor(str(model_folder(family))).chat_template:  # PaliGemma's has none, and gets rayalign's
        assert by_transformers(model_folder(family), *QUESTIONS[0], max_new_tokens=8) == alone[0]


@pytest.fixture(scope="module")
def adapted(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with two adapters: `dpo`, of LoRA, and `dora`, on the vision tower, too."""
    root = tmp_path_factory.mktemp("run")
    for name, tuner in {
        "dpo": TunerConfig(lora_target_modules=("ALL",)),
        "dora": TunerConfig(lora_target_modules=("ALL",), freeze_vit=False, use_dora=True, lora_rank=4),
    }.items():
        policy = wake_adapters(make_policy(model_folder("llava"), tuner=tuner), seed=len(name), scale=0.3)
        save_policy(policy, root / name)
        load_processor(str(model_folder("llava"))).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def three(model_folder: Callable[..., Path], adapted: Path) -> Engine:
    """A base model, and two adapters on it."""
    return load(model_folder("llava"), **{"dpo.v1": adapted / "dpo", "dora": adapted / "dora"})


def test_base_and_adapters_respond_side_by_side_each_like_its_merged_model(
    three: Engine, model_folder: Callable[..., Path], adapted: Path, tmp_path: Path
) -> None:
    prompts = [prompt_of(three, question, images) for question, images in QUESTIONS[:2]]
    greedy = Sampling(max_new_tokens=8)
    names = ["base", "dpo.v1", "dora"] * 2
    found = together(three, [prompt for prompt in prompts for _ in range(3)], greedy, names)
    expected = {}
    for name in ("dpo", "dora"):
        write_merged(ModelSource(str(model_folder("llava")), str(adapted / name)), tmp_path / name)
        merged = load(tmp_path / name)
        expected[name] = [text_of(merged.respond("base", prompt, greedy)) for prompt in prompts]
    base = [text_of(load(model_folder("llava")).respond("base", prompt, greedy)) for prompt in prompts]
    assert found == [responses[i] for i in range(2) for responses in (base, expected["dpo"], expected["dora"])]
    assert len(set(found)) == len(found)
    assert three.names == ("base", "dpo.v1", "dora")


def test_what_is_drawn_follows_from_the_seed_and_not_from_what_else_runs(three: Engine) -> None:
    prompt, other = (prompt_of(three, question, images) for question, images in QUESTIONS[:2])

    def sampled(seed: int) -> Sampling:
        return Sampling(max_new_tokens=8, temperature=1.5, top_p=0.9, seed=seed)

    first = text_of(three.respond("base", prompt, sampled(1)))
    assert first == text_of(three.respond("base", prompt, sampled(1))) == together(three, [other, prompt], sampled(1))[1]
    assert first != text_of(three.respond("base", prompt, sampled(2)))
    # Whoever draws does not disturb a greedy neighbour.
    greedy = Sampling(max_new_tokens=8)
    assert text_of(three.respond("base", prompt, Sampling(max_new_tokens=8, temperature=1e-4))) == text_of(
        three.respond("base", prompt, greedy)
    )


@pytest.mark.parametrize("temperature", [9.1e-39, 1e-40, 5e-324, 1e-6])
def test_a_tiny_temperature_is_greedy_and_harms_no_neighbour(three: Engine, temperature: float) -> None:
    prompts = [prompt_of(three, question, images) for question, images in QUESTIONS[:2]]
    talk, greedy = Talk(three, prompts), Sampling(max_new_tokens=8)
    talk.ask(0, Sampling(max_new_tokens=8, temperature=temperature, top_p=0.9))
    talk.ask(1, greedy)
    assert talk.responses() == [text_of(three.respond("base", prompt, greedy)) for prompt in prompts]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_whose_logits_are_no_numbers_fails_alone(
    three: Engine, monkeypatch: pytest.MonkeyPatch, temperature: float, value: float
) -> None:
    prompts = [prompt_of(three, question, images) for question, images in QUESTIONS[:2]]
    sampling = Sampling(max_new_tokens=200, temperature=temperature, seed=1)
    expected = text_of(three.respond("base", prompts[0], sampling))
    step = Sequences.step

    def broken(self: Sequences, tokens: Sequence[int]) -> torch.Tensor:
        logits = step(self, tokens)
        logits[1:, 3] = value
        return logits

    monkeypatch.setattr(Sequences, "step", broken)
    first, second = together(three, prompts, sampling)
    assert first == expected
    assert "failed: FloatingPointError: what the model makes of a response are no numbers" in second
    assert nothing_runs(three)


def test_top_p_draws_among_the_likeliest_tokens_that_reach_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([3, 0, 2, 1])]
    generator = torch.Generator().manual_seed(0)
    drawn = {
        top_p: {draw(logits.clone(), Sampling(1, temperature=1.0, top_p=top_p), generator) for _ in range(200)}
        for top_p in (0.4, 0.6, 0.9, 1.0)
    }
    assert drawn == {0.4: {1}, 0.6: {1, 3}, 0.9: {1, 2, 3}, 1.0: {0, 1, 2, 3}}


def test_a_response_has_as_many_tokens_as_asked_for_and_says_why_it_ends(three: Engine) -> None:
    prompt = prompt_of(three, *QUESTIONS[0])
    *_, last = three.respond("base", prompt, Sampling(max_new_tokens=3))
    assert (last.num_tokens, last.finish_reason) == (3, "length")
    whole = text_of(three.respond("base", prompt, Sampling(max_new_tokens=8)))
    stop = whole[len(whole) // 2 :][:2]
    pieces = list(three.respond("base", prompt, Sampling(max_new_tokens=8, stop=(stop,))))
    assert text_of(pieces) == whole[: whole.index(stop)].rstrip()
    assert (pieces[-1].finish_reason, pieces[-1].num_tokens < 8) == ("stop", True)


def test_a_response_ends_where_it_and_its_prompt_have_the_greatest_length_together(model_folder: Callable[..., Path]) -> None:
    length = prompt_of(load(model_folder("llava")), *QUESTIONS[0]).num_tokens + 5
    engine = load(model_folder("llava"), max_length=length)
    last = list(engine.respond("base", prompt_of(engine, *QUESTIONS[0]), Sampling(max_new_tokens=100, temperature=5.0)))[-1]
    assert (last.num_tokens, last.finish_reason) == (5, "length")


def test_the_end_token_ends_a_response_and_no_setting_of_the_model_changes_it(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder("llava"), tmp_path / "model"))
    engine = load(folder)
    prompt = prompt_of(engine, *QUESTIONS[0])
    settings = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 3.0, "max_new_tokens": 1}
    plain = text_of(engine.respond("base", prompt, Sampling(max_new_tokens=8)))
    third = int(by_transformers(folder, *QUESTIONS[0], max_new_tokens=3).split(".")[2])
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert text_of(load(folder).respond("base", prompt, Sampling(max_new_tokens=8))) == plain
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [third]}))
    *_, last = load(folder).respond("base", prompt, Sampling(max_new_tokens=8))
    assert (last.num_tokens, last.finish_reason) == (2, "stop")


def test_who_stops_listening_ends_the_response(three: Engine) -> None:
    prompt = prompt_of(three, *QUESTIONS[0])
    pieces = three.respond("base", prompt, Sampling(max_new_tokens=400))
    next(pieces)
    pieces.close()
    assert nothing_runs(three)


@pytest.mark.parametrize("name", ["base", "dora"])
def test_a_short_response_does_not_wait_for_the_end_of_a_long_one(
    three: Engine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    show_each_token(three, monkeypatch)
    talk = Talk(three, [prompt_of(three, question, images) for question, images in QUESTIONS[:2]])
    talk.ask(0, Sampling(max_new_tokens=200), then=lambda: talk.ask(1, Sampling(max_new_tokens=3), name))
    talk.responses()
    assert talk.events.index(("end", 1)) < talk.events.index(("end", 0))
    # The long one goes on beside it: no response takes all of the turns.
    begin, end = talk.events.index(("piece", 1)), talk.events.index(("end", 1))
    assert ("piece", 0) in talk.events[begin:end]


def test_no_more_responses_run_than_there_may(three: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    show_each_token(three, monkeypatch)
    monkeypatch.setattr(three, "_max_batch_size", 2)
    talk = Talk(three, [prompt_of(three, question, images) for question, images in (*QUESTIONS[:2], QUESTIONS[2])])
    for i, (length, name) in enumerate(((60, "base"), (5, "dora"), (3, "base"))):
        talk.ask(i, Sampling(max_new_tokens=length), name)
    talk.responses()
    assert talk.events.index(("end", 1)) < talk.events.index(("piece", 2))
    assert talk.events.index(("end", 2)) < talk.events.index(("end", 0))


@pytest.mark.parametrize(
    "broken",
    ["rayalign.serving.engine.prefill", "rayalign.policy.sequences._padded", "rayalign.policy.sequences.Sequences.step"],
)
def test_those_who_run_when_the_model_fails_are_told_and_the_next_ones_run(
    three: Engine, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    prompts = [prompt_of(three, question, images) for question, images in QUESTIONS[:2]]
    words = "failed: RuntimeError: shape '[7]' is invalid for input of size 1"
    with monkeypatch.context() as patch:
        patch.setattr(broken, lambda *_: torch.zeros(1).view(7))
        found = together(three, prompts, Sampling(max_new_tokens=200))
        assert [text[-len(words) :] for text in found] == [words] * 2
        with pytest.raises(GenerationFailed) if "_padded" not in broken else contextlib.nullcontext():
            list(three.respond("base", prompts[0], Sampling(max_new_tokens=2)))
    assert list(three.respond("base", prompts[0], Sampling(max_new_tokens=2)))[-1].finish_reason == "length"
    assert nothing_runs(three)


@pytest.mark.parametrize(
    ("question", "images", "words"),
    [
        ("Which </s> is it?", (), "messages: </s> is no text to this model: it marks a turn, an image or an end."),
        ("Which?", (b"no image",), "images: 8 bytes, not a whole PNG, JPEG, WEBP, GIF, BMP, TIFF image"),
        ("Which? " * 600, (), "messages: "),
        (" ", (), "messages: the question is empty"),
    ],
)
def test_a_conversation_that_can_t_be_encoded_is_refused(
    three: Engine, question: str, images: tuple[bytes, ...], words: str
) -> None:
    with pytest.raises(RecordError) as caught:
        prompt_of(three, question, images)
    assert str(caught.value).startswith(words)


def test_an_adapter_of_another_model_is_refused(model_folder: Callable[..., Path], adapted: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit the model"):
        load(model_folder("llava", hidden_size=32), dpo=adapted / "dpo")
