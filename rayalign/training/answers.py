"""What the model itself says to a few held-out prompts, before the first step and at the end: asked on every worker, kept in
the run's folder, shown by its report.

Nothing here ends a run: a model that can't be asked is named in the log and on the page. Where workers hold shards of it and
only one of them fails, the others wait for it in the middle of a forward: the run starts again then, and does not ask any more.
"""

import dataclasses
import logging
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import TypeAdapter

from rayalign.data.store import PreparedData, Rows, from_batch
from rayalign.report.conversations import Answers
from rayalign.storage import Store
from rayalign.training.distributed import gather, group_beside

if TYPE_CHECKING:
    from rayalign.data.encoder_spec import EncoderSpec
    from rayalign.policy.policy import Policy

logger = logging.getLogger(__name__)

ANSWERS = "answers.json"
"""The file of a run's folder: what was answered at each moment, by record, and why it could not be asked."""

Moment = Literal["before", "after"]

MAX_NEW_TOKENS = 64

PATIENCE = 120.0
"""Seconds within which workers that answer together come to the end of it, one after the other."""

_FILE = TypeAdapter(Answers)


def sample_of(rows: Rows, count: int) -> Rows:
    """At most so many of the rows, spread over them evenly; the same ones each time."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))]


def ask(
    moment: Moment,
    policy: "Policy",
    spec: "EncoderSpec",
    data: PreparedData,
    rows: Rows,
    *,
    folder: Store,
    rank: int,
    workers: int,
    together: bool = False,
) -> None:
    """Keeps the policy's answers to the prompts of some rows, each worker a share of them, or all of them `together`, which a
    sharded policy needs. Every worker calls it. Answers from before the training stay what they are once they are there.

    Raises RuntimeError where this worker alone of those that answer together failed."""
    known: Answers = gather(read_answers(folder) if rank == 0 else None)[0]
    if (moment == "before" and known.before) or known.gave_up:
        return
    # Apart from the group of the forwards, in one of which the others may wait.
    meeting = group_beside(seconds=PATIENCE) if together else None
    from rayalign.policy.generation import generate_answers  # here: who reads answers needs no model

    texts: dict[str, str] = {}
    failed = ""
    try:
        pairs = from_batch(data.reader().read(rows if together else rows[rank::workers]))
    except Exception as error:  # noqa: BLE001  # of storage
        failed, pairs = f"{type(error).__name__}: {error}", []
    if together and any(gather(failed)):
        pairs = []  # what one can't read all leave alone
    try:
        said = generate_answers(policy, spec, pairs, max_new_tokens=MAX_NEW_TOKENS)
        texts = {pair.id: text for pair, text in zip(pairs, said, strict=True)}
    except Exception as error:  # noqa: BLE001  # of a model: a run is worth more than what it says
        failed = f"{type(error).__name__}: {error}"
    try:
        everyone = gather((texts, failed), group=meeting)
    except RuntimeError:
        if not failed:
            raise
        _keep(folder, moment, {}, failed, gave_up=True)
        raise RuntimeError(
            f"This worker alone could not answer held-out prompts, and the others wait for it ({failed}). A new start leaves "
            "the answers out."
        ) from None
    if rank == 0:
        said_by_all = {name: text for worker in everyone for name, text in worker[0].items()}
        _keep(folder, moment, said_by_all, max(e[1] for e in everyone))


def read_answers(folder: Store) -> Answers:
    """What is kept in a run's folder; nothing where there is nothing, or nothing that can be read."""
    file = folder / ANSWERS
    try:
        return _FILE.validate_json(file.read_bytes()) if file.exists() else Answers()
    except (OSError, ValueError) as error:
        logger.warning("The answers in %s can't be read: %s", folder.location, error)
        return Answers()


def _keep(folder: Store, moment: Moment, texts: dict[str, str], failed: str, *, gave_up: bool = False) -> None:
    if failed:
        logger.warning("The model could not be asked for answers of its own, for the report: %s", failed)
    kept = dataclasses.asdict(read_answers(folder)) | {moment: texts, "failed": failed, "gave_up": gave_up}
    try:
        (folder / ANSWERS).write_json(kept)
    except OSError as error:
        logger.warning("The model's own answers could not be kept: %s", error)
