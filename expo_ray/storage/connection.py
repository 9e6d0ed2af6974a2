"""Connection of this process to a bucket, of whatever cloud it is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from expo_ray.storage.pace import Pace

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

CONNECT_TIMEOUT_S = 5.0
# A read is given up after this long without a byte, or in all: 4 MiB in a minute is 70 kB/s.
SILENCE_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
# obstore counts silence from the start of a request, so a body that takes longer to send would be cut off: writes have no
# limit on silence, only one in all.
WRITE_TIMEOUT_S = 60.0
# `retry` repeats requests, so that one store is asked at one pace.
NO_RETRIES: RetryConfig = {"max_retries": 0}
# Parts of an upload are repeated by obstore, which alone knows them. Below the 5 minutes after which a signature is refused.
PART_RETRIES: RetryConfig = {"max_retries": 20, "retry_timeout": timedelta(minutes=4)}


@dataclass(frozen=True)
class Cloud:
    """What messages say of a cloud's settings.

    Attributes:
        credentials: how to give some; ends a sentence.
        rights: to grant, likewise.
        endpoint: the variable with the address of the store.
        certificates: remedy for a certificate that is not trusted.
        region: the variable with the region of a bucket; empty where buckets are found without.
    """

    credentials: str
    rights: str
    endpoint: str
    certificates: str
    region: str = ""


@dataclass(frozen=True)
class Connection:
    """Clients of one bucket.

    Attributes:
        endpoint: where requests go, for messages.
        guarded: TLS guards the bytes on their way.
        reads: obstore's client for GET, HEAD and LIST; retries nothing.
        puts: for single PUT and DELETE; retries nothing.
        uploads: for objects in parts; repeats parts.
        pace: how fast this process asks.
    """

    cloud: Cloud
    bucket: str
    endpoint: str
    guarded: bool
    reads: Any
    puts: Any
    uploads: Any
    pace: Pace


def reading_options(*, allow_http: bool) -> ClientConfig:
    """Options of a client that reads."""
    return {
        "allow_http": allow_http,
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "timeout": timedelta(seconds=READ_TIMEOUT_S),
        "read_timeout": timedelta(seconds=SILENCE_TIMEOUT_S),
    }


def timeouts_of_writes() -> tuple[float, float]:
    """Seconds to connect, and to send a body and get its answer."""
    return CONNECT_TIMEOUT_S, WRITE_TIMEOUT_S


def writing_options(*, allow_http: bool) -> ClientConfig:
    """Options of a client that writes."""
    return {
        "allow_http": allow_http,
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
        "timeout": timedelta(seconds=WRITE_TIMEOUT_S),
    }
