"""Checksums of byte ranges that combine into the one that an object store keeps of a whole object.

The CRCs are those of AWS' own library, awscrt: 20 GB/s and more a core for CRC64NVME and CRC32C, without the GIL.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

# Bytes of each CRC that stores keep, the one to prefer first.
CRC_BYTES = {"CRC64NVME": 8, "CRC32C": 4, "CRC32": 4}


@dataclass(frozen=True, slots=True)
class Checksum:
    """A store's own checksum of a whole object.

    Attributes:
        algorithm: a key of `CRC_BYTES`.
        value: of all bytes.
    """

    algorithm: str
    value: int


@dataclass(frozen=True, slots=True)
class RangeChecksum:
    """Checksum of the bytes of an object from `start` to before `end`, as they were read."""

    start: int
    end: int
    value: int


@cache
def has_awscrt() -> bool:
    """True if awscrt is installed, without which nothing here but `parse_checksum` works."""
    try:
        import awscrt.checksums  # noqa: F401
    except ImportError:
        return False
    return True


def checksum_of(algorithm: str, data: memoryview) -> int:
    """CRC of `data`."""
    import awscrt.checksums

    crc: int = getattr(awscrt.checksums, algorithm.lower())(data)
    return crc


def next_checksum(algorithm: str, data: memoryview, before: int | None) -> int:
    """CRC of bytes whose CRC is `before`, and of `data` behind them."""
    import awscrt.checksums

    crc: int = getattr(awscrt.checksums, algorithm.lower())(data, before or 0)
    return crc


def joined(algorithm: str, ranges: Iterable[RangeChecksum]) -> list[RangeChecksum]:
    """The same ranges in their order, those that follow each other without a gap as one."""
    import awscrt.checksums

    combine: Any = getattr(awscrt.checksums, f"combine_{algorithm.lower()}")
    merged: list[RangeChecksum] = []
    for part in sorted(ranges, key=lambda part: (part.start, part.end)):
        if merged and merged[-1].end == part.start:
            before = merged.pop()
            value = combine(before.value, part.value, part.end - part.start)
            merged.append(RangeChecksum(before.start, part.end, value))
        else:
            merged.append(part)
    return merged


def parse_checksum(algorithm: str, text: str) -> Checksum | None:
    """Read what S3 says of an object; None if it is no checksum of the whole, such as one of the checksums of parts."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:  # `<checksum of checksums>-<parts>`
        return None
    return Checksum(algorithm, int.from_bytes(data)) if len(data) == CRC_BYTES.get(algorithm) else None
