"""Failures of a GPU as errors that name a remedy; imports neither torch nor Triton."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from expo_ray.errors import JobError, in_one_line


@contextmanager
def gpu_failures() -> Iterator[None]:
    """Turn what torch, Triton and the driver raise in the `with` block into a `JobError`.

    Raises:
        JobError: with the reason and the way out.
    """
    try:
        yield
    except Exception as error:
        from_triton = type(error).__module__.partition(".")[0] == "triton"
        if not (from_triton or isinstance(error, RuntimeError | OSError | subprocess.CalledProcessError)):
            raise
        raise JobError(
            f"`device: cuda`: {reason_of(error)}; or run it again with `device: cpu`: the result is the same, byte for byte, and "
            "shards that are stored are not computed again"
        ) from error


def reason_of(error: Exception) -> str:
    """Why a GPU cannot compute, and what to do about it, in one clause."""
    text = in_one_line(error).strip().partition("\n")[0].rstrip(".")
    if "out of memory" in str(error).lower():
        return (
            f"the GPU has no memory left ({text}): stop the processes that fill it (`nvidia-smi` lists them), or name another GPU "
            "with CUDA_VISIBLE_DEVICES"
        )
    if "C compiler" in str(error) or isinstance(error, subprocess.CalledProcessError):
        return (
            f"Triton cannot compile its launcher ({text}): install gcc and the headers of this Python (Debian, Ubuntu: "
            "apt install gcc python3-dev), or name a compiler with CC"
        )
    return f"the GPU failed ({text}): see `nvidia-smi`, and that its driver is R580 or newer where torch is built for CUDA 13"
