"""Tiny reward models with tokenizers of their own, made from configurations; small enough for every test, big enough for vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from expo_ray.evaluation.records import Response, digest
from tests.support.paths import ROOT

MAX_TOKENS = 256
BOS, EOS = "<s>", "</s>"
TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def byte_tokenizer(template: str | None, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A token for each byte, `<s>` 0 and `</s>` 1; padding is `</s>`, as in many released models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([BOS, EOS, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    tokenizer.chat_template = template
    return tokenizer


def save_reward_model(
    folder: Path, *, template: str | None = TURNS, adds_bos: bool = False, **changes: Any
) -> Path:
    """A `LlamaForSequenceClassification` in fp32 with one label; pad is eos."""
    torch.manual_seed(3)
    config = LlamaConfig(
        **{
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 32, "vocab_size": 320, "max_position_embeddings": MAX_TOKENS, "bos_token_id": 0, "eos_token_id": 1,
            "pad_token_id": 1, "num_labels": 1, "initializer_range": 0.3,
        }
        | changes
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer(template, adds_bos=adds_bos).save_pretrained(folder)
    return folder


def rename_head(folder: Path, name: str) -> None:
    """Save the head under another name, as other libraries do."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def last_token_scores(folder: Path, ids: Sequence[Sequence[int]]) -> list[float]:
    """Apply the head to the last token's hidden state, one text at a time and without padding."""
    model: Any = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several for so small a model get into each other's way
    try:
        with torch.inference_mode():
            return [
                (
                    model.model(torch.tensor([list(text)])).last_hidden_state[0, -1] @ model.score.weight[0]
                ).item()
                for text in ids
            ]
    finally:
        torch.set_num_threads(threads)


def response(prompt: str, text: str, sample: int = 0, **more: Any) -> Response:
    messages = ({"role": "user", "content": prompt},)
    values: dict[str, Any] = {
        "prompt_id": digest(list(messages)), "sample": sample, "model": "m", "messages": messages, "text": text,
        "num_tokens": len(text), "num_prompt_tokens": 0, "finish_reason": "stop", "seed": 0,
    }  # fmt: skip
    return Response(**values | more)


def english(count: int, longest: int = 100_000) -> list[Response]:
    """Prompts and texts of all lengths out of this repository's documents; the first is empty."""
    root = ROOT
    words = [
        word
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
        for word in (root / name).read_text().split()
    ]
    texts = [" ".join(words[7 * number : 7 * number + number * number % 37]) for number in range(count)]
    return [
        response(f"Question {number} about {words[11 * number % len(words)]}?", text[:longest])
        for number, text in enumerate(texts)
    ]
