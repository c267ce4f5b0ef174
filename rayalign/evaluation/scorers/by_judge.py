"""Scores by a judge: a model behind an OpenAI-compatible URL, which sees the pictures, the question and the response.

What it writes is kept word for word beside the score that is read out of it.
"""

import base64
import functools
import io
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import urllib3
from urllib3.util import Retry

from rayalign.config.config import Config
from rayalign.data.rows import Sources
from rayalign.evaluation.scorers.scorer import Candidate, Score, Scored, ScoreFunction
from rayalign.formats.records import IMAGE_MARK, RecordError, record_errors
from rayalign.images.fetch import fetch_images, open_image
from rayalign.models.source import ModelSource
from rayalign.storage import Store

KEY_VARIABLE = "OPENAI_API_KEY"
"""Holds the key that is sent to the judge's server, on each worker."""

INSTRUCTION = """You are shown a question, pictures where it has some, and a response. Judge how good the response is: whether
what it says is right and to be seen in the pictures, whether it says what was asked, and whether it makes nothing up.

Question: {query}

Response: {response}

Explain your judgement in a few sentences. End with a line "Score: N", where N is a number from 1 (worthless) to 10 (perfect).
"""


def judge_key() -> str | None:
    """The key of KEY_VARIABLE without the line's end that files of secrets have; None where there is none. Raises ValueError,
    which does not quote it, for what no header can hold."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise ValueError(
            f"{KEY_VARIABLE}: holds more than the key of the judge's server: a space, a line's end or a letter that no key "
            "has. Set it to the key alone."
        )
    return key or None


def headers_with(key: str | None) -> dict[str, str]:
    """Of a request to a judge's server."""
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


SECRET_LETTERS = 8
"""Of a key; shorter ones, such as EMPTY, are what a server without keys is sent."""


def without_key(text: str, key: str | None) -> str:
    """What a server or a library says, which may quote the key that it was sent."""
    return text.replace(key, "(the key)") if key and len(key) >= SECRET_LETTERS else text


SECONDS = 120
"""For one judgement."""

RETRIES = Retry(
    total=5,
    connect=2,
    backoff_factor=1,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,
    raise_on_status=False,
)
MAX_JUDGEMENT_TOKENS = 1024

OF_THE_REQUEST = (400, 413, 422)
"""Statuses that say something of one request: a picture that the judge does not take, a text that is too long for it."""

UNREACHABLE = "judge unreachable"

PLAIN_QUESTION = 'Answer with the word "yes".'
"""Any judge that can be reached answers it: a row that fails where this is answered failed by what it holds."""


Ask = Callable[[Sequence[Mapping[str, Any]]], str]
"""What the judge writes to the parts of a message."""


class JudgeUnreachable(ConnectionError):
    """A judge that scores none of some rows, and answers no plain question either: no other row fares better."""


@dataclass(frozen=True)
class JudgeScorer:
    """A judge by its server's URL, which ends before /chat/completions, and the model's name there."""

    url: str
    model: str
    instruction: str
    pattern: str

    kind = "judge"
    source: ModelSource | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"kind": self.kind, "url": self.url, "model": self.model, "prompt": self.instruction, "pattern": self.pattern}

    def load(self, config: Config, sources: Sources) -> ScoreFunction:
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it tells each attempt
        http = urllib3.PoolManager(maxsize=config.optimizer.batch_size)
        return functools.partial(self._score, functools.partial(self._ask, http, judge_key()), config, sources)

    def _score(self, ask: Ask, config: Config, sources: Sources, candidates: Sequence[Candidate]) -> list[Scored]:
        with ThreadPoolExecutor(config.optimizer.batch_size) as threads:
            scores = list(threads.map(functools.partial(self._judge, ask, sources), candidates))
        gone = [score for score in scores if isinstance(score, RecordError) and score.reason == UNREACHABLE]
        if gone and not any(isinstance(score, Score) for score in scores) and not _answers(ask):
            raise JudgeUnreachable(gone[0].words)
        return scores

    def _judge(self, ask: Ask, sources: Sources, candidate: Candidate) -> Scored:
        try:
            said = ask(self.content(sources, candidate))
        except RecordError as error:
            return error
        *_, found = None, *re.finditer(self.pattern, said)
        try:
            return Score(float(found.group(1)), said) if found else RecordError("no score", f"the judge wrote: {said}")
        except (TypeError, ValueError):
            return RecordError("no score", f"--judge_pattern finds no number in: {said}")

    def content(self, sources: Sources, candidate: Candidate) -> list[dict[str, Any]]:
        """The parts of the message that the judge is sent; raises RecordError for images that can't be read."""
        root = Store.at(sources.image_root) if sources.image_root else None
        record = candidate.record
        with record_errors(passing=(OSError,)):
            images = fetch_images(
                record.images, folder=Store(candidate.folder), image_root=root, allow_urls=sources.allow_image_urls
            )
        query = "\n".join(message.content for message in record.messages).replace(IMAGE_MARK, "").strip()
        filled = {"{query}": query, "{response}": record.chosen}  # at once: either may hold the other's mark
        text = re.sub(r"\{query\}|\{response\}", lambda mark: filled[mark.group()], self.instruction)
        urls = [_data_uri(image) for image in images]
        return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]

    def _ask(self, http: urllib3.PoolManager, key: str | None, content: Sequence[Mapping[str, Any]]) -> str:
        """What the judge writes; raises RecordError where it does not answer, UNREACHABLE where that is not the request's
        fault."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": list(content)}],
            "temperature": 0,
            "max_tokens": MAX_JUDGEMENT_TOKENS,
        }
        try:
            answer = http.request(
                "POST",
                f"{self.url}/chat/completions",
                body=json.dumps(body).encode(),
                headers=headers_with(key),
                timeout=SECONDS,
                retries=RETRIES,
            )
        except urllib3.exceptions.HTTPError as error:
            raise RecordError(UNREACHABLE, f"the judge {self.url} can't be reached: {without_key(str(error), key)}") from None
        told = without_key(answer.data.decode(errors="replace"), key)[:300]
        if answer.status != 200:
            reason = "judge failed" if answer.status in OF_THE_REQUEST else UNREACHABLE
            raise RecordError(reason, f"the judge {self.url} answered {answer.status}: {told!r}")
        try:
            said = json.loads(answer.data)["choices"][0]["message"]["content"] or ""
            return str(said).encode(errors="replace").decode()  # JSON can spell half a character, which no file takes
        except (ValueError, LookupError, TypeError):
            raise RecordError("judge failed", f"{self.url} answered no chat completion: {told!r}") from None


def _answers(ask: Ask) -> bool:
    """Whether the judge answers a question that has nothing to do with any row."""
    try:
        ask([{"type": "text", "text": PLAIN_QUESTION}])
    except RecordError as error:
        return error.reason != UNREACHABLE
    return True


def _data_uri(image: bytes) -> str:
    """A picture as servers take it: a PNG, JPEG or WebP as it is, the first frame of any other as PNG. Raises RecordError for
    one that can't be decoded."""
    kind = _kind(image)
    if kind is None:
        kind, file = "png", io.BytesIO()
        open_image(image).save(file, "PNG")
        image = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _kind(image: bytes) -> str | None:
    if image.startswith(b"\x89PNG"):
        return "png"
    if image.startswith(b"\xff\xd8"):
        return "jpeg"
    return "webp" if image[8:12] == b"WEBP" else None


def judge_scorer(url: str, *, model: str | None, prompt_file: str | None, pattern: str) -> JudgeScorer:
    """The scorer of a judge's URL; raises ValueError for flags that it lacks or can't use."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--scorer judge={url}: expected the URL of an OpenAI-compatible server, such as http://host:8000/v1.")
    if not model:
        raise ValueError("--scorer judge: pass --judge_model with the name by which the server knows the judge.")
    judge_key()
    instruction = _instruction_in(prompt_file) if prompt_file else INSTRUCTION
    if "{response}" not in instruction:
        raise ValueError(f"--judge_prompt {prompt_file}: has no {{response}}, so that the judge would see none.")
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"--judge_pattern {pattern!r} is no valid regular expression: {error}.") from None
    if not groups:
        raise ValueError(f"--judge_pattern {pattern!r} has no group, which holds the score: write one such as Score: (\\d+).")
    return JudgeScorer(url.rstrip("/"), model, instruction, pattern)


def _instruction_in(file: str) -> str:
    """The text of --judge_prompt. Raises ValueError where it can't be read."""
    try:
        return Store.at(file).read_bytes().decode()
    except FileNotFoundError:
        problem = "there is no such file. Give a text file with the judge's instruction"
    except UnicodeDecodeError as error:
        problem = f"is no text in UTF-8 (byte {error.start} is {error.object[error.start]:#x}). Save it as UTF-8"
    except (OSError, ValueError) as error:
        problem = f"can't be read ({error}). Give a text file with the judge's instruction"
    raise ValueError(f"--judge_prompt {file}: {problem}.")
