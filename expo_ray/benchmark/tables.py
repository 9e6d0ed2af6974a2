"""Make tables, plots and JSON of benchmark results. The same tables are printed as Markdown and drawn on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expo_ray.benchmark.alpaca_eval.win_rates import ArmDifference, ArmScore
from expo_ray.benchmark.answer_checks import AnswerChecks
from expo_ray.benchmark.head_to_head import HeadToHead
from expo_ray.benchmark.intervals import Estimate, holm, outcome, pooled
from expo_ray.benchmark.mt_bench.ratings import ModelRatings, score_ratings
from expo_ray.benchmark.open_llm_leaderboard import TASKS, ModelTasks
from expo_ray.config.fields import LengthControlKind
from expo_ray.report.benchmark_page import Forest, ForestRow, Table
from expo_ray.report.results import Interval
from expo_ray.text import shown

CONTROLS: Mapping[LengthControlKind, str] = {
    "official": "official length control (GPT-4-1106's verdicts on the gamed baselines)",
    "rejudge": "length control with this judge's own verdicts on the gamed baselines",
    "none": "length control from this arm's verdicts alone",
}
# Each length control has its own column, because figures of different controls are not comparable.
_LC_COLUMNS: Mapping[LengthControlKind, str] = {
    "official": "LC win rate (official)",
    "rejudge": "LC win rate (rejudged)",
    "none": "LC win rate (no gamed baselines)",
}


def arms_table(scores: Sequence[ArmScore], judge: str) -> Table:
    """Table of AlpacaEval win rates of models against one baseline."""
    kinds = [kind for kind in _LC_COLUMNS if any(score.control == kind for score in scores)]
    rows = [
        (
            score.verdicts.model,
            rate(score.win_rate),
            *(rate(score.controlled) if score.control == kind else "" for kind in kinds),
            str(len(score.verdicts.index)),
            str(score.unparsed),
            f"{score.verdicts.lengths.mean():.0f}",
        )
        for score in scores
    ]
    notes = [CONTROLS[kind] for kind in kinds] or [
        "not controlled for length: no control is right for this judge and baseline"
    ]
    baseline = scores[0].verdicts.opponent if scores else ""
    return Table(
        f"AlpacaEval 2.0 against {baseline or 'the baseline'}",
        ("model", "win rate %", *(f"{_LC_COLUMNS[kind]} %" for kind in kinds), "prompts", "unparsed", "mean length"),
        tuple(rows),
        (f"Judge: {judge or 'not named in the file'}.", f"Brackets: 95 % intervals over prompts; {'; '.join(notes)}."),
    )  # fmt: skip


def differences_table(differences: Sequence[ArmDifference]) -> Table:
    """Table of paired differences of win rates, with the detectable difference."""
    rows = [
        (
            f"{each.model} - {each.reference}",
            label,
            points(figure),
            f"{figure.detectable:.1f}",
            _verdict_of(figure.interval),
            str(each.prompts),
        )
        for each in differences
        for label, figure in (("win rate", each.win_rate), ("LC win rate", each.controlled))
        if figure is not None
    ]
    return Table(
        "Paired differences",
        ("models", "figure", "difference, points", "detectable", "at 5 %", "prompts"),
        tuple(rows),
        (
            "Both models answered the same prompts, which are resampled together.",
            "Detectable: the true difference that this number of prompts shows with 80 % power. "
            "An inconclusive difference is no evidence of equality. Secondary figures, not adjusted for their number.",
        ),
    )


def head_to_head_table(duels: Sequence[HeadToHead]) -> Table:
    """Table of the primary result: each model judged against its reference, Holm-adjusted over the pairs, and the mean over pairs."""
    adjusted = holm([duel.p_value for duel in duels])
    rows = [_duel_row(duel, p) for duel, p in zip(duels, adjusted, strict=True)]
    if mean := pooled_head_to_head(duels):
        raw = pooled([duel.win_rate for duel in duels])
        verdict = _verdict_of(_minus_half(mean.interval))
        rows.append((
            f"mean of {len(duels)} pairs", rate(raw), rate(mean), f"{mean.detectable:.1f}", "", verdict, "", str(duels[0].prompts), ""
        ))  # fmt: skip
    return Table(
        "Head to head",
        ("pair", "win rate %", "LC win rate %", "detectable", "p (Holm)", "at 5 %", "length ratio", "prompts", "unparsed"),
        tuple(rows),
        (
            f"Judge: {', '.join(dict.fromkeys(duel.judge for duel in duels)) or 'none'}. 50 is a draw.",
            "LC win rate: at equal length, the intercept of a logistic regression on tanh(length difference). The primary figure; "
            "its p-values are adjusted for the number of pairs. Detectable: the distance from 50 that this number of prompts shows with 80 % power.",
        ),
    )  # fmt: skip


def _duel_row(duel: HeadToHead, p: float) -> tuple[str, ...]:
    return (
        f"{duel.model} against {duel.opponent}",
        rate(duel.win_rate),
        rate(duel.controlled),
        f"{duel.controlled.detectable:.1f}",
        _p_text(p),
        outcome(duel.controlled.interval.mean - 50, p),
        _two_decimals(duel.length_ratio),
        str(duel.prompts),
        str(duel.unparsed),
    )


def pooled_head_to_head(duels: Sequence[HeadToHead]) -> Estimate | None:
    """Mean length-controlled win rate over pairs on the same prompts; None for a single pair or different prompts."""
    if len(duels) < 2 or not _same_prompts(duels):
        return None
    return pooled([duel.controlled for duel in duels])


def head_to_head_forest(duels: Sequence[HeadToHead]) -> Forest:
    """Forest plot of the length-controlled win rate above 50 of each pair, and their mean."""
    rows = [_forest_row(duel.model, _minus_half(duel.controlled.interval)) for duel in duels]
    if mean := pooled_head_to_head(duels):
        rows.append(_forest_row(f"mean of {len(duels)} pairs", _minus_half(mean.interval), pooled=True))
    return Forest("Head to head at equal length", "points above 50", tuple(rows))


def differences_forest(differences: Sequence[ArmDifference]) -> Forest:
    """Forest plot of paired differences, length-controlled if available, and their mean over pairs on the same prompts."""
    figures = [(each.model, each.controlled or each.win_rate) for each in differences]
    rows = [_forest_row(name, figure.interval) for name, figure in figures]
    if len(rows) > 1 and _same_prompts(differences):
        mean = pooled([figure for _, figure in figures])
        rows.append(_forest_row(f"mean of {len(rows)} pairs", mean.interval, pooled=True))
    return Forest("Differences of win rates", "points", tuple(rows))


def ratings_table(models: Sequence[ModelRatings]) -> Table:
    """Table of MT-Bench averages."""
    rows = []
    for model in models:
        figure = score_ratings(model).interval
        turns = (model.mean(0), model.mean(1))
        rows.append((
            model.model,
            f"{figure.mean:.2f} [{figure.low:.2f}, {figure.high:.2f}]",
            *("" if turn is None else f"{turn:.2f}" for turn in turns),
            *(f"{model.categories()[name]:.1f}" if name in model.categories() else "" for name in _categories(models)),
            str(model.num_ratings),
            str(model.unparsed),
        ))  # fmt: skip
    return Table(
        "MT-Bench",
        ("model", "average", "turn 1", "turn 2", *_categories(models), "ratings", "unparsed"),
        tuple(rows),
        (
            f"Judge: {', '.join(dict.fromkeys(model.judge for model in models)) or 'none'}.",
            "Brackets: 95 % intervals over questions. Ten questions of a category are too few for one.",
        ),
    )


def ratings_difference_table(model: str, reference: str, figure: Estimate, questions: int) -> Table:
    """Table of the paired difference of two MT-Bench averages."""
    interval = figure.interval
    return Table(
        "Paired difference",
        ("models", "difference", "detectable", "at 5 %", "questions"),
        ((
            f"{model} - {reference}",
            f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]",
            f"{figure.detectable:.2f}",
            _verdict_of(interval),
            str(questions),
        ),),
        ("Detectable: the true difference that this number of questions shows with 80 % power.",),
    )  # fmt: skip


def tasks_table(models: Sequence[ModelTasks]) -> Table:
    """Table of the six tasks of the Open LLM Leaderboard v1."""
    flexible = any(model.gsm8k_flexible is not None for model in models)
    rows = [
        (
            model.name,
            *(_two_decimals(model.scores.get(task)) for task in TASKS),
            *([_two_decimals(model.gsm8k_flexible)] if flexible else []),
            _two_decimals(model.average),
        )
        for model in models
    ]
    columns = ("model", *TASKS, *(["gsm8k, flexible"] if flexible else []), "average")
    return Table("Open LLM Leaderboard v1, %", columns, tuple(rows), ())


def checks_table(checks: Mapping[str, AnswerChecks]) -> Table:
    """Table of the signs of gaming or damage in each set of answers."""
    rows = [
        (
            name,
            *(
                "" if share is None else f"{share:.1%}"
                for share in (
                    check.distinct, check.common_prefix, check.common_line, check.prompt_overlap, check.leaks, check.empty, check.cut_off,
                    check.repetitive,
                )
            ),
            f"{check.mean_length:.0f}",
            "" if check.length_ratio is None else f"{check.length_ratio:.2f}",
            "; ".join(check.flags) or "none",
        )
        for name, check in checks.items()
    ]  # fmt: skip
    return Table(
        "Answers",
        ("model", "distinct", "common beginning", "common line", "repeat the prompt", "leak tokens", "empty", "cut off", "loop", "mean length",
         "length ratio", "flags"),
        tuple(rows),
        (),
    )  # fmt: skip


def markdown(tables: Sequence[Table]) -> str:
    """The tables as one Markdown document."""
    return "\n".join(line for table in tables for line in (*_markdown_lines(table), ""))


def interval_json(interval: Interval) -> list[float]:
    """Both ends, unrounded."""
    return [interval.low, interval.high]


def estimate_json(figure: Estimate) -> dict[str, Any]:
    """A figure with its interval, standard error and detectable difference, unrounded."""
    return {
        "value": figure.interval.mean,
        "interval": interval_json(figure.interval),
        "standard_error": figure.standard_error,
        "detectable": figure.detectable,
    }


def arm_json(score: ArmScore) -> dict[str, Any]:
    """A model's win rates against the baseline, unrounded, in percent."""
    figures = {"win_rate": score.win_rate, "length_controlled_winrate": score.controlled}
    return {
        **{name: figure.interval.mean if figure else None for name, figure in figures.items()},
        "intervals": {
            name: interval_json(figure.interval) if figure else None for name, figure in figures.items()
        },
        "n": len(score.verdicts.index),
        "unparsed": score.unparsed,
    }


def difference_json(difference: ArmDifference) -> dict[str, Any]:
    """A paired difference of win rates, unrounded, in points."""
    figures = {"win_rate": difference.win_rate, "length_controlled_winrate": difference.controlled}
    return {
        "model": difference.model,
        "reference": difference.reference,
        **{name: estimate_json(figure) if figure else None for name, figure in figures.items()},
        "n": difference.prompts,
    }


def duel_json(duel: HeadToHead) -> dict[str, Any]:
    """The head-to-head figures of one pair in the form of `arm_json`."""
    figures = {"win_rate": duel.win_rate, "length_controlled_winrate": duel.controlled}
    return {
        **{name: figure.interval.mean for name, figure in figures.items()},
        "intervals": {name: interval_json(figure.interval) for name, figure in figures.items()},
        "n": duel.prompts,
        "unparsed": duel.unparsed,
    }


def head_to_head_json(duels: Sequence[HeadToHead]) -> dict[str, Any]:
    """The head-to-head table, unrounded."""
    adjusted = holm([duel.p_value for duel in duels])
    mean = pooled_head_to_head(duels)
    return {
        "pairs": [
            {
                "model": duel.model,
                "reference": duel.opponent,
                "judge": duel.judge,
                "win_rate": estimate_json(duel.win_rate),
                "length_controlled_winrate": estimate_json(duel.controlled),
                "p": duel.p_value,
                "p_holm": p,
                "outcome": outcome(duel.controlled.interval.mean - 50, p),
                "length_ratio": duel.length_ratio,
                "n": duel.prompts,
                "unparsed": duel.unparsed,
            }
            for duel, p in zip(duels, adjusted, strict=True)
        ],
        "pooled": estimate_json(mean) if mean else None,
    }


def rate(figure: Estimate | None) -> str:
    """`9.97 [7.84, 12.57]`."""
    if figure is None:
        return ""
    interval = figure.interval
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def points(figure: Estimate) -> str:
    """`+1.23 [-0.40, +2.91]`."""
    interval = figure.interval
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def _verdict_of(interval: Interval) -> str:
    """Claim that an unadjusted interval of a difference allows."""
    return "better" if interval.low > 0 else "worse" if interval.high < 0 else "inconclusive"


def _same_prompts(pairs: Sequence[HeadToHead] | Sequence[ArmDifference]) -> bool:
    return all(np.array_equal(pairs[0].index, pair.index) for pair in pairs)


def _forest_row(label: str, interval: Interval, *, pooled: bool = False) -> ForestRow:
    return ForestRow(label, interval.mean, interval.low, interval.high, pooled)


def _minus_half(interval: Interval) -> Interval:
    return Interval(interval.mean - 50, interval.low - 50, interval.high - 50)


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _two_decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _categories(models: Sequence[ModelRatings]) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model.categories()))


def _markdown_lines(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(shown(cell, 600).replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(table.columns) - 1)
    return [f"## {table.title}", "", line(table.columns), rule, *map(line, table.rows), "", *table.notes]
