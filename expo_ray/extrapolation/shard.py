"""The unit of work: one shard of a pair, read once from both parents, written once per alpha."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.config import format_alpha
from expo_ray.errors import ArithmeticFault, ExpoError, OutputError
from expo_ray.extrapolation.layout import ShardPlan
from expo_ray.extrapolation.model_folder import ModelFolder
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.reading import FileRanges, Reading
from expo_ray.extrapolation.receipt import Receipt, write_receipt
from expo_ray.extrapolation.stream import HELD, compute_pages
from expo_ray.text import first_few

# Memory of all outputs together for parts of uploads.
WRITE_BYTES = 96 << 20

# Size of a page of one output in bytes, and the futures of its hashing and its writing.
_Appended = tuple[int, Future[None], Future[None]]
_Page = list[_Appended]


@dataclass(frozen=True)
class Written:
    """The files of one shard that are stored, and why others are not.

    Attributes:
        receipts: of the files that are stored.
        failures: why a model cannot be, by alpha; nothing of its file is left behind.
    """

    receipts: tuple[Receipt, ...]
    failures: Mapping[float, ExpoError]


def extrapolate_shard(
    plan: PairPlan,
    index: int,
    alphas: Sequence[float],
    *,
    device: str = "cpu",
    on_bytes: Callable[[int], None] = lambda written: None,
) -> Written:
    """Write shard `index` of the models at `alphas`, whose folders are claimed, and their receipts.

    Reading and arithmetic run in a few threads, page by page; for each output one more thread hashes the pages in file order,
    and another one writes them. An alpha that overflows, or whose folder another plan has taken meanwhile, costs the others
    nothing.

    Args:
        device: `cpu` or `cuda`; the bytes are the same.
        on_bytes: called with the number of bytes that have just been written, summed over all outputs; what it raises ends the work.

    Raises:
        ArithmeticFault: if a parent holds NaN or infinity; nothing is left behind.
        InputChanged: if a parent is no longer the one that was planned.
        StorageError: if a store refuses.
    """
    shard = plan.shards[index]
    with ExitStack() as stack:
        buffer_bytes = WRITE_BYTES // len(alphas)
        outputs = [_Output(ModelFolder(plan, alpha), shard, buffer_bytes, stack) for alpha in alphas]
        reading = Reading()
        totals: list[dict[str, TensorStatistics]] = [{} for _ in alphas]
        under_way: deque[_Page] = deque()
        for page in compute_pages(plan, index, alphas, device, reading):
            under_way.append([output.append(out) for output, out in zip(outputs, page.outs, strict=True)])
            for tensor, statistics in page.statistics:
                for total, sums in zip(totals, statistics, strict=False):  # kept tensors have none
                    total[tensor] = total.get(tensor, TensorStatistics()) + sums
            if len(under_way) > HELD:  # the buffers of older pages are about to be filled again
                on_bytes(_wait_for(under_way.popleft()))
        while under_way:
            on_bytes(_wait_for(under_way.popleft()))
        _refuse_broken_weights(totals[0])  # of the parents, so the same for every alpha
        read = {"sft": reading.of(plan.sft), "dpo": reading.of(plan.dpo)}
        receipts: list[Receipt] = []
        failures: dict[float, ExpoError] = {}
        for alpha, output, total in zip(alphas, outputs, totals, strict=True):
            try:
                _refuse_overflow(alpha, total)
                receipts.append(output.commit(total, read))
            except (ArithmeticFault, OutputError) as error:
                failures[alpha] = error
        return Written(tuple(receipts), failures)


class _Output:
    """A file of one model, written in one thread and hashed in another.

    Args:
        buffer_bytes: memory for parts of an upload.
        stack: its end removes what has been written and not committed.
    """

    def __init__(self, folder: ModelFolder, shard: ShardPlan, buffer_bytes: int, stack: ExitStack) -> None:
        self.folder, self.file = folder, shard.file
        self.writer = stack.enter_context(
            folder.store.writer(shard.file, shard.size, buffer_bytes=buffer_bytes)
        )
        self.sha256 = hashlib.sha256()
        self._hashing, self._writing = (
            stack.enter_context(ThreadPoolExecutor(1, name)) for name in ("hash", "write")
        )

    def append(self, out: memoryview) -> _Appended:
        """Queue bytes for both threads; they must stay as they are until `_wait_for`."""
        hashed = self._hashing.submit(self.sha256.update, out)
        return out.nbytes, hashed, self._writing.submit(self.writer.write, out)

    def commit(
        self,
        statistics: Mapping[str, TensorStatistics],
        read: Mapping[str, Mapping[str, FileRanges]],
    ) -> Receipt:
        """Store the file, then its receipt.

        Args:
            read: what it was computed from.

        Raises:
            OutputError: if another plan has taken the folder.
        """
        self.folder.check_claim()  # else a zombie task could write into the folder's new owner
        info, digest = self.writer.commit(), self.sha256.hexdigest()
        receipt = Receipt(self.folder.plan_id, self.file, info.size, digest, info.etag, statistics, read)
        write_receipt(self.folder.store, receipt)
        return receipt


def _wait_for(page: _Page) -> int:
    """Wait until a page is hashed and written; returns its size in bytes."""
    for _, hashed, written in page:
        hashed.result()
        written.result()
    return sum(size for size, _, _ in page)


def _refuse_broken_weights(total: Mapping[str, TensorStatistics]) -> None:
    broken = [
        f"{name} ({sums.nan} NaN, {sums.inf} infinite)"
        for name, sums in total.items()
        if sums.nan or sums.inf
    ]
    if broken:
        raise ArithmeticFault(
            f"{len(broken)} tensor(s) of the parents hold values that no alpha can repair: {first_few(broken)}; "
            "repair or download the parents again, or freeze these tensors with `multipliers: {<pattern>: 0}`"
        )


def _refuse_overflow(alpha: float, total: Mapping[str, TensorStatistics]) -> None:
    over = [f"{name} ({sums.overflow} elements)" for name, sums in total.items() if sums.overflow]
    if over:
        raise ArithmeticFault(
            f"alpha {format_alpha(alpha)} overflows the output's dtype in {len(over)} tensor(s): {first_few(over)}; "
            "choose a smaller alpha, or `dtype: bf16` or `fp32`"
        )
