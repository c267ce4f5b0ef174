"""OpenAI's requests and responses: what is read of a body, what is refused and in which words, what is sent back.

https://platform.openai.com/docs/api-reference/chat. What would change a response and is not done is refused, never ignored.
Nothing here knows of HTTP servers or models: `app` puts it together.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import pydantic

from rayalign.formats.records import IMAGE_MARK, Message, RecordError
from rayalign.serving.conversation import require_plain

INVALID = "invalid_request_error"

URL_SCHEMES = ("http://", "https://")
DATA_SCHEME = "data:image/"

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Parameters that are taken with these values only, which are as good as none."""

WITHOUT_EFFECT = ("user", "safety_identifier", "metadata", "prompt_cache_key")
"""Parameters that say who asks, and change no response."""


class ApiError(Exception):
    """A request that is answered with an error: the HTTP status, and what OpenAI's clients read of the body."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = INVALID, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind, self.code, self.param = message, status, kind, code, param

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for: tokens of a response; images, and bytes of each; bytes of the body."""

    max_new_tokens: int
    max_images: int
    max_image_bytes: int
    max_body_bytes: int
    allow_image_urls: bool


class _Given(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class _Text(_Given):
    type: Literal["text"]
    text: str


class _Url(_Given):
    url: str
    detail: Literal["auto", "high"] = "auto"


class _Image(_Given):
    type: Literal["image_url"]
    image_url: _Url


class _Turn(_Given):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[_Text | _Image, pydantic.Field(discriminator="type")]]


class _StreamOptions(_Given):
    include_usage: bool = False


class ChatRequest(_Given):
    """The body of /v1/chat/completions."""

    model: str
    messages: list[_Turn] = pydantic.Field(min_length=1)
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    temperature: float = pydantic.Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = pydantic.Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = pydantic.Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def num_tokens(self, limits: Limits) -> int:
        """Tokens that the response may have. Raises ApiError for more than the server gives."""
        asked = self.max_completion_tokens or self.max_tokens or limits.max_new_tokens
        if asked > limits.max_new_tokens:
            name = "max_completion_tokens" if self.max_completion_tokens else "max_tokens"
            raise ApiError(f"{name} is {asked}; this server gives {limits.max_new_tokens} at the most.", param=name)
        return asked


class ScoreRequest(_Given):
    """The body of /v1/score: the responses to one conversation."""

    model: str
    messages: list[_Turn] = pydantic.Field(min_length=1)
    responses: list[str] = pydantic.Field(min_length=1, max_length=64)


Request = TypeVar("Request", ChatRequest, ScoreRequest)


def parse(kind: type[Request], body: bytes) -> Request:
    """Reads a request's body. Raises ApiError that says which parameter is wrong, and why."""
    try:
        values = _without_nulls(json.loads(body))
        _check_texts(values)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"The body is no JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ApiError("The body must be a JSON object.")
    given = {name: value for name, value in values.items() if name not in WITHOUT_EFFECT}
    for name, neutral in NEUTRAL.items():
        if name in given and given.pop(name) not in neutral:
            raise ApiError(f"{name} is not supported by this server: leave it out.", code="unsupported_parameter", param=name)
    try:
        request = kind.model_validate(given)
    except pydantic.ValidationError as error:
        raise _invalid(error) from None
    if isinstance(request, ChatRequest):
        stops = request.stops
        if len(stops) > 4 or not all(0 < len(stop) <= 256 for stop in stops):
            raise ApiError("stop must be up to 4 texts of 1 to 256 characters each.", param="stop")
    return request


def conversation(request: ChatRequest | ScoreRequest, limits: Limits) -> tuple[list[Message], list[str]]:
    """The messages, with `<image>` marks where images stand, and the images' URLs in their order. Raises ApiError for images
    that are too many, too large, or neither data: URIs nor, where they are allowed, http(s) URLs."""
    messages, urls = [], []
    for i, turn in enumerate(request.messages):
        where = f"messages.{i}.content"
        parts = [_Text(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        content = ""
        for part in parts:
            if isinstance(part, _Text):
                content += _plain(part.text, where)
                continue
            if turn.role != "user":
                raise ApiError("Images can stand in messages of the user only.", param=where)
            _check_url(part.image_url.url, limits, where)
            urls.append(part.image_url.url)
            content += IMAGE_MARK
        messages.append(Message(role="system" if turn.role == "developer" else turn.role, content=content))
    if len(urls) > limits.max_images:
        raise ApiError(f"{len(urls)} images; this server takes {limits.max_images} in a request.", param="messages")
    return messages, urls


def record_error(error: RecordError) -> ApiError:
    """The answer to a conversation that can't be encoded."""
    if error.reason == "too long":
        return ApiError(f"The conversation is too long: {error.words}.", code="context_length_exceeded", param="messages")
    return ApiError(f"{str(error)[:500]}.", param="responses" if error.field == "responses" else "messages")


def unknown_model(name: str, names: Sequence[str]) -> ApiError:
    words = f"There is no model {name[:100]!r} here. There are: {', '.join(names)}."
    return ApiError(words, status=404, code="model_not_found", param="model")


def models_page(names: Sequence[str], created: int) -> dict[str, Any]:
    return {"object": "list", "data": [model_entry(name, created) for name in names]}


def model_entry(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "rayalign"}


@dataclass(frozen=True)
class Completion:
    """Writes what is sent back of one response."""

    id: str
    model: str
    created: int

    @classmethod
    def of(cls, model: str, created: int) -> "Completion":
        return cls(f"chatcmpl-{secrets.token_hex(12)}", model, created)

    def whole(self, text: str, finish_reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": dict(usage)}

    def chunk(self, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        """A piece of the response; the first one, without a text, says whose it is."""
        delta: dict[str, str] = {"role": "assistant", "content": ""} if text is None else {"content": text} if text else {}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, usage: Mapping[str, int]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": dict(usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def scores_page(model: str, scores: Sequence[float], prompt_tokens: int) -> dict[str, Any]:
    data = [{"object": "score", "index": i, "score": score} for i, score in enumerate(scores)]
    return {"object": "list", "model": model, "data": data, "usage": usage_of(prompt_tokens, 0)}


def event(body: Mapping[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def _check_url(url: str, limits: Limits, where: str) -> None:
    if url.startswith(DATA_SCHEME):
        # Of base64, four letters are three bytes.
        if len(url) * 3 / 4 > limits.max_image_bytes + 256:
            raise too_large(limits, where)
    elif url.startswith(URL_SCHEMES):
        if not limits.allow_image_urls:
            raise ApiError("This server fetches no images: send them as data:image/...;base64,... URIs.", param=where)
    else:
        allowed = "data:image/... URI or http(s) URL" if limits.allow_image_urls else "data:image/... URI"
        raise ApiError(f"An image must be a {allowed}, and {url[:40]!r} is none.", param=where)


def too_large(limits: Limits, where: str) -> ApiError:
    return ApiError(f"An image has more than {limits.max_image_bytes / 2**20:g} MiB, which is the limit.", param=where)


def _plain(text: str, where: str) -> str:
    try:
        return require_plain(text)
    except RecordError as error:
        raise ApiError(f"{error.words}.", param=where) from None


def _check_texts(value: Any, place: str = "") -> None:
    """Raises ApiError for half a surrogate pair anywhere in a body: JSON can spell it, and nothing can encode it or send it
    back."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            where = place or "The body"
            raise ApiError(f"{where}: half a surrogate pair at character {error.start}.", param=place or None) from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_texts(key, place)
            _check_texts(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_texts(inner, f"{place}.{i}".lstrip("."))


def _without_nulls(value: Any) -> Any:
    """Without what is null, which is as good as not given: clients write out all that a message could have."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _invalid(error: pydantic.ValidationError) -> ApiError:
    """The first thing that is wrong with a request; of a message's content, the first about the form that it has."""
    first = min(error.errors(include_url=False), key=lambda found: -len(found["loc"]))
    # pydantic names the alternative that it tried, too.
    place = ".".join(str(word) for word in first["loc"] if word != "str" and not str(word).startswith("list["))
    if first["type"] == "extra_forbidden":
        return ApiError(
            f"{place} is unknown to this server, or not supported: leave it out.", code="unknown_parameter", param=place
        )
    code = "missing_required_parameter" if first["type"] == "missing" else None
    return ApiError(f"{place}: {first['msg']}.", code=code, param=place or None)
