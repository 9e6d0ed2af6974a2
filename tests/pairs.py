"""Small pairs of checkpoints for tests, written with the safetensors library, and the formula to check them by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def llama_tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16, rows: int = 256) -> Tensors:
    """The weights of the `LLAMA` config, of a realistic scale."""
    hidden, inner, kv = 64, 96, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in shapes.items()}


def moved(tensors: Tensors, seed: int = 1, scale: float = 2e-3) -> Tensors:
    """The same weights after a small step, as alignment training makes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (one.float() + torch.randn(one.shape, generator=generator) * scale).to(one.dtype)
        if one.is_floating_point()
        else one
        for name, one in tensors.items()
    }


def write_model(folder: Path, tensors: Tensors, config: Mapping[str, Any] = LLAMA, shards: int = 1) -> Path:
    """A Hugging Face folder of `tensors`, dealt out over `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[index::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[index::shards], file)
    total = sum(one.nbytes for one in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return folder


def write_pair(folder: Path, sft_shards: int = 1, dpo_shards: int = 1, **options: Any) -> tuple[Path, Path]:
    """`(sft, dpo)` folders below `folder`."""
    sft = llama_tensors(**options)
    return write_model(folder / "sft", sft, shards=sft_shards), write_model(folder / "dpo", moved(sft), shards=dpo_shards)


def read_weights(folder: Path) -> Tensors:
    """Every tensor of a folder, read with the safetensors library."""
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}


def nearest(sft: torch.Tensor, dpo: torch.Tensor, alpha: float) -> torch.Tensor:
    """The formula for 16-bit parents, in float32 steps, rounded once."""
    d, s = dpo.float(), sft.float()
    return (d + torch.tensor(alpha, dtype=torch.float32) * (d - s)).to(dpo.dtype)
