"""Make the pairs to measure with, and keep them in the cache; the same bytes on every machine.

python -m benchmarks.pair       makes them now rather than at the first measurement
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import CACHE, ROOT

if TYPE_CHECKING:
    from torch import Tensor

TINY_LLAMA_LAYERS = 22
ONE_TENSOR_BYTES = 2 * 2**30
# As in the pairs that were looked at: the delta's RMS is 2.5e-3 of the weights'.
WEIGHT_STD, DELTA_STD = 0.02, 5e-5
SHARDS = {"sft": 5, "dpo": 2}
_BLOCK = 1 << 24

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pair:
    """Two folders, in bf16, sharded differently."""

    sft: Path
    dpo: Path

    @property
    def weight_bytes(self) -> int:
        """Of both models."""
        return sum(
            file.stat().st_size for side in (self.sft, self.dpo) for file in side.glob("*.safetensors")
        )


def llama_pair(layers: int = TINY_LLAMA_LAYERS) -> Pair:
    """A pair with TinyLlama's shapes: 1.1 B parameters, 2.2 GB each, unless given fewer layers."""
    return _cached(f"llama-{layers}")


def one_tensor_pair(nbytes: int = ONE_TENSOR_BYTES) -> Pair:
    """Make a pair of a single tensor."""
    return _cached(f"tensor-{nbytes}")


def _cached(name: str) -> Pair:
    home = CACHE / name
    if not home.is_dir():
        # In another process: the memory that torch takes here would be counted as that of the processes measured later.
        subprocess.run([sys.executable, "-m", "benchmarks.pair", name], cwd=ROOT, check=True)
    return Pair(home / "sft", home / "dpo")


def make(name: str) -> None:
    """Make a pair in the cache; its folder has its name only when it is complete."""
    print(f"making {CACHE / name}", file=sys.stderr, flush=True)
    kind, size = name.split("-")
    if kind == "llama":
        shapes, config = dict(_llama_shapes(int(size))), _llama_config(int(size))
    else:
        shapes, config = (
            {"model.embed_tokens.weight": (int(size) // 2048, 1024)},
            {"model_type": "one-tensor"},
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
        for side in SHARDS:
            _write(Path(unfinished) / "pair" / side, side, shapes, config)
        (Path(unfinished) / "pair").rename(CACHE / name)


def _llama_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (32000, 2048)
    for layer in range(layers):
        inner = {
            "input_layernorm": (2048,),
            "self_attn.q_proj": (2048, 2048),
            "self_attn.k_proj": (256, 2048),
            "self_attn.v_proj": (256, 2048),
            "self_attn.o_proj": (2048, 2048),
            "post_attention_layernorm": (2048,),
            "mlp.gate_proj": (5632, 2048),
            "mlp.up_proj": (5632, 2048),
            "mlp.down_proj": (2048, 5632),
        }
        yield from ((f"model.layers.{layer}.{name}.weight", shape) for name, shape in inner.items())
    yield "model.norm.weight", (2048,)
    yield "lm_head.weight", (32000, 2048)


def _llama_config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _write(folder: Path, side: str, shapes: Shapes, config: Mapping[str, object]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    seeds = {tensor: seed for seed, tensor in enumerate(shapes)}
    groups = _groups(shapes, SHARDS[side])
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {tensor: _weights(shapes[tensor], seeds[tensor], side) for tensor in group}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": 2 * sum(map(prod, shapes.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder)


def _groups(shapes: Shapes, shards: int) -> list[list[str]]:
    """Names in their order, in at most `shards` groups of about the same size."""
    share = sum(map(prod, shapes.values())) / shards
    groups: list[list[str]] = []
    filled = share
    for name, shape in shapes.items():
        if filled >= share:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += prod(shape)
    return groups


def _weights(shape: tuple[int, ...], seed: int, side: str) -> Tensor:
    """Normal weights of one seed; dpo's are sft's, moved. Made in blocks, for the largest tensor has 2^30 elements."""
    import torch

    weights = torch.empty(prod(shape), dtype=torch.bfloat16)
    base, delta = (torch.Generator().manual_seed(2 * seed + k) for k in range(2))
    for block in weights.split(_BLOCK):
        block.copy_(torch.randn(block.numel(), generator=base) * WEIGHT_STD)
        if side == "dpo":
            block.copy_(block.float() + torch.randn(block.numel(), generator=delta) * DELTA_STD)
    return weights.reshape(shape)


def _write_tokenizer(folder: Path) -> None:
    """Write the smallest tokenizer that loads: mergekit and the paper's script copy one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>"))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        make(name)
