"""Measure how reliable a judge is, against stored verdicts of GPT-4 and with answers that no judge should prefer.

The measurements are the judge card, which `expo-ray benchmark judge` stores beside the judge's answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from expo_ray.benchmark.answer_files import AnswerSet
from expo_ray.benchmark.downloads import GPT4_VERDICTS, fetch_public_file
from expo_ray.benchmark.judges.ask_judge import AnswerStore, JudgeAnswer, Question
from expo_ray.benchmark.judges.judge import Judge, mass_on_names
from expo_ray.benchmark.judges.pairwise import (
    Comparison,
    Sides,
    comparisons_of,
    parse_judgments,
    questions_of,
    read_template,
)
from expo_ray.benchmark.judges.verdicts import Judgment
from expo_ray.benchmark.row_files import is_number, parse_rows, read_unpacked
from expo_ray.errors import BenchmarkError, NotFound
from expo_ray.evaluation.statistics import Array
from expo_ray.storage import Store
from expo_ray.untrusted import parse_json_object

CARD_FILE = "card.json"
_SEED = 20_240_425
_CANARIES = 40
# An answer that fits every prompt and helps with none; a judge that reads it does not prefer it.
_CONSTANT = "Thank you for your question. I am happy to help you with it. Please let me know what you would like to do next."
_LEAST_CONSISTENCY, _LEAST_MASS, _LEAST_AGREEMENT, _MOST_CANARY = 0.8, 0.9, 0.65, 0.2
_POSITION = 0.4, 0.6
_MOST_UNPARSED = 0.05
_LEAST_PROMPTS = 20


@dataclass(frozen=True)
class JudgeCard:
    """Measurements of a judge. Shares are from 0 to 1.

    Attributes:
        judge: name of the model.
        protocol: `logprobs` or `verdict`.
        prompts: number of prompts with a verdict in both orders.
        agreement: share of verdicts, averaged over both orders, that prefer the same output as GPT-4; a draw counts half.
        correlation: rank correlation (Spearman) of the preferences with GPT-4's.
        consistency: share of prompts on which the same output wins in both orders.
        first_place: mean preference for the output shown first; .5 is fair.
        longer: mean preference for the longer output.
        mass: mean probability of the two names as the first token; None with the protocol `verdict`.
        unparsed: share of answers without a verdict.
        constant_canary: mean preference for one meaningless answer to every prompt.
        permuted_canary: mean preference for answers to other prompts.
        cost: dollars for these measurements, if the price is known.
        warnings: reasons not to trust tables of this judge; empty if there are none.
    """

    judge: str
    protocol: str
    prompts: int
    agreement: float
    correlation: float
    consistency: float
    first_place: float
    longer: float
    mass: float | None
    unparsed: float
    constant_canary: float
    permuted_canary: float
    cost: float
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """Figures in a line, for the notes below a table."""
        mass = "" if self.mass is None else f", mass {self.mass:.3f}"
        return (
            f"judge {self.judge} ({self.protocol}), {self.prompts} prompts: agrees with GPT-4 in {self.agreement:.0%} "
            f"(rank correlation {self.correlation:+.2f}), consistent over both orders {self.consistency:.0%}, first place "
            f"{self.first_place:.0%}, longer {self.longer:.0%}{mass}, unparsed {self.unparsed:.0%}, canaries "
            f"{self.constant_canary:.0%} and {self.permuted_canary:.0%}"
        )


@dataclass(frozen=True)
class Examination:
    """The comparisons from which a judge is measured.

    Attributes:
        sides: baseline and model of the stored verdicts.
        verdicts: GPT-4's preference, 1 to 2, by instruction.
        comparisons: of the stored outputs, in both orders.
        constant: the baseline's outputs against one meaningless answer.
        permuted: the baseline's outputs against its outputs to other prompts.
    """

    sides: Sides
    verdicts: Mapping[str, float]
    comparisons: Sequence[Comparison]
    constant: Sequence[Comparison]
    permuted: Sequence[Comparison]

    @property
    def questions(self) -> list[Question]:
        """All questions of the examination."""
        return questions_of([*self.comparisons, *self.constant, *self.permuted])


def read_examination(judge: Judge, reference: str | None, limit: int) -> Examination:
    """Read or download the verdicts of GPT-4, and choose the comparisons to measure a judge with.

    Args:
        judge: to be examined.
        reference: annotations.json of GPT-4 with both outputs; None for those of vicuna-7b in alpaca-eval's repository.
        limit: number of prompts, drawn with a fixed seed.

    Raises:
        BenchmarkError: if the reference holds fewer than 20 usable rows, or cannot be downloaded.
        StorageError: if it cannot be read.
    """
    rows = (
        parse_rows(fetch_public_file(GPT4_VERDICTS), GPT4_VERDICTS.url)
        if reference is None
        else parse_rows(read_unpacked(reference), reference)
    )
    usable = [row for _, row in rows if _is_usable(row)]
    if len(usable) < 20:
        raise BenchmarkError(
            f"{reference or GPT4_VERDICTS.url}: {len(usable)} of {len(rows)} row(s) have `instruction`, `output_1`, `output_2` and a "
            "`preference` from 1 to 2; a judge card needs at least 20"
        )
    drawn = random.Random(_SEED).sample(usable, min(limit, len(usable)))
    outputs = {row["instruction"]: row["output_1"] for row in drawn}
    baseline = AnswerSet("baseline", outputs, reference or GPT4_VERDICTS.url)
    model = AnswerSet("model", {row["instruction"]: row["output_2"] for row in drawn}, baseline.source)
    instructions = list(outputs)
    sides = Sides(baseline, model, instructions)
    template = read_template(judge)
    few = instructions[:_CANARIES]
    moved = [outputs[instruction] for instruction in (*few[1:], few[0])]
    canaries = {
        "constant": dict.fromkeys(few, _CONSTANT),
        "permuted": dict(zip(few, moved, strict=True)),
    }
    constant, permuted = (
        comparisons_of(judge, template, Sides(baseline, AnswerSet(name, texts, name), few), "both")
        for name, texts in canaries.items()
    )
    verdicts = {row["instruction"]: float(row["preference"]) for row in drawn}
    return Examination(sides, verdicts, comparisons_of(judge, template, sides, "both"), constant, permuted)


def measure_judge(judge: Judge, examination: Examination, answers: Mapping[str, JudgeAnswer]) -> JudgeCard:
    """Compute the judge card from the answers of an examination.

    Args:
        answers: to the questions of the examination.
    """
    judgments = parse_judgments(judge, examination.sides, examination.comparisons, answers)
    read = [judgment for judgment in judgments if judgment.preference is not None]
    both = _both_orders(read)
    means = np.array([sum(pair) / 2 for pair in both.values()])
    of_gpt4 = np.array([examination.verdicts[instruction] for instruction in both])
    masses = [
        mass_on_names(judgment.log_probabilities) for judgment in judgments if judgment.log_probabilities
    ]
    asked = [judgment for judgment in judgments if judgment.key]
    figures: dict[str, Any] = {
        "prompts": len(both),
        "agreement": _mean(_same_side(means, of_gpt4)),
        "correlation": _rank_correlation(means, of_gpt4),
        "consistency": _mean([_is_consistent(*pair) for pair in both.values()]),
        "first_place": _mean([_of_first(judgment) for judgment in read], default=0.5),
        "longer": _preference_for_longer(read),
        "mass": float(np.mean(masses)) if masses else None,
        "unparsed": sum(judgment.preference is None for judgment in asked) / max(1, len(asked)),
        "constant_canary": _canary(judge, examination.constant, answers),
        "permuted_canary": _canary(judge, examination.permuted, answers),
    }
    cost = sum(answers[question.id].cost for question in examination.questions if question.id in answers)
    return JudgeCard(judge.model, judge.protocol, **figures, cost=cost, warnings=tuple(_warnings(figures)))


def write_judge_card(stored: AnswerStore, card: JudgeCard) -> None:
    """Store a judge card beside the judge's answers."""
    stored.store.put(f"{stored.prefix}/{CARD_FILE}", (json.dumps(asdict(card), indent=1) + "\n").encode())


def read_judge_card(store: Store, judge: Judge) -> JudgeCard | None:
    """Read the stored card of a judge; None if there is none."""
    key = f"judges/{judge.id}/{CARD_FILE}"
    try:
        data = parse_json_object(
            store.read(key), f"{store.uri}/{key}", error=BenchmarkError, remedy="make the card again"
        )
    except NotFound:
        return None
    try:
        return JudgeCard(**{**data, "warnings": tuple(data["warnings"])})
    except (TypeError, KeyError) as error:
        raise BenchmarkError(f"{store.uri}/{key}: not a judge card of this version; make it again") from error


def _warnings(figures: Mapping[str, Any]) -> list[str]:
    mass = figures["mass"]
    checks = [
        (figures["prompts"] < _LEAST_PROMPTS, f"only {figures['prompts']} prompts have a verdict in both orders (at least {_LEAST_PROMPTS})"),
        (figures["consistency"] < _LEAST_CONSISTENCY, f"the same output wins in both orders for {figures['consistency']:.0%} of prompts only (at least {_LEAST_CONSISTENCY:.0%})"),
        (mass is not None and mass < _LEAST_MASS, f"it names one of the two outputs with a probability of {mass or 0:.2f} only (at least {_LEAST_MASS})"),
        (figures["agreement"] < _LEAST_AGREEMENT, f"it agrees with GPT-4 in {figures['agreement']:.0%} only (at least {_LEAST_AGREEMENT:.0%}; chance is 50%)"),
        (not _POSITION[0] <= figures["first_place"] <= _POSITION[1], f"the output shown first gets {figures['first_place']:.0%}"),
        (figures["unparsed"] > _MOST_UNPARSED, f"{figures['unparsed']:.0%} of its answers hold no verdict"),
        (figures["constant_canary"] > _MOST_CANARY, f"a meaningless answer gets {figures['constant_canary']:.0%} (at most {_MOST_CANARY:.0%})"),
        (figures["permuted_canary"] > _MOST_CANARY, f"an answer to another prompt gets {figures['permuted_canary']:.0%} (at most {_MOST_CANARY:.0%})"),
    ]  # fmt: skip
    return [text for failed, text in checks if failed]


def _is_usable(row: Any) -> bool:
    if not isinstance(row, Mapping):
        return False
    texts = all(isinstance(row.get(name), str) for name in ("instruction", "output_1", "output_2"))
    preference = row.get("preference")
    return (
        texts
        and is_number(preference)
        and 1 <= float(preference or 0) <= 2
        and row["output_1"] != row["output_2"]
    )


def _both_orders(judgments: Sequence[Judgment]) -> dict[str, tuple[float, float]]:
    by_order: dict[str, dict[bool, float]] = {}
    for judgment in judgments:
        if judgment.preference is not None:
            by_order.setdefault(judgment.instruction, {})[judgment.switched] = judgment.preference
    return {
        instruction: (orders[False], orders[True])
        for instruction, orders in by_order.items()
        if len(orders) == 2
    }


def _is_consistent(straight: float, switched: float) -> bool:
    """True if the same output wins in both orders, or both orders are a draw."""
    return (straight - 1.5) * (switched - 1.5) > 0 or straight == switched == 1.5


def _mean(values: Array | Sequence[float], default: float = 0.0) -> float:
    return float(np.mean(values)) if len(values) else default


def _of_first(judgment: Judgment) -> float:
    preference = judgment.preference or 1.5
    return preference - 1 if judgment.switched else 2 - preference


def _preference_for_longer(judgments: Sequence[Judgment]) -> float:
    shares = [
        (judgment.preference or 1.5) - 1
        if judgment.length_2 > judgment.length_1
        else 2 - (judgment.preference or 1.5)
        for judgment in judgments
        if judgment.length_1 != judgment.length_2
    ]
    return float(np.mean(shares)) if shares else 0.5


def _canary(judge: Judge, comparisons: Sequence[Comparison], answers: Mapping[str, JudgeAnswer]) -> float:
    """Mean preference for the canary, over answers with a verdict; 1, the worst value, without any."""
    empty = AnswerSet("baseline", {}, ""), AnswerSet("canary", {}, "")
    judged = parse_judgments(judge, Sides(*empty, []), comparisons, answers)
    read = [judgment.preference - 1 for judgment in judged if judgment.preference is not None]
    return float(np.mean(read)) if read else 1.0


def _same_side(preferences: Array, others: Array) -> Array:
    product = (preferences - 1.5) * (others - 1.5)
    return np.where(product > 0, 1.0, np.where(product < 0, 0.0, 0.5))


def _rank_correlation(values: Array, others: Array) -> float:
    ranks = [_ranks(each) for each in (values, others)]
    spread = [float(each.std()) if len(each) else 0.0 for each in ranks]
    if min(spread) == 0:
        return 0.0
    return float(
        np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / (spread[0] * spread[1])
    )


def _ranks(values: Array) -> Array:
    """Ranks from 0; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return np.asarray((last - (counts - 1) / 2)[place], np.float64)
