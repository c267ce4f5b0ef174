"""A conversation as a model's chat template writes it: the prompt's text and the response's. `encode` makes tokens of both.

Templates are read, not trusted. They differ in what they take as a message's content (a list of parts, or a plain string), in
whether they know of a system message, and in how they write a conversation once it has a response. Each text must be found in
what the template wrote; where it isn't, the next form of contents is tried.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from rayalign.formats.records import IMAGE_MARK, Message, RecordError

Turns = Sequence[Mapping[str, Any]]
Apply = Callable[[Turns, bool], str]
"""Writes some turns; the flag asks for the beginning of the response at the end."""

EVERY_ROLE = frozenset({"system", "user", "assistant"})
FORMS = (EVERY_ROLE, frozenset({"user"}), frozenset[str]())
"""The roles whose contents are given as parts; the others' are plain strings. The usual form comes first."""

THINK_MARK = re.compile(r"</?think>")
OPEN_THOUGHT = re.compile(r"([<◁])(think|thinking|thought)([>▷])\s*\Z")
"""The end of a prompt that begins the response with a thought, as those of models do that always think."""

# Written by Python as a list of parts is written, the line break or the quotes would not come out as they are.
PROBES = {
    "system": "Be 'brief',\nand \"kind\".",
    "user": "What is 'this',\nand \"that\"?",
    "assistant": "One is 'red',\nthe other \"blue\".",
}
PLACEHOLDER = "RAYALIGN-RESPONSE"

QUESTION = ("user",)
"""The kind of conversation that every template must write."""


class UnfitForm(Exception):
    """A form of contents that a template can't write, or not as it is."""


class RefusedForm(UnfitForm):
    """A conversation that a template's author refuses, in its own words (`raise_exception`)."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's text: `prompt` up to where the model responds, and `response` with what the template puts behind it."""

    prompt: str
    response: str


@dataclass(frozen=True)
class _Forms:
    """The forms of contents that a template can write, and why it can't write the first one that it can't."""

    forms: tuple[frozenset[str], ...]
    reason: str


class ChatTemplate:
    """A model's chat template; `apply` renders it. Raises ValueError where it can't write a question and its response.

    `image_token` stands for an image in a plain string; None for a language model.
    """

    def __init__(self, apply: Apply, *, model: str, image_token: str | None) -> None:
        self._apply = apply
        self._image_token = image_token
        self._known: dict[tuple[tuple[str, ...], bool], _Forms] = {}
        self._prompt_of = functools.lru_cache(maxsize=len(FORMS))(self._render_prompt)  # a record's responses share it
        usable = self._forms_for(QUESTION)
        if not usable.forms:
            raise ValueError(
                f"The chat template of {model} writes a question and its response in no form that was tried: {usable.reason}. "
                "Give the processor a template that writes each message's text as it stands (chat_template.jinja in the "
                "model's folder)."
            )

    def render(self, messages: Sequence[Message], response: str, *, side: str) -> Rendered:
        """The text of a conversation and of a response to it. Raises RecordError where the template can't write it, or leaves
        some of its text out; `side` names the response."""
        messages = [message for message in messages if message.content.strip()]
        kind = _kind_of(messages)
        usable = self._forms_for(kind)
        if not usable.forms and not any(IMAGE_MARK in message.content for message in messages):
            usable = self._forms_for(kind, with_picture=False)
        reasons = []
        for form in usable.forms:
            try:
                rendered = self._render_in(form, messages, response)
                _require_closed_thought(rendered)
                return rendered
            except UnfitForm as error:
                reasons.append(str(error))
        (reason, *_) = reasons or [usable.reason]
        raise RecordError("chat template", f"the model's chat template can't write this conversation: {reason}", field=side)

    def _forms_for(self, kind: tuple[str, ...], *, with_picture: bool = True) -> "_Forms":
        """The forms in which conversations of some kind come out as they are, found out with texts that show it."""
        if (kind, with_picture) not in self._known:
            messages = [Message.model_validate({"role": role, "content": PROBES[role]}) for role in kind]
            if self._image_token is not None and with_picture:
                first = kind.index("user")
                messages[first] = Message(role="user", content=IMAGE_MARK + PROBES["user"])
            plain = self._known[QUESTION, True].forms if kind != QUESTION else ()
            self._known[kind, with_picture] = self._find_forms(messages, plain)
        return self._known[kind, with_picture]

    def _find_forms(self, messages: Sequence[Message], plain: Collection[frozenset[str]]) -> "_Forms":
        """The forms in which some messages come out as they are. `plain` are those of a question alone: what the template's
        author refuses in one of them is refused, and no other form of the question, with its pictures out of the template's
        sight, gets around it."""
        forms, reasons = [], []
        refused: frozenset[str] | None = None
        for form in FORMS if self._image_token is not None else FORMS[::-1]:
            if refused is not None and ("user" in form) != ("user" in refused):
                continue
            try:
                self._render_in(form, messages, PROBES["assistant"])
            except UnfitForm as error:
                reasons.append(str(error))
                if isinstance(error, RefusedForm) and form in plain:
                    refused = form
            else:
                forms.append(form)
        return _Forms(tuple(forms), reasons[0] if reasons else "")

    def _render_in(self, form: frozenset[str], messages: Sequence[Message], response: str) -> Rendered:
        turns = [self._turn(form, message.role, message.content) for message in messages]
        prompt = self._prompt_of(form, tuple(messages))
        whole = self._write([*turns, self._turn(form, "assistant", response)], begin_response=False)
        start = len(prompt)
        if not whole.startswith(prompt):
            start = self._start_of_response(form, turns, whole)
        written = whole[start:]
        _require(written, _pieces(response), "the response")
        return Rendered(prompt, written)

    def _render_prompt(self, form: frozenset[str], messages: tuple[Message, ...]) -> str:
        prompt = self._write([self._turn(form, message.role, message.content) for message in messages], begin_response=True)
        _check_prompt(prompt, messages)
        return prompt

    def _start_of_response(self, form: frozenset[str], turns: Turns, whole: str) -> int:
        """Where the response begins in a conversation that the template writes otherwise once it has one: where a placeholder
        stands that takes its place."""
        marked = self._write([*turns, self._turn(form, "assistant", PLACEHOLDER)], begin_response=False)
        before, found, behind = marked.rpartition(PLACEHOLDER)
        if not found or not whole.startswith(before) or not whole.endswith(behind):
            raise UnfitForm("it writes what comes before a response by what the response is")
        return len(before)

    def _write(self, turns: Turns, *, begin_response: bool) -> str:
        try:
            return self._apply(turns, begin_response)
        except Exception as error:  # a template may fail in any way; its author's own words are in the error
            words = f"{type(error).__name__}: {error}"
            # transformers' `raise_exception` raises this class itself, and jinja2 only classes below it.
            raise (RefusedForm if type(error) is jinja2.TemplateError else UnfitForm)(words) from error

    def _turn(self, form: frozenset[str], role: str, content: str) -> dict[str, Any]:
        if role in form:
            return {"role": role, "content": _content_parts(content)}
        return {"role": role, "content": content.replace(IMAGE_MARK, self._image_token or IMAGE_MARK)}


def _kind_of(messages: Sequence[Message]) -> tuple[str, ...]:
    """The roles of a conversation, with one earlier round for any number of them."""
    system = ("system",) if any(message.role == "system" for message in messages) else ()
    earlier = ("user", "assistant") if any(message.role == "assistant" for message in messages) else ()
    return (*system, *earlier, "user")


def _check_prompt(prompt: str, messages: Sequence[Message]) -> None:
    """Raises UnfitForm where a message's text isn't in the prompt; those of question and response stand in order."""
    position = 0
    for message in messages:
        pieces = [piece for text in message.content.split(IMAGE_MARK) for piece in _pieces(text)]
        if message.role == "system":  # some templates put it into the first or the last question
            _require(prompt, pieces, "the system message")
        elif message.role == "assistant":
            position = _require(prompt, pieces[-1:], "an earlier response", position)  # what it thought before may be left out
        else:
            position = _require(prompt, pieces, "a question", position)


def _require_closed_thought(rendered: Rendered) -> None:
    """Raises UnfitForm where the prompt opens a thought that the response does not close: it would be learnt as a thought."""
    opened = OPEN_THOUGHT.search(rendered.prompt)
    if opened is None:
        return
    first, name, last = opened.groups()
    if f"{first}/{name}{last}" not in rendered.response:
        mark = first + name + last
        raise UnfitForm(
            f"it opens a thought ({mark}) where the model responds, and this response closes none; write the thought into it, "
            "or give the model's folder a chat_template.jinja that opens none"
        )


def _pieces(text: str) -> list[str]:
    """A text without the white space around it, which templates take away or add; in pieces where it has think marks, which
    some write in their own way."""
    return [piece.strip() for piece in THINK_MARK.split(text) if piece.strip()]


def _require(written: str, pieces: Iterable[str], what: str, position: int = 0) -> int:
    """Where the last of some pieces ends, which must stand in a text in their order."""
    for piece in pieces:
        found = written.find(piece, position)
        if found < 0:
            raise UnfitForm(f"{what} {piece[:60]!r} does not stand in what it writes ({written[-120:]!r})")
        position = found + len(piece)
    return position


def _content_parts(text: str) -> list[dict[str, str]]:
    """`"a <image> b"` as the list of text and image parts that chat templates take."""
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(text.split(IMAGE_MARK)):
        if i:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
