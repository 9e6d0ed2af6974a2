"""What the engines and reward models of a job need of GPUs, from headers, configurations and the job file alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from expo_ray.checkpoint.folder import read_checkpoint
from expo_ray.config import PublishedModel, RewardModel, Serving
from expo_ray.evaluation.devices import SettledDevice
from expo_ray.evaluation.placement import UTILIZATION, WHOLE, Need, Node, Placement, place
from expo_ray.evaluation.responses.check_served import longest_context
from expo_ray.evaluation.rewards.reward_function import RewardFunction
from expo_ray.evaluation.rewards.reward_model import CheckedReward, Classifier, kv_values
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.storage import open_store

# Keys and values that fit into an engine's cache at least: of 32 conversations of 1,024 tokens. With less, a GPU idles.
ENGINE_TOKENS = 32_768
# The same for a reward model, which reads each text once: two batches of vLLM.
SCORED_TOKENS = 16_384
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# A `gpu_memory_utilization` above this is that of a whole GPU: nothing fits beside it.
_MOST_SHARED = 0.75


def workers_of(settings: Serving) -> int:
    """Workers of one engine, each on its own GPU or CPU; `engine` may say more than `serving` does."""
    engine = settings.engine
    tensor_parallel = engine.get("tensor_parallel_size", settings.tensor_parallel_size)
    return int(tensor_parallel) * int(engine.get("pipeline_parallel_size", 1))


def place_search(
    plans: Sequence[PairPlan], settings: Serving, rewards: Sequence[CheckedReward], nodes: Sequence[Node]
) -> Placement | None:
    """Find a place on GPUs for the engines and reward models of a search; None if all run on CPUs.

    Args:
        settings: whose device is settled.
        rewards: those that compute on GPUs.

    Raises:
        Problems: with each engine or reward model that fits nowhere even alone.
        JobError: if the GPUs cannot hold them.
    """
    engines = [search_need(plans, settings)] if plans and settings.device == "cuda" else []
    needs = [reward_need(checked.spec, checked.model, checked.dtype) for checked in rewards]
    return place(engines, needs, nodes) if engines or needs else None


def scores_on_gpus(spec: RewardModel, model: Classifier | RewardFunction, device: SettledDevice) -> bool:
    """True if reward actors run on GPUs: as the job says, else where reward models of the run do, if it is no function."""
    if spec.num_gpus is not None:
        return spec.num_gpus > 0
    return isinstance(model, Classifier) and device == "cuda"


def engine_needs(
    plans: Sequence[PairPlan], models: Sequence[PublishedModel], settings: Serving
) -> list[Need]:
    """What the engines of each pair and published model need, all of them at the same time."""
    needs = [_engine_need(plan.name, _numel(plan), _config_of(plan), settings) for plan in plans]
    for model in models:
        checkpoint = read_checkpoint(open_store(model.uri))
        numel = sum(tensor.numel for tensor in checkpoint.tensors.values())
        needs.append(_engine_need(model.name, numel, checkpoint.config, settings))
    return needs


def search_need(plans: Sequence[PairPlan], settings: Serving) -> Need:
    """What the engines of a search need: one at a time at least, at most all of every pair; of the size of the largest pair."""
    largest = max(engine_needs(plans, (), settings), key=lambda need: need.num_bytes)
    return Need(
        "engine" if len(plans) > 1 else plans[0].name,
        largest.weight_bytes,
        largest.cache_bytes,
        largest.workers,
        most=largest.most * len(plans),
        share=largest.share,
    )


def reward_need(spec: RewardModel, model: Classifier | RewardFunction, dtype: str) -> Need:
    """What the actors of a reward model, or of a function that the job gives GPUs, need.

    Args:
        dtype: that a model computes in: `bf16`, `fp16` or `fp32`.
    """
    weights = cache = 0
    if isinstance(model, Classifier):
        weights = BYTES[dtype] * model.numel
        cache = BYTES[dtype] * model.kv_values * min(model.max_tokens, SCORED_TOKENS)
    asked = spec.num_gpus
    return Need(
        spec.name,
        weights,
        cache,
        workers=max(1, int(asked or 1)),
        most=spec.replicas,
        cpus=spec.num_cpus,
        share=None if asked is None else min(WHOLE, math.ceil(WHOLE * asked)),
        setting="num_gpus",
    )


def _engine_need(name: str, numel: int, config: Mapping[str, Any], settings: Serving) -> Need:
    width = BYTES.get(settings.dtype, 2)  # vLLM computes in 16 bits where a checkpoint has 32
    context = settings.engine.get("max_model_len", settings.max_model_len) or longest_context(config)
    tokens = max(ENGINE_TOKENS, context) if math.isfinite(context) else ENGINE_TOKENS
    utilization = settings.engine.get("gpu_memory_utilization")
    return Need(
        name,
        width * numel,
        math.ceil(width * kv_values(config) * tokens),
        workers=workers_of(settings),
        most=settings.max_replicas or settings.replicas,
        share=None if utilization is None else _share(utilization),
    )


def _share(utilization: float) -> int:
    """Share of a GPU of which an engine with this `gpu_memory_utilization` uses the usual part."""
    return WHOLE if utilization > _MOST_SHARED else math.ceil(WHOLE * utilization / UTILIZATION)


def _numel(plan: PairPlan) -> int:
    """Weights that an engine holds: of one alpha, or of sft and the adapter where that is served beside it."""
    own = sum(tensor.base.numel for shard in plan.shards for tensor in shard.tensors)
    return own + (sum(tensor.numel for tensor in plan.sft.tensors.values()) if plan.scaled else 0)


def _config_of(plan: PairPlan) -> Mapping[str, Any]:
    return plan.sft.config if plan.dpo.adapter else plan.dpo.config
