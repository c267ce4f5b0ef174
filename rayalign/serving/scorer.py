"""A reward model that scores responses: several requests as one batch, by the forward of training.

The counterpart of `engine` for what `rm` trained. `app` calls it.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rayalign.algorithms import Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.data.batch import assemble
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.pairs import EncodedPair, rows_of_two
from rayalign.formats.records import Message, record_errors
from rayalign.models.source import ModelSource
from rayalign.ops.value_head import find_value_head
from rayalign.policy.loading import load_policy
from rayalign.policy.policy import Policy
from rayalign.serving.batching import Batcher
from rayalign.serving.conversation import record_of

logger = logging.getLogger(__name__)


class ScoringFailed(RuntimeError):
    """A batch failed while it ran, through no fault of the request."""


@dataclass(frozen=True)
class _Scoring:
    """Responses of one request, and what is called with their scores."""

    pairs: Sequence[EncodedPair]
    on_scores: Callable[[list[float] | ScoringFailed], None]


class Scorer:
    """Scores responses to a conversation with the reward model that is called `name`; one thread runs it."""

    def __init__(self, policy: Policy, encoder: Encoder, name: str, *, max_batch_size: int) -> None:
        self.name = name
        self._policy, self._encoder = policy, encoder
        self._max_batch_size = max_batch_size
        self._encoding = threading.Lock()  # tokenizers are not made for several threads
        self._batcher = Batcher(self._run, max_batch_size=max_batch_size)

    @property
    def num_open(self) -> int:
        """Requests that wait or are scored."""
        return self._batcher.num_open

    def prepare(self, messages: Sequence[Message], images: Sequence[bytes], responses: Sequence[str]) -> list[EncodedPair]:
        """Each response to a conversation as a row. Raises RecordError for what can't be encoded, or is too long."""
        with record_errors(), self._encoding:
            return [self._encoder.encode(record_of(messages, images, response), images) for response in responses]

    def submit(self, pairs: Sequence[EncodedPair], on_scores: Callable[[list[float] | ScoringFailed], None]) -> None:
        """Asks for the scores of rows; `on_scores` is called on the scorer's own thread."""
        self._batcher.submit(_Scoring(pairs, on_scores))

    def _run(self, scorings: Sequence[_Scoring]) -> None:
        outcome: list[float] | ScoringFailed
        try:
            outcome = self._scores([pair for scoring in scorings for pair in scoring.pairs])
        except Exception as error:  # whatever goes wrong must not end the thread, on which all others wait
            logger.exception("A batch of %d requests failed", len(scorings))
            outcome = ScoringFailed(f"{type(error).__name__}: {str(error)[:200]}")
        start = 0
        for scoring in scorings:
            end = start + len(scoring.pairs)
            scoring.on_scores(outcome[start:end] if isinstance(outcome, list) else outcome)
            start = end

    def _scores(self, pairs: Sequence[EncodedPair]) -> list[float]:
        """The scores of responses, of which no more rows run at a time than there may be requests: one request has up to 64."""
        rows = rows_of_two(dict(enumerate(pairs)))
        scores: dict[int, float] = {}
        for start in range(0, len(rows), self._max_batch_size):
            some = rows[start : start + self._max_batch_size]
            sides = self._values([row for row, _ in some])
            for (_, numbers), both in zip(some, torch.stack(sides, dim=1).tolist(), strict=True):
                scores |= zip(numbers, both, strict=False)
        return [scores[i] for i in range(len(pairs))]

    def _values(self, rows: Sequence[EncodedPair]) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self._encoder.spec
        batch = assemble(rows, layout=spec.layout, process_images=image_processing(spec)).to(self._policy.device)
        with torch.inference_mode():
            return self._policy.values(batch, self._policy.image_features(batch))


def is_reward_model(source: ModelSource) -> bool:
    """Whether a folder on this machine is that of a reward model."""
    return find_value_head(Path(source.adapter or source.base)) is not None


def load_scorer(
    source: ModelSource,
    name: str,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    device: torch.device,
    max_length: int,
    max_pixels: int | None,
    max_batch_size: int,
) -> Scorer:
    """Loads a reward model's folder. Raises ValueError for weights, an adapter or a head that do not fit."""
    source = source.here()
    flags = ModelConfig(dtype=dtype, gradient_checkpointing=False)
    # A model without an adapter gets a new one, which adds 0: full tuning would keep its weights in float32.
    policy = load_policy(source, model=flags, tuner=TunerConfig(), device=device, needs=Needs(head="value"))
    policy.model.eval()
    encoder = Encoder(EncoderSpec(source.base, "both", max_length=max_length, max_pixels=max_pixels))
    return Scorer(policy, encoder, name, max_batch_size=max_batch_size)
