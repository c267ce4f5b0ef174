"""`rayalign chat`: a conversation with a model in the terminal, and with a second one beside it (`--compare`).

Both respond with `engine`, in this process: no server and no Ray.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch

from rayalign.config.sections import ModelConfig
from rayalign.config.serving import ChatConfig
from rayalign.formats.records import IMAGE_MARK, Message, RecordError
from rayalign.images.fetch import MAX_IMAGE_BYTES, decoded_size
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import ModelSource, require_model
from rayalign.serving.conversation import require_plain
from rayalign.serving.engine import Engine
from rayalign.serving.loading import load_engine
from rayalign.serving.response import GenerationFailed, Sampling
from rayalign.serving.scorer import is_reward_model

HELP = "/image FILE puts a picture to the next question, /new begins anew, /quit ends.\n"


def run(config: ChatConfig, *, lines: TextIO | None = None, out: TextIO | None = None) -> None:
    """Talks until the lines end, or one is /quit. Raises ValueError for models that can't be loaded, and for --image files that
    can't be read."""
    if not config.model:
        raise ValueError(
            "Pass --model with what is to be talked to: a model's folder or hub id, or the model/ folder of a run."
        )
    lines, out = lines or sys.stdin, out or sys.stdout
    images = [read_image(path) for path in config.image]
    sources = {"--model": config.model, **({"--compare": config.compare} if config.compare else {})}
    found = [(name, _source_of(flag, name)) for flag, name in sources.items()]  # all of them, before any weights are loaded
    engines = [(name, _load(config, name, source)) for name, source in found]
    try:
        _talk([_Chat(name, engine, config, images) for name, engine in engines], config, lines, out)
    finally:
        for _, engine in engines:
            engine.close()


def _talk(chats: list["_Chat"], config: ChatConfig, lines: TextIO, out: TextIO) -> None:
    out.write(HELP)
    for line in _asked(lines, out):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            chats = [_Chat(chat.name, chat.engine, config) for chat in chats]
        elif command == "/image":
            try:
                image = read_image(rest.strip())
            except ValueError as error:
                out.write(f"{error}\n")
                continue
            for chat in chats:
                chat.show(image)
        elif command.startswith("/"):
            out.write(HELP)
        elif line:
            for chat in chats:
                out.write(f"[{chat.name}] " if len(chats) > 1 else "")
                chat.ask(line, out)


class _Chat:
    """A conversation with one model; `new_images` are for the next question."""

    def __init__(self, name: str, engine: Engine, config: ChatConfig, new_images: Sequence[bytes] = ()) -> None:
        self.name, self.engine = name, engine
        self._sampling = Sampling(config.max_new_tokens, temperature=config.temperature, seed=config.seed)
        self._messages: tuple[Message, ...] = ()
        self._images: tuple[bytes, ...] = ()
        self._new_images = tuple(new_images)

    def show(self, image: bytes) -> None:
        """Puts a picture to the next question."""
        self._new_images = (*self._new_images, image)

    def ask(self, question: str, out: TextIO) -> None:
        """Writes the response to a question as it comes. A question that can't be asked is told, and is none: its pictures stay
        for the next one."""
        if not self._respond(question, out) and self._new_images:
            out.write(f"Pictures that stay for the next question: {len(self._new_images)} (/new drops them).\n")

    def _respond(self, question: str, out: TextIO) -> bool:
        """Whether question and response are part of the conversation now."""
        try:
            turn = Message(role="user", content=IMAGE_MARK * len(self._new_images) + require_plain(question))
            messages, pictures = (*self._messages, turn), (*self._images, *self._new_images)
            prompt = self.engine.prepare(messages, pictures)
        except RecordError as error:
            out.write(f"{error}\n")
            return False
        text = ""
        try:
            for piece in self.engine.respond(self.name, prompt, self._sampling):
                text += piece.text
                out.write(piece.text)
                out.flush()
        except GenerationFailed as error:
            out.write(f"The model failed: {error}\n")
            return False
        out.write("\n")
        if text:  # templates write no empty turn
            self._messages, self._images = (*messages, Message(role="assistant", content=text)), pictures
            self._new_images = ()
        return bool(text)


def read_image(path: str) -> bytes:
    """A picture's file. Raises ValueError where it can't be read, or is none."""
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror or error}).") from None
    if len(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"{path}: has more than {MAX_IMAGE_BYTES // 2**20} MiB.")
    try:
        decoded_size(content)
    except RecordError as error:
        raise ValueError(f"{path}: {error.words}.") from None
    return content


def _asked(lines: TextIO, out: TextIO) -> Iterator[str]:
    """The lines that are typed, each behind a mark."""
    while True:
        out.write("> ")
        out.flush()
        line = lines.readline()
        if not line:
            out.write("\n")
            return
        yield line.strip()


def _source_of(flag: str, name: str) -> ModelSource:
    """Where a model's files are on this machine. Raises ValueError, which names its flag, for what can't be talked to."""
    try:
        source = require_model(ModelConfig(model=name), REGISTERED_MODELS).here()
    except ValueError as error:
        raise ValueError(re.sub("^--model ", f"{flag} ", str(error))) from None
    if is_reward_model(source):
        raise ValueError(f"{flag} {name}: is a reward model, which writes no responses. `rayalign serve` has it score them.")
    return source


def _load(config: ChatConfig, name: str, source: ModelSource) -> Engine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_engine(
        source,
        name,
        {},
        dtype=getattr(torch, ModelConfig(dtype=config.dtype).dtype_on(device.type)),
        device=device,
        max_length=config.max_length,
        max_pixels=config.max_pixels,
        max_batch_size=1,
    )
