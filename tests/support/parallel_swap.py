"""Log-probabilities of an engine of several workers after a swap, and of one started on the published folder; run as its own process.

    python -m tests.support.parallel_swap PLAN WORKERS STEP FOLDER OUT

PLAN is a pickled `PairPlan`, OUT receives JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from expo_ray.extrapolation.plan import PairPlan
from expo_ray.on_ray.serving.pair_server import starts_at_dpo

IDS = [[0, *range(7, 47)], [0, *range(90, 20, -3)]]
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def engine_on(folder: str, workers: int) -> Any:
    """An engine that starts with the weights of a folder."""
    from vllm import LLM

    return LLM(
        model=folder, tensor_parallel_size=workers, enforce_eager=True, max_model_len=128, max_num_seqs=4,
        kv_cache_memory_bytes=1 << 28, worker_extension_cls="expo_ray.on_ray.serving.swap.PairWorker", disable_log_stats=True,
    )  # fmt: skip


def answers(engine: Any) -> list[list[float]]:
    """Log-probabilities of the prompts' tokens after the first, and of a few greedy ones."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=6, temperature=0, prompt_logprobs=0, logprobs=0)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in IDS], params, use_tqdm=False)
    return [
        [
            next(iter(token.values())).logprob
            for token in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs)
        ]
        for output in outputs
    ]


def swapped(plan: PairPlan, workers: int, step: str) -> dict[str, Any]:
    """Answers before and after a swap, and the work of each worker."""
    engine = engine_on(plan.dpo.uri, workers)
    result: dict[str, Any] = {"dpo": answers(engine)}
    opened = engine.collective_rpc("expo_open", args=(pickle.dumps(plan), starts_at_dpo(plan)))
    result["swap"] = [worker["swap"] for worker in opened]
    result["faults"] = engine.collective_rpc("expo_swap", args=(step,))
    engine.reset_prefix_cache()
    result["swapped"] = answers(engine)
    result["work"] = engine.collective_rpc("expo_work")
    engine.llm_engine.engine_core.shutdown()
    return result


def main() -> None:
    plan_file, workers, step, folder, out = sys.argv[1:]
    os.environ |= ENVIRONMENT
    result = swapped(pickle.loads(Path(plan_file).read_bytes()), int(workers), step)
    started = engine_on(folder, int(workers))
    result["started"] = answers(started)
    started.llm_engine.engine_core.shutdown()
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
