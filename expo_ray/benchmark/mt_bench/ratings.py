"""Read a judge's ratings of MT-Bench answers from FastChat's files, and compute scores with intervals over questions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expo_ray.benchmark.intervals import Estimate, Refit, difference, estimate
from expo_ray.benchmark.row_files import first_places, is_number, read_row_file
from expo_ray.config.fields import DuplicatePolicy
from expo_ray.errors import BenchmarkError, ExpoError, Problems, problems_of
from expo_ray.evaluation.statistics import Array
from expo_ray.text import shown

# FastChat's score for an answer of the judge without a rating.
UNPARSED = -1
QUESTIONS = range(81, 161)
TURNS = (1, 2)
# Ten questions each, in the order of their numbers.
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True)
class Rating:
    """A judge's rating of one answer.

    Attributes:
        place: file and line, for messages.
        prompt: text that the judge was shown; it differs between two answers to the same question.
        score: 1 to 10, or -1 if the judge's text holds no rating.
    """

    place: str
    model: str
    judge: str
    question: int
    turn: int
    score: float
    prompt: str


@dataclass(frozen=True, eq=False)
class ModelRatings:
    """The ratings of one model.

    Attributes:
        questions: (questions,), their numbers, ascending.
        scores: (questions, turns), NaN without a rating.
        unparsed: ratings of -1, which count in no mean.
    """

    model: str
    judge: str
    questions: Array
    scores: Array
    unparsed: int

    @property
    def complete(self) -> bool:
        """True if all 160 answers of the benchmark have been rated, parsed or not."""
        whole = self.questions.tolist() == list(QUESTIONS)
        return whole and self.num_ratings + self.unparsed == len(QUESTIONS) * len(TURNS)

    @property
    def num_ratings(self) -> int:
        """Number of parsed ratings."""
        return int((~np.isnan(self.scores)).sum())

    def mean(self, columns: slice | int = slice(None)) -> float | None:
        """Mean rating of all turns, or of some; None without any."""
        scores = self.scores[:, columns]
        return float(np.nanmean(scores)) if not np.isnan(scores).all() else None

    def categories(self) -> dict[str, float]:
        """Mean rating by category, without intervals: a category has only ten questions."""
        means = {}
        for at, name in enumerate(CATEGORIES):
            rows = self.scores[(self.questions - QUESTIONS.start) // 10 == at]
            if rows.size and not np.isnan(rows).all():
                means[name] = float(np.nanmean(rows))
        return means


def read_ratings(uris: Sequence[str], duplicates: DuplicatePolicy = "refuse") -> dict[str, ModelRatings]:
    """Read FastChat's single-answer judgments of one or more models.

    Args:
        uris: JSON lines with `question_id`, `model`, `judge`, `turn` and `score`.
        duplicates: refuse a second rating of the same question and turn, or use the last one in the order of the files.

    Raises:
        Problems: with every fault of every file.
        StorageError: if a file cannot be read.
    """
    problems: list[ExpoError] = []
    ratings: list[Rating] = []
    for uri in uris:
        try:
            file = read_row_file(uri)
        except BenchmarkError as error:
            problems += problems_of(error)
            continue
        rows = [(f"{uri} {place}", row, _fault_of(row)) for place, row in file.rows]
        problems += file.problems
        ratings += [_rating(place, row) for place, row, fault in rows if not fault]
        faulty = defaultdict(list)
        for place, _, fault in rows:
            if fault:
                faulty[fault].append(place.removeprefix(f"{uri} "))
        problems += [
            BenchmarkError(f"{uri}: {first_places(where)}: {what}") for what, where in faulty.items()
        ]
    judges = Counter(rating.judge for rating in ratings)
    if len(judges) > 1:
        problems.append(
            BenchmarkError(
                f"ratings of {len(judges)} judges ({first_places(judges)}) are not comparable; give those of one"
            )
        )
    if duplicates == "refuse":
        problems += _twice(ratings)
    if problems:
        raise Problems(problems)
    return {model: _of_model(rows) for model, rows in _by_model(ratings).items()}


def score_ratings(ratings: ModelRatings) -> Estimate:
    """Estimate the mean of all ratings; whole questions are resampled, because their two turns are not independent.

    Raises:
        BenchmarkError: if fewer than two questions have a rating.
    """
    scores = ratings.scores[~np.isnan(ratings.scores).all(axis=1)]
    if len(scores) < 2:
        raise BenchmarkError(
            f"{shown(ratings.model)}: {len(scores)} question(s) with a rating, {ratings.unparsed} of -1; an average with its interval "
            "needs at least 2"
        )
    return estimate(_mean_rating(scores), len(scores))


def compare_ratings(model: ModelRatings, reference: ModelRatings) -> tuple[Estimate, int]:
    """Estimate the difference of two mean ratings on the questions that both models have; also returns their number.

    Raises:
        BenchmarkError: if they have fewer than two questions in common.
    """
    common = np.intersect1d(model.questions, reference.questions)
    scores = [each.scores[np.isin(each.questions, common)] for each in (model, reference)]
    rated = ~(np.isnan(scores[0]).all(axis=1) | np.isnan(scores[1]).all(axis=1))
    number = int(rated.sum())
    figures = [estimate(_mean_rating(each[rated]), number) for each in scores]
    return difference(figures[0], figures[1]), number


def _mean_rating(scores: Array) -> Refit:
    total, rated = np.nansum(scores, axis=1), (~np.isnan(scores)).sum(axis=1)
    return lambda counts: np.asarray((counts @ total) / np.maximum(counts @ rated, 1e-9))


def _fault_of(row: Mapping[str, Any]) -> str:
    faults = []
    if not isinstance(row.get("model"), str) or not row["model"]:
        faults.append("no `model`, as in a file of single-answer ratings (`*_single.jsonl`)")
    if type(row.get("question_id")) is not int:
        faults.append(f"question_id {shown(row.get('question_id'), 40)}, not a whole number")
    if row.get("turn") not in TURNS:
        faults.append(f"turn {shown(row.get('turn'), 40)}, not 1 or 2")
    score = row.get("score")
    if not (is_number(score) and (score == UNPARSED or 0 <= score <= 10)):
        faults.append(f"score {shown(score, 40)}, neither a rating up to 10 nor -1 for none")
    return "; ".join(faults)


def _rating(place: str, row: Mapping[str, Any]) -> Rating:
    judge = row.get("judge")
    name = judge[0] if isinstance(judge, list) and judge else judge
    return Rating(
        place,
        row["model"],
        str(name or ""),
        row["question_id"],
        int(row["turn"]),
        float(row["score"]),
        str(row.get("user_prompt", "")),
    )


def _by_model(ratings: Iterable[Rating]) -> dict[str, list[Rating]]:
    models: dict[str, list[Rating]] = defaultdict(list)
    for rating in ratings:
        models[rating.model].append(rating)
    return models


def _twice(ratings: Sequence[Rating]) -> list[BenchmarkError]:
    problems = []
    for model, rows in _by_model(ratings).items():
        first: dict[tuple[int, int], Rating] = {}
        again = [row for row in rows if first.setdefault((row.question, row.turn), row) is not row]
        if not again:
            continue
        others = [row for row in again if row.prompt != first[row.question, row.turn].prompt]
        kind = (
            f"two answer sets: {len(again)} answers are rated twice, {len(others)} of them with another text"
            if others
            else f"{len(again)} answers are rated twice"
        )
        problems.append(
            BenchmarkError(
                f"{shown(model)}: {kind} (first {first[again[0].question, again[0].turn].place}, then {again[0].place}); "
                "remove one, or let the last count with --duplicates last"
            )
        )
    return problems


def _of_model(rows: Sequence[Rating]) -> ModelRatings:
    last = {(row.question, row.turn): row for row in rows}
    questions = sorted({question for question, _ in last})
    place = {question: at for at, question in enumerate(questions)}
    scores = np.full((len(questions), len(TURNS)), np.nan)
    for (question, turn), row in last.items():
        if row.score != UNPARSED:
            scores[place[question], turn - 1] = row.score
    return ModelRatings(
        rows[0].model,
        rows[0].judge,
        np.array(questions, np.float64),
        scores,
        sum(row.score == UNPARSED for row in last.values()),
    )
