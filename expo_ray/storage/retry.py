"""Asking again: after a transient failure, and where nothing guards the bytes on their way."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from expo_ray.errors import TransientStorageError

ATTEMPTS = 6
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 8.0

logger = logging.getLogger(__name__)
T = TypeVar("T")


def retry_transient(ask: Callable[[], T]) -> T:
    """The first answer of at most `ATTEMPTS`, with exponentially growing, jittered pauses; about 6 s in all.

    Raises:
        TransientStorageError: the last one, if no attempt was answered. Any other error passes at once.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return ask()
        except TransientStorageError as error:
            delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            logger.info("attempt %d of %d failed, next in %.1f s: %s", attempt, ATTEMPTS, delay_s, error)
            time.sleep(delay_s)
    try:
        return ask()
    except TransientStorageError as error:
        raise TransientStorageError(f"{error} (asked {ATTEMPTS} times)") from error


def read_agreed(fetch: Callable[[], T], uri: str) -> T:
    """Bytes that two reads agree on; for connections without TLS, where a flipped bit goes unnoticed otherwise.

    A ranged GET carries no checksum of its range, so the only witness is a second read; where the two differ a third decides.

    Raises:
        TransientStorageError: if three reads give three different contents.
    """
    first = fetch()
    second = fetch()
    if first == second:
        return first
    logger.warning("%s: two reads of the same range differ; reading it a third time", uri)
    third = fetch()
    if third in (first, second):
        return third
    raise TransientStorageError(
        f"{uri}: three reads of the same range gave three contents; the network corrupts data, use an https endpoint"
    )
