"""Embeddings, heads and ties, held against what transformers has in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from expo_ray.checkpoint.folder import Checkpoint, read_checkpoint
from expo_ray.checkpoint.renaming import match_names
from expo_ray.checkpoint.tensors import Tensor
from expo_ray.checkpoint.tied import VocabularyWeights
from tests.support.stored_files import stored_folder

LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def weights_of(names: Sequence[str], config: dict[str, Any], rows: int = 32) -> VocabularyWeights:
    tensors = {
        name: Tensor(name, "F32", (rows, 16) if name.endswith("weight") else (rows,), "f", 0)
        for name in names
    }
    return VocabularyWeights(Checkpoint("memory://x", "", config, tensors, {}))


def tiny(config: PreTrainedConfig, path: Path) -> Checkpoint:
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return read_checkpoint(stored_folder(path))


@pytest.mark.parametrize(
    ("config", "embedding"),
    [
        (LlamaConfig(**LLAMA, tie_word_embeddings=True), EMBEDDING),
        (GemmaConfig(**LLAMA, num_key_value_heads=1, head_dim=8), EMBEDDING),
        (GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32), "transformer.wte.weight"),
    ],
)
def test_a_head_that_transformers_left_out_stands_for_the_embedding(
    config: PreTrainedConfig, embedding: str, tmp_path: Path
) -> None:
    checkpoint = tiny(config, tmp_path)
    assert HEAD not in checkpoint.tensors
    assert VocabularyWeights(checkpoint).embedding == embedding
    assert VocabularyWeights(checkpoint).owner(HEAD) == embedding
    # Older libraries leave out a setting that equals their default.
    stored_config = json.loads((tmp_path / "config.json").read_text())
    stored_config.pop("tie_word_embeddings", None)
    bare = Checkpoint("memory://x", "", stored_config, checkpoint.tensors, {})
    assert VocabularyWeights(bare).owner(HEAD) == embedding


def test_an_untied_head_stands_for_itself(tmp_path: Path) -> None:
    checkpoint = tiny(LlamaConfig(**LLAMA, tie_word_embeddings=False), tmp_path)
    assert HEAD in checkpoint.tensors
    assert VocabularyWeights(checkpoint).owner(HEAD) == HEAD


SHARED = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
BERT, BERT_HEAD = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"


@pytest.mark.parametrize(
    ("names", "config", "name", "owner"),
    [
        ([EMBEDDING, HEAD], TIED, HEAD, EMBEDDING),
        ([EMBEDDING, HEAD], UNTIED, HEAD, HEAD),
        ([EMBEDDING, HEAD], {}, HEAD, HEAD),
        ([EMBEDDING], UNTIED, HEAD, HEAD),
        ([EMBEDDING], {}, HEAD, EMBEDDING),
        (["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"], {"text_config": TIED},
         "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
        (["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"], {**UNTIED, "text_config": TIED},
         "language_model.lm_head.weight", "language_model.lm_head.weight"),
        (["gpt_neox.embed_in.weight", "embed_out.weight"], TIED, "embed_out.weight", "gpt_neox.embed_in.weight"),
        (["model.tok_embeddings.weight", "output.weight"], TIED, "output.weight", "model.tok_embeddings.weight"),
        (["vision.patch.weight"], TIED, HEAD, HEAD),
        # only the head is stored, as safetensors' save_model does
        ([HEAD], {**TIED, "vocab_size": 32}, EMBEDDING, HEAD),
        ([HEAD], {**UNTIED, "vocab_size": 32}, EMBEDDING, EMBEDDING),
        ([HEAD], {**TIED, "vocab_size": 64}, EMBEDDING, EMBEDDING),
        ([BERT_HEAD], {**TIED, "vocab_size": 32}, BERT, BERT_HEAD),
        # encoder and decoder share the embedding, whatever becomes of the head
        (SHARED[:1], {**UNTIED, "vocab_size": 32}, SHARED[1], SHARED[0]),
        (SHARED, {**UNTIED, "vocab_size": 32}, SHARED[2], SHARED[0]),
        (SHARED[2:], {"vocab_size": 32}, SHARED[0], SHARED[2]),
        (SHARED[1:], {"vocab_size": 32}, SHARED[0], SHARED[0]),
        (SHARED[:1], TIED | {"vocab_size": 32}, HEAD, SHARED[0]),
        (SHARED[:1], {**UNTIED, "vocab_size": 32}, HEAD, HEAD),
        # the head of a model with two embeddings goes with the decoder's
        (["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"], {"vocab_size": 32},
         "lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"),
        # a prediction layer's own copy is nobody else's
        ([EMBEDDING], {"vocab_size": 32}, "model.layers.61.embed_tokens.weight", "model.layers.61.embed_tokens.weight"),
        ([BERT, "cls.predictions.bias"], TIED, "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ([BERT, "cls.predictions.decoder.bias"], TIED, "cls.predictions.bias", "cls.predictions.decoder.bias"),
    ],
)  # fmt: skip
def test_the_owner_of_a_name(names: list[str], config: dict[str, Any], name: str, owner: str) -> None:
    assert weights_of(names, config).owner(name) == owner


@pytest.mark.parametrize(
    ("names", "config", "embedding"),
    [
        (["model.layers.61.embed_tokens.weight", EMBEDDING], {}, EMBEDDING),
        (["weight", "wte.bias"], {}, None),
        (["backbone.embeddings.weight"], {"vocab_size": 32}, "backbone.embeddings.weight"),
        (["backbone.embeddings.weight"], {"vocab_size": 16}, None),
        (["transformer.w.weight"], {"vocab_size": 32}, "transformer.w.weight"),
        (["vision.embeddings.weight"], {}, None),
    ],
)
def test_the_embedding(names: list[str], config: dict[str, Any], embedding: str | None) -> None:
    assert weights_of(names, config).embedding == embedding


def test_the_embedding_has_the_rows_that_the_language_model_declares() -> None:
    rows = {
        "qformer.embeddings.word_embeddings.weight": 20,
        "language_model.model.decoder.embed_tokens.weight": 32,
    }
    tensors = {name: Tensor(name, "F32", (count, 16), "f", 0) for name, count in rows.items()}
    config = {"text_config": {"vocab_size": 32}, "qformer_config": {"vocab_size": 20}}
    vocabulary = VocabularyWeights(Checkpoint("memory://x", "", config, tensors, {}))
    assert (vocabulary.embedding, vocabulary.rows) == ("language_model.model.decoder.embed_tokens.weight", 32)


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (["bert.a", "bert.b", "cls.x"], ["a", "b"], {"bert.a": "a", "bert.b": "b"}),
        (["a", "b"], ["bert.a", "bert.b", "cls.x"], {"a": "bert.a", "b": "bert.b"}),
        (["policy.a", "policy.b", "ref.a", "ref.b"], ["a", "b"], {}),
        (["model.a", "language_model.a"], ["a"], {}),
        (["a", "other.a"], ["a"], {}),
        (["model.language_model.layers.0.q", "model.visual.x"], ["model.layers.0.q", "visual.x"],
         {"model.language_model.layers.0.q": "model.layers.0.q", "model.visual.x": "visual.x"}),
    ],
)  # fmt: skip
def test_names_of_one_tensor(names: list[str], wanted: list[str], expected: dict[str, str]) -> None:
    assert match_names(names, wanted) == expected
