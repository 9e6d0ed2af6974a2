"""Repeated requests: after a transient failure, and to compare bytes that nothing guards on their way."""

from __future__ import annotations

import itertools
import logging
import os
import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from expo_ray.errors import SlowDown, StorageError, TransientStorageError
from expo_ray.storage.pace import Pace, pause

ATTEMPTS = 6
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 8.0
READINGS = 3

logger = logging.getLogger(__name__)
T = TypeVar("T")


def retry_transient(ask: Callable[[], T], pace: Pace | None = None) -> T:
    """Call `ask` until it answers, with exponentially growing, jittered pauses.

    It is given up after `ATTEMPTS` attempts, about 6 s; but a store that has answered before is asked for `PATIENCE_S`.

    Args:
        pace: turns of this process at the store; left out, every attempt begins at once.

    Raises:
        TransientStorageError: the last one, if every attempt failed. Any other error passes at once.
    """
    pace = pace or Pace()
    began = time.monotonic()
    for attempt in itertools.count(1):
        turn = pace.wait_for_turn()
        try:
            answer = ask()
        except TransientStorageError as error:
            if isinstance(error, SlowDown):
                pace.refused(turn, error.retry_after_s)
            waited_s = time.monotonic() - began
            if attempt >= ATTEMPTS and waited_s >= (pace.patience_s if error.passes_with_time else 0):
                raise _given_up(error, attempt, waited_s) from error
            delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            logger.info("attempt %d failed, next in %.1f s or more: %s", attempt, delay_s, error)
            pause(delay_s)
        else:
            pace.answered(turn)
            return answer
    raise AssertionError("the attempts do not end")


def _given_up(error: TransientStorageError, attempts: int, waited_s: float) -> TransientStorageError:
    """The same error, with how long the store was asked for."""
    last = type(error)(f"{error} (asked {attempts} times in {waited_s:.0f} s)")
    last.__dict__.update(error.__dict__)
    return last


def retry_translated(
    ask: Callable[[], T], translate: Callable[[Exception], StorageError], pace: Pace | None = None
) -> T:
    """`retry_transient(ask)`, where `ask` calls a client library whose errors `translate` turns into ours."""

    def translated() -> T:
        try:
            return ask()
        except StorageError:
            raise
        except Exception as error:
            raise translate(error) from error

    return retry_transient(translated, pace)


def reads_twice() -> bool:
    """True if the user wants everything that no TLS guards to be read twice, whether or not a checksum is compared."""
    return os.environ.get("EXPO_RAY_READ_TWICE", "") not in {"", "0"}


def read_agreed(read: Callable[[], T], agrees: Callable[[T], bool], uri: str) -> T:
    """Read until a second reading (`agrees`) finds the same bytes; for connections without TLS.

    Over plain HTTP nothing but TCP's weak checksum guards the bytes, and a ranged GET carries no digest of its range: the only
    witness of a flipped bit is a second read.

    Raises:
        TransientStorageError: if no two readings in a row agree.
    """
    for _ in range(READINGS):
        data = read()
        if agrees(data):
            return data
        logger.warning("%s: two reads of the same bytes differ; reading them again", uri)
    raise TransientStorageError(
        f"{uri}: reads of the same bytes differ again and again; the network corrupts data, use an https endpoint"
    )


def copy_pieces(pieces: Iterable[bytes], out: memoryview, uri: str) -> None:
    """Fill `out`, a view of bytes, with what arrives.

    Raises:
        TransientStorageError: if less or more arrives than `out` holds.
    """
    filled = 0
    for piece in pieces:
        end = filled + len(piece)
        if end > len(out):
            break
        out[filled:end] = piece
        filled = end
    else:
        if filled == len(out):
            return
    raise TransientStorageError(f"{uri}: asked for {len(out)} bytes and got another number")


def equal_pieces(pieces: Iterable[bytes], out: memoryview) -> bool:
    """Compare the bytes that arrive with those in `out`."""
    seen = 0
    for piece in pieces:
        # `tobytes` because comparing a memoryview goes byte by byte: 6 ms for 4 MiB, where this takes 0.5 ms.
        if out[seen : seen + len(piece)].tobytes() != piece:
            return False
        seen += len(piece)
    return seen == len(out)
