"""How often is an alpha chosen that gains nothing, where prompts fill templates that react to alpha, each in its own way?

Prompts are texts, so that the product finds the templates itself, or not; rewards are drawn. No alpha gains anything on average: what a search
finds is a lucky set of templates.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from benchmarks.alpha_search import counted
from benchmarks.on_all_cores import on_all_cores
from benchmarks.result import report, table
from expo_ray.config import Search
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.search.alpha_scores import AlphaScores
from expo_ray.evaluation.search.decision import decide
from expo_ray.evaluation.search.history import Half, History
from expo_ray.evaluation.search.methods import next_rung
from expo_ray.evaluation.search.response_measures import RESPONSE_MEASURES
from expo_ray.evaluation.search.roles import DEFAULT_ROLES
from expo_ray.evaluation.search.search_pair import halves_of

PROMPTS = 2000
# Standard deviations of the reward: of what alpha does to a template, of prompts, and of a response.
REACTION, PROMPT_NOISE, RESIDUAL = 0.5, 2.0, 1.5
SETS = (10, 50, 200)
SETTINGS = Search(method="grid", alphas=(0.1, 0.2, 0.4, 0.8, 1.6, 3.2), prompts=(512,))


def template_set(count: int, seed: int) -> tuple[PromptSet, Mapping[str, int]]:
    """Prompts that fill `count` invented templates of six fixed words with two slots of one to three words; and the template of each."""
    chance = random.Random(seed)

    def words(number: int) -> list[str]:
        return ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(3, 9))) for _ in range(number)]

    vocabulary, template_of = words(3000), dict[str, int]()
    prompts = []
    for number in range(count):
        fixed = words(6)
        for _ in range(PROMPTS // count):
            slots = [" ".join(chance.choices(vocabulary, k=chance.randint(1, 3))) for _ in range(2)]
            text = " ".join([*fixed[:2], slots[0], *fixed[2:5], slots[1], fixed[5]])
            prompts.append(prompt_of([{"role": "user", "content": text}]))
            template_of[prompts[-1].id] = number
    return PromptSet.of("templates", prompts), template_of


@cache
def shared_set(count: int) -> tuple[PromptSet, Mapping[str, int]]:
    """The set that all searches with so many templates share."""
    return template_set(count, seed=count)


def search(task: tuple[int, bool, int]) -> float:
    """Search on rewards that depend on templates alone, and return the decision.

    Args:
        task: number of templates, whether the search finds them, and a seed.
    """
    count, finds, seed = task
    prompts, template_of = shared_set(count)
    if finds:
        halves, clusters = halves_of(prompts), prompts.clusters
    else:  # as without this knowledge: every prompt by itself
        alone = replace(prompts)
        alone.__dict__["clusters"] = {prompt.id: number for number, prompt in enumerate(prompts.prompts)}
        halves, clusters = halves_of(alone), {}
    choose, confirm = (
        Half(tuple(prompt.id for prompt in halves[name].prompts), {}, DEFAULT_ROLES, clusters)
        for name in ("choose", "confirm")
    )  # fmt: skip
    history = History(choose, confirm)
    shifts = np.random.default_rng([seed, 1]).normal(0, REACTION, max(template_of.values()) + 1)
    while rung := next_rung(history, SETTINGS):
        half = history.half(rung.half)
        ids = half.prompt_ids[rung.start : rung.stop]
        scores = {
            alpha: respond(ids, template_of, shifts, (seed, alpha, rung.half == "choose", rung.start))
            for alpha in half.missing(rung)
        }
        history = history.with_scores(rung.half, scores)
    return decide(history, SETTINGS).alpha


def respond(
    ids: Sequence[str],
    template_of: Mapping[str, int],
    shifts: np.ndarray[tuple[int], np.dtype[np.float64]],
    drawn: tuple[int, float, bool, int],
) -> AlphaScores:
    """Rewards of responses: each template shifts by its own amount at any alpha above 0."""
    seed, alpha, side, start = drawn
    ease = np.random.default_rng([seed, 2, side, start]).normal(0, PROMPT_NOISE, len(ids))
    noise = np.random.default_rng([seed, 3, side, start, round(alpha * 1e6)]).normal(0, RESIDUAL, len(ids))
    shift = shifts[[template_of[prompt_id] for prompt_id in ids]] * (alpha > 0)
    zero = np.zeros(len(ids))
    measures = dict.fromkeys(RESPONSE_MEASURES, zero)
    return AlphaScores(alpha, tuple(ids), {"reward": ease + noise + shift}, zero + 200.0, measures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 searches of each; the result is not kept")
    parser.add_argument("--searches", type=int, default=200, help="of each set (%(default)s)")
    arguments = parser.parse_args()
    count = 3 if arguments.quick else arguments.searches
    cells = [(number, finds) for number in SETS for finds in (False, True)]
    alphas = on_all_cores(search, [(*cell, seed) for cell in cells for seed in range(count)])
    chosen = {
        cell: counted(alpha > 0 for alpha in alphas[at * count : (at + 1) * count])
        for at, cell in enumerate(cells)
    }
    rows = [
        (str(number), str(len(set(shared_set(number)[0].clusters.values()))), chosen[number, False], chosen[number, True])
        for number in SETS
    ]  # fmt: skip
    report(
        "templates",
        "Prompts that fill templates: alphas chosen without a gain",
        [
            f"{count} searches of each set, `grid` with six alphas on 512 prompts and 512 to confirm. {PROMPTS:,} prompts fill invented templates of "
            f"six fixed words. Each template reacts to alpha by its own amount, with a standard deviation of {REACTION:g} where that of a paired "
            f"difference is {np.sqrt(2) * RESIDUAL:.1f}, and by none on average. Alpha above 0 was chosen:",
            table(("templates", "clusters found", "each prompt by itself", "by cluster"), rows),
        ],
        packages=("numpy",),
        keep=not arguments.quick,
    )


if __name__ == "__main__":
    main()
