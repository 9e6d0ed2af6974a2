"""A vLLM engine behind Ray Serve that answers for all alphas of a LoRA pair at the same time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from ray.serve.llm import LLMConfig

from expo_ray.errors import ArithmeticFault
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import DPO, SFT, Step
from expo_ray.on_ray.serving.engine_adapter import (
    load_adapter,
    refuses_adapters,
    stop_engine,
    unload_adapter,
)
from expo_ray.on_ray.serving.pair_server import (
    Method,
    ModelServer,
    PairServer,
    error_response,
    fetch_on_nodes,
    renamed,
    with_fields,
)
from expo_ray.serving.adapters import merged_plan, note_of_merging, write_adapter, write_adapter_weights
from expo_ray.serving.engine_checks import without_adapters
from expo_ray.serving.lease import Busy, Lease
from expo_ray.serving.node_cache import rebuild_engine_folder
from expo_ray.serving.resident_adapters import ResidentAdapters
from expo_ray.serving.served_models import parse_name
from expo_ray.text import first_few

log = logging.getLogger("expo_ray")


class AdapterRefused(Exception):
    """vLLM cannot serve this adapter on this model; the message is the reason."""


class AdapterServer(PairServer):
    """An engine that holds sft, and beside it the published adapter of each alpha that is asked for.

    Requests for different alphas are answered in one batch, without a swap. Where vLLM cannot serve the adapter, the engine merges
    it and swaps as `PairServer` does, and its card says why.

    Args:
        plan: of an adapter that is scaled.
    """

    async def __init__(self, llm_config: LLMConfig, *, plan: PairPlan) -> None:  # type: ignore[misc]
        self._merges = False
        try:
            await self._start(llm_config, plan)
        except AdapterRefused as refused:
            log.warning("%s: %s", plan.name, note_of_merging(str(refused)))
            stop_engine(self)
            self._merges, self._note = True, note_of_merging(str(refused))
            kept = without_adapters(llm_config.engine_kwargs)
            await super().__init__(with_fields(llm_config, engine_kwargs=kept), plan=merged_plan(plan))

    async def _start(self, llm_config: LLMConfig, plan: PairPlan) -> None:
        """Start the engine and load dpo's adapter, which shows whether vLLM knows all its layers.

        Raises:
            AdapterRefused: if it cannot hold it.
        """
        architectures = plan.sft.config.get("architectures") or []
        if refuses_adapters(architectures):
            raise AdapterRefused(f"vLLM has no adapters for {first_few(architectures)}")
        self._plan, self._lease = plan, Lease(self._swap, None)  # which nobody waits for
        arguments = llm_config.engine_kwargs
        self._in_batch = int(arguments["max_loras"])
        self._adapters = ResidentAdapters(
            self._load, self._unload, int(arguments["max_cpu_loras"]), {DPO, *map(Step, plan.outputs)}
        )
        await asyncio.to_thread(fetch_on_nodes, partial(write_adapter_weights, plan))
        try:
            await ModelServer.__init__(self, llm_config, fetch=partial(rebuild_engine_folder, plan))
        except RuntimeError as error:
            if "lora" in str(error).lower():
                raise AdapterRefused(str(error)) from error
            raise
        async with self._adapters.on(DPO):
            pass

    async def card(self, name: str) -> dict[str, Any]:
        described = await super().card(name)
        return described | ({"adapter": self._note} if self._merges else {"alphas_at_once": self._in_batch})

    async def _answer(self, method: Method, request: Any, raw_request_info: Any) -> AsyncGenerator[Any, None]:
        if self._merges:
            async for part in super()._answer(method, request, raw_request_info):
                yield part
            return
        served, step = request.model, parse_name(request.model).step or DPO
        if step.factors:
            yield error_response(400, _no_groups(served), "bad_alpha")
            return
        try:
            async with self._model_of(step) as engine_name:
                request.model = engine_name
                async for part in await method(request, raw_request_info):
                    yield renamed(part, engine_name, served)
        except ArithmeticFault as error:
            yield error_response(400, str(error), "bad_alpha")
        except Busy as error:
            yield error_response(429, str(error), "too_many_alphas")

    @asynccontextmanager
    async def _model_of(self, step: Step) -> AsyncIterator[str]:
        """Keep the weights of a step in the engine; yields the name under which it answers for them."""
        if step == SFT:  # the model without an adapter
            yield self._name
        else:
            async with self._adapters.on(step):
                yield self._name_of(step)

    async def _load(self, step: Step) -> None:
        """Write the adapter of a step on all nodes of the engine, load it, and compare what the engine holds.

        Raises:
            ArithmeticFault: if its weights overflow.
            AdapterRefused: if the engine does not take it, or a part of it.
        """
        folder = await asyncio.to_thread(fetch_on_nodes, partial(write_adapter, self._plan, step.alpha))
        name = self._name_of(step)
        try:
            number = await load_adapter(self, name, folder)
        except ValueError as error:
            raise AdapterRefused(f"vLLM does not take it ({error})") from error
        reports = await self.collective_rpc("expo_check_adapter", args=(number,))
        unused, overflowing = (
            sorted({layer for report in reports for layer in report[kind]})
            for kind in ("unused", "overflowing")
        )
        if unused or overflowing:
            await unload_adapter(self, name)
        if unused:
            raise AdapterRefused(f"vLLM has no place for {first_few(unused)} of it")
        if overflowing:
            raise ArithmeticFault(
                f"alpha {step}: {first_few(overflowing)} overflow in {self._about['dtype']}; choose a smaller alpha"
            )

    async def _unload(self, step: Step) -> None:
        await unload_adapter(self, self._name_of(step))

    def _name_of(self, step: Step) -> str:
        return f"{self._name}@{step}"

    async def record_routing_stats(self) -> dict[str, Any]:
        return await super().record_routing_stats() if self._merges else {"every_step": True}


def _no_groups(served: str) -> str:
    return (
        f"{served}: dpo is an adapter with one scale for all tensors, so no group can have another alpha; ask for one alpha, or set "
        "`adapter: merge` for the pair"
    )
