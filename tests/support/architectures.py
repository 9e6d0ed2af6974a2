"""Build every architecture of transformers on the meta device and compare what `VocabularyWeights` makes of its names.

Run as `python -m tests.support.architectures`; prints one JSON object a line, for each model class.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from expo_ray.checkpoint.constants import is_constant
from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.tensors import Tensor
from expo_ray.checkpoint.tied import VocabularyWeights

MAPPINGS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "MULTIMODAL_LM",
    "PRETRAINING", "TEXT_TO_WAVEFORM",
)  # fmt: skip
MORE = ("PI0", "T5Gemma")


def classes() -> dict[str, tuple[Any, Any]]:
    """Name of the model class -> its configuration's class and itself."""
    by_name: dict[str, tuple[Any, Any]] = {}
    for mapping in MAPPINGS:
        pairs = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING")
        for config_class in pairs:
            models = pairs[config_class]
            for model_class in models if isinstance(models, tuple | list) else [models]:
                by_name.setdefault(model_class.__name__, (config_class, model_class))
    for name in MORE:
        model_class = getattr(transformers, f"{name}ForConditionalGeneration")
        by_name.setdefault(model_class.__name__, (getattr(transformers, f"{name}Config"), model_class))
    return by_name


def survey(name: str, config_class: Any, model_class: Any) -> dict[str, Any]:
    """Whether embedding, head and ties of one architecture are recognised from names, shapes and configuration."""
    config = config_class()
    with torch.device("meta"):
        model = model_class(config)
    names_of: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(parameter_name)
    embedding, head = (
        _names(model, method, names_of) for method in ("get_input_embeddings", "get_output_embeddings")
    )
    state = model.state_dict()
    tied = {
        copy: kept for copy, kept in model.all_tied_weights_keys.items() if copy in state and kept in state
    }
    stored = {
        key: Tensor(key, "F32", tuple(tensor.shape), "f", 0)
        for key, tensor in state.items()
        if key not in tied and tensor.is_floating_point()
    }
    saved = json.loads(config.to_json_string(use_diff=False))
    vocabulary = VocabularyWeights(Checkpoint("memory://x", "", saved, stored, {}))
    buffers = [key for key, _ in model.named_buffers() if key in stored and not is_constant(stored[key])]
    return {
        "name": name,
        "embedding": not embedding or vocabulary.embedding in {tied.get(key, key) for key in embedding},
        "head": not embedding
        or all(vocabulary.is_vocabulary(key) or _rows(stored, key) == vocabulary.rows for key in head),
        "ties": sorted(copy for copy, kept in tied.items() if vocabulary.owner(copy) != kept),
        "reversed": sorted(_not_reversed(saved, stored, tied)),
        "buffers": buffers,
        "has_embedding": bool(embedding),
    }


def _names(model: Any, method: str, names_of: dict[int, list[str]]) -> list[str]:
    try:
        weight = getattr(getattr(model, method)(), "weight", None)
    except (AttributeError, NotImplementedError):
        return []
    return names_of.get(id(weight), [])


def _rows(stored: dict[str, Tensor], name: str) -> int:
    return stored[name].shape[0] if name in stored else 0


def _not_reversed(config: dict[str, Any], stored: dict[str, Tensor], tied: dict[str, str]) -> Iterator[str]:
    """Heads that are not recognised as the embedding where only they are stored."""
    matrices = {
        copy: kept for copy, kept in tied.items() if copy.endswith(".weight") and len(stored[kept].shape) == 2
    }
    if len(matrices) != 1:
        return
    for head, kept in matrices.items():
        alone = {head if key == kept else key: tensor for key, tensor in stored.items()}
        if VocabularyWeights(Checkpoint("memory://x", "", config, alone, {})).owner(kept) != head:
            yield head


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for name, (config_class, model_class) in sorted(classes().items()):
        try:
            result = survey(name, config_class, model_class)
        except Exception as error:  # a default configuration need not be one that can be built
            result = {"name": name, "error": f"{type(error).__name__}: {error}"[:200]}
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
