"""Repeated requests: after a transient failure, and to compare bytes that nothing guards on their way."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from expo_ray.errors import StorageError, TransientStorageError

ATTEMPTS = 6
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 8.0
READINGS = 3

logger = logging.getLogger(__name__)
T = TypeVar("T")


def retry_transient(ask: Callable[[], T]) -> T:
    """Call `ask` until it answers, at most `ATTEMPTS` times, with exponentially growing, jittered pauses; about 6 s in all.

    Raises:
        TransientStorageError: the last one, if every attempt failed. Any other error passes at once.
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


def retry_translated(ask: Callable[[], T], translate: Callable[[Exception], StorageError]) -> T:
    """`retry_transient(ask)`, where `ask` calls a client library whose errors `translate` turns into ours."""

    def translated() -> T:
        try:
            return ask()
        except StorageError:
            raise
        except Exception as error:
            raise translate(error) from error

    return retry_transient(translated)


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
