"""Tied embeddings: when the output head is the input embedding under another name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from expo_ray.checkpoint.text_config import text_configs

# Input embedding -> output heads that go with it, as the architectures of `transformers` name the two.
_HEADS: Mapping[str, tuple[str, ...]] = {
    "embed_tokens": ("lm_head",),
    "wte": ("lm_head",),
    "word_embeddings": ("lm_head", "output_layer"),
    "tok_embeddings": ("output", "lm_head"),
    "embed_in": ("embed_out", "lm_head"),
}


def embedding_name(names: Iterable[str]) -> str | None:
    """The name of the text embedding: of those that look like one, the outermost; None without any."""
    found = [name for name in names if name.endswith(".weight") and name.split(".")[-2] in _HEADS]
    return min(found, key=lambda name: (name.count("."), name), default=None)


def tied_alias(names: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Output heads that stand for the input embedding of one checkpoint.

    A head that is stored counts as tied only if the configuration says so and nowhere denies it: two tensors then hold one
    weight. Where no head is stored the embedding has to serve, so every name it could have is an alias, unless the
    configuration denies it; an absent `tie_word_embeddings` denies nothing, as its default differs between architectures.

    Args:
        names: of the tensors in the checkpoint.
        config: `config.json`, parsed.

    Returns:
        Name of the head -> name of the embedding; the head need not be among `names`.
    """
    embedding = embedding_name(names)
    if embedding is None:
        return {}
    said = [
        bool(part["tie_word_embeddings"]) for part in text_configs(config) if "tie_word_embeddings" in part
    ]
    heads = _possible_heads(embedding)
    stored = [head for head in heads if head in names]
    if stored:
        return dict.fromkeys(stored, embedding) if said and all(said) else {}
    return dict.fromkeys(heads, embedding) if not said or any(said) else {}


def _possible_heads(embedding: str) -> list[str]:
    *outer, own = embedding.split(".")[:-1]
    prefixes = ["".join(f"{part}." for part in outer[:depth]) for depth in range(len(outer) + 1)]
    return [f"{prefix}{head}.weight" for prefix in prefixes for head in _HEADS[own]]
