"""How far from the exact model is the written one, rounded to nearest and stochastically?

Each written model is compared with the same model in float32 weights, on the same chats and in float32 arithmetic, so that
nothing but the rounding of the weights differs. The pair is SmolLM2-135M of `examples/smollm2`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.chats import Batch, batches
from benchmarks.measure import CACHE, EXPO_RAY, fresh, run
from benchmarks.result import report, table
from examples.smollm2.build import build

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

ALPHAS = (0.1, 0.3, 0.5, 1.0)
SEEDS = (0, 1, 2)
STOCHASTIC = [f"stochastic-{seed}" for seed in SEEDS]
# What is written for every alpha; `exact` keeps float32 weights.
VARIANTS: Mapping[str, Sequence[object]] = {
    "exact": ("--rounding", "nearest", "--dtype", "fp32"),
    "nearest": ("--rounding", "nearest"),
    **{
        name: ("--rounding", "stochastic", "--seed", seed)
        for name, seed in zip(STOCHASTIC, SEEDS, strict=True)
    },
}
CHECKED_TENSOR = "model.layers.7.mlp.down_proj.weight"

# By alpha and name of what is compared with `exact` (`dpo` or a variant).
Divergences = Mapping[tuple[float, str], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="26 short chats; the result is not kept")
    parser.add_argument(
        "--pair", type=Path, default=CACHE / "smollm2", help="where the pair is, or will be built"
    )
    arguments = parser.parse_args()
    num_chats, new_tokens = (26, 16) if arguments.quick else (208, 32)

    build(arguments.pair, ("sft", "dpo_100pct"))
    sft, dpo = arguments.pair / "sft", arguments.pair / "dpo_100pct"
    written = {name: write(sft, dpo, name) for name in VARIANTS}
    worst = max(error_of_exact(sft, dpo, written["exact"], alpha) for alpha in ALPHAS)
    chats = list(batches(dpo, num_chats, new_tokens))
    divergences = measure(dpo, written, chats)
    effective = {
        (alpha, name): json.loads((folder_of(written[name], alpha) / "expo.json").read_text())["statistics"][
            "effective_alpha"
        ]
        for alpha in ALPHAS
        for name in VARIANTS
    }
    num_tokens = sum(int(batch.counted.sum()) for batch in chats)
    report(
        "rounding",
        "Rounding: how far from the exact model is the written one?",
        [
            table(HEADER, [row(alpha, effective, divergences) for alpha in ALPHAS]),
            f"KL is `KL(exact || written)` in nats per token: the mean over the {num_tokens:,} tokens of {num_chats} chats (prompts, and replies "
            f"that dpo sampled). Stochastic rounding: mean ± standard deviation over {len(SEEDS)} seeds. `exact` keeps float32 weights; "
            f"one of its tensors, computed again by numpy in float64, is off by at most {worst:.2f} units in float32's last place.",
            reading(divergences),
        ],
        packages=("torch", "transformers", "numpy"),
        keep=not arguments.quick,
    )


def write(sft: Path, dpo: Path, name: str) -> Path:
    """The models of one variant, a folder `alpha=A` for each alpha."""
    output = fresh(f"rounding/{name}")
    alphas = [word for alpha in ALPHAS for word in ("--alpha", alpha)]
    run(*EXPO_RAY, "extrapolate", "--sft", sft, "--dpo", dpo, *alphas, "--output", output, *VARIANTS[name])
    return output


def folder_of(output: Path, alpha: float) -> Path:
    return output / f"alpha={alpha:g}"


def error_of_exact(sft: Path, dpo: Path, exact: Path, alpha: float) -> float:
    """Largest distance of a tensor of `exact` from the formula in float64, in float32's units in the last place of the terms."""
    import numpy as np
    from safetensors import safe_open

    def load(folder: Path) -> NDArray[np.float64]:
        with safe_open(folder / "model.safetensors", "pt") as file:
            values: Tensor = file.get_tensor(CHECKED_TENSOR)
        return values.double().numpy()

    s, d, out = load(sft), load(dpo), load(folder_of(exact, alpha))
    step = alpha * (d - s)
    # Not the result's own last place: where the terms cancel, it is far below that of either.
    unit = np.spacing(np.maximum(np.abs(d), np.abs(step)).astype(np.float32))
    return float(np.max(np.abs(out - (d + step)) / unit))


def measure(dpo: Path, written: Mapping[str, Path], chats: Sequence[Batch]) -> Divergences:
    """Mean KL from `exact` to `dpo` and to each variant, for each alpha."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        dpo, dtype=torch.float32, trust_remote_code=False
    ).eval()
    sums: dict[tuple[float, str], float] = defaultdict(float)
    with torch.inference_mode():
        for number, batch in enumerate(chats, 1):
            print(f"batch {number} of {len(chats)}", flush=True)
            unmoved = logits(model, dpo, batch)
            for alpha in ALPHAS:
                exact = logits(model, folder_of(written["exact"], alpha), batch)
                sums[alpha, "dpo"] += divergence(exact, unmoved)
                for name in VARIANTS:
                    if name != "exact":
                        sums[alpha, name] += divergence(
                            exact, logits(model, folder_of(written[name], alpha), batch)
                        )
    num_tokens = sum(int(batch.counted.sum()) for batch in chats)
    return {key: value / num_tokens for key, value in sums.items()}


def logits(model: Any, folder: Path, batch: Batch) -> Tensor:
    """What the weights of `folder`, widened to float32, predict after every counted token: (tokens, vocabulary)."""
    from safetensors.torch import load_file

    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing  # the head is tied
    hidden = model.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
    predicted: Tensor = model.lm_head(hidden[batch.counted])
    return predicted


def divergence(exact: Tensor, other: Tensor) -> float:
    """Sum of KL(exact || other) over tokens; in float64, for float32 leaves few digits of 1e-6."""
    total = 0.0
    for ours, theirs in zip(exact.split(256), other.split(256), strict=True):
        p, q = (part.double().log_softmax(-1) for part in (ours, theirs))
        total += float((p.exp() * (p - q)).sum())
    return total


HEADER = (
    "alpha", "effective, nearest", "effective, stochastic", "KL, nearest", "KL, stochastic", "nearest / stochastic",
    "KL(exact, dpo)",
)  # fmt: skip


def row(
    alpha: float, effective: Mapping[tuple[float, str], float], divergences: Divergences
) -> Sequence[str]:
    seeds = [divergences[alpha, name] for name in STOCHASTIC]
    effective_seeds = [effective[alpha, name] for name in STOCHASTIC]
    nearest = divergences[alpha, "nearest"]
    return (
        f"{alpha:g}",
        f"{effective[alpha, 'nearest']:.3f}",
        f"{statistics.mean(effective_seeds):.3f}",
        f"{nearest:.2e}",
        f"{statistics.mean(seeds):.2e} ± {statistics.stdev(seeds):.0e}",
        f"{nearest / statistics.mean(seeds):.1f}",
        f"{divergences[alpha, 'dpo']:.2e}",
    )


def reading(divergences: Divergences) -> str:
    """What the table says, with its own figures."""
    closer = [
        f"{alpha:g}"
        for alpha in ALPHAS
        if max(divergences[alpha, name] for name in STOCHASTIC) < divergences[alpha, "nearest"]
    ]
    return (
        f"Stochastic rounding is closer to the exact model than nearest, with any of the seeds, at alpha {', '.join(closer) or '(none)'}. "
        f"As a share of KL(exact, dpo), which is how far alpha moves the model, nearest is off by {shares(divergences, ['nearest'])} "
        f"at alpha {', '.join(f'{alpha:g}' for alpha in ALPHAS)}, stochastic rounding by {shares(divergences, STOCHASTIC)}."
    )


def shares(divergences: Divergences, names: Sequence[str]) -> str:
    """Percentages of KL(exact, dpo), one for each alpha; the mean over `names`."""
    means = [
        statistics.mean(divergences[alpha, name] for name in names) / divergences[alpha, "dpo"]
        for alpha in ALPHAS
    ]
    return ", ".join(f"{100 * mean:.2g} %" for mean in means)


if __name__ == "__main__":
    main()
