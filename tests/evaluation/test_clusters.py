"""Prompts that hang together: found by their words, kept in one half, resampled together."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from expo_ray.config import Search
from expo_ray.evaluation.prompts.clusters import cluster_prompts
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.records import Response
from expo_ray.evaluation.search.alpha_scores import AlphaScores, AnsweredAgain
from expo_ray.evaluation.search.roles import Roles, role_tests
from expo_ray.evaluation.search.search_pair import halves_of, search_alpha
from expo_ray.extrapolation.step import Step
from tests.support.scores import scores_of

TEMPLATES = (
    "Write a short story about {} that takes place in {}.",
    "Explain {} to a child of {} years.",
    "What are the main advantages of {} over {} in practice?",
    "Summarise the history of {} in three paragraphs, and mention {}.",
    "Give me a recipe with {} and {} for two people.",
    "How would you convince a friend that {} is better than {}?",
    "Translate the phrase {} into French and explain {}.",
    "Compose a poem of {} lines on {} in the style of Goethe.",
    "List five facts on {} which few people know, such as {}.",
    "Plan a weekend in {} for somebody who likes {}.",
)
NATURAL = (
    "How long should I boil an egg if I want the yolk to stay soft?",
    "my landlord keeps my deposit, what can i do",
    "Rewrite this sentence so that it sounds more polite: give me the report now.",
    "Why is the sky red at sunset but blue at noon?",
    "I am writing a function that sorts a linked list in place. It crashes on an empty list. Help.",
    "Who won the world cup in 1998 and where was the final played?",
    "Is it safe to take ibuprofen together with paracetamol?",
    "Draft an email to my team saying that the launch moves to Thursday.",
    "What's the difference between a virus and a bacterium?",
    "Suggest names for a small bakery near a railway station.",
    "Convert 12 stone 4 pounds to kilograms, please, and show the steps.",
    "Can plants get tired?",
    "Tell me a joke which a physicist would like but a chemist would not.",
    "What should I see in Lisbon on a rainy afternoon with two toddlers?",
    "Prove that the square root of two is irrational.",
    "My cat sneezes every morning. Should I worry?",
)


def prompt_set(texts: Sequence[str], category: str = "") -> PromptSet:
    return PromptSet.of("set", [prompt_of([{"role": "user", "content": text}], category) for text in texts])


def filled(per_template: int, longest: int = 3) -> tuple[PromptSet, dict[str, int]]:
    """Prompts that fill the templates with one to `longest` invented words; and the template of each, by prompt id."""
    chance = random.Random(1)
    vocabulary = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(3, 9))) for _ in range(600)]
    texts: dict[str, int] = {}
    for number, template in enumerate(TEMPLATES):
        for _ in range(per_template):
            slots = [" ".join(chance.choices(vocabulary, k=chance.randint(1, longest))) for _ in range(2)]
            texts[template.format(*slots)] = number
    prompts = prompt_set(list(texts))
    template_of = {prompt.id: texts[prompt.messages[-1]["content"]] for prompt in prompts.prompts}
    return prompts, template_of


@pytest.mark.parametrize("per_template", [8, 60])
def test_prompts_of_one_template_are_one_cluster(per_template: int) -> None:
    prompts, template_of = filled(per_template)
    clusters = prompts.clusters
    agreeing = Counter((template_of[prompt_id], label) for prompt_id, label in clusters.items())
    largest = [
        max(count for (template, _), count in agreeing.items() if template == number) for number in range(10)
    ]
    assert sum(largest) >= 0.9 * len(prompts)
    # No cluster mixes templates.
    assert len({label for _, label in agreeing}) == len(agreeing)


def test_prompts_as_people_write_them_stand_alone() -> None:
    clusters = cluster_prompts(prompt_set(NATURAL).prompts)
    assert len(set(clusters.values())) == len(NATURAL)


def test_near_duplicates_are_one_cluster_whatever_the_order() -> None:
    texts = [
        variant for text in NATURAL for variant in (text, text.upper(), f"{text} Thanks!", f"Hi. {text}")
    ]
    prompts = prompt_set(texts).prompts
    clusters = cluster_prompts(prompts)
    by_text = {prompt.messages[-1]["content"]: clusters[prompt.id] for prompt in prompts}
    for text in NATURAL:
        assert by_text[text] == by_text[text.upper()]
        assert by_text[text] in {by_text[f"{text} Thanks!"], by_text[f"Hi. {text}"]} or len(text.split()) < 6
    assert cluster_prompts(tuple(reversed(prompts))) == clusters


def test_the_form_of_a_whole_set_is_no_cluster() -> None:
    numbers = prompt_set([f"Spell the number {number}, letter by letter, please." for number in range(200)])
    assert len(set(numbers.clusters.values())) == 200
    few = prompt_set(
        [
            f"{form} number {n}?"
            for form in ("What is the square of the", "Please write out the")
            for n in "abcdefghij"
        ]
    )
    assert len(set(few.clusters.values())) > 6


def test_many_categories_are_clusters_and_few_are_strata() -> None:
    def with_categories(count: int) -> PromptSet:
        chance = random.Random(2)
        prompts = [
            prompt_of(
                [
                    {
                        "role": "user",
                        "content": " ".join("".join(chance.choices("abcdefgh", k=6)) for _ in range(8)),
                    }
                ],
                f"kind {number % count}",
            )
            for number in range(60)
        ]
        return PromptSet.of("set", prompts)

    many = with_categories(30)
    assert len(set(many.clusters.values())) == 30
    for prompt in many.prompts:
        same = {many.clusters[other.id] for other in many.prompts if other.category == prompt.category}
        assert len(same) == 1
    assert len(set(with_categories(5).clusters.values())) > 5


def test_halves_split_no_cluster_and_are_about_as_large() -> None:
    prompts, _ = filled(40)
    choose, confirm = prompts.halves()
    labels = [{prompts.clusters[prompt.id] for prompt in half.prompts} for half in (choose, confirm)]
    assert not labels[0] & labels[1]
    assert abs(len(choose) - len(confirm)) < 0.3 * len(prompts)
    drawn = {prompt.id for prompt in halves_of(prompts)["choose"].prompts}
    assert drawn == {prompt.id for prompt in choose.prompts}


def test_templates_that_react_differently_give_no_false_gain() -> None:
    """Five templates of 100 prompts; alpha shifts each by its own amount, by none on average. Nominal 2.5 %."""
    generator = np.random.default_rng(5)
    ids = [str(number) for number in range(500)]
    labels = {prompt_id: number % 5 for number, prompt_id in enumerate(ids)}
    zero = scores_of(0.0, ids, {"rm": np.zeros(500)})
    passed = Counter[str]()
    for _ in range(200):
        shift = generator.normal(0, 0.5, 5)[np.arange(500) % 5]
        scores = scores_of(0.5, ids, {"rm": shift + generator.normal(0, 2.1, 500)})
        for name, clusters in (("alone", {}), ("together", labels)):
            beside = scores.clustered(clusters), zero.clustered(clusters)
            (test,) = role_tests("confirm", *beside, Roles(), 0.95)
            passed[name] += test.passed
    assert passed["together"] <= 0.03 * 200
    assert passed["alone"] > 0.1 * 200


def test_an_interval_by_clusters_is_at_least_a_t_interval_of_their_means() -> None:
    generator = np.random.default_rng(6)
    values = generator.normal(size=(30, 8)) + generator.normal(size=(30, 1))
    ids = [str(number) for number in range(240)]
    labels = {prompt_id: number // 8 for number, prompt_id in enumerate(ids)}
    scores, dpo = (
        scores_of(alpha, ids, {"rm": rewards}).clustered(labels)
        for alpha, rewards in ((0.5, values.ravel()), (0.0, np.zeros(240)))
    )
    (test,) = role_tests("confirm", scores, dpo, Roles(), 0.95)
    low, high = stats.t.interval(0.95, 29, values.mean(), stats.sem(values.mean(axis=1)))
    assert test.gain.low <= low < high <= test.gain.high
    assert test.gain.high - test.gain.low < 1.5 * (high - low)


def test_a_search_takes_the_clusters_of_its_prompts() -> None:
    prompts, template_of = filled(40)
    shifts = np.random.default_rng(8).normal(0, 3, 10)

    class ByTemplate:
        def __init__(self) -> None:
            self.num_responses = 0

        def expect(self, steps: Sequence[Step]) -> None: ...

        def responses(self, step: Step, prompt_ids: Collection[str]) -> Mapping[str, Response]:
            return {}

        def evaluate(self, step: Step, asked: PromptSet) -> AlphaScores:
            ids = [prompt.id for prompt in asked.prompts]
            seed = [round(1000 * (step.alpha + 1)), int(ids[0], 16)]
            noise = np.random.default_rng(seed).normal(0, 1, len(ids))
            shift = np.array([shifts[template_of[prompt_id]] for prompt_id in ids]) * (step.alpha > 0)
            return scores_of(step.alpha, ids, {"rm": noise + shift + 1.2 * (step.alpha > 0)})

        def ask_dpo_again(self, asked: PromptSet) -> AnsweredAgain:
            raise NotImplementedError

    def search(clusters: dict[str, int]) -> AlphaScores:
        history, _ = search_alpha(
            halves_of(prompts), Search(method="grid", alphas=(0.1, 0.5)), ByTemplate(), print, at_once=1, clusters=clusters
        )  # fmt: skip
        return history.choose.beside_dpo(0.5)[1]

    assert search({}).clusters is None
    labels = search(dict(prompts.clusters)).clusters
    assert labels is not None
    sizes = sorted(Counter(labels.tolist()).values())
    assert sum(size > 20 for size in sizes) in {4, 5, 6}
    assert sum(size for size in sizes if size > 20) > 0.9 * len(labels)
