"""Results of a run as they might come out: a pair that gains, one that keeps dpo, one with a collapse, and one that failed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from expo_ray.report.results import (
    Example,
    Groups,
    GroupTrial,
    GuardrailCheck,
    HalfName,
    Interval,
    Measurement,
    PairResult,
    Results,
    Verdict,
)

HOSTILE = (
    "</pre></details><script>document.title='owned'</script><img src=x onerror=\"fetch('http://192.0.2.1/')\">"
    "<style>body{display:none}</style>{{ 7*7 }} &amp; \u202eright to left\u202c \x00\x1b[31m"
)
LONG_WORD = "https://example.org/" + "a-very-long-path-without-any-break" * 12
MODELS = ("RM-Mistral-7B", "Skywork-Reward-8B")
TALK = (
    "The short answer is that both effects play a part, but they act on different scales. First, consider the plain case: a body at rest "
    "stays at rest. Then there is friction,  which everybody forgets.\n\n1. Measure twice.\n2. Cut once.\n\n    def area(radius):\n"
    "        return 3.14159 * radius ** 2\n\nIn summary, it depends on what you want to keep. "
)


def sample_results() -> Results:
    """Three pairs and a failure, the same at every call."""
    return Results(
        output="s3://alignment/expo/2026-11",
        created="2026-11-24T21:04:11Z",
        pairs=(
            _pair("tulu-2-70b", optimum=0.0, height=0.0, collapse=0.9, decision=0.0, seed=3),
            _pair("zephyr-7b", optimum=0.57, height=0.61, collapse=5.0, decision=0.4, seed=1),
            _pair("in-house-8b-10pct", optimum=6.0, height=1.9, collapse=40.0, decision=4.525, seed=2),
        ),
        cost={
            "gpu_hours": 61.4,
            "cpu_hours": 9.25,
            "generated_tokens": 21_483_904,
            "scored_tokens": 63_110_442,
            "bytes_read": 312_488_201_216,
            "bytes_written": 30_062_348_288,
        },
        versions={
            "expo-ray": "0.4.0", "python": "3.12.11", "ray": "2.60.0", "vllm": "0.29.0", "torch": "2.13.0", "transformers": "5.19.0",
        },
        digests={
            "prompts ultrafeedback (choose)": "9f7c1d5e0b3a4c62",
            "prompts ultrafeedback (confirm)": "47aa0e9c51d2f08b",
            "reward model RM-Mistral-7B": "c0ffee5e11d00d42",
            "reward model Skywork-Reward-8B": "5ca1ab1e0ddba115",
        },
        failures={
            "starling-lm": "starling-lm: dpo has 32002 rows, sft has 32000; set `vocab: by-token` to match rows through both tokenizers, or "
            "`vocab: keep-dpo` to leave the extra rows as in dpo <b>now</b>"
        },
    )  # fmt: skip


def _pair(
    name: str, *, optimum: float, height: float, collapse: float, decision: float, seed: int
) -> PairResult:
    chance = random.Random(seed)
    alphas = [-1.0, -0.5, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8]
    alphas = sorted(
        {
            *(alpha for alpha in alphas if alpha <= collapse * 1.6),
            *((0.2828, 0.5657) if optimum < 2 else (4.525, 9.051)),
        }
    )
    alphas = (
        [alpha for alpha in alphas if alpha <= collapse * 1.6]
        if decision
        else [-1.0, -0.5, 0.0, 0.1, 0.2, 0.2828, 0.4, 0.8]
    )
    halves: tuple[tuple[HalfName, int, list[float]], ...] = (
        ("choose", 512, alphas),
        ("confirm", 1000, [0.0, decision] if decision else [0.0]),
    )
    measured = [
        _measured(chance, (model, alpha, half, prompts), (optimum, height, collapse))
        for model in MODELS
        for half, prompts, chosen in halves
        for alpha in chosen
    ]  # fmt: skip
    lengths = {alpha: 301 * (1 + 0.16 * math.asinh(alpha / 0.5)) for alpha in alphas}
    return PairResult(
        name=name,
        sft=f"hf://example-labs/{name}-sft@4d0ec2f9a1b8",
        dpo=f"s3://alignment/models/{name}-dpo",
        decision=decision,
        reason=(
            f"alpha {decision:g} is the smallest within one standard error of the best ({optimum:g}); on 1000 untouched prompts both reward "
            "models find it better than dpo, with the lower bound of the gain above zero."
            if decision
            else "No alpha is better than dpo beyond chance: the largest gain, +0.021 at alpha 0.1, has an interval of [-0.062, +0.104], "
            "so dpo is kept."
        ),
        measured=tuple(measured),
        guardrails=tuple(
            guard for alpha in alphas if alpha > 0 for guard in _guards(alpha, collapse, lengths)
        ),
        rejected={
            alpha: (
                "ladder: 23.1% of responses end at the token limit, 1.2% with dpo (rejected beyond +10.0%)"
                if alpha > collapse
                else "race at 256 prompts: significantly below the best, -0.214 [-0.301, -0.127]"
                if alpha > 2 * decision
                else "refinement at 512 prompts: within one standard error of the best, and larger than the chosen alpha"
                if alpha > decision
                else "race at 512 prompts: below the best by more than one standard error"
            )
            for alpha in alphas
            if alpha > 0 and alpha != decision
        },
        effective_alphas={alpha: alpha * (1 + 0.004 * chance.uniform(-1, 1)) for alpha in alphas if alpha > 0}
        if seed != 1
        else {
            alpha: alpha * min(1.0, 0.9 + 0.1 * alpha) if alpha < 1 else alpha for alpha in alphas if alpha > 0
        },
        mean_tokens=lengths,
        examples=_examples(chance, last="chosen" if decision else "candidate"),
        published={decision: f"s3://alignment/expo/2026-11/pairs/{name}/alpha={decision:g}"}
        if decision
        else {},
        pushed="https://huggingface.co/example-labs/in-house-8b-10pct-expo" if seed == 2 else "",
        generations=5_632 - 512 * seed,
        rounding="stochastic" if seed != 1 else "nearest",
        warnings=("the reward did not fall up to the largest alpha, 12.8; raise `largest_alpha` to climb further",)
        if seed == 2
        else (),
        groups=_groups(measured) if seed == 2 else None,
    )  # fmt: skip


def _groups(measured: Sequence[Measurement]) -> Groups:
    """Multipliers that were tried on the chosen alpha: one combination is better than alpha alone."""
    chosen = {"attention": 0.5, "mlp": 2.0}
    return Groups(
        multipliers=chosen,
        reason="attention x0.5, mlp x2: its gain on 1000 untouched prompts is +0.210 [+0.061, +0.357] over alpha alone by RM-Mistral-7B",
        trials=(
            GroupTrial(
                {"embeddings": 0.0},
                128,
                Interval(-0.02, -0.13, 0.09),
                "its gain over alpha alone is not above 0.056",
            ),
            GroupTrial(
                {"attention": 0.5}, 512, Interval(0.12, -0.02, 0.25), "attention x0.5, mlp x2 is better"
            ),
            GroupTrial(chosen, 512, Interval(0.24, 0.1, 0.39), ""),
        ),
        measured=tuple(
            replace(each, gain=replace(each.gain, mean=each.gain.mean + 0.2, high=each.gain.high + 0.2))
            for each in measured
            if each.alpha == 4.525
        ),
    )


def _measured(
    chance: random.Random, at: tuple[str, float, HalfName, int], hill: tuple[float, float, float]
) -> Measurement:
    model, alpha, half, prompts = at
    second = model != MODELS[0]
    gain = _gain(alpha, *hill) * (0.55 if second else 1.0)
    gain += 0.0 if alpha == 0 else chance.gauss(0, 0.02)
    base, width = (-3.4, 0.09) if second else (6.83, 0.11)
    base += 0.07 * (half == "confirm")
    width *= 0.0 if alpha == 0 else math.sqrt(512 / prompts) * (1 + 0.3 * math.asinh(abs(alpha)))
    controlled = gain - 0.06 * math.asinh(alpha)
    return Measurement(
        alpha=alpha,
        half=half,
        reward_model=model,
        prompts=prompts,
        reward=Interval(base + gain, base + gain - 0.2, base + gain + 0.2),
        gain=Interval(gain, gain - width, gain + width),
        controlled_gain=None
        if alpha > hill[2]
        else Interval(controlled, controlled - width * 1.2, controlled + width * 1.2),
        win_rate=0.5 if alpha == 0 else 0.5 + 0.4 * math.tanh(gain),
    )


def _gain(alpha: float, optimum: float, height: float, collapse: float) -> float:
    """From sft up to dpo, over a hill in log alpha, down a cliff."""
    if alpha <= 0:
        return 1.4 * alpha * (1 - 0.2 * (alpha + 1))
    if not optimum:
        return 0.021 - 0.5 * float(alpha**1.5)
    hill = height * math.exp(-((math.log(alpha / optimum)) ** 2) / 3.5)
    return hill - 1.2 * max(0.0, math.log(alpha / collapse) + 0.4)


def _guards(alpha: float, collapse: float, lengths: dict[float, float]) -> list[GuardrailCheck]:
    strain = alpha / collapse
    values = {
        "length ratio": (lengths[alpha] / lengths[0.0], 1.3, 1.6),
        "cut": (0.13 * strain**2, 0.05, 0.1),
        "repetition": (0.06 * strain, 0.05, 0.1),
        "broken": (0.004 * strain, 0.01, 0.05),
        "kl": (0.11 * alpha**1.2, 0.5, 2.0),
    }
    return [
        GuardrailCheck(
            alpha,
            name,
            value,
            reject,
            _verdict(value, warn, reject),
            f"{name} is {value:.3f} where dpo's responses would give none of it (above {warn:g})",
            warn,
        )
        for name, (value, warn, reject) in values.items()
    ]


def _verdict(value: float, warn: float, reject: float) -> Verdict:
    return "reject" if value > reject else "warn" if value > warn else "ok"


def _examples(chance: random.Random, *, last: str) -> tuple[Example, ...]:
    prompts = (
        "Explain why the sky is blue to a five-year-old, in at most three sentences.",
        HOSTILE,
        "Write a Python function that computes the area of a circle, and say what could go wrong.",
        "Schreibe ein Gedicht über den Herbst. " * 20,
    )
    rows = []
    for number, prompt in enumerate(prompts):
        sides = ("sft", "dpo", last)
        responses = {side: TALK * (number + 1 + len(side) % 3) for side in sides}
        if number == 1:
            responses["dpo"] = HOSTILE + " " + LONG_WORD
        gains = (2.31, 1.07, -0.88, -1.92)
        rewards = {"sft": 4.1 + chance.random(), "dpo": 6.2, last: 6.2 + gains[number]}
        rows.append(Example(prompt, responses, {side: rewards[side] for side in sides}))
    return tuple(rows)
