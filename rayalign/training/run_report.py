"""A run's report.html: what is shown, read from the run's folder and its data, and written while the run goes on.

Nothing here ends or slows a run: what fails while a page is made is logged once, and the run goes on without it.
"""

import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayalign.config.config import Config
from rayalign.data.store import PreparedData, from_batch
from rayalign.report.conversations import Conversation
from rayalign.report.health import Metrics
from rayalign.report.page import Times, render_report
from rayalign.report.pairs import ScoredPair, extremes
from rayalign.storage import Store
from rayalign.training.answers import read_answers
from rayalign.training.metric_names import PAIR_TOKENS

if TYPE_CHECKING:
    from rayalign.data.prepare import RunData

logger = logging.getLogger(__name__)

REPORT = "report.html"

SCORES = "held_out_scores.json"
"""The file of a run's folder with the held-out pairs' own values by metric, which rank 0 leaves for the driver: they would go
through Ray Train's controller from every worker."""

LONGEST_WAIT_SECONDS = 60.0
"""How long the end of a run waits for the page that is being written."""

Scores = Mapping[str, Mapping[str, float]]
"""Each held-out pair's own values by metric."""


class Background:
    """Does one thing at a time in a thread beside the training; what comes while it is busy is left out."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._has_failed = False

    def run(self, work: Callable[[], None]) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._guarded, args=(work,), name="report", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until all is done, but not for ever."""
        if self._thread is not None:
            self._thread.join(LONGEST_WAIT_SECONDS)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of any kind, storage's included: the run is worth more than its page
            if not self._has_failed:
                of_storage = isinstance(error, OSError)
                words = f" ({error})" if of_storage else ""
                logger.warning("The report could not be written%s; the run goes on without it", words, exc_info=not of_storage)
            self._has_failed = True


def keep_scores(folder: Store, scores: Scores) -> None:
    """Writes the scores into a run's folder."""
    (folder / SCORES).write_json(scores)


def read_scores(folder: Store) -> Scores:
    """The scores that a finished training left."""
    return (folder / SCORES).read_json_object()


def write_report(
    folder: Store,
    config: Config,
    data: "RunData",
    scores: Scores,
    *,
    metrics: Metrics,
    num_steps: int,
    times: Times,
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page; without a summary, of a run that has not finished."""
    held_out = data.held_out or data.training
    answers = read_answers(folder)
    rows = held_out.rows_of(frozenset([*scores, *answers.records]))
    pairs = [scored_pair(pair_id, scores[pair_id]) for pair_id in rows if pair_id in scores]
    shown = [pair.id for side in extremes(pairs) for pair in side]
    page = render_report(
        title=folder.name,
        config=config.to_dict() | {"rlhf_type": config.algorithm.name},
        summary=summary or {},
        metrics=metrics,
        dropped=Counter(line["reason"] for line in dropped_lines(data)),
        pairs=pairs,
        conversations=_conversations(
            held_out, data, sorted({rows[pair] for pair in [*shown, *answers.records] if pair in rows})
        ),
        answers=answers,
        times=times,
        num_steps=num_steps,
        score_name="log-prob per token" if data.spec.responses == "chosen" else "reward",
    )
    (folder / REPORT).write_bytes(page.encode())


def dropped_lines(data: "RunData") -> list[dict[str, Any]]:
    """The records left out, of the training and of the held-out data sets, as dropped.jsonl lists them."""
    return [line for some in (data.training, data.held_out) if some for line in some.dropped()]


def scored_pair(pair_id: str, score: Mapping[str, float]) -> ScoredPair:
    """A held-out record with its own values by metric, as the page and the warnings look at it."""
    chosen_tokens, rejected_tokens = (int(score[name]) for name in PAIR_TOKENS)
    return ScoredPair(
        id=pair_id,
        reward_chosen=_reward(score, "chosen", chosen_tokens),
        reward_rejected=_reward(score, "rejected", rejected_tokens),
        tokens_chosen=chosen_tokens,
        tokens_rejected=rejected_tokens,
    )


def _reward(score: Mapping[str, float], side: str, tokens: int) -> float:
    """A response's reward; without rewards its log-prob per token; nan where the row has no such response."""
    if f"rewards/{side}" in score:
        return score[f"rewards/{side}"]
    return score[f"logps/{side}"] / tokens if f"logps/{side}" in score and tokens else math.nan


def _conversations(held_out: PreparedData, data: "RunData", rows: Sequence[int]) -> dict[str, Conversation]:
    """The texts and pictures of some records. Responses are what is trained on or compared."""
    decode = data.spec.tokenizer.decode
    return {
        pair.id: Conversation(
            turns=tuple((role, text) for role, text in json.loads(pair.conversation)),
            chosen=decode(pair.chosen_ids, skip_special_tokens=True).strip(),
            rejected=decode(pair.rejected_ids, skip_special_tokens=True).strip(),
            images=tuple(pair.images),
        )
        for pair in (found.as_evaluated() for found in from_batch(held_out.reader().read(rows)))
    }
