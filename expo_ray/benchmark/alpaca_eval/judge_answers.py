"""Run AlpacaEval through any judge: one or two files of answers against the baseline, and against each other.

1. `prepare_alpaca` reads and aligns every file and lists the comparisons: head to head in both orders, each model against the
   baseline, and the two gamed baselines against the baseline, which the length control needs.
2. `estimate_alpaca` estimates what is still to be asked.
3. `judge_alpaca_answers` asks the judge, and stores each answer.
4. `score_alpaca_answers` computes win rates with intervals, raw and at equal length; `write_annotations` writes the verdicts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expo_ray.benchmark.alpaca_eval.covariates import Covariates, load_covariates
from expo_ray.benchmark.alpaca_eval.length_control import LengthControl, rejudged_control
from expo_ray.benchmark.alpaca_eval.win_rates import ArmDifference, ArmScore, compare_arms, score_arm
from expo_ray.benchmark.answer_checks import Answer, AnswerChecks, check_answers
from expo_ray.benchmark.answer_files import AnswerSet, parse_answer_set, read_answer_set
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
from expo_ray.benchmark.row_files import parse_rows
from expo_ray.config.fields import LengthControlKind
from expo_ray.errors import BenchmarkError, Collected, ExpoError
from expo_ray.progress import Counters
from expo_ray.storage import Store, join_uri, open_output, open_store

log = logging.getLogger("expo_ray")

# The judge whose verdicts AlpacaEval's own length control holds.
_OFFICIAL_JUDGES = ("gpt-4-1106-preview", "weighted_alpaca_eval_gpt4_turbo")


@dataclass(frozen=True)
class AlpacaRequest:
    """The files to judge, and the options of the judging.

    Attributes:
        outputs: file of the model's answers.
        judge: the model that judges.
        output: folder of stored answers, annotations and results.
        baseline: file of the baseline's answers; None for AlpacaEval's, downloaded.
        against: file of another model's answers, such as dpo's, to compare with head to head.
        covariates: folder with AlpacaEval's covariates and gamed baselines; None to download them.
        length_control: None for `rejudge` if the covariates are available, else no control.
        both_orders: judge each comparison with the baseline in both orders instead of the one that AlpacaEval draws.
        allow_missing: compare only the instructions that all files answer.
        retry_unparsed: ask again if a stored answer holds no verdict.
        max_cost: limit in dollars, which is never exceeded.
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
    """Two sets of answers and the comparisons that the judge is asked for."""

    name: str
    sides: Sides
    comparisons: Sequence[Comparison]


@dataclass(frozen=True)
class PreparedAlpaca:
    """The matchups of a request, read and aligned.

    Attributes:
        arms: each model against the baseline; empty without a baseline.
        direct: the model against the other model; None without another model.
        gamed: the gamed baselines against the baseline; empty without length control.
        covariates: None without length control.
        notes: figures that are left out, with the reason.
    """

    request: AlpacaRequest
    store: Store
    arms: Sequence[Matchup]
    direct: Matchup | None
    gamed: Sequence[Matchup]
    covariates: Covariates | None
    notes: Sequence[str]

    @property
    def matchups(self) -> list[Matchup]:
        """All matchups in the order of asking: the one of the primary figure first."""
        return [*filter(None, [self.direct]), *self.arms, *self.gamed]


@dataclass(frozen=True)
class AlpacaResult:
    """The figures of one run.

    Attributes:
        score: of the model; None if there is no baseline.
        reference: score of the other model; None without one.
        difference: of the two models' win rates against the baseline.
        direct: head to head, the primary figure; None without another model.
        length_control: how win rates against the baseline are controlled.
        checks: signs of gaming or damage in each set of answers, by model.
        judge_card: stored measurements of the judge; None if `expo-ray benchmark judge` has not made any.
        cost: dollars spent on all stored judgments that the figures rest on.
    """

    score: ArmScore | None
    reference: ArmScore | None
    difference: ArmDifference | None
    direct: HeadToHead | None
    length_control: LengthControlKind
    checks: Mapping[str, AnswerChecks]
    judge_card: JudgeCard | None
    cost: float


def prepare_alpaca(request: AlpacaRequest) -> PreparedAlpaca:
    """Read and align every file, download those that the request does not name, and list the comparisons.

    Raises:
        Problems: with every fault of every file.
    """
    problems = Collected()
    with problems.catching():
        store = open_output(request.output)
    covariates, notes = _load_covariates(request, problems)
    prompts = covariates.prompts if covariates else ()
    other: AnswerSet | None = None
    with problems.catching():
        model = read_answer_set(request.outputs, prompts)
    with problems.catching():
        other = read_answer_set(request.against, prompts) if request.against else None
    baseline = _load_baseline(request, prompts, problems, notes)
    problems.raise_any()
    if other is not None and other.name == model.name:
        other = replace(other, name=f"{other.name} (against)")
    if baseline and covariates and not set(model.outputs) <= set(covariates.prompts):
        notes.append("no length control: the instructions are not AlpacaEval's")
    if not baseline or not set(model.outputs) <= set(prompts):
        covariates = None
    prepared = PreparedAlpaca(request, store, (), None, (), covariates, notes)
    return _align_all(prepared, model, other, baseline)


def _align_all(
    prepared: PreparedAlpaca, model: AnswerSet, other: AnswerSet | None, baseline: AnswerSet | None
) -> PreparedAlpaca:
    """List the matchups: align the outputs of each two models by instruction."""
    request, covariates, problems = prepared.request, prepared.covariates, Collected()
    order: Orders = "both" if request.both_orders else "alpaca"
    arms: list[Matchup] = []
    direct: Matchup | None = None
    if baseline:
        for arm in filter(None, [model, other]):
            with problems.catching():
                arms.append(_matchup(request, baseline, arm, order))
    with problems.catching():
        direct = _matchup(request, other, model, "both") if other else None
    problems.raise_any()
    gamed: list[Matchup] = []
    if baseline and covariates and request.length_control != "official":
        for file in (ALPACA_CONCISE, ALPACA_VERBOSE):
            with problems.catching():
                gamed.append(_gamed_matchup(request, file, covariates, baseline, order))
        problems.raise_any()
    return replace(prepared, arms=arms, direct=direct, gamed=gamed)


def _matchup(request: AlpacaRequest, baseline: AnswerSet, model: AnswerSet, order: Orders) -> Matchup:
    sides = align(baseline, model, allow_missing=request.allow_missing)
    comparisons = comparisons_of(request.judge, read_template(request.judge), sides, order)
    return Matchup(f"{model.name} against {baseline.name}", sides, comparisons)


def _gamed_matchup(
    request: AlpacaRequest, file: PublicFile, covariates: Covariates, baseline: AnswerSet, order: Orders
) -> Matchup:
    answers = _load_gamed_answers(request.covariates, file, covariates.prompts)
    common = {
        instruction: text for instruction, text in answers.outputs.items() if instruction in baseline.outputs
    }
    return _matchup(replace(request, allow_missing=True), baseline, replace(answers, outputs=common), order)


def _load_gamed_answers(folder: str | None, file: PublicFile, prompts: Sequence[str]) -> AnswerSet:
    """Read the answers of a gamed baseline from the folder of covariates, or download them."""
    if folder is not None:
        keys = {info.key for info in open_store(folder).list()}
        stem = file.name.removesuffix(".json")
        for name in (f"{stem}{suffix}" for suffix in (".json", ".jsonl", ".jsonl.gz", ".json.gz")):
            if name in keys:
                return replace(read_answer_set(join_uri(folder, name), prompts), name=stem)
    return parse_answer_set(parse_rows(fetch_public_file(file), file.url), file.url, prompts)


def _load_baseline(
    request: AlpacaRequest, prompts: Sequence[str], problems: Collected, notes: list[str]
) -> AnswerSet | None:
    """Read the baseline's answers, or download AlpacaEval's; head to head needs none, so a failed download is then only a note."""
    if request.baseline is not None:
        with problems.catching():
            return read_answer_set(request.baseline, prompts)
        return None
    try:
        return parse_answer_set(
            parse_rows(fetch_public_file(ALPACA_BASELINE), ALPACA_BASELINE.url), ALPACA_BASELINE.url
        )
    except ExpoError as error:
        if request.against is None:
            problems.add(error)
        else:
            notes.append(f"no win rates against the baseline: {error}")
        return None


def _load_covariates(request: AlpacaRequest, problems: Collected) -> tuple[Covariates | None, list[str]]:
    """Load the covariates unless they are not wanted; without them, the notes say why."""
    if request.length_control == "none":
        return None, []
    if request.length_control == "official" and request.judge.model not in _OFFICIAL_JUDGES:
        problems.add(
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
        problems.add(error)
        return None, []


def estimate_alpaca(prepared: PreparedAlpaca) -> CostEstimate:
    """Estimate number and cost of the questions that have no stored answer.

    Raises:
        BenchmarkError: if the cost is above the limit of the request.
    """
    judge = prepared.request.judge
    questions = [question for matchup in prepared.matchups for question in questions_of(matchup.comparisons)]
    wanted = estimate_cost(judge, questions, AnswerStore(prepared.store, judge).read())
    check_cost(judge, wanted, prepared.request.max_cost)
    return wanted


def judge_alpaca_answers(prepared: PreparedAlpaca, progress: Counters) -> Judged:
    """Ask the judge every question that has no stored answer; errors as of `ask_judge`."""
    request = prepared.request
    stored = AnswerStore(prepared.store, request.judge)
    questions = [question for matchup in prepared.matchups for question in questions_of(matchup.comparisons)]
    again: frozenset[str] = frozenset()
    if request.retry_unparsed:
        answers = stored.read()
        again = frozenset().union(
            *(unparsed_ids(_judgments(request, matchup, answers)) for matchup in prepared.matchups)
        )
    return ask_judge(stored, questions, progress=progress, max_cost=request.max_cost, again=again)


def score_alpaca_answers(prepared: PreparedAlpaca, judged: Judged) -> AlpacaResult:
    """Compute every figure from the judge's answers, and read its stored card; comparisons without an answer are left out.

    Raises:
        BenchmarkError: if fewer than two prompts hold a verdict.
    """
    request = prepared.request
    control = _length_control(prepared, judged)
    prompts = _prompts(prepared)
    arms = [
        score_arm(verdicts_of(_judgments(request, arm, judged.answers), prompts), control)
        for arm in prepared.arms
    ]
    direct = None
    if prepared.direct:
        direct = head_to_head(verdicts_of(_judgments(request, prepared.direct, judged.answers), prompts))
    used = {
        question.id for matchup in prepared.matchups for question in questions_of(matchup.comparisons)
    } & judged.answers.keys()
    return AlpacaResult(
        arms[0] if arms else None,
        arms[1] if len(arms) > 1 else None,
        compare_arms(arms[0], arms[1], control) if len(arms) > 1 else None,
        direct,
        control.kind if control else "none",
        _check_all_answers(prepared),
        read_judge_card(prepared.store, request.judge),
        sum(judged.answers[key].cost for key in used),
    )


def _check_all_answers(prepared: PreparedAlpaca) -> dict[str, AnswerChecks]:
    """Check each model's answers against the baseline's, or without a baseline against the other model's."""
    checks = {}
    for matchup in [*prepared.arms, *filter(None, [prepared.direct])]:
        if matchup.sides.model.name not in checks:
            sets = matchup.sides.model, matchup.sides.baseline
            model, reference = (
                [Answer(instruction, each.outputs[instruction]) for instruction in matchup.sides.instructions]
                for each in sets
            )
            checks[matchup.sides.model.name] = check_answers(model, reference)
    return checks


def write_annotations(prepared: PreparedAlpaca, judged: Judged) -> list[str]:
    """Write a file in the format of alpaca-eval's annotations.json for each matchup; returns their paths."""
    request, paths = prepared.request, []
    for matchup in [*filter(None, [prepared.direct]), *prepared.arms]:
        rows = annotation_rows(request.judge, matchup.sides, _judgments(request, matchup, judged.answers))
        key = f"annotations/{_file_name(matchup.name)}.json"
        prepared.store.put(key, (json.dumps(rows, indent=1) + "\n").encode("ascii"))
        paths.append(join_uri(prepared.store.uri, key))
    return paths


def _length_control(prepared: PreparedAlpaca, judged: Judged) -> LengthControl | None:
    if prepared.covariates is None or not prepared.arms:
        return None
    if prepared.request.length_control == "official":
        return prepared.covariates.official
    gamed = [
        verdicts_of(_judgments(prepared.request, matchup, judged.answers), prepared.covariates.prompts)
        for matchup in prepared.gamed
    ]
    return rejudged_control(gamed, prepared.covariates.difficulty)


def _prompts(prepared: PreparedAlpaca) -> Sequence[str]:
    if prepared.covariates:
        return prepared.covariates.prompts
    return list(
        {instruction: None for matchup in prepared.matchups for instruction in matchup.sides.instructions}
    )


def _judgments(request: AlpacaRequest, matchup: Matchup, answers: Mapping[str, Any]) -> list[Judgment]:
    return parse_judgments(request.judge, matchup.sides, matchup.comparisons, answers)


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in name)[
        :150
    ]
