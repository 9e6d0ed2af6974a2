"""The unit of work: one shard of a pair, read once from both parents, written once per alpha."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from expo_ray.config import format_alpha
from expo_ray.errors import ArithmeticFault, ExpoError, OutputError, some
from expo_ray.extrapolation.output import check_claim
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.receipt import Receipt, write_receipt
from expo_ray.extrapolation.statistics import TensorStatistics
from expo_ray.extrapolation.stream import computed_chunks
from expo_ray.storage import Store, open_store


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

    Reading and arithmetic run in a few threads, chunk by chunk; this thread takes the chunks back in file order, hashes and
    writes them. An alpha that overflows, or whose folder another plan has taken meanwhile, costs the others nothing.

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
        hashing = stack.enter_context(ThreadPoolExecutor(len(alphas), "hash"))
        outputs = [
            _Output(open_store(plan.outputs[alpha]), shard.file, shard.size, stack) for alpha in alphas
        ]
        totals: list[dict[str, TensorStatistics]] = [{} for _ in alphas]
        _append(outputs, [memoryview(shard.header)] * len(alphas), hashing)
        on_bytes(len(shard.header) * len(alphas))
        for chunk in computed_chunks(plan, index, alphas, device):
            _append(outputs, chunk.outs, hashing)
            for total, one in zip(totals, chunk.statistics, strict=False):
                total[chunk.tensor] = total.get(chunk.tensor, TensorStatistics()) + one
            on_bytes(sum(out.nbytes for out in chunk.outs))
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
    """One file being written and hashed."""

    def __init__(self, store: Store, file: str, size: int, stack: ExitStack) -> None:
        self.store, self.file = store, file
        self.writer = stack.enter_context(store.writer(file, size))
        self.sha256 = hashlib.sha256()

    def finish(self, plan_id: str, statistics: Mapping[str, TensorStatistics]) -> Receipt:
        info = self.writer.commit()
        receipt = Receipt(plan_id, self.file, info.size, self.sha256.hexdigest(), info.etag, statistics)
        write_receipt(self.store, receipt)
        return receipt


def _append(outputs: Sequence[_Output], outs: Sequence[memoryview], hashing: ThreadPoolExecutor) -> None:
    hashed: list[Future[None]] = [
        hashing.submit(output.sha256.update, out) for output, out in zip(outputs, outs, strict=True)
    ]
    for output, out in zip(outputs, outs, strict=True):
        output.writer.write(out)
    for future in hashed:
        future.result()


def _refuse_broken_weights(total: Mapping[str, TensorStatistics]) -> None:
    broken = [
        f"{name} ({one.nan} NaN, {one.inf} infinite)" for name, one in total.items() if one.nan or one.inf
    ]
    if broken:
        raise ArithmeticFault(
            f"{len(broken)} tensor(s) of the parents hold values that no alpha can mend: {some(broken)}; "
            "repair or download the parents again, or freeze these tensors with `multipliers: {<pattern>: 0}`"
        )


def _refuse_overflow(alpha: float, total: Mapping[str, TensorStatistics]) -> None:
    over = [f"{name} ({one.overflow} elements)" for name, one in total.items() if one.overflow]
    if over:
        raise ArithmeticFault(
            f"alpha {format_alpha(alpha)} overflows the output's dtype in {len(over)} tensor(s): {some(over)}; "
            "choose a smaller alpha, or `dtype: bf16` or `fp32`"
        )
