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
from expo_ray.extrapolation.model_folder import check_claim
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.receipt import Receipt, write_receipt
from expo_ray.extrapolation.stream import HELD, computed_pages
from expo_ray.storage import Store, open_store
from expo_ray.text import first_few

# The bytes of a page of one output, and what becomes of its hashing and its writing.
_Appended = tuple[int, Future[None], Future[None]]
_Page = list[_Appended]


@dataclass(frozen=True)
class Written:
    """What came of one shard.

    Attributes:
        receipts: of the files that are stored.
        failures: why others cannot be, by alpha; nothing of them is left behind.
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
        on_bytes: told how many bytes of output have just been written.

    Raises:
        ArithmeticFault: if a parent holds NaN or infinity; nothing is left behind.
        InputChanged: if a parent is no longer the one that was planned.
        StorageError: if a store refuses.
    """
    shard = plan.shards[index]
    with ExitStack() as stack:
        outputs = [
            _Output(open_store(plan.outputs[alpha]), shard.file, shard.size, stack) for alpha in alphas
        ]
        totals: list[dict[str, TensorStatistics]] = [{} for _ in alphas]
        under_way: deque[_Page] = deque()
        for page in computed_pages(plan, index, alphas, device):
            under_way.append([output.append(out) for output, out in zip(outputs, page.outs, strict=True)])
            for tensor, statistics in page.statistics:
                for total, one in zip(totals, statistics, strict=False):
                    total[tensor] = total.get(tensor, TensorStatistics()) + one
            if len(under_way) > HELD:
                on_bytes(_finished(under_way.popleft()))
        while under_way:
            on_bytes(_finished(under_way.popleft()))
        _refuse_broken_weights(totals[0])
        receipts: list[Receipt] = []
        failures: dict[float, ExpoError] = {}
        for alpha, output, total in zip(alphas, outputs, totals, strict=True):
            try:
                _refuse_overflow(alpha, total)
                check_claim(plan, alpha)  # or a job that was given up and lives on writes into its successor
                receipts.append(output.finish(plan.plan_id(alpha), total))
            except (ArithmeticFault, OutputError) as error:
                failures[alpha] = error
        return Written(tuple(receipts), failures)


class _Output:
    """One file being written and hashed, each in a thread of its own."""

    def __init__(self, store: Store, file: str, size: int, stack: ExitStack) -> None:
        self.store, self.file = store, file
        self.writer = stack.enter_context(store.writer(file, size))
        self.sha256 = hashlib.sha256()
        self._hashing, self._writing = (
            stack.enter_context(ThreadPoolExecutor(1, name)) for name in ("hash", "write")
        )

    def append(self, out: memoryview) -> _Appended:
        hashed = self._hashing.submit(self.sha256.update, out)
        return out.nbytes, hashed, self._writing.submit(self.writer.write, out)

    def finish(self, plan_id: str, statistics: Mapping[str, TensorStatistics]) -> Receipt:
        info = self.writer.commit()
        receipt = Receipt(plan_id, self.file, info.size, self.sha256.hexdigest(), info.etag, statistics)
        write_receipt(self.store, receipt)
        return receipt


def _finished(page: _Page) -> int:
    """Wait until a page is hashed and written; its bytes."""
    for _, hashed, written in page:
        hashed.result()
        written.result()
    return sum(size for size, _, _ in page)


def _refuse_broken_weights(total: Mapping[str, TensorStatistics]) -> None:
    broken = [
        f"{name} ({one.nan} NaN, {one.inf} infinite)" for name, one in total.items() if one.nan or one.inf
    ]
    if broken:
        raise ArithmeticFault(
            f"{len(broken)} tensor(s) of the parents hold values that no alpha can mend: {first_few(broken)}; "
            "repair or download the parents again, or freeze these tensors with `multipliers: {<pattern>: 0}`"
        )


def _refuse_overflow(alpha: float, total: Mapping[str, TensorStatistics]) -> None:
    over = [f"{name} ({one.overflow} elements)" for name, one in total.items() if one.overflow]
    if over:
        raise ArithmeticFault(
            f"alpha {format_alpha(alpha)} overflows the output's dtype in {len(over)} tensor(s): {first_few(over)}; "
            "choose a smaller alpha, or `dtype: bf16` or `fp32`"
        )
