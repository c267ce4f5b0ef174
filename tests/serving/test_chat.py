"""The chat in the terminal: each model's own conversation, its commands, and what can't be asked."""

import io
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayalign.config.serving import ChatConfig
from rayalign.formats.records import IMAGE_MARK, Message
from rayalign.models.source import ModelSource
from rayalign.serving import chat
from rayalign.serving.loading import load_engine
from rayalign.serving.response import Sampling
from tests.tiny_models import noise_image


def said(folder: Path, turns: list[tuple[str, str]], images: list[bytes]) -> str:
    """The model's greedy response to a conversation."""
    engine = load_engine(
        ModelSource(str(folder)),
        "m",
        {},
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_length=512,
        max_pixels=None,
        max_batch_size=1,
    )
    messages = [Message.model_validate({"role": role, "content": content}) for role, content in turns]
    prompt = engine.prepare(messages, images)
    return "".join(piece.text for piece in engine.respond("m", prompt, Sampling(max_new_tokens=6)))


def talk(*lines: str, **flags: Any) -> str:
    out = io.StringIO()
    chat.run(ChatConfig(max_new_tokens=6, **flags), lines=io.StringIO("".join(f"{line}\n" for line in lines)), out=out)
    return out.getvalue().removeprefix(chat.HELP)


def test_two_models_respond_each_in_its_own_conversation(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    picture = noise_image(40, 30)
    (tmp_path / "cat.png").write_bytes(picture)
    folders = [model_folder("llava"), model_folder("qwen2_vl")]
    first = [("user", IMAGE_MARK + "Which digit is it?")]
    expected = [said(folder, first, [picture]) for folder in folders]
    more = [
        said(folder, [*first, ("assistant", response), ("user", "Which?")], [picture])
        for folder, response in zip(folders, expected, strict=True)
    ]
    alone = [said(folder, [("user", "Which?")], []) for folder in folders]
    names = [str(folder) for folder in folders]
    found = talk(
        *("Which digit is it?", "Which?", "/new", "Which?", "/quit", "Which?"),
        model=names[0],
        compare=names[1],
        image=(str(tmp_path / "cat.png"),),
    )
    said_to = ["".join(f"[{n}] {r}\n" for n, r in zip(names, rs, strict=True)) for rs in (expected, more, alone)]
    assert found == f"> {said_to[0]}> {said_to[1]}> > {said_to[2]}> "


def test_what_can_t_be_asked_is_told_and_the_talk_goes_on(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    picture = noise_image(40, 30)
    (tmp_path / "cat.png").write_bytes(picture)
    folder = model_folder("llava")
    found = talk(
        *("/image none.png", "/help", "What is <image>?", f"/image {tmp_path / 'cat.png'}", "Which?"), model=str(folder)
    )
    assert found == (
        "> none.png: can't be read (No such file or directory).\n"
        f"> {chat.HELP}"
        "> messages: <image> stands for an image in rayalign's records: take it out of the text\n"
        f"> > {said(folder, [('user', IMAGE_MARK + 'Which?')], [picture])}\n> \n"
    )
    with pytest.raises(ValueError, match=r"^none.png: can't be read"):
        talk(model=str(folder), image=("none.png",))


def test_a_picture_stays_until_a_question_is_taken(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    picture = noise_image(40, 30)
    (tmp_path / "cat.png").write_bytes(picture)
    folder, image = model_folder("llava"), f"/image {tmp_path / 'cat.png'}"
    stays = "Pictures that stay for the next question: 1 (/new drops them).\n"
    found = talk(image, "What is <image>?", "Which? " * 600, "Which?", model=str(folder), max_length=512)
    shown = said(folder, [("user", IMAGE_MARK + "Which?")], [picture])
    first, _, rest = found.partition(stays)
    assert first == "> > messages: <image> stands for an image in rayalign's records: take it out of the text\n"
    assert rest.startswith("> messages: ")
    assert rest.endswith(f"\n{stays}> {shown}\n> \n")
    alone = said(folder, [("user", "Which?")], [])
    assert alone != shown
    assert talk(image, "<image>", "/new", "Which?", model=str(folder)).endswith(f"{stays}> > {alone}\n> \n")


def test_what_is_no_model_or_no_picture_is_told_before_anything_is_loaded(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(chat, "load_engine", lambda *_, **__: pytest.fail("a model was loaded"))
    folder, text = str(model_folder("llava")), tmp_path / "cat.png"
    text.write_text("a cat")
    with pytest.raises(ValueError, match=rf"^--compare {tmp_path}: the folder has no config.json"):
        talk(model=folder, compare=str(tmp_path))
    with pytest.raises(ValueError) as caught:
        talk(model=folder, image=(str(text),))
    assert str(caught.value) == f"{text}: 5 bytes, not a whole PNG, JPEG, WEBP, GIF, BMP, TIFF image."


def test_the_models_threads_end_with_the_talk(model_folder: Callable[..., Path]) -> None:
    before = set(threading.enumerate())
    talk("Which?", "/quit", model=str(model_folder("llava")))
    assert set(threading.enumerate()) <= before


def test_a_line_that_is_no_text_is_told(model_folder: Callable[..., Path]) -> None:
    found = talk("\udcff", model=str(model_folder("llava")))
    assert found == "> messages: half a surrogate pair at character 0\n> \n"


def test_a_model_that_fails_is_told_and_the_talk_goes_on(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llava"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    damaged = {name: torch.full_like(values, math.nan) for name, values in weights.items()}
    save_file(damaged, folder / "model.safetensors", metadata={"format": "pt"})
    found = talk("Which?", "/help", model=str(folder))
    assert found == (
        "> The model failed: FloatingPointError: what the model makes of a prompt are no numbers: its weights are damaged, or "
        f"too large for its type (--dtype)\n> {chat.HELP}> \n"
    )


@pytest.mark.parametrize(("file", "words"), [("config.json", "is not a valid JSON"), ("processor_config.json", "processor")])
def test_files_of_a_model_that_are_damaged_or_gone_are_named(
    model_folder: Callable[..., Path], tmp_path: Path, file: str, words: str
) -> None:
    folder = shutil.copytree(model_folder("llava"), tmp_path / "model")
    if file == "config.json":
        (folder / file).write_text("{oops")
    else:
        (folder / file).unlink()
    with pytest.raises(ValueError, match=f"^The model {folder} can't be read: .*{words}"):
        talk("Which?", model=str(folder))
