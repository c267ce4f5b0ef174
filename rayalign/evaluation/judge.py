"""A judge behind an OpenAI-compatible URL: a prompt goes in, its text comes out. What it said is kept, and not asked again."""

import functools
import json
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import urllib3

from rayalign.evaluation.scorers.by_judge import (
    OF_THE_REQUEST,
    PLAIN_QUESTION,
    RETRIES,
    headers_with,
    judge_key,
    without_key,
)
from rayalign.progress import Progress
from rayalign.storage import Store

logger = logging.getLogger(__name__)

THREADS = 8
TIMEOUT = urllib3.Timeout(connect=10, read=300)

OF_THE_PROMPT = (*OF_THE_REQUEST, 403, 500)
"""Statuses that may say something of one prompt: one that is too long, that a filter holds back, at which the server fails."""


class Refused(ValueError):
    """A judge that gives a prompt no answer, where it may answer others."""


@dataclass(frozen=True)
class Judge:
    """The judge called `model` at `url`, such as http://localhost:8000/v1. It answers greedily, so that it would say the same
    again."""

    url: str
    model: str

    def ask(self, prompt: str) -> dict[str, Any]:
        """The judge's whole answer to a prompt. Raises ValueError where there is none; Refused where that may be the prompt's
        fault."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0.0}
        key = judge_key()
        place = f"{self.url.rstrip('/')}/chat/completions"
        try:
            with urllib3.PoolManager(timeout=TIMEOUT, retries=RETRIES) as pool:
                answer = pool.request("POST", place, body=json.dumps(body).encode(), headers=headers_with(key))
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise ValueError(f"--judge_url {self.url}: the judge can't be reached ({without_key(str(error), key)}).") from None
        if answer.status != 200:
            said = without_key(answer.data.decode(errors="replace"), key)[:300]
            kind = Refused if answer.status in OF_THE_PROMPT else ValueError
            raise kind(f"--judge_url {self.url}: the judge answers {answer.status}: {said}")
        try:
            whole = json.loads(answer.data)
            text_of(whole)
        except (ValueError, KeyError, IndexError, TypeError):
            raise Refused(
                f"--judge_url {self.url}: the answer is no chat completion. Give the URL before /chat/completions, such as "
                "http://localhost:8000/v1."
            ) from None
        return dict(whole)


def text_of(answer: Mapping[str, Any]) -> str:
    """What the judge says in an answer."""
    said = str(answer["choices"][0]["message"]["content"] or "")
    return said.encode(errors="replace").decode()  # JSON can spell half a character, which no file takes


def judge_all(judge: Judge, prompts: Mapping[str, str], kept: Store) -> dict[str, str | None]:
    """What the judge says to each prompt, by its id; None where it refuses to answer that one. Whole answers are kept in a file
    of JSON lines, {"id", "judge", "url", "prompt", "answer"}; what is in it of the same judge is not asked again. Raises
    ValueError where the judge fails; what it said is kept."""
    lines: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []  # of another judge, or on another answer: they cost as much, and may be asked for again
    named = {"judge": judge.model, "url": judge.url.rstrip("/")}
    for line in read_judgements(kept):
        is_asked = named.items() <= line.items() and prompts.get(line["id"]) == line["prompt"]
        (lines if is_asked else others).append(line)
    left = [name for name in prompts if name not in {line["id"] for line in lines}]
    refused: dict[str, Refused] = {}
    progress = Progress(len(left))
    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(left), THREADS):
            some = left[start : start + THREADS]
            answers = dict(
                zip(some, threads.map(functools.partial(_answer, judge), map(prompts.__getitem__, some)), strict=True)
            )
            for name, answer in answers.items():
                if isinstance(answer, dict):
                    lines.append({"id": name, **named, "prompt": prompts[name], "answer": answer})
            kept.write_bytes("".join(json.dumps(line) + "\n" for line in [*others, *lines]).encode())
            for answer in answers.values():
                if isinstance(answer, ValueError) and not isinstance(answer, Refused):
                    raise answer
            refused |= {name: answer for name, answer in answers.items() if isinstance(answer, Refused)}
            if refused.keys() >= answers.keys():
                judge.ask(PLAIN_QUESTION)  # raises where the prompts are not to blame
            if progress.add(len(some)):
                logger.info("Judge: %s", progress.line("answers"))
    if refused:
        first, why = next(iter(refused.items()))
        logger.warning(
            "The judge refuses %d of %d answers, which stay unrated. First: %s: %s", len(refused), len(prompts), first, why
        )
    return {**dict.fromkeys(refused), **{line["id"]: text_of(line["answer"]) for line in lines}}


def _answer(judge: Judge, prompt: str) -> dict[str, Any] | ValueError:
    """An answer or why there is none, so that those of other prompts are kept."""
    try:
        return judge.ask(prompt)
    except ValueError as error:
        return error


def read_judgements(kept: Store) -> Iterator[dict[str, Any]]:
    """The lines of a file of `judge_all`; raises ValueError for a damaged one."""
    if not kept.exists():
        return
    for number, line in enumerate(kept.read_bytes().decode().splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{kept.location}: line {number} is damaged ({error}). Delete the file to ask the judge again."
            ) from None
