"""Answers of an engine after swaps, and of engines that were started on published folders; run as its own process.

    python -m tests.support.swap_script PLAN STEP FOLDER STEP FOLDER OUT

PLAN is a pickled `PairPlan`, OUT receives JSON. `PairServer` runs as it does in a replica, without Ray Serve around it.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.llm._internal.serve.core.configs import accelerators
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.serve.llm.openai_api_models import ChatCompletionRequest

from expo_ray.config import Serving
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import Step
from expo_ray.on_ray.cluster import cluster
from expo_ray.on_ray.serving import engine_weights
from expo_ray.on_ray.serving.engine_settings import engine_config
from expo_ray.on_ray.serving.pair_server import ModelServer, PairServer
from expo_ray.on_ray.serving.swap import PairWorker
from expo_ray.serving.served_models import NEXT_MODEL

# All questions share it; with it they fill two blocks of the prefix cache, which on CPUs have 128 tokens.
PREAMBLE = "You are a careful historian who answers briefly. " * 6
QUESTIONS = ("What is the capital of France?", "Name a river.", "Who was Ada Lovelace?")
TOKENS = 12

Answers = list[tuple[str, list[float]]]


class ForgetfulWorker(PairWorker):
    """Leaves steps of the swap out on request."""

    forgotten: Sequence[str] = ()

    def expo_forget(self, steps: Sequence[str]) -> None:
        self.forgotten = steps
        if "parents" in steps:
            assert self.expo_slices is not None
            self.expo_slices.release()
        if "repack" in steps:
            engine_weights.repack_heads = lambda model: None

    def expo_made(self) -> int:
        """Bytes that are made ahead so far."""
        ahead = self.expo_ahead
        assert ahead._process is not None
        return os.stat(f"/proc/{ahead._process.pid}/fd/{ahead._memory}").st_size

    def expo_compare(self, step: Step) -> None:
        if "compare" not in self.forgotten:
            super().expo_compare(step)


async def ask(server: ModelServer, model: str, then: str = "") -> Answers:
    """Greedy texts and logprobs of the questions, one after the other; `then` is the model that is said to be asked next."""
    info = RawRequestInfo(headers={NEXT_MODEL.lower(): then})
    answers: Answers = []
    for question in QUESTIONS:
        messages = [{"role": "system", "content": PREAMBLE}, {"role": "user", "content": question}]
        request = ChatCompletionRequest.model_validate(
            {"model": model, "messages": messages, "temperature": 0, "max_tokens": TOKENS, "logprobs": True, "top_logprobs": 1}
        )  # fmt: skip
        (answer,) = [part async for part in await _chat(server, request, info)]
        if not hasattr(answer, "choices"):
            raise RuntimeError(answer.error.message)
        choice = answer.choices[0]
        answers.append((choice.message.content, [token.logprob for token in choice.logprobs.content]))
    return answers


async def _chat(server: ModelServer, request: Any, info: RawRequestInfo) -> AsyncGenerator[Any, None]:
    return await server.chat(request, info)


async def wait_until_made(server: ModelServer, plan: PairPlan) -> None:
    size = sum(shard.size for shard in plan.shards)
    while await server.collective_rpc("expo_made") != [size]:
        await asyncio.sleep(0.1)


Server = TypeVar("Server", bound=ModelServer)


async def start(kind: type[Server], name: str, settings: Serving, **arguments: Any) -> Server:
    """A server as Serve makes it, which awaits its `__init__`. Placement groups stay, so each takes but a share of a CPU."""
    server = kind.__new__(kind)
    initialise: Any = server.__init__  # type: ignore[misc]
    await initialise(engine_config(name, settings, cpus=0.2), **arguments)
    return server


async def swapped(plan: PairPlan, settings: Serving, first: str, second: str) -> dict[str, Any]:
    server = await start(PairServer, plan.name, settings, plan=plan)
    name = plan.name
    answers: dict[str, Any] = {"dpo": await ask(server, name)}
    answers["first"] = await ask(server, f"{name}@{first}")
    answers["second"] = await ask(server, f"{name}@{second}")
    answers["parents"] = (await server.card(name))["parents"]
    await server.collective_rpc("expo_forget", args=(["parents"],))
    answers["first again"] = await ask(server, f"{name}@{first}", then=f"{name}@{second}")
    await wait_until_made(server, plan)
    answers["second, made ahead"] = await ask(server, f"{name}@{second}", then=f"{name}@7")
    answers["first, not the one expected"] = await ask(server, f"{name}@{first}")

    pause = server.pause
    server.pause = lambda **options: pause(**options | {"clear_cache": False})  # type: ignore[method-assign]
    answers["second, cache kept"] = await ask(server, f"{name}@{second}")
    server.pause = pause  # type: ignore[method-assign]

    await server.collective_rpc("expo_forget", args=(["repack", "compare"],))
    answers["first, head kept"] = await ask(server, f"{name}@{first}")
    await server.collective_rpc("expo_forget", args=(["repack"],))
    try:
        answers["third, head kept"] = await ask(server, f"{name}@1")
    except RuntimeError as error:
        answers["refused"] = str(error)
        try:
            await server.check_health()
        except RuntimeError as unhealthy:
            answers["health"] = str(unhealthy)
    await server.__del__()
    return answers


async def started_on(folder: Path, settings: Serving) -> Answers:
    server = await start(ModelServer, "published", settings, fetch=lambda: folder)
    answers = await ask(server, "published")
    await server.__del__()
    return answers


def wait_for_placement() -> None:
    """Ray's library looks up a placement group right after asking for it; before a replica starts, Serve has waited for it."""
    library: Any = accelerators
    ask_for = library.placement_group

    def ready(**options: Any) -> Any:
        group = ask_for(**options)
        ray.get(group.ready())
        return group

    library.placement_group = ready


def main() -> None:
    plan_file, first, first_folder, second, second_folder, out = sys.argv[1:]
    plan = pickle.loads(Path(plan_file).read_bytes())
    settings = Serving(max_model_len=512, engine={"max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 28})
    forgetful = settings.model_copy(
        update={
            "engine": {**settings.engine, "worker_extension_cls": "tests.support.swap_script.ForgetfulWorker"}
        }
    )
    wait_for_placement()
    with cluster():
        answers = asyncio.run(swapped(plan, forgetful, first, second))
        folders = (Path(first_folder), Path(second_folder))
        answers["started"] = [asyncio.run(started_on(folder, settings)) for folder in folders]
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
