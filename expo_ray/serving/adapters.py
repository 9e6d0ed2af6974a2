"""LoRA pairs whose alphas one engine answers side by side: which pairs can be, with which settings, from which files.

The published adapter of an alpha is dpo's own with another scale, so an engine holds sft once and a small adapter for each alpha.
Nothing is swapped, and what answers is what is published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from expo_ray.checkpoint.adapter import LoraLayer, match_lora_layers
from expo_ray.checkpoint.tied import VocabularyWeights
from expo_ray.config import Pair
from expo_ray.errors import ArithmeticFault, CheckpointError
from expo_ray.extrapolation.model_folder import ADAPTER_CONFIG
from expo_ray.extrapolation.plan import PairPlan, plan_from_headers
from expo_ray.extrapolation.publish import scaled_config_file
from expo_ray.extrapolation.stream import compute_pages
from expo_ray.home import cache_folder
from expo_ray.serving.cache_room import lease, locked, make_room
from expo_ray.storage import open_store
from expo_ray.text import shown_names

# The ranks that vLLM makes room for (`MaxLoRARanks` in vllm/config/lora.py).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Alphas in one batch. Each has a slot in the engine, which takes room from the keys and values: a tenth of the model's size at most.
MOST_IN_BATCH, LEAST_IN_BATCH = 8, 2
_SLOTS_SHARE = 0.1
# Adapters that wait in the host's memory for their turn, for each in a batch.
_KEPT_PER_SLOT = 2
_SLOT_ELEMENT_BYTES = 2
_TOLERANCE = 1e-12


def merged_plan(plan: PairPlan) -> PairPlan:
    """Plan the pair of a scaled adapter as a whole model, the adapter merged into it.

    Raises:
        Problems: if the adapter cannot be merged.
    """
    pair = cast(Pair, plan.options).model_copy(update={"adapter": "merge"})
    return plan_from_headers(pair, plan.sft, plan.dpo, plan.outputs)


def note_of_merging(reason: str) -> str:
    """The note of a plan whose adapter engines merge although the job scales it."""
    return f"engines merge the adapter and hold one alpha at a time, as {reason}"


def reason_to_merge(plan: PairPlan, engine: Mapping[str, Any]) -> str:
    """The reason why engines have to merge a scaled adapter, as far as its headers tell; empty if they need not.

    vLLM gives all layers the one scale of `lora_alpha` and `r`, and passes over `alpha_pattern` and `rank_pattern`
    (vllm/lora/peft_helper.py), so an adapter with several scales would be answered wrongly and without a word.

    Args:
        plan: of an adapter that is scaled; `match_lora_layers` has refused DoRA, biases and `modules_to_save` already.
        engine: arguments of vLLM that the job gives.
    """
    if engine.get("enable_lora") is False:
        return "`serving.engine` says `enable_lora: false`"
    layers = match_lora_layers(plan.dpo, plan.sft).layers
    vocabulary = VocabularyWeights(plan.sft)
    rules = {
        "is on an embedding or the output head, which vLLM may pad or tie": [
            layer for layer in layers if vocabulary.is_vocabulary(layer.base_name)
        ],
        "is on an expert": [layer for layer in layers if ".experts." in layer.base_name],
        f"has a rank above the {RANKS[-1]} that vLLM holds": [
            layer for layer in layers if layer.a.shape[0] > RANKS[-1]
        ],
        "has a scale other than `lora_alpha` and `r` give, the only one that vLLM applies": [
            layer for layer in layers if not _has_common_scale(layer, plan.dpo.adapter)
        ],
    }
    for rule, broken in rules.items():
        if broken:
            return f"the adapter of {shown_names([layer.base_name for layer in broken])} {rule}"
    return ""


def _has_common_scale(layer: LoraLayer, config: Mapping[str, Any]) -> bool:
    rank = config["r"]
    common = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return math.isclose(layer.scale, common, rel_tol=_TOLERANCE)


def adapter_arguments(plan: PairPlan, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a vLLM engine that serves the alphas of a scaled adapter side by side; those in `engine` count first.

    As many adapters have a slot in a batch as fit into a tenth of the model's size, at least 2 and at most 8.
    """
    layers = match_lora_layers(plan.dpo, plan.sft).layers
    largest = max(layer.a.shape[0] for layer in layers)
    rank = engine.get("max_lora_rank") or min(rank for rank in RANKS if rank >= largest)
    widths = sum(layer.a.shape[1] + layer.b.shape[0] for layer in layers)
    model_bytes = sum(tensor.nbytes for tensor in plan.sft.tensors.values())
    fitting = int(_SLOTS_SHARE * model_bytes / (_SLOT_ELEMENT_BYTES * rank * widths))
    slots = engine.get("max_loras") or min(MOST_IN_BATCH, max(LEAST_IN_BATCH, fitting))
    modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in plan.dpo.tensors}
    return {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": slots,
        "max_cpu_loras": _KEPT_PER_SLOT * slots,
        "lora_target_modules": sorted(modules),
        **engine,
    }


def write_adapter(plan: PairPlan, alpha: float) -> Path:
    """Write the adapter of an alpha into this node's cache, with the bytes of the published one, and return its folder.

    All alphas share the file of weights.

    Raises:
        ArithmeticFault: if a scale is not a number at this alpha.
        InputChanged: if dpo is no longer the one that was planned.
        StorageError: if it cannot be read, or the cache not be written.
    """
    try:
        config = scaled_config_file(plan, alpha)
    except CheckpointError as error:
        raise ArithmeticFault(str(error)) from error
    weights = cache_folder() / "adapters" / plan.plan_id(0)
    (file,) = (shard.file for shard in plan.shards)
    _lease(weights)
    if not (weights / file).is_file():
        write_adapter_weights(plan)
    folder = cache_folder() / "adapters" / plan.plan_id(alpha)
    _lease(folder)
    open_store(str(folder)).put(ADAPTER_CONFIG, config)
    if folder != weights and not (folder / file).exists():
        (folder / file).unlink(missing_ok=True)  # a link to a cache that was moved
        (folder / file).symlink_to(weights / file)
    return folder


def write_adapter_weights(plan: PairPlan) -> None:
    """Write the weights of the pair's adapters into this node's cache, over those of an earlier engine.

    Raises:
        InputChanged: if dpo is no longer the one that was planned.
        StorageError: if it cannot be read, or the cache not be written.
    """
    (shard,) = plan.shards
    folder = cache_folder() / "adapters" / plan.plan_id(0)
    _lease(folder)
    make_room(folder, shard.size)
    store = open_store(str(folder))
    with store.writer(shard.file, shard.size) as writer:
        for page in compute_pages(plan, 0, [0.0], "cpu"):
            writer.write(page.outs[0])
        writer.commit()


def _lease(folder: Path) -> None:
    """Keep a folder of the cache, under a lock, as another process may be evicting it."""
    with locked(folder):
        lease(folder)
