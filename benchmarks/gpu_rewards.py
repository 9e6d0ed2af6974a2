"""The part of `gpu.py` about reward models: what fp32, TF32 and bf16 cost and change."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.gpu import Findings
from benchmarks.measure import fresh
from expo_ray.on_ray.rewards.backends import TransformersBackend

LARGE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
VOCABULARY = 32000
# Name, dtype of the back end, and torch's precision of float32 products.
WAYS = (
    ("fp32", "fp32", "highest"),
    ("fp32, attention in TF32", "fp32", "highest"),
    ("fp32, all in TF32", "fp32", "high"),
    ("bf16", "bf16", "highest"),
)


def measure_rewards(findings: Findings, on_gpu: bool, quick: bool) -> None:
    """Scores of a classifier with random weights: how far from the CPU's fp32, and tokens a second."""
    folder = fresh("gpu-reward")
    save_classifier(folder, SMALL if quick else LARGE, "cuda" if on_gpu else "cpu")
    draw = np.random.default_rng(0)
    few, many = 4 if quick else 12, 8 if quick else 128
    compared = [draw.integers(1, VOCABULARY, n).tolist() for n in draw.integers(40, 400, few)]
    timed = [draw.integers(1, VOCABULARY, n).tolist() for n in draw.integers(200, 1200, many)]
    expected = TransformersBackend(folder, "fp32", cuda=False).score(compared)
    for name, dtype, precision in WAYS:
        torch.set_float32_matmul_precision(precision)
        try:
            backend = TransformersBackend(folder, dtype, cuda=on_gpu)
            if "attention" in name:
                set_tf32_attention(backend)
            scores = backend.score(compared)
            backend.score(timed[:4])
            started = time.perf_counter()
            backend.score(timed)
            rate = sum(map(len, timed)) / (time.perf_counter() - started)
        finally:
            torch.set_float32_matmul_precision("highest")
        worst = max(abs(score - other) for score, other in zip(scores, expected, strict=True))
        largest = max(map(abs, expected))
        text = f"at most {worst:.1e} from the CPU's fp32 (scores up to {largest:.2f}), {rate:,.0f} tokens/s"
        findings.add("rewards", name, text)


def save_classifier(folder: Path, size: dict[str, Any], device: str) -> None:
    """Write a Llama classifier of random bf16 weights."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        **size, "vocab_size": VOCABULARY, "num_labels": 1, "pad_token_id": 0, "max_position_embeddings": 4096,
    }  # fmt: skip
    config = transformers.LlamaConfig(**settings)
    with torch.device(device):
        model: Any = transformers.LlamaForSequenceClassification(config)
    model.score.weight.data.mul_(20)  # scores of a few units, as trained models have
    model.to(torch.bfloat16).save_pretrained(folder)


def set_tf32_attention(backend: TransformersBackend) -> None:
    """Let attention alone multiply in TF32, as Triton's attention kernel does with fp32 unless it is told not to."""
    from transformers.masking_utils import eager_mask

    def attend(  # noqa: PLR0917 - transformers passes them by position
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any,
        scaling: float = 1.0, dropout: float = 0.0, **others: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        torch.set_float32_matmul_precision("high")
        scores = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, :, : key.shape[-2]]
        out = (scores.softmax(-1) @ value).transpose(1, 2).contiguous()
        torch.set_float32_matmul_precision("highest")
        return out, None

    transformers.AttentionInterface.register("tf32", attend)
    transformers.AttentionMaskInterface.register("tf32", eager_mask)
    backend._model.set_attn_implementation("tf32")
