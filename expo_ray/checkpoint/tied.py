"""The vocabulary weights of a checkpoint: its embedding, its output head, and whether the two are tied into one weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.small_files import text_configs
from expo_ray.checkpoint.tensors import WEIGHT_DTYPES, Tensor

# Last parts of the names of input embeddings in the architectures of `transformers`.
_EMBEDDINGS = (
    "embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "word_embedding", "tokens_embed",
    "input_embedding", "embedding_projection",
)  # fmt: skip
# Other modules have these names too, so a tensor counts only if its number of rows is the size of the vocabulary.
_AMBIGUOUS_EMBEDDINGS = ("embeddings", "shared", "w")
# Output heads: the part of the name behind the parents that head and embedding share.
_HEADS = (
    "lm_head", "output_layer", "output", "embed_out", "proj_out", "output_projection", "cls.predictions.decoder",
    "predictions.decoder", "lm_head.decoder", "lm_head.out_proj", "decoder", "vocab_projector", "pred_layer.proj", "lm_loss",
    "unembedding_projection", "generator_lm_head", "text_decoder_postnet.lm_head",
)  # fmt: skip
# An encoder and a decoder that share an embedding also have it under their own names, tied head or not.
_COPIES = ("encoder", "decoder", "text_encoder", "text_decoder", "text_model")
_VOCAB_SIZES = ("vocab_size", "padded_vocab_size", "n_vocab", "n_words", "src_vocab_size", "tgt_vocab_size")
_WITH_LANGUAGE_MODEL = ("vlm_config", "decoder", "encoder", "text_encoder", "generator")


class VocabularyWeights:
    """Lookup of the stored tensor that holds a vocabulary weight, by any name that the weight can have.

    Attributes:
        embedding: name of the input embedding; of the head if only that is stored; None if neither is.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._config = checkpoint.config
        self._rows = _declared_rows(checkpoint.config)
        self._input = self._named_embedding()
        self.embedding = self._input or self._lonely_head()

    @cached_property
    def rows(self) -> int:
        """Number of rows of the vocabulary, as stored, else as declared in `config.json`; 0 if unknown."""
        if self.embedding:
            return self._tensors[self.embedding].shape[0]
        return max(self._rows, default=0)

    def owner(self, name: str) -> str:
        """Name of the stored tensor that holds the weight called `name`; `name` itself if no other does.

        A stored head counts as tied only if the configuration says so and nowhere denies it; two tensors then hold one weight.
        Without a stored head the embedding is the head, unless the configuration denies that they are tied. An absent
        `tie_word_embeddings` denies nothing, as its default differs between architectures.
        """
        if name.endswith(".bias"):
            return self._owner_of_bias(name)
        if self.embedding is None or name == self.embedding or not name.endswith(".weight"):
            return name
        module = name.removesuffix(".weight")
        if self.is_head(name) and self._is_tied:
            return self._same_shape(name, self._decoder_half or self.embedding)
        if self._is_copy(module):
            return self._same_shape(name, self.embedding)
        if self._input is None and self._is_embedding_of_head(module) and not self._denied:
            return self.embedding
        return name

    def tensor(self, name: str) -> Tensor | None:
        """The stored tensor called `name`, or the one that holds it."""
        return self._tensors.get(name) or self._tensors.get(self.owner(name))

    def is_head(self, name: str) -> bool:
        """True if `name` is one that the output head of this checkpoint can have."""
        return name in self._head_names

    def is_vocabulary(self, name: str) -> bool:
        """True if `name` can only be an embedding, a head or the bias of a head of this checkpoint."""
        if name.endswith(".bias"):
            module = name.removesuffix("bias")
            return self.is_head(f"{module}weight") or self.is_head(f"{module}decoder.weight")
        return (
            name == self.embedding
            or self.is_head(name)
            or self._is_copy(name.removesuffix(".weight"))
            or (self._input is None and self._is_embedding_of_head(name.removesuffix(".weight")))
        )

    def has_tied_head(self, name: str) -> bool:
        """True if the output head of this checkpoint is the tensor `name` under another name."""
        heads = self._stored_heads or sorted(self._head_names)
        return any(head != name and self.owner(head) == name for head in heads)

    @cached_property
    def _tie_settings(self) -> list[bool]:
        return [
            bool(part["tie_word_embeddings"])
            for part in text_configs(self._config)
            if "tie_word_embeddings" in part
        ]

    @property
    def _denied(self) -> bool:
        return bool(self._tie_settings) and not any(self._tie_settings)

    def _same_shape(self, name: str, owner: str) -> str:
        """`owner`, unless `name` is stored and cannot be the same weight."""
        stored = self._tensors.get(name)
        return owner if stored is None or stored.shape == self._tensors[owner].shape else name

    @cached_property
    def _is_tied(self) -> bool:
        if self._stored_heads:
            return bool(self._tie_settings) and all(self._tie_settings)
        return not self._denied

    @cached_property
    def _stored_heads(self) -> list[str]:
        return [name for name in _heads(self._input) if name in self._tensors] if self._input else []

    @cached_property
    def _head_names(self) -> frozenset[str]:
        return frozenset(_heads(self.embedding or "")) - {self.embedding}

    def _is_copy(self, module: str) -> bool:
        """True if the module is the embedding of an encoder or decoder that shares one, or the shared one."""
        if self._input is None:
            return False
        *path, own = module.split(".")
        *own_path, embedding = self._input.split(".")[:-1]
        bare = [part for part in path if part not in _COPIES]
        own_bare = [part for part in own_path if part not in _COPIES]
        if bare != own_bare or own not in (*_EMBEDDINGS, "shared"):
            return False
        if embedding == "shared" or len(own_path) == len(own_bare):
            return len(path) > len(bare)
        # Only a copy is stored. It serves under the shared name, and for the other half if that half does not store its own.
        halves = [name for name in self._tensors if _is_half(name, own_bare)]
        return (own == "shared" or len(path) > len(bare)) and len(halves) == 1

    @cached_property
    def _decoder_half(self) -> str | None:
        """Name of the decoder's embedding if the encoder has a separate one; the head is then tied to the decoder's."""
        if self._input is None or "encoder" not in self._input.split("."):
            return None
        half = ".".join("decoder" if part == "encoder" else part for part in self._input.split("."))
        return half if half in self._tensors else None

    def _is_embedding_of_head(self, module: str) -> bool:
        head = self.embedding or ""
        prefix = next(
            (
                prefix
                for prefix in _prefixes(head)
                if head.removeprefix(prefix).removesuffix(".weight") in _HEADS
            ),
            "",
        )
        return module.startswith(prefix) and module.rpartition(".")[2] in (
            *_EMBEDDINGS,
            *_AMBIGUOUS_EMBEDDINGS,
        )

    def _named_embedding(self) -> str | None:
        """Name of the text embedding; None if none is stored.

        Of several candidates by name, the first in this order: as many rows as the configured vocabulary, inside the language
        model, an encoder's before a decoder's, fewer parents.
        """
        named = []
        for name, tensor in self._tensors.items():
            own = f".{name}".removesuffix(".weight").rpartition(".")[2] if name.endswith(".weight") else ""
            fits = tensor.shape[0] in self._rows if _is_matrix(tensor) else False
            if _is_matrix(tensor) and (own in _EMBEDDINGS or (fits and own in _AMBIGUOUS_EMBEDDINGS)):
                named.append((not fits, *_remoteness(name), name))
        if not named:
            return None
        name = min(named)[-1]
        head = self._lonely_head() if min(named)[0] else None
        return None if head and head not in _heads(name) else name

    def _lonely_head(self) -> str | None:
        """Name of the head of a checkpoint that stores its head and not its embedding."""
        named = [
            name
            for name, tensor in self._tensors.items()
            if _is_matrix(tensor)
            and tensor.shape[0] in self._rows
            and any(f".{name}".endswith(f".{head}.weight") for head in _HEADS)
        ]
        return named[0] if len(named) == 1 else None

    def _owner_of_bias(self, name: str) -> str:
        """Stored name of a head's bias: BERT and its relatives have it twice, as `X.bias` and `X.decoder.bias`."""
        outer = name.removesuffix(".decoder.bias") + ".bias" if name.endswith(".decoder.bias") else ""
        if outer and outer.endswith(("predictions.bias", "lm_head.bias", "_head.bias")):
            return outer if outer in self._tensors else name
        inner = name.removesuffix(".bias") + ".decoder.bias"
        return inner if name not in self._tensors and inner in self._tensors else name


def _remoteness(name: str) -> tuple[bool, bool, int]:
    parts = name.split(".")
    return "language_model" not in parts, "decoder" in parts, len(parts)


def _is_half(name: str, bare: list[str]) -> bool:
    """True if `name` is the embedding of an encoder or of a decoder."""
    *path, own = name.split(".")[:-1] or [""]
    return (
        own in _EMBEDDINGS
        and name.endswith(".weight")
        and len(path) > len(bare)
        and [part for part in path if part not in _COPIES] == bare
    )


def _is_matrix(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2 and tensor.dtype in WEIGHT_DTYPES


def _prefixes(name: str) -> list[str]:
    """Parents of a dotted name as prefixes, from the empty one to all of them."""
    outer = name.split(".")[:-2]
    return ["".join(f"{part}." for part in outer[:depth]) for depth in range(len(outer) + 1)]


def _heads(embedding: str) -> Iterator[str]:
    """Every name that the head tied to an embedding can have."""
    for prefix in _prefixes(embedding):
        for head in _HEADS:
            yield f"{prefix}{head}.weight"


def _declared_rows(config: Mapping[str, Any]) -> set[int]:
    """Vocabulary sizes that a configuration declares for its language models."""
    rows = set(_sizes(text_configs(config)))
    return rows or set(
        _sizes(
            part
            for key in _WITH_LANGUAGE_MODEL
            if isinstance(nested := config.get(key), Mapping)
            for part in text_configs(nested)
        )
    )


def _sizes(configs: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    for config in configs:
        for key in _VOCAB_SIZES:
            size = config.get(key)
            if type(size) is int and size > 0:
                yield size
