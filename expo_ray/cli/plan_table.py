"""A table of what a planned job would do, to check before paying for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import ceil

from expo_ray.config import format_alpha
from expo_ray.extrapolation.plan_job import JobPlan
from expo_ray.progress import clock, size_text
from expo_ray.text import shown_end

# An assumption, not a measurement; `expo-ray plan --bandwidth` takes another.
WORKER_BYTES_PER_S = 500_000_000


def describe(job_plan: JobPlan, *, workers: int | None = None, bandwidth: int = WORKER_BYTES_PER_S) -> str:
    """A table of the pairs and an estimate of the time.

    Args:
        workers: shards under way at once; this machine's CPUs where nothing else is known.
        bandwidth: bytes a second that one worker reads and writes.
    """
    workers = workers or os.cpu_count() or 1
    head = ("pair", "tensors", "shards", "alphas", "read", "write", "there already")
    rows = [head]
    read_in_all = 0
    for plan in job_plan.pairs:
        written = job_plan.bytes_of(plan)
        read = sum(shard.size for index, shard in enumerate(plan.shards) if job_plan.missing(plan, index))
        read = round(plan.bytes_read * read / max(1, plan.bytes_written))
        read_in_all += read
        rows.append(
            (
                plan.name,
                str(sum(len(shard.tensors) for shard in plan.shards)),
                str(len(plan.shards)),
                " ".join(map(format_alpha, plan.outputs)),
                size_text(read),
                size_text(written),
                size_text(plan.bytes_written * len(plan.outputs) - written),
            )
        )
    lines = align_columns(rows, left=len(head))
    moved = read_in_all + job_plan.bytes_to_write
    lines.append(
        f"{len(job_plan.pairs)} pair(s): {size_text(read_in_all)} to read, {size_text(job_plan.bytes_to_write)} to write, about "
        f"{clock(ceil(moved / (workers * bandwidth)))} with {workers} worker(s) of {size_text(bandwidth)}/s"
    )
    lines += [f"note: {plan.name}: {shown_end(note, 2000)}" for plan in job_plan.pairs for note in plan.notes]
    return "\n".join(lines)


def align_columns(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lines of a table: the first `left` columns aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if place < left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
