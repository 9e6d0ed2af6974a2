"""Tiny models of `transformers` and adapters of `peft`, made from configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from tests.support.pairs import moved

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny_llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | changes)


def causal_model(
    config: PretrainedConfig, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def after_training(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, after a small step of all its weights."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name, weight in moved(weights).items():
            weights[name].copy_(weight)
    return model


def save_pair(
    folder: Path, model: PreTrainedModel, sft_shard_size: str = "1GB", dpo_shard_size: str = "1GB"
) -> tuple[Path, Path]:
    """`(sft, dpo)` folders as `save_pretrained` writes them; the model is dpo afterwards."""
    model.save_pretrained(folder / "sft", max_shard_size=sft_shard_size)
    after_training(model).save_pretrained(folder / "dpo", max_shard_size=dpo_shard_size)
    return folder / "sft", folder / "dpo"


def save_lora(folder: Path, model: PreTrainedModel, **settings: Any) -> tuple[Path, Path]:
    """`(sft, adapter)`: a model and a LoRA adapter on it whose B is not zero, as after training."""
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(folder / "sft")
    values: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    config = LoraConfig(**values | settings)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_" in name or "lora_embedding" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    adapted.save_pretrained(str(folder / "adapter"))
    return folder / "sft", folder / "adapter"
