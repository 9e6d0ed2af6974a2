"""Answer seeded requests on CPUs, also those whose prompts are computed in parts.

Like `engine_adapter` this file knows private names of vLLM. Where the prompts of a step have more tokens than its budget (2,048 on
CPUs), vLLM 0.29 computes a part of the last one, draws a token all the same, throws it away, and sets the request's random generator
back by as much as the draw took. The generators of CPUs cannot be set back ("CPU Generator does not use offset"), which ended the
engine with all its requests. Here the generators of such requests are out of the way while the token is drawn, so that they need not
be set back. On GPUs vLLM's own way is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def keep_generators_on_cpus() -> None:
    """Let all engines of this process that compute on CPUs draw tokens that are thrown away without their requests' generators."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original: Any = CPUModelRunner.sample_tokens
    if hasattr(original, "expo_original"):
        return

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _without_generators_of_parts(self):
            return original(self, *args, **kwargs)

    sample_tokens.expo_original = original  # type: ignore[attr-defined]
    CPUModelRunner.sample_tokens = sample_tokens  # type: ignore[assignment]


@contextmanager
def _without_generators_of_parts(runner: Any) -> Iterator[None]:
    """Take the generators of requests of whose prompt only a part was computed out of the batch."""
    batch = runner.input_batch
    in_parts = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
    kept = {index: batch.generators.pop(index) for index in in_parts if index in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(kept)
