"""A response's tokens as text, while they are generated: what is certain is given out, and a stop text ends it.

`engine` has one for each response. All pieces together are `tokenizer.decode(ids, skip_special_tokens=True).strip()`, up to the
first stop text.
"""

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"
"""What stands for bytes that are no whole character yet."""


class ResponseText:
    """The text of one response. `stopped`: a stop text was found, and the response ends before it."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # What is decoded from `_start` on is text up to `_end`, and what a new token adds to it.
        self._start = self._end = 0
        self._held = ""
        self._begun = False
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes one more token, and returns what is certain to belong to the response by now."""
        self._ids.append(token)
        before, now = self._decode(self._start, self._end), self._decode(self._start, len(self._ids))
        if now.endswith(BROKEN) or len(now) <= len(before):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return self._take(now[len(before) :])

    def finish(self) -> str:
        """What was held back, once there are no more tokens."""
        if self.stopped:
            return ""
        rest = self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._end)) :]
        self._start = self._end = len(self._ids)
        taken = self._take(rest)
        held, self._held = self._held, ""
        return taken if self.stopped else (taken + held).rstrip()

    def _take(self, text: str) -> str:
        """Puts text behind what is held back, and lets go of what no stop text or end can take away any more."""
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)].rstrip()
        # White space is held until more follows, and so is the beginning of a stop text.
        certain = min((len(text) - _overlap(text, stop) for stop in self._stop), default=len(text))
        certain = len(text[:certain].rstrip())
        self._begun = self._begun or certain > 0
        self._held = text[certain:]
        return text[:certain]

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the text's end are the beginning of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
