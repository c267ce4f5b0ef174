"""What is behind an error of Ray's: one that a user can fix, or a failure of the cluster in a sentence with what helps."""

from collections.abc import Iterator
from typing import Any

import ray.exceptions
import ray.train

from rayalign.retries import StorageFailed

USER_ERRORS = (ValueError, FloatingPointError)
"""What a user can fix: flags, data, a model's files; a loss that is no longer finite."""

RAY_ERRORS = (ray.exceptions.RayError, ray.train.TrainingFailedError)
"""How Ray says that a task, an actor or a training run failed."""

WORKERS_ERROR = "_base_exc"
"""Where Ray Train keeps the exception that a worker's function raised, in the failure that it reports of the worker. Can go
when Ray Train documents a way to it.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/exceptions.py"""

HEALTH_ERROR = "health_check_failure"
"""The same, where a worker no longer answers. Can go when WORKERS_ERROR can."""

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "pair closure", "ncclRemoteError")
"""What gloo and NCCL say in a worker whose exchange with another one ended with that one."""


def user_error_in(error: Exception) -> ValueError | FloatingPointError | None:
    """The first error that a user can fix among those behind one of RAY_ERRORS."""
    for cause in causes_of(error):
        if isinstance(cause, USER_ERRORS) and not isinstance(cause, RAY_ERRORS):
            return cause
    return None


def cause_in_words(error: Exception) -> str:
    """What is behind one of RAY_ERRORS, in a sentence or two with what helps."""
    causes = list(causes_of(error))
    texts = " ".join(map(str, causes))
    if any(isinstance(c, ray.exceptions.OutOfMemoryError) for c in causes) or "low on memory" in texts:
        return (
            "Ray ended a process because its machine's memory was full. Fewer --num_workers on a machine, a smaller "
            "--batch_size with more --gradient_accumulation_steps, or a lower --max_pixels or --max_length need less."
        )
    # Of workers that fail together, those that only met the end of another one are not the cause.
    ends = [cause for cause in causes if list(causes_of(cause)) == [cause]]
    innermost = next((cause for cause in reversed(ends) if not _met_lost_peer(cause)), ends[-1])
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()] or [""]
    first = lines[0].rstrip(".:")
    if type(innermost).__name__ == "OutOfMemoryError":  # torch's, whose class differs with the kind of device
        return (
            f"a GPU's memory was full ({first}). A smaller --batch_size with more --gradient_accumulation_steps makes the same "
            "update in less; `rayalign plan` tells what fits."
        )
    if isinstance(innermost, StorageFailed):
        return str(innermost)
    if isinstance(innermost, ray.exceptions.OutOfDiskError | ray.exceptions.ObjectStoreFullError):
        return f"a machine's disk or Ray's shared memory was full ({first}). Free some, on every node."
    if isinstance(innermost, ray.exceptions.RayError) or _met_lost_peer(innermost):
        return f"a process or machine of the cluster was lost ({type(innermost).__name__}: {first})."
    return f"{type(innermost).__name__}: {first}."


def is_lost_peer(text: str) -> bool:
    """Whether a line or an error's text is of a worker's exchange with another one that has ended."""
    return any(words in text for words in LOST_PEER)


def _met_lost_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and is_lost_peer(str(error))


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error and those that Ray says are behind it, the outermost first."""
    yield error
    inner: list[Any] = list(getattr(error, "worker_failures", {}).values())
    inner += [getattr(error, name, None) for name in ("controller_failure", "cause", WORKERS_ERROR, HEALTH_ERROR)] + [
        error.__cause__
    ]
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            yield from causes_of(cause)
