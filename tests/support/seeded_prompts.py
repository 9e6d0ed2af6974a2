"""Seeded answers to prompts that are computed in parts, before and after vLLM is mended; run as its own process.

    python -m tests.support.seeded_prompts FOLDER OUT

OUT receives JSON: the answers of an engine that computes each prompt at once, of one that computes them in parts, and the error of
one that does so without being mended.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.support.parallel_swap import ENVIRONMENT

# The first takes three parts; of the others, some take one and some are cut by the budget of a step.
PROMPTS = [[0, *(7 + number % 80 for number in range(length))] for length in (150, 20, 50, 33, 90)]
AT_ONCE, IN_PARTS = 1024, 64


def engine_on(folder: str, budget: int) -> Any:
    from vllm import LLM

    return LLM(
        model=folder, enforce_eager=True, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=budget,
        kv_cache_memory_bytes=1 << 28, worker_extension_cls="expo_ray.on_ray.serving.swap.PairWorker", disable_log_stats=True,
    )  # fmt: skip


def answers(engine: Any) -> list[list[int]]:
    """Token ids, drawn with a seed for each prompt."""
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, seed=number, ignore_eos=True)
        for number in range(len(PROMPTS))
    ]
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    folder, out = sys.argv[1:]
    os.environ |= ENVIRONMENT
    result: dict[str, Any] = {"at once": answers(engine_on(folder, AT_ONCE))}
    try:
        answers(engine_on(folder, IN_PARTS))
    except RuntimeError as error:
        result["not mended"] = str(error)
    engine = engine_on(folder, IN_PARTS)
    engine.collective_rpc("expo_prepare")
    result["in parts"] = answers(engine)
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
