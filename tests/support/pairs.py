"""Small pairs of checkpoints for tests, written with the safetensors library, and the formula to check them by."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from expo_ray.cli.process import main

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
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in shapes.items()
    }


def moved(tensors: Tensors, seed: int = 1, scale: float = 5e-4) -> Tensors:
    """The same weights after a small step, as alignment training makes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
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
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file(
            {name: tensors[name] for name in names[index::shards]}, folder / file, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(names[index::shards], file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return folder


def write_pair(folder: Path, sft_shards: int = 1, dpo_shards: int = 1, **options: Any) -> tuple[Path, Path]:
    """`(sft, dpo)` folders below `folder`."""
    sft = llama_tensors(**options)
    return write_both(folder, sft, moved(sft), sft_shards=sft_shards, dpo_shards=dpo_shards)


def write_both(
    folder: Path,
    sft: Tensors,
    dpo: Tensors,
    config: Mapping[str, Any] = LLAMA,
    *,
    sft_shards: int = 1,
    dpo_shards: int = 1,
) -> tuple[Path, Path]:
    """`(sft, dpo)` folders of these tensors."""
    return (
        write_model(folder / "sft", sft, config, shards=sft_shards),
        write_model(folder / "dpo", dpo, config, shards=dpo_shards),
    )


def read_weights(folder: Path) -> Tensors:
    """Every tensor of a folder, read with the safetensors library."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def same_bits(tensors: Tensors, wanted: Tensors) -> bool:
    """Whether names, dtypes, shapes and every bit agree."""
    return tensors.keys() == wanted.keys() and all(
        (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape)
        and torch.equal(tensor.flatten().view(torch.uint8), wanted[name].flatten().view(torch.uint8))
        for name, tensor in tensors.items()
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; empty if there is none."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def expo(
    sft: Path | str,
    dpo: Path | str,
    output: Path | str,
    *alphas: object,
    rounding: str = "nearest",
    more: str = "",
) -> int:
    """The exit status of `expo-ray extrapolate`, run in this process; `more` are further words of the command line."""
    command = ["extrapolate", "--sft", str(sft), "--dpo", str(dpo), "--output", str(output)]
    command += [word for alpha in alphas for word in ("--alpha", str(alpha))]
    return main([*command, "--rounding", rounding, *shlex.split(more)])


def nearest(
    sft: torch.Tensor, dpo: torch.Tensor, alpha: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The declared formula: in float32 steps for 16-bit parents and in float64 for others, rounded once."""
    narrow = {sft.dtype, dpo.dtype} <= {torch.bfloat16, torch.float16}
    wide = torch.float32 if narrow else torch.float64
    d, s = dpo.to(wide), sft.to(wide)
    value = s if alpha == -1 else d + torch.tensor(alpha, dtype=wide) * (d - s)
    return rounded(value, dtype or dpo.dtype)


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` rounded once, ties to even; torch itself goes from float64 to 16 bits by way of float32."""
    best = value.to(dtype)
    if value.dtype != torch.float64 or dtype.itemsize > 2:
        return best
    start = best.view(torch.int16)
    for step in (-1, 1):
        other = (start + step).view(dtype)
        gap, gap_of_other = (best.double() - value).abs(), (other.double() - value).abs()
        even = other.view(torch.int16) % 2 == 0
        best = torch.where((gap_of_other < gap) | ((gap_of_other == gap) & even), other, best)
    return best


def stepwise(sft: torch.Tensor, dpo: torch.Tensor, alpha: float) -> torch.Tensor:
    """What the paper's script computes: bf16 after each step."""
    d, s = dpo.bfloat16(), sft.bfloat16()
    return d + alpha * (d - s)
