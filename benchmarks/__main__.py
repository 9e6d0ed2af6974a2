"""Run the benchmarks: `python -m benchmarks` runs all quick ones, `python -m benchmarks NAME [options]` a single one."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

from benchmarks.measure import ROOT

QUESTIONS = {
    "local": "how long does a local pair take, against copying it, mergekit and the paper's script?",
    "memory": "how much memory does a pair take, and does the size of a tensor matter?",
    "alphas": "what do four alphas in one pass cost, against four passes?",
    "s3": "how fast is S3 to S3, against moving the same bytes with obstore alone?",
    "throttling": "what becomes of a job whose store admits only so many requests a second?",
    "scale": "how many shards a second does the Ray driver carry, and does its memory grow?",
    "machines": "what does the loss of a machine cost a pipeline?",
    "many_pairs": "what do a thousand pairs cost the driver: memory, sockets, requests, planning, the report?",
    "rewards": "how fast are responses scored, against a transformers pipeline at batch 8?",
    "reward_dtypes": "by how much do rewards in 16 bits differ from fp32, and between the back ends?",
    "alpha_search": "how good is the alpha that the search finds, and at what price?",
    "length_rule": "which gains that come with longer responses are refused, and which honest ones?",
    "templates": "how often is an alpha chosen without a gain, where prompts fill templates?",
    "roles": "what do the roles of a second reward model refuse, and what harm do they let through?",
    "coverage": "how often do the intervals of gains cover the truth?",
    "decisions": "which alpha does the pipeline choose on real models, and what stops it?",
    "swap": "what does another alpha cost by a swap, against starting an engine on the published folder?",
    "swap_floor": "how far is a swap from what the memory of this machine allows?",
    "swap_wait": "how long does an engine wait for a swap, against the floor, and with the next alpha made ahead?",
    "swap_slices": "how much does each worker read and compute for a swap, and which architectures does that cover?",
    "adapters": "what do several alphas of a LoRA pair cost side by side, against swaps and a merged model?",
    "swap_architectures": "do swapped weights of many architectures answer as transformers does?",
    "serving": "what does the endpoint cost, against vLLM alone on the same prompts?",
    "judgments": "do intervals of judged win rates cover the truth, and what does a judge who likes length change?",
    "rounding": "how far from the exact model is the written one?",
    "gpu": "does a GPU write the CPU's bytes, and how near are its kernels to the card's limits?",
}
# These measure the quality of results instead of this machine's speed. They take many minutes, so they run only when named.
ONLY_WHEN_NAMED = {
    "adapters", "alpha_search", "coverage", "decisions", "gpu", "judgments", "length_rule", "machines", "many_pairs", "reward_dtypes", "roles", "rounding",
    "swap_architectures", "swap_slices",
    "templates", "throttling",
}  # fmt: skip


def main(words: list[str]) -> int:
    if not words:
        return run_all()
    name, *options = words
    if name not in QUESTIONS:
        print("python -m benchmarks [NAME [options]]\n")
        print("\n".join(f"  {name:12} {question}" for name, question in QUESTIONS.items()))
        print(
            f"\nWithout a name: all but {', '.join(sorted(ONLY_WHEN_NAMED))}. NAME --help lists its options."
        )
        return 0 if name in {"-h", "--help"} else 2
    sys.argv = [f"python -m benchmarks {name}", *options]
    import_module(f"benchmarks.{name}").main()
    return 0


def run_all() -> int:
    failed = []
    for name in QUESTIONS:
        if name not in ONLY_WHEN_NAMED:
            # A process each, so that the imports of a benchmark do not count in the memory of the next.
            command = [sys.executable, "-m", "benchmarks", name]
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
