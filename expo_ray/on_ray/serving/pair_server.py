"""A vLLM engine behind Ray Serve: for a published model, or for all alphas of a pair."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import pickle
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.util.placement_group import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from expo_ray.checkpoint.tokenizer import local_tokenizer_files, read_chat_template, read_special_tokens
from expo_ray.errors import ArithmeticFault
from expo_ray.evaluation.records import digest
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import DPO, Step, stepped
from expo_ray.on_ray.gpus import starting_alone
from expo_ray.on_ray.serving.engine_adapter import (
    ErrorInfo,
    ErrorResponse,
    engine_slots,
    engine_version,
    fit_shared_memory,
    free_shared_memory,
    restore_plain_logs,
    stop_engine,
)
from expo_ray.serving.engine_checks import deciding_arguments
from expo_ray.serving.engine_errors import read_own_log, root_cause
from expo_ray.serving.lease import Busy, Lease
from expo_ray.serving.node_cache import rebuild_engine_folder
from expo_ray.serving.served_models import NEXT_MODEL, NameFault, ServedName, parse_name

log = logging.getLogger("expo_ray")
restore_plain_logs()  # which the imports above have changed

SWAP_TIMEOUT_S = 3600.0

# Files of a model that are not part of its engine's identity: weights, which have their own, and what no engine reads.
_NOT_HASHED = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".md",
    ".png",
    ".pdf",
}

T = TypeVar("T")
Method = Callable[[Any, Any], Coroutine[Any, Any, AsyncGenerator[Any, None]]]


class ModelServer(LLMServer):
    """An engine for one published model.

    Args:
        llm_config: with the model's name as the engine's id of it.
        fetch: downloads the model to the node where it is called, and returns its folder.
        weights: names the weights; see `hash_listing`.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, llm_config: LLMConfig, *, fetch: Callable[[], Path], weights: str = ""
    ) -> None:
        folder = await asyncio.to_thread(fetch_on_nodes, fetch)
        self._name, self._weights = llm_config.model_id, weights
        tokenizer = local_tokenizer_files(folder)
        template = read_chat_template(tokenizer)
        self._template = digest(template) if template else ""
        self._special_ids = [token.id for token in read_special_tokens(tokenizer)]
        self._files, self._settings = hash_side_files(folder), settings_of(llm_config.engine_kwargs)
        config = _with_source(llm_config, folder)
        fit_shared_memory(config, free_shared_memory())
        with ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, starting_alone(not has_whole_gpus()))
            try:
                await super().__init__(config)
            except Exception as error:
                raise RuntimeError(root_cause(f"{type(error).__name__}: {error}", read_own_log())) from error
        self._slots = engine_slots(self)
        self._about = (await self.collective_rpc("expo_prepare"))[0]

    async def __del__(self) -> None:
        # Ray's `__del__` does not end the engine's processes; they would notice after a while
        stop_engine(self)
        await super().__del__()

    async def slots(self) -> int:
        """Requests that the engine works on at once."""
        return self._slots

    async def record_routing_stats(self) -> dict[str, Any]:
        """Tell the router what it chooses replicas by, see `AlphaRouter`."""
        return {"slots": self._slots}

    async def card(self, name: str) -> dict[str, Any]:
        """Describe a served name, for `/v1/models/<name>`."""
        return {
            "engine": f"vllm {engine_version()}",
            "template": self._template,
            "files": self._files,
            "settings": self._settings,
            "special_ids": self._special_ids,
            "weights": self._weights_of(parse_name(name)),
            **self._about,
        }

    def _weights_of(self, name: ServedName) -> str:
        return self._weights

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return self._answer(super().chat, request, raw_request_info)

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return self._answer(super().completions, request, raw_request_info)

    async def tokenize(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return await super().tokenize(self._for_engine(request), raw_request_info)

    async def detokenize(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return await super().detokenize(self._for_engine(request), raw_request_info)

    def _for_engine(self, request: Any) -> Any:
        request.model = self._name
        return request

    async def _answer(self, method: Method, request: Any, raw_request_info: Any) -> AsyncGenerator[Any, None]:
        """Stream the engine's answer, under the name that was asked for."""
        served = request.model
        async for part in await method(self._for_engine(request), raw_request_info):
            yield renamed(part, self._name, served)


class PairServer(ModelServer):
    """An engine for all alphas of a pair; it starts with dpo's own weights.

    Each request holds a lease on its step from before the engine sees it until its last token has been sent or the client
    has gone. A failed swap makes the replica unhealthy, so that Serve replaces it, and it answers nothing meanwhile.
    """

    async def __init__(self, llm_config: LLMConfig, *, plan: PairPlan) -> None:  # type: ignore[misc]
        self._plan, holds_dpo = plan, starts_at_dpo(plan)
        expected = {DPO, *map(Step, plan.outputs)}
        self._lease = Lease(self._swap, DPO if holds_dpo else None, expected, self._make_ahead)
        self._announcements: set[asyncio.Task[Any]] = set()
        await super().__init__(llm_config, fetch=lambda: rebuild_engine_folder(plan))
        opened = await self.collective_rpc(
            "expo_open", args=(pickle.dumps(plan), holds_dpo, has_whole_gpus())
        )
        self._describe_swap(opened)

    def _describe_swap(self, workers: Sequence[Mapping[str, str]]) -> None:
        """Put into card and log how the workers swap, and where they keep the parents."""
        described = {key: "; ".join(sorted({worker[key] for worker in workers})) for key in workers[0]}
        if described.items() <= self._about.items():
            return
        self._about |= described
        # A replica shows warnings only.
        log.warning("%s: swaps by %s, with the parents in %s", self._name, *described.values())

    async def card(self, name: str) -> dict[str, Any]:
        return await super().card(name) | ({"notes": list(self._plan.notes)} if self._plan.notes else {})

    def _weights_of(self, name: ServedName) -> str:
        step = name.step or DPO
        return stepped(self._plan, step).plan_id(step.alpha)

    async def _answer(self, method: Method, request: Any, raw_request_info: Any) -> AsyncGenerator[Any, None]:
        try:
            async with self._lease.on(parse_name(request.model).step or DPO):
                self._expect_next(raw_request_info)
                async for part in super()._answer(method, request, raw_request_info):
                    yield part
        except ArithmeticFault as error:
            yield error_response(400, str(error), "bad_alpha")
        except Busy as error:
            yield error_response(429, str(error), "too_many_alphas")
        except Exception as error:
            if error is not self._lease.failure:
                raise
            yield error_response(503, self._unusable(), "service_unavailable")

    def _expect_next(self, raw_request_info: Any) -> None:
        """Pass on the hint of a request, the name that its client will ask for next, if it is one of this pair."""
        headers = getattr(raw_request_info, "headers", None) or {}
        with suppress(NameFault):
            following = parse_name(headers.get(NEXT_MODEL.lower(), ""))
            if following.base == self._name:
                self._lease.expect(following.step or DPO)

    def _make_ahead(self, step: Step) -> None:
        task = asyncio.get_running_loop().create_task(
            self.collective_rpc("expo_make_ahead", args=(str(step),))
        )
        self._announcements.add(task)
        task.add_done_callback(self._announcements.discard)

    async def _swap(self, step: Step) -> None:
        """Swap the weights of the engine, which no request uses now.

        Abandoned requests may still be in it. The pause aborts them, and clears the prefix cache, which belongs to the old
        weights.

        Raises:
            ArithmeticFault: if the weights cannot be computed; the engine can take others.
        """
        await self.pause(mode="abort", clear_cache=True)
        faults = await self.collective_rpc("expo_swap", timeout=SWAP_TIMEOUT_S, args=(str(step),))
        self._describe_swap(await self.collective_rpc("expo_describe_swap"))
        await self.resume()
        if any(faults):
            raise ArithmeticFault(next(filter(None, faults)))

    async def check_health(self) -> None:
        if self._lease.failure:
            raise RuntimeError(self._unusable())
        await super().check_health()

    def _unusable(self) -> str:
        return f"{self._name}: the weights of this replica are unknown ({self._lease.failure}); it is being replaced, ask again"

    async def record_routing_stats(self) -> dict[str, Any]:
        stats, held = await super().record_routing_stats(), self._lease.held
        return stats if held is None else stats | {"step": str(held)}


def has_whole_gpus() -> bool:
    """True if no GPU of this replica's engine is shared with other programs."""
    group = get_current_placement_group()
    shares = [float(bundle.get("GPU", 0)) for bundle in group.bundle_specs] if group else []
    return all(share.is_integer() for share in shares)


def starts_at_dpo(plan: PairPlan) -> bool:
    """True if an engine that has loaded the pair's folder holds the very weights of alpha 0."""
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    return not plan.dpo.adapter and all(tensor.dtype == tensor.base.dtype for tensor in tensors)


def _with_source(config: LLMConfig, folder: Path) -> LLMConfig:
    """Copy a configuration with the model's folder."""
    return with_fields(
        config, model_loading_config={"model_id": config.model_id, "model_source": str(folder)}
    )


def with_fields(config: LLMConfig, **changes: Any) -> LLMConfig:
    """Copy a configuration with other values. A copy made anew, as `config` has cached an engine's settings."""
    return LLMConfig(**{name: getattr(config, name) for name in type(config).model_fields} | changes)


def hash_side_files(folder: Path) -> str:
    """Hash the files beside the weights: engines read configurations, vocabularies and end-of-answer tokens from them."""
    paths = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix not in _NOT_HASHED
        and not path.relative_to(folder).parts[0].startswith(".")
    ]
    return digest({str(path.relative_to(folder)): _sha256(path) for path in paths})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_of(arguments: Mapping[str, Any]) -> str:
    """Digest of the engine's arguments that decide answers; data type and context are described by the engine itself."""
    return digest(deciding_arguments(arguments))


def error_response(status: int, message: str, kind: str) -> ErrorResponse:
    """The body of a refusal, in the form that OpenAI's clients expect."""
    return ErrorResponse(error=ErrorInfo(message=message, type=kind, code=status))


def renamed(part: Any, engine_name: str, served: str) -> Any:
    """Put the served name in the place of the engine's, in a response, a streamed event or a list of them."""
    if isinstance(part, list):
        return [renamed(each, engine_name, served) for each in part]
    if isinstance(part, str):
        # Quotes inside JSON strings are escaped, so that the first such text is the field itself.
        return part.replace(f'"model":{json.dumps(engine_name)}', f'"model":{json.dumps(served)}', 1)
    if hasattr(part, "model"):
        part.model = served
    return part


def fetch_on_nodes(fetch: Callable[[], T]) -> T:
    """Call `fetch` on every node that the engine is spread over; returns its result, such as a folder, which is the same on all.

    Raises:
        ExpoError: if it cannot be fetched.
    """
    group = get_current_placement_group()
    nodes = set(placement_group_table(group)["bundles_to_node_id"].values()) if group else set()
    others = nodes - {ray.get_runtime_context().get_node_id()}
    task: Any = ray.remote(num_cpus=0)(_call)
    ray.get(
        [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(fetch)
            for node in others
        ]
    )
    return fetch()


def _call(fetch: Callable[[], T]) -> T:
    return fetch()
