"""What a reward model is, from its headers alone: enough to refuse one that would score nonsense before it is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from expo_ray.checkpoint.folder import read_checkpoint
from expo_ray.checkpoint.quantisation import quantisation_of
from expo_ray.checkpoint.tensors import Checkpoint
from expo_ray.checkpoint.text_config import text_configs
from expo_ray.config import RewardModel
from expo_ray.errors import Problems, RewardError, some
from expo_ray.evaluation.records import digest
from expo_ray.evaluation.reward_function import RewardFunction, is_function, load_function
from expo_ray.storage import open_store
from expo_ray.text import shown
from expo_ray.untrusted import Foreign, validated

# Last layer of the heads that `transformers` puts on sequence classifiers; its rows are the labels.
_HEADS = (
    "score.weight",
    "classifier.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
    "logits_proj.weight",
)
_OTHER_HEADS = ("v_head.", "value_head.", "reward_head.", "regression_layer.")
_SUFFIX = "ForSequenceClassification"
_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
# Their positions begin behind the padding token's.
_SHIFTED = {"roberta", "xlm-roberta", "camembert"}


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier with one label.

    Attributes:
        spec: what the user said of it.
        side_files: keys of configuration, tokenizer and template.
        max_tokens: longest input.
        numel: number of weights.
        stored: dtype of the weights as stored: `bf16`, `fp16` or `fp32`.
        kv_values: values that attention caches for each token, over all layers.
        identity: digest of the files.
    """

    spec: RewardModel
    uri: str
    side_files: tuple[str, ...]
    max_tokens: int
    numel: int
    stored: str
    kv_values: int
    identity: str


def inspect_reward_model(spec: RewardModel) -> Classifier | RewardFunction:
    """Look at a reward model without loading it.

    Raises:
        Problems: with everything that is wrong with it.
        ExpoError: if there is no such folder or function.
    """
    if is_function(spec.model):
        return load_function(spec.model)
    store = open_store(spec.model)
    checkpoint = read_checkpoint(store)
    _check_types(checkpoint)
    problems = [RewardError(f"{store.uri}: {text}") for text in _problems(checkpoint)]
    if problems:
        raise Problems(problems)
    config = checkpoint.config
    return Classifier(
        spec=spec,
        uri=store.uri,
        side_files=checkpoint.side_files,
        max_tokens=_max_tokens(config) or 0,
        numel=sum(tensor.numel for tensor in checkpoint.tensors.values()),
        stored=_stored(checkpoint),
        kv_values=_kv_values(config),
        identity=digest(
            [[key, info.size, info.etag] for key, info in sorted(checkpoint.files.items())]
            if not checkpoint.revision
            else checkpoint.revision
        ),
    )


_Count = Annotated[int, Field(ge=1, lt=2**40)]


class _Part(Foreign):
    """The values of a configuration, or of one nested in it, that sizes are computed from."""

    hidden_size: _Count | None = None
    n_embd: _Count | None = None
    num_attention_heads: _Count | None = None
    n_head: _Count | None = None
    num_key_value_heads: _Count | None = None
    num_hidden_layers: _Count | None = None
    n_layer: _Count | None = None
    head_dim: _Count | None = None
    model_type: str | None = None


class _Config(_Part):
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | str | None = None
    id2label: dict[str, Any] | None = None
    num_labels: Annotated[int, Field(ge=0)] | None = None


def _check_types(checkpoint: Checkpoint) -> None:
    outer, *nested = text_configs(checkpoint.config)
    source, remedy = f"{checkpoint.uri}/config.json", "put the model's own config.json in its place"
    validated(_Config, outer, source, error=RewardError, remedy=remedy)
    for part in nested:
        validated(_Part, part, source, error=RewardError, remedy=remedy)


def _problems(checkpoint: Checkpoint) -> list[str]:
    """What forbids to score with it, each with its remedy."""
    if checkpoint.adapter:
        return ["a bare adapter; merge it into its base model and give the merged folder"]
    config, names = checkpoint.config, checkpoint.tensors
    problems = []
    if scheme := quantisation_of(checkpoint):
        problems.append(f"quantised with {scheme}; give the model in bf16, fp16 or fp32")
    if config.get("auto_map"):
        problems.append(
            f"needs code of its own ({shown(', '.join(sorted(_classes(config['auto_map']))))}), which is not run here; "
            f"convert it to an architecture of transformers, or score with a `python:` function"
        )
    architectures = config.get("architectures") or []
    if not any(str(one).endswith(_SUFFIX) for one in architectures):
        problems.append(
            f"config.json says architectures {some(list(map(str, architectures))) or 'none'}, no sequence classifier; loaded as one it would "
            f"score with a random head. Give a reward model saved as *{_SUFFIX}"
        )
    heads = [name for name in _HEADS if name in names]
    if not heads:
        others = [name for name in names if name.startswith(_OTHER_HEADS)]
        found = f" (there is {some(others)}, which transformers does not load)" if others else ""
        problems.append(
            f"has no score head: none of {some(list(_HEADS))} is among its tensors{found}; it would be filled with random numbers. "
            "Give the folder of the trained reward model, with its head"
        )
    labels = {f"the {heads[0]} of its weights": math.prod(names[heads[0]].shape[:1])} if heads else {}
    labels["config.json"] = _num_labels(config)
    if set(labels.values()) != {1}:
        told = " and ".join(f"{count} by {where}" for where, count in labels.items())
        problems.append(
            f"has {told} label(s), but a reward is one number; give a model with one label (`num_labels: 1`)"
        )
    if _max_tokens(config) is None:
        problems.append(
            f"config.json does not say how long inputs may be; add `{_LIMITS[0]}`, as the model was trained"
        )
    return problems


def _classes(auto_map: Mapping[str, Any] | str) -> list[str]:
    return [auto_map] if isinstance(auto_map, str) else list(auto_map)


def _num_labels(config: Mapping[str, Any]) -> int:
    """As `transformers` counts them: two unless told."""
    labels = config.get("id2label")
    return int(config.get("num_labels") or (len(labels) if labels else 2))


def _max_tokens(config: Mapping[str, Any]) -> int | None:
    for part in reversed(list(text_configs(config))):
        for key in _LIMITS:
            if type(limit := part.get(key)) is int and limit > 0:
                return limit - 2 if part.get("model_type") in _SHIFTED else limit
    return None


def _kv_values(config: Mapping[str, Any]) -> int:
    part = list(text_configs(config))[-1]
    width = part.get("hidden_size") or part.get("n_embd") or 0
    heads = part.get("num_attention_heads") or part.get("n_head") or 1
    layers = part.get("num_hidden_layers") or part.get("n_layer") or 1
    head_dim = part.get("head_dim") or width // heads
    return int(2 * layers * (part.get("num_key_value_heads") or heads) * head_dim)


def _stored(checkpoint: Checkpoint) -> str:
    """The dtype of most weights."""
    counts: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    return {"BF16": "bf16", "F16": "fp16"}.get(max(counts, key=lambda name: counts[name]), "fp32")


def reward_id(model: Classifier | RewardFunction, spec: RewardModel, dtype: str) -> str:
    """Names what decides the scores: the model's files or the function's text, dtype, back end as asked, truncation."""
    return digest([model.identity, dtype, spec.backend, spec.truncate])
