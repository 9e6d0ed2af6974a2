"""AlpacaEval through any judge: one or two files of answers against the baseline, and against each other.

judge_alpaca(request)
  read_arms         every file, aligned by instruction, all problems at once
  questions         head to head in both orders, arms against the baseline, the gamed baselines once per judge
  ask               what is not stored yet
  scores            win rates, at equal length too, with intervals; head to head
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from expo_ray.benchmark.alpaca_eval.covariates import Covariates, load_covariates
from expo_ray.benchmark.alpaca_eval.length_control import LengthControl, rejudged_control
from expo_ray.benchmark.alpaca_eval.win_rates import ArmDifference, ArmScore, compare_arms, score_arm
from expo_ray.benchmark.answer_checks import Answer, AnswerChecks, check_answers
from expo_ray.benchmark.answer_files import AnswerSet, parse_answer_set, parse_rows, read_answer_set
from expo_ray.benchmark.downloads import (
    ALPACA_BASELINE,
    ALPACA_CONCISE,
    ALPACA_VERBOSE,
    PublicFile,
    fetch_public_file,
)
from expo_ray.benchmark.head_to_head import HeadToHead, head_to_head
from expo_ray.benchmark.judges.ask_judge import (
    AnswerStore,
    CostEstimate,
    Judged,
    ask_judge,
    check_cost,
    estimate_cost,
)
from expo_ray.benchmark.judges.judge import Judge
from expo_ray.benchmark.judges.pairwise import (
    Comparison,
    Orders,
    Sides,
    align,
    annotation_rows,
    comparisons_of,
    parse_judgments,
    questions_of,
    read_template,
    unparsed_ids,
)
from expo_ray.benchmark.judges.reliability import JudgeCard, read_judge_card
from expo_ray.benchmark.judges.verdicts import Judgment, verdicts_of
from expo_ray.config.fields import LengthControlKind
from expo_ray.errors import Attempts, BenchmarkError, ExpoError, Problems
from expo_ray.progress import Counters
from expo_ray.storage import Store, join_uri, open_output, open_store

log = logging.getLogger("expo_ray")
T = TypeVar("T")

# The judge whose verdicts AlpacaEval's own length control holds.
_OFFICIAL_JUDGES = ("gpt-4-1106-preview", "weighted_alpaca_eval_gpt4_turbo")


@dataclass(frozen=True)
class AlpacaRequest:
    """The files to judge, and how.

    Attributes:
        outputs: file of the model's answers.
        judge: who judges.
        output: folder of what is stored and written.
        baseline: file of the baseline's answers; None for AlpacaEval's, downloaded.
        against: file of another model's answers, such as dpo's, to compare with head to head.
        covariates: folder with AlpacaEval's covariates and gamed baselines; None to download them.
        length_control: None for `rejudge` where the covariates are at hand.
        both_orders: judge each comparison with the baseline in both orders, not in AlpacaEval's one.
        allow_missing: compare the instructions that all files have.
        retry_unparsed: ask again where an answer holds no verdict.
        max_cost: dollars that are never passed.
    """

    outputs: str
    judge: Judge
    output: str
    baseline: str | None = None
    against: str | None = None
    covariates: str | None = None
    length_control: LengthControlKind | None = None
    both_orders: bool = False
    allow_missing: bool = False
    retry_unparsed: bool = False
    max_cost: float | None = None


@dataclass(frozen=True)
class Matchup:
    """Two sets of answers and what is asked about them."""

    name: str
    sides: Sides
    comparisons: Sequence[Comparison]


@dataclass(frozen=True)
class PreparedAlpaca:
    """All that is read before the first question.

    Attributes:
        arms: each model against the baseline; empty if no baseline is at hand.
        direct: the model against the other; None without one.
        gamed: the gamed baselines against the baseline; empty without length control.
        covariates: None without length control.
        notes: what is left out, and why.
    """

    request: AlpacaRequest
    store: Store
    arms: Sequence[Matchup]
    direct: Matchup | None
    gamed: Sequence[Matchup]
    covariates: Covariates | None
    notes: Sequence[str]

    @property
    def matches(self) -> list[Matchup]:
        """In the order in which they are asked: the primary figure first."""
        return [*filter(None, [self.direct]), *self.arms, *self.gamed]


@dataclass(frozen=True)
class AlpacaResult:
    """The figures of one run.

    Attributes:
        score: of the model; None if there is no baseline.
        reference: of the model that it is compared with; None without one.
        difference: of the two arms' win rates.
        direct: head to head, the primary figure; None without another model.
        length_control: how win rates against the baseline are controlled.
        checks: signs of gaming or damage in each set of answers, by model.
        card: of the judge; None if none was made.
        cost: dollars spent on all stored judgments that the figures rest on.
    """

    score: ArmScore | None
    reference: ArmScore | None
    difference: ArmDifference | None
    direct: HeadToHead | None
    length_control: LengthControlKind
    checks: Mapping[str, AnswerChecks]
    card: JudgeCard | None
    cost: float


def prepare_alpaca(request: AlpacaRequest) -> PreparedAlpaca:
    """Read and align every file.

    Raises:
        Problems: with everything that is wrong with any of them.
    """
    attempts = Attempts()
    store = _first(attempts.attempt(partial(open_output, request.output)))
    covariates, notes = _covariates(request, attempts)
    prompts = covariates.prompts if covariates else ()
    model = _first(attempts.attempt(partial(read_answer_set, request.outputs, prompts)))
    other = (
        _first(attempts.attempt(partial(read_answer_set, request.against, prompts)))
        if request.against
        else None
    )
    baseline = _baseline(request, prompts, attempts, notes)
    attempts.end()
    assert model is not None
    assert store is not None
    if other is not None and other.name == model.name:
        other = replace(other, name=f"{other.name} (against)")
    if baseline and covariates and not set(model.outputs) <= set(covariates.prompts):
        notes.append("no length control: the instructions are not AlpacaEval's")
    if not baseline or not set(model.outputs) <= set(prompts):
        covariates = None
    prepared = PreparedAlpaca(request, store, (), None, (), covariates, notes)
    return _matched(prepared, model, other, baseline)


def _matched(
    prepared: PreparedAlpaca, model: AnswerSet, other: AnswerSet | None, baseline: AnswerSet | None
) -> PreparedAlpaca:
    """Place the outputs of each two sides by instruction, and make the comparisons."""
    request, covariates, attempts = prepared.request, prepared.covariates, Attempts()
    order: Orders = "both" if request.both_orders else "alpaca"
    match = partial(_match, request)
    arms = [
        made
        for arm in filter(None, [model, other] if baseline else [])
        for made in attempts.attempt(partial(match, baseline, arm, order))
    ]
    direct = _first(attempts.attempt(partial(match, other, model, "both"))) if other else None
    attempts.end()
    gamed: list[Matchup] = []
    if baseline and covariates and request.length_control != "official":
        for file in (ALPACA_CONCISE, ALPACA_VERBOSE):
            gamed += attempts.attempt(partial(_gamed_match, request, file, covariates, baseline, order))
        attempts.end()
    return replace(prepared, arms=arms, direct=direct, gamed=gamed)


def _match(request: AlpacaRequest, baseline: AnswerSet, model: AnswerSet, order: Orders) -> Matchup:
    sides = align(baseline, model, allow_missing=request.allow_missing)
    comparisons = comparisons_of(request.judge, read_template(request.judge), sides, order)
    return Matchup(f"{model.name} against {baseline.name}", sides, comparisons)


def _gamed_match(
    request: AlpacaRequest, file: PublicFile, covariates: Covariates, baseline: AnswerSet, order: Orders
) -> Matchup:
    answers = _gamed_answers(request.covariates, file, covariates.prompts)
    common = {
        instruction: text for instruction, text in answers.outputs.items() if instruction in baseline.outputs
    }
    return _match(replace(request, allow_missing=True), baseline, replace(answers, outputs=common), order)


def _gamed_answers(folder: str | None, file: PublicFile, prompts: Sequence[str]) -> AnswerSet:
    if folder is not None:
        keys = {info.key for info in open_store(folder).list()}
        stem = file.name.removesuffix(".json")
        for name in (f"{stem}{suffix}" for suffix in (".json", ".jsonl", ".jsonl.gz", ".json.gz")):
            if name in keys:
                return replace(read_answer_set(join_uri(folder, name), prompts), name=stem)
    return parse_answer_set(parse_rows(fetch_public_file(file), file.url), file.url, prompts)


def _baseline(
    request: AlpacaRequest, prompts: Sequence[str], attempts: Attempts, notes: list[str]
) -> AnswerSet | None:
    if request.baseline is not None:
        return _first(attempts.attempt(partial(read_answer_set, request.baseline, prompts)))
    try:
        return parse_answer_set(
            parse_rows(fetch_public_file(ALPACA_BASELINE), ALPACA_BASELINE.url), ALPACA_BASELINE.url
        )
    except ExpoError as error:
        if request.against is None:
            attempts.problems.append(error)
        else:
            notes.append(f"no win rates against the baseline: {error}")
        return None


def _covariates(request: AlpacaRequest, attempts: Attempts) -> tuple[Covariates | None, list[str]]:
    """The covariates if length control is asked for or can be had; else why not."""
    if request.length_control == "none":
        return None, []
    if request.length_control == "official" and request.judge.model not in _OFFICIAL_JUDGES:
        attempts.problems.append(
            BenchmarkError(
                f"the official length control holds the verdicts of {_OFFICIAL_JUDGES[0]} and is wrong under {request.judge.model}; "
                "use --length-control rejudge"
            )
        )
        return None, []
    try:
        return load_covariates(request.covariates), []
    except ExpoError as error:
        if request.length_control is None and request.covariates is None:
            return None, [f"no length control: {error}"]
        attempts.problems += error.problems if isinstance(error, Problems) else [error]
        return None, []


def estimate_alpaca(prepared: PreparedAlpaca) -> CostEstimate:
    """Estimate the questions that are still to be asked, and their cost.

    Raises:
        BenchmarkError: if that is more than the request allows.
    """
    judge = prepared.request.judge
    questions = [question for match in prepared.matches for question in questions_of(match.comparisons)]
    wanted = estimate_cost(judge, questions, AnswerStore(prepared.store, judge).read())
    check_cost(judge, wanted, prepared.request.max_cost)
    return wanted


def judge_alpaca_answers(prepared: PreparedAlpaca, progress: Counters) -> Judged:
    """Ask the judge everything that has no stored answer; errors as of `ask_judge`."""
    request = prepared.request
    stored = AnswerStore(prepared.store, request.judge)
    questions = [question for match in prepared.matches for question in questions_of(match.comparisons)]
    again: frozenset[str] = frozenset()
    if request.retry_unparsed:
        answers = stored.read()
        again = frozenset().union(
            *(unparsed_ids(_judgments(request, match, answers)) for match in prepared.matches)
        )
    return ask_judge(stored, questions, progress=progress, max_cost=request.max_cost, again=again)


def score_alpaca_answers(prepared: PreparedAlpaca, judged: Judged) -> AlpacaResult:
    """Compute every figure from the answers; a comparison without an answer is left out.

    Raises:
        BenchmarkError: if fewer than two prompts hold a verdict.
    """
    request = prepared.request
    control = _control(prepared, judged)
    prompts = _prompts(prepared)
    arms = [
        score_arm(verdicts_of(_judgments(request, arm, judged.answers), prompts), control)
        for arm in prepared.arms
    ]
    direct = None
    if prepared.direct:
        direct = head_to_head(verdicts_of(_judgments(request, prepared.direct, judged.answers), prompts))
    used = {
        question.id for match in prepared.matches for question in questions_of(match.comparisons)
    } & judged.answers.keys()
    return AlpacaResult(
        arms[0] if arms else None,
        arms[1] if len(arms) > 1 else None,
        compare_arms(arms[0], arms[1], control) if len(arms) > 1 else None,
        direct,
        control.kind if control else "none",
        _checks(prepared),
        read_judge_card(prepared.store, request.judge),
        sum(judged.answers[key].cost for key in used),
    )


def _checks(prepared: PreparedAlpaca) -> dict[str, AnswerChecks]:
    """Check each model's answers beside the baseline's, or the other model's where there is no baseline."""
    checks = {}
    for match in [*prepared.arms, *filter(None, [prepared.direct])]:
        if match.sides.model.name not in checks:
            sets = match.sides.model, match.sides.baseline
            model, reference = (
                [Answer(instruction, each.outputs[instruction]) for instruction in match.sides.instructions]
                for each in sets
            )
            checks[match.sides.model.name] = check_answers(model, reference)
    return checks


def write_annotations(prepared: PreparedAlpaca, judged: Judged) -> list[str]:
    """Write alpaca-eval's annotations.json of each match; returns their paths."""
    request, paths = prepared.request, []
    for match in [*filter(None, [prepared.direct]), *prepared.arms]:
        rows = annotation_rows(request.judge, match.sides, _judgments(request, match, judged.answers))
        key = f"annotations/{_file_name(match.name)}.json"
        prepared.store.put(key, (json.dumps(rows, indent=1) + "\n").encode("ascii"))
        paths.append(join_uri(prepared.store.uri, key))
    return paths


def _control(prepared: PreparedAlpaca, judged: Judged) -> LengthControl | None:
    if prepared.covariates is None or not prepared.arms:
        return None
    if prepared.request.length_control == "official":
        return prepared.covariates.official
    gamed = [
        verdicts_of(_judgments(prepared.request, match, judged.answers), prepared.covariates.prompts)
        for match in prepared.gamed
    ]
    return rejudged_control(gamed, prepared.covariates.difficulty)


def _prompts(prepared: PreparedAlpaca) -> Sequence[str]:
    if prepared.covariates:
        return prepared.covariates.prompts
    return list({instruction: None for match in prepared.matches for instruction in match.sides.instructions})


def _judgments(request: AlpacaRequest, match: Matchup, answers: Mapping[str, Any]) -> list[Judgment]:
    return parse_judgments(request.judge, match.sides, match.comparisons, answers)


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in name)[
        :150
    ]


def _first(made: Sequence[T]) -> T | None:
    return made[0] if made else None
