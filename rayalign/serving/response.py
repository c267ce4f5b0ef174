"""A response while it is generated: how its tokens are chosen, what is told of them, and when it ends. `engine` runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rayalign.data.batch import PairBatch
from rayalign.serving.response_text import ResponseText

GREEDY_BELOW = 1e-5
"""Temperatures below it are as good as 0, and would take logits out of float32's range."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: at `temperature` 0 the likeliest, else drawn among the likeliest that have `top_p` together. The
    same `seed` draws the same response, whatever else runs. A `stop` text ends the response before it."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the response as the model takes it: a batch of one row, whose response has no tokens."""

    batch: PairBatch

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens


@dataclass(frozen=True)
class Piece:
    """Some more text of a response, and how many tokens it has by now; the last piece says why it ends."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None


class GenerationFailed(RuntimeError):
    """The model failed while it ran, through no fault of the request."""


class Generation:
    """A response that is asked for: waits, runs, and tells `on_piece` what comes of it, the last time with a piece that says
    why it ends, or with the error that ended it. `cancel` ends it without another word.

    All but `cancel` is called by the thread that runs the model. `last` is the token that was taken last.
    """

    def __init__(
        self,
        adapter: str | None,
        prompt: Prompt,
        sampling: Sampling,
        text: ResponseText,
        on_piece: Callable[[Piece | GenerationFailed], None],
    ) -> None:
        self.adapter, self.prompt, self.done, self.last = adapter, prompt, False, -1
        self._sampling, self._text, self._on_piece = sampling, text, on_piece
        self._num_tokens = 0
        self._generator: torch.Generator | None = None

    def cancel(self) -> None:
        self.done = True

    def fail(self, error: Exception) -> None:
        if not self.done:
            self.done = True
            self._on_piece(GenerationFailed(f"{type(error).__name__}: {str(error)[:200]}"))

    def chosen(self, likeliest: int, logits: Tensor) -> int:
        """The next token by the logits [V] of all, of which the likeliest is known."""
        if self._sampling.temperature < GREEDY_BELOW:
            return likeliest
        if self._generator is None:
            self._generator = torch.Generator(logits.device).manual_seed(self._sampling.seed)
        return draw(logits, self._sampling, self._generator)

    def take(self, token: int, ends: frozenset[int]) -> None:
        """Takes the token that was chosen, and says what comes of it."""
        if self.done:
            return
        reason: FinishReason | None = None
        self.last = token
        if token in ends:
            text, reason = self._text.finish(), "stop"
        else:
            self._num_tokens += 1
            text = self._text.add(token)
            if self._num_tokens == self._sampling.max_new_tokens:
                text, reason = text + self._text.finish(), "length"
            if self._text.stopped:
                reason = "stop"
        if text or reason:
            self.done = reason is not None
            self._on_piece(Piece(text, self._num_tokens, reason))


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn by its logits [V]: among the likeliest whose probabilities reach `top_p` together."""
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        # A token stays where those before it do not reach top_p by themselves; the first one always does.
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0
        return int(tokens[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
