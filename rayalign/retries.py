"""Work that is done again, after a pause, where storage or the network failed it: how often, and after which errors."""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.5
"""The wait after the first failure; each is twice the one before, 16 s in all, less a random share of each. (Arrow's client of
S3 tries again by itself for 6 s in each attempt, but not after every error.)"""

LASTING_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
LASTING_WORDS = (
    *("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID", "SIGNATURE_DOES_NOT_MATCH"),
    *("HTTP status 301", "HTTP status 401", "HTTP status 403", "HTTP status 404"),
    *("Not a regular file", "does not exist", "' not found", "credentials"),
)
"""In the errors of object stores that answer the same however often they are asked."""


class StorageFailed(OSError):
    """An object store failed at something until no attempt was left; says at what, and its last error."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.EIO  # so that nobody takes it for an error in a file's content


def retried(work: Callable[[], T], place: str) -> T:
    """The result of some work at an object store, which is done again from its beginning where the store fails.

    Raises StorageFailed, which names the place, after the last attempt, and at once what would not change.
    """
    wait, lots = FIRST_WAIT_SECONDS, random.SystemRandom()  # no draw from the run's own generators
    started = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except OSError as error:
            if isinstance(error, StorageFailed) or is_lasting(error):
                raise
            if attempt == ATTEMPTS:
                seconds = time.monotonic() - started
                words = " ".join(str(error).split()).rstrip(".")
                raise StorageFailed(
                    f"{place}: the storage failed {ATTEMPTS} times in {seconds:.0f} s, at last with: {words}."
                ) from None
            logger.info("Storage: attempt %d of %d at %s failed: %s", attempt, ATTEMPTS, place, error)
        time.sleep(wait * lots.uniform(0.5, 1))
        wait *= 2
    raise AssertionError("the last attempt returns or raises")


def is_lasting(error: OSError) -> bool:
    """Whether an error will be the same at the next attempt: what is asked for is not there or not allowed, or the local disk
    is full. (Errors of object stores come without a number.)"""
    if isinstance(error, LASTING_ERRORS):
        return True
    if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        return True
    return any(words in str(error) for words in LASTING_WORDS)
