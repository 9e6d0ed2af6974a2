"""Were the parents read without a flipped bit? Checksums of all ranges together are compared with those that their stores keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.errors import StorageError
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.reading import known_checksum
from expo_ray.extrapolation.receipt import Receipt
from expo_ray.storage import FileInfo, Store, open_planned
from expo_ray.storage.checksums import Checksum, RangeChecksum, checksum_of, joined
from expo_ray.storage.retry import reads_twice
from expo_ray.text import shown_names

# What guarded a file on its way to us, besides the name of a checksum that was compared.
TLS, TWICE, LOCAL, NOTHING = "TLS", "read twice", "local", "not verified"

# Headers, and tensors that no shard needs, are read to complete a checksum, as long as they are not more than this.
_MOST_UNREAD = 64 << 20
_FILES_AT_ONCE = 8

# What guarded each file of weights, by side and key.
Guards = Mapping[str, Mapping[str, str]]


class DamagedReading(StorageError):
    """Bytes of a parent changed on their way.

    Attributes:
        shards: files of the model that were computed from them, or may have been.
    """

    shards: frozenset[str] = frozenset()


def check_reading(plan: PairPlan, receipts: Sequence[Receipt]) -> Guards:
    """Compare what the shards of a model were computed from with the checksums of the parents' files.

    Args:
        receipts: of every shard.

    Returns:
        What guarded each file of weights.

    Raises:
        DamagedReading: if bytes are not those that the store has.
    """
    return {side: _check_parent(plan, side, parent, receipts) for side, parent in _sides(plan)}


def readers_of(plan: PairPlan, side: str) -> dict[str, set[str]]:
    """The files of weights of a parent that shards are computed from, and the shards of each."""
    readers: dict[str, set[str]] = {}
    is_base = getattr(plan, side) is plan.base
    for shard in plan.shards:
        for tensor in shard.tensors:
            used = (tensor.base if is_base else None, tensor.sft if side == "sft" else None)
            for stored in filter(None, used):
                readers.setdefault(stored.file, set()).add(shard.file)
    return readers


def _sides(plan: PairPlan) -> Iterator[tuple[str, Checkpoint]]:
    yield "sft", plan.sft
    yield "dpo", plan.dpo


def _check_parent(
    plan: PairPlan, side: str, parent: Checkpoint, receipts: Sequence[Receipt]
) -> dict[str, str]:
    store, readers = open_planned(parent.uri, parent.files), readers_of(plan, side)

    def check(file: str) -> str:
        read = {receipt.file: receipt.read.get(side, {}).get(file) for receipt in receipts}
        info = parent.files[file]
        known = known_checksum(parent.uri, info) if store.local_path is None else None
        algorithms = {
            ranges.algorithm if ranges else "" for shard, ranges in read.items() if shard in readers[file]
        }
        if known is None or algorithms != {known.algorithm}:
            return _guard(store)
        ranges = [part for of_shard in read.values() if of_shard for part in of_shard.ranges]
        whole = _completed(store, info, known, joined(known.algorithm, ranges))
        if whole is None:
            return _guard(store)
        if whole != known.value:
            raise _damaged(f"{store.uri}/{file}", known, readers[file])
        return known.algorithm

    with ThreadPoolExecutor(_FILES_AT_ONCE, "check") as pool:
        return dict(zip(sorted(readers), pool.map(check, sorted(readers)), strict=True))


def _guard(store: Store) -> str:
    """What guards a file whose checksum cannot be compared."""
    if store.local_path is not None:
        return LOCAL
    if store.guarded:
        return TLS
    return TWICE if reads_twice() else NOTHING


def _completed(store: Store, info: FileInfo, known: Checksum, read: Sequence[RangeChecksum]) -> int | None:
    """Checksum of a file, from what was read of it and what is read now in between.

    Returns:
        None if ranges overlap, or too much was not read.
    """
    ends = [0, *(part.end for part in read)]
    starts = [*(part.start for part in read), info.size]
    gaps = list(zip(ends, starts, strict=True))
    if any(end > start for end, start in gaps) or sum(start - end for end, start in gaps) > _MOST_UNREAD:
        return None
    filled = [_read_range(store, info, known.algorithm, end, start) for end, start in gaps if end < start]
    (whole,) = joined(known.algorithm, [*read, *filled])
    return whole.value


def _read_range(store: Store, info: FileInfo, algorithm: str, start: int, end: int) -> RangeChecksum:
    """Read bytes that no shard needs; a second time where nothing guards them."""
    buffer = memoryview(bytearray(min(end - start, store.chunk_bytes)))
    parts = []
    for at in range(start, end, len(buffer)):
        view = buffer[: min(len(buffer), end - at)]
        store.read_into(info.key, at, view, etag=info.etag)
        parts.append(RangeChecksum(at, at + len(view), checksum_of(algorithm, view)))
    (whole,) = joined(algorithm, parts)
    return whole


def _damaged(uri: str, known: Checksum, shards: set[str]) -> DamagedReading:
    error = DamagedReading(
        f"{uri}: what was read has not the {known.algorithm} that the store keeps of this file, so bits flipped on their way; "
        f"{len(shards)} shard(s) were computed from it and have to be written again ({shown_names(shards)}): run the job again, "
        "by https, or with EXPO_RAY_READ_TWICE=1 if that does not help"
    )
    error.shards = frozenset(shards)
    return error
