"""Are swapped weights those of the formula? Tiny models of many architectures, swapped in place, against transformers in float32.

    python -m benchmarks.swap_architectures mixtral olmoe      # all without names; each starts an engine

Prints a line of JSON for each: the largest difference of a log-probability at dpo and after swaps to 0.5, 2 and back to 0, and the
tensors and the share of elements that can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "initializer_range": 0.2,
}  # fmt: skip
_HEADS = {"num_key_value_heads": 2}
_WIDE = {"head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
# Model type of transformers and what differs from SIZES.
ARCHITECTURES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-sliding": ("mistral", {"sliding_window": 8}),
    "gemma": ("gemma", _WIDE),
    "gemma2": ("gemma2", {**_WIDE, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3_text", {**_WIDE, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, **_WIDE}),
    "phi3": ("phi3", _HEADS),
    "gpt2": ("gpt2", _GPT2),
    "gpt-bigcode": ("gpt_bigcode", {**_GPT2, "multi_query": True}),
    "gpt-neox": ("gpt_neox", _HEADS),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 2}),
    "falcon": ("falcon", {"multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False}),
    "falcon-new": ("falcon", {"num_kv_heads": 1, "parallel_attn": True, "bias": True, "new_decoder_architecture": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-padded": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 80}),
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, **_WIDE, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    "qwen2-moe": ("qwen2_moe", {**_EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}),
    "olmoe": ("olmoe", {**_EXPERTS, **_HEADS}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {**_HEADS, "partial_rotary_factor": 0.5}),
    "cohere": ("cohere", {}),
    "granite": ("granite", {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    "starcoder2": ("starcoder2", {}),
    "nemotron": ("nemotron", _WIDE),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "glm4": ("glm4", _WIDE),
    "exaone4": ("exaone4", {**_WIDE, "sliding_window": 8, "sliding_window_pattern": 2}),
}  # fmt: skip
PROMPT_TOKENS = 32


def main() -> int:
    """Try the architectures named, each in a process of its own; the exit status is 1 if one is off by 1e-3 or refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ARCHITECTURES))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(try_swaps(arguments.names[0])))
        return 0
    bad = 0
    for name in arguments.names or ARCHITECTURES:
        command = [sys.executable, "-m", "benchmarks.swap_architectures", "--here", name]
        process = subprocess.run(command, check=False, capture_output=True, text=True)
        line = (process.stdout.strip() or "{}").splitlines()[-1]
        result: dict[str, Any] = {"error": process.stderr.strip()[-500:]}
        if process.returncode == 0:
            result = json.loads(line)
        print(json.dumps({"architecture": name, **result}), flush=True)
        bad += any(result.get(key, 1.0) > 1e-3 for key in ("dpo", "0.5", "2", "0"))
    return int(bad > 0)


def try_swaps(name: str) -> dict[str, Any]:
    """Swap one tiny pair and compare; "not packed again" tells what the comparison says of experts that are left as loaded."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory(prefix="swap-") as folder:
        root = Path(folder)
        ids = _save_pair(name, root)
        # Before vLLM, which patches some classes of transformers.
        wanted = {alpha: _transformers(root, alpha, ids) for alpha in (0.0, 0.5, 2.0)}
        return _engine(root, ids, wanted)


def _save_pair(name: str, root: Path) -> list[int]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.chat_models import ascii_tokenizer

    kind, changes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for side in ("sft", "dpo"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(root / side)
        ascii_tokenizer().save_pretrained(root / side)
    drawn = torch.randint(5, 101, (PROMPT_TOKENS - 1,), generator=torch.Generator().manual_seed(3))
    return [0, *map(int, drawn)]


def _transformers(root: Path, alpha: float, ids: Sequence[int]) -> list[float]:
    """Log-probabilities of the tokens after the first, with `dpo + alpha * (dpo - sft)`."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    sft, dpo = (load_file(root / side / "model.safetensors") for side in ("sft", "dpo"))
    folder = root / f"alpha-{alpha:g}"
    folder.mkdir()
    for path in (root / "dpo").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    mixed = {key: dpo[key] + alpha * (dpo[key] - sft[key]) for key in dpo}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logprobs[index - 1, ids[index]]) for index in range(1, len(ids))]


def _engine(root: Path, ids: Sequence[int], wanted: Mapping[float, Sequence[float]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    from expo_ray.config import Pair
    from expo_ray.extrapolation.plan import plan_pair
    from expo_ray.on_ray.serving.pair_server import starts_at_dpo

    plan = plan_pair(Pair(name="pair", sft=str(root / "sft"), dpo=str(root / "dpo")), {})
    engine: Any = LLM(
        model=str(root / "dpo"), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4,
        kv_cache_memory_bytes=1 << 28, worker_extension_cls="expo_ray.on_ray.serving.swap.PairWorker", disable_log_stats=True,
    )  # fmt: skip

    def off_by(alpha: float) -> float:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        output = engine.generate([{"prompt_token_ids": list(ids)}], params, use_tqdm=False)[0]
        logprobs = [next(iter(token.values())).logprob for token in output.prompt_logprobs[1:]]
        return max(abs(float(mine - its)) for mine, its in zip(logprobs, wanted[alpha], strict=True))

    result: dict[str, Any] = {"dpo": off_by(0.0)}
    engine.collective_rpc("expo_open", args=(pickle.dumps(plan), starts_at_dpo(plan)))
    result["compared"], result["share"] = engine.collective_rpc(_coverage)[0]
    result["of"] = sum(len(shard.tensors) for shard in plan.shards)
    for text in ("0.5", "2", "0"):
        engine.collective_rpc("expo_swap", args=(text,))
        engine.reset_prefix_cache()
        result[text] = off_by(float(text))
    result["not packed again"] = engine.collective_rpc(_swap_without_packing)[0]
    return result


def _coverage(worker: Any) -> tuple[int, float]:
    comparison = worker.expo_comparison
    return len(comparison.tensors), comparison.share


def _swap_without_packing(worker: Any) -> str:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    method: Any = UnquantizedFusedMoEMethod
    method._setup_kernel = method._setup_kernel.expo_original
    try:
        worker.expo_swap("0.5")
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())
