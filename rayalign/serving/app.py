"""The HTTP server of a model: an ASGI application with OpenAI's routes, which `serve` runs in each replica.

`chat_api` reads requests and writes responses, `engine` or `scorer` computes; here they meet, with the token, the limits and
the order in which things are refused: who asks, how much, and only then what.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rayalign.formats.records import RecordError
from rayalign.images.fetch import fetch_images
from rayalign.serving import chat_api
from rayalign.serving.chat_api import ApiError, ChatRequest, Completion, Limits, ScoreRequest
from rayalign.serving.engine import Engine
from rayalign.serving.response import GenerationFailed, Piece, Prompt, Sampling
from rayalign.serving.scorer import Scorer, ScoringFailed
from rayalign.serving.vllm_config import is_loopback
from rayalign.storage import Store

logger = logging.getLogger(__name__)

BODY_SECONDS = 60
"""How long a request's body may take to arrive."""

CHAT, SCORE = "/v1/chat/completions", "/v1/score"

Handler = Callable[[Request], Awaitable[Response]]


def digest_of(token: str) -> str:
    """What the server keeps of its token."""
    return hashlib.sha256(token.encode()).hexdigest()


def build_app(backend: Engine | Scorer, limits: Limits, *, token_digest: str | None, max_concurrency: int) -> Starlette:
    """The application of a model: /v1/models; /v1/chat/completions of an engine, /v1/score of a scorer; /health."""
    server = _Server(backend, limits, token_digest, max_concurrency)
    responds = isinstance(backend, Engine)
    return Starlette(
        routes=[
            Route("/health", server.health),
            Route("/v1/models", server.guarded(server.models)),
            Route("/v1/models/{name:path}", server.guarded(server.model)),
            Route(CHAT, server.guarded(server.chat if responds else server.neither), methods=["POST"]),
            Route(SCORE, server.guarded(server.neither if responds else server.score), methods=["POST"]),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _failure},
    )


class _Server:
    """The routes' handlers, with what they share."""

    def __init__(self, backend: Engine | Scorer, limits: Limits, token_digest: str | None, max_concurrency: int) -> None:
        self._backend, self._limits, self._token_digest = backend, limits, token_digest
        self._max_concurrency = max_concurrency
        self._preparing = 0
        self._created = int(time.time())

    @property
    def _names(self) -> tuple[str, ...]:
        return self._backend.names if isinstance(self._backend, Engine) else (self._backend.name,)

    def guarded(self, handler: Handler) -> Handler:
        """The handler for those who may ask."""

        async def handle(request: Request) -> Response:
            self._authorize(request)
            return await handler(request)

        return handle

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        return JSONResponse(chat_api.models_page(self._names, self._created))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._require_model(name)
        return JSONResponse(chat_api.model_entry(name, self._created))

    async def chat(self, request: Request) -> Response:
        """One response to a conversation, whole or as it comes."""
        engine = self._backend
        assert isinstance(engine, Engine)
        with self._place():
            asked = chat_api.parse(ChatRequest, await self._body(request))
            self._require_model(asked.model)
            max_new_tokens = asked.num_tokens(self._limits)
            prompt = await self._prepared(asked, engine.prepare)
            sampling = Sampling(
                max_new_tokens=max_new_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=asked.seed if asked.seed is not None else time.time_ns() % 2**63,
                stop=asked.stops,
            )
            pieces = _pieces_of(engine, asked.model, prompt, sampling)
        written = Completion.of(asked.model, int(time.time()))
        if asked.stream:
            events = _events(pieces, written, prompt.num_tokens, with_usage=asked.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        text = ""
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                text += piece.text
        usage = chat_api.usage_of(prompt.num_tokens, piece.num_tokens)
        return JSONResponse(written.whole(text, piece.finish_reason or "stop", usage))

    async def score(self, request: Request) -> Response:
        """The scores of some responses to a conversation."""
        scorer = self._backend
        assert isinstance(scorer, Scorer)
        loop = asyncio.get_running_loop()
        scores: asyncio.Future[list[float] | ScoringFailed] = loop.create_future()

        def arrived(outcome: list[float] | ScoringFailed) -> None:
            if not scores.done():
                scores.set_result(outcome)

        with self._place():
            asked = chat_api.parse(ScoreRequest, await self._body(request))
            self._require_model(asked.model)
            responses = asked.responses
            pairs = await self._prepared(asked, lambda messages, images: scorer.prepare(messages, images, responses))
            scorer.submit(pairs, lambda outcome: _tell(loop, arrived, outcome))
        outcome = await scores
        if isinstance(outcome, ScoringFailed):
            raise outcome
        tokens = sum(pair.num_tokens for pair in pairs)
        return JSONResponse(chat_api.scores_page(asked.model, outcome, tokens))

    async def neither(self, request: Request) -> Response:
        """What this kind of model does not do."""
        names = ", ".join(self._names)
        if isinstance(self._backend, Engine):
            raise ApiError(f"{names}: no reward model, so that there are no scores. Responses: POST {CHAT}.", status=404)
        raise ApiError(f"{names} is a reward model, which writes no responses. It scores them: POST {SCORE}.", status=404)

    def _authorize(self, request: Request) -> None:
        if self._token_digest is None:
            # A page in a browser could otherwise reach the server by a name that it lets point to this machine.
            host = request.headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if not is_loopback(name[1:-1] if name.startswith("[") else name):
                words = "This server answers to localhost and this machine's own addresses, such as 127.0.0.1 or [::1], not to"
                raise ApiError(f"{words} {host[:100]!r}.", status=403)
            return
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(digest_of(token.strip()), self._token_digest):
            raise ApiError("The token is missing or wrong (Authorization: Bearer TOKEN).", status=401, code="invalid_api_key")

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Within it, a request is read and encoded, and counts among those that are under way. Raises ApiError where these are
        as many as there may be."""
        if self._preparing + self._backend.num_open >= self._max_concurrency:
            raise ApiError(
                f"{self._max_concurrency} requests are under way, which is the limit: try again in a moment.",
                status=429,
                kind="rate_limit_error",
                code="rate_limit_exceeded",
            )
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    async def _body(self, request: Request) -> bytes:
        # A page in a browser may send other types to any server, unasked.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError("The body must be JSON, and Content-Type say so: application/json.", status=415)
        try:
            return await asyncio.wait_for(self._read(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(f"The body took more than {BODY_SECONDS} seconds.", status=408) from None
        except ClientDisconnect:
            raise ApiError("The client has gone.", status=499) from None

    async def _read(self, request: Request) -> bytes:
        limit = self._limits.max_body_bytes
        too_large = ApiError(f"The body has more than {limit / 2**20:g} MiB, which is the limit.", status=413)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large
        return bytes(body)

    def _require_model(self, name: str) -> None:
        if name not in self._names:
            raise chat_api.unknown_model(name, self._names)

    async def _prepared(self, asked: ChatRequest | ScoreRequest, prepare: Callable[..., Any]) -> Any:
        """What `prepare` makes of a conversation and its images' bytes, beside other requests."""
        messages, urls = chat_api.conversation(asked, self._limits)

        def work() -> Any:
            # Only data: URIs and, where they are allowed, http(s) URLs come here; no path is read.
            images = fetch_images(urls, folder=Store("/nowhere"), image_root=None, allow_urls=self._limits.allow_image_urls)
            if any(len(image) > self._limits.max_image_bytes for image in images):
                raise chat_api.too_large(self._limits, "messages")
            return prepare(messages, images)

        try:
            return await asyncio.to_thread(work)
        except RecordError as error:
            raise chat_api.record_error(error) from None


def _pieces_of(engine: Engine, name: str, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece, None]:
    """Asks for a response, and gives its pieces as they come; it is cancelled where nobody listens any more."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Piece | GenerationFailed]()
    generation = engine.submit(name, prompt, sampling, lambda piece: _tell(loop, arrived.put_nowait, piece))

    async def listen() -> AsyncGenerator[Piece, None]:
        try:
            while True:
                piece = await arrived.get()
                if isinstance(piece, GenerationFailed):
                    raise piece
                yield piece
                if piece.finish_reason:
                    return
        finally:
            generation.cancel()

    return listen()


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[Any], None], value: Any) -> None:
    """Calls something on a loop, from another thread. Where the loop is closed, nobody waits for it any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, value)


async def _events(
    pieces: AsyncIterator[Piece], written: Completion, prompt_tokens: int, *, with_usage: bool
) -> AsyncIterator[bytes]:
    """A response as server-sent events. What goes wrong by now can't be told by the status any more, and is an event itself."""
    yield chat_api.event(written.chunk(None, None))
    num_tokens = 0
    try:
        async for piece in pieces:
            num_tokens = piece.num_tokens
            yield chat_api.event(written.chunk(piece.text, piece.finish_reason))
    except GenerationFailed as error:
        yield chat_api.event(_server_error(error).body)
        return
    if with_usage:
        yield chat_api.event(written.usage_chunk(chat_api.usage_of(prompt_tokens, num_tokens)))
    yield chat_api.event("[DONE]")


def _server_error(error: Exception) -> ApiError:
    words = str(error) if isinstance(error, GenerationFailed | ScoringFailed) else type(error).__name__
    return ApiError(f"The server failed: {words}", status=500, kind="server_error")


def _json(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json(ApiError(f"{request.method} {request.url.path[:100]}: {error.detail}.", status=error.status_code))


async def _failure(request: Request, error: Exception) -> Response:
    return _json(_server_error(error))
