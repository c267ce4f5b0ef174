"""A tokenizer as `encode` uses it: a prompt's ids as generation begins from them, and those of responses as they follow it."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from rayalign.models.compat import ids_only


class ResponseIds(NamedTuple):
    """A response's ids, and whether a token would cross into it from its prompt, if both were tokenized as one text."""

    ids: list[int]
    crosses_seam: bool


class TextIds:
    """The ids of texts by one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._ids_of = ids_only(tokenizer)
        self._bos: str | None = tokenizer.bos_token
        self._special_tokens = _pattern_of_special_tokens(tokenizer)
        plain, marked = (self._ids_of(["a"], add_special_tokens=special)[0] for special in (False, True))
        self._puts_no_tokens = plain == marked
        self._tokens_behind = _tokens_behind(plain, marked)

    def special_token_in(self, text: str) -> str | None:
        """A special token that a text holds: written there, it is not text but what it stands for."""
        found = self._special_tokens.search(text)
        return None if found is None else found.group()

    def has_bos(self, prompt: str) -> bool:
        """Whether a prompt begins with the token of the beginning, so that the tokenizer must not put it there."""
        return self._bos is not None and prompt.startswith(self._bos)

    def open_ended(self, ids: list[int]) -> list[int]:
        """A prompt's ids without what the tokenizer puts behind every text (`add_eos_token`): it goes on."""
        extra = self._tokens_behind
        return ids[: -len(extra)] if extra and ids[-len(extra) :] == extra else ids

    def prompt_and_responses(self, prompt: str, responses: Mapping[str, str]) -> tuple[list[int], dict[str, ResponseIds]]:
        """The ids of a prompt, with the special tokens that the tokenizer puts before it, and those of `responses`."""
        ids, found = self._plain(prompt, responses)
        if not self.has_bos(prompt) and not self._puts_no_tokens:
            (ids,) = self._ids_of([prompt], add_special_tokens=True)
        return self.open_ended(ids), found

    def responses(self, prompt: str, responses: Mapping[str, str]) -> dict[str, ResponseIds]:
        """The ids of each response (by side) as they follow the prompt's in one tokenization of both. Where a token would cross
        the seam, the prompt keeps the ids that generation sees, and the response is tokenized behind a line break instead."""
        return self._plain(prompt, responses)[1]

    def _plain(self, prompt: str, responses: Mapping[str, str]) -> tuple[list[int], dict[str, ResponseIds]]:
        before, *whole = self._plain_ids(prompt, *(prompt + text for text in responses.values()))
        behind = {side: _behind(before, ids) for side, ids in zip(responses, whole, strict=True)}
        crossing = [side for side, ids in behind.items() if ids is None]
        if crossing:
            line_break, *whole = self._plain_ids("\n", *("\n" + responses[side] for side in crossing))
            behind |= {side: _behind(line_break, ids) for side, ids in zip(crossing, whole, strict=True)}
        found = {}
        for side, ids in behind.items():
            found[side] = ResponseIds(self._plain_ids(responses[side])[0] if ids is None else ids, side in crossing)
        return before, found

    def _plain_ids(self, *texts: str) -> list[list[int]]:
        return self._ids_of(texts, add_special_tokens=False)


def _behind(first: list[int], both: list[int]) -> list[int] | None:
    """The ids of a text behind another; None where a token crosses the seam."""
    return both[len(first) :] if both[: len(first)] == first else None


def _pattern_of_special_tokens(tokenizer: Any) -> re.Pattern[str]:
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


def _tokens_behind(plain: list[int], marked: list[int]) -> list[int]:
    """What stands behind a text's plain ids in those with special tokens."""
    starts = [i for i in range(len(marked)) if marked[i : i + len(plain)] == plain]
    return marked[starts[0] + len(plain) :] if starts else []
