"""Compare the outputs of two models by a judge: list the questions, and parse the judge's answers into preferences."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from expo_ray.benchmark.answer_files import AnswerSet
from expo_ray.benchmark.judges.ask_judge import JudgeAnswer, Question, question_id
from expo_ray.benchmark.judges.judge import Judge, preference_from_logprobs, preference_from_verdict
from expo_ray.benchmark.judges.prompt_templates import Template, read_alpaca_template, verdict_template
from expo_ray.benchmark.judges.verdicts import Judgment
from expo_ray.errors import BenchmarkError
from expo_ray.text import first_few, shown

Orders = Literal["alpaca", "both"]
DRAW = 1.5


@dataclass(frozen=True)
class Comparison:
    """An instruction with the outputs of a baseline and of a model, in one order.

    Attributes:
        instruction: the prompt of both outputs.
        baseline: `output_1` of AlpacaEval's files.
        model: `output_2`.
        switched: whether the model's output is shown first.
        question: to the judge; None if the outputs are identical, which is a draw without asking.
    """

    instruction: str
    baseline: str
    model: str
    switched: bool
    question: Question | None


def is_model_shown_first(instruction: str) -> bool:
    """True if AlpacaEval shows the model's output first, by its own pseudo-random draw for each instruction."""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]


@dataclass(frozen=True)
class Sides:
    """The outputs of two models, and the instructions to compare them on."""

    baseline: AnswerSet
    model: AnswerSet
    instructions: Sequence[str]


def align(baseline: AnswerSet, model: AnswerSet, *, allow_missing: bool) -> Sides:
    """Place the outputs of two models by instruction, in the baseline's order.

    Raises:
        BenchmarkError: if there are none in common, if the model answers instructions that the baseline lacks, or, unless
            `allow_missing`, if it leaves some of the baseline's without an answer.
    """
    common = [instruction for instruction in baseline.outputs if instruction in model.outputs]
    unknown = [_label(instruction) for instruction in model.outputs if instruction not in baseline.outputs]
    missing = [_label(instruction) for instruction in baseline.outputs if instruction not in model.outputs]
    if unknown and (not allow_missing or not common):
        raise BenchmarkError(
            f"{model.source}: {len(unknown)} of its {len(model.outputs)} instruction(s) are not in {baseline.source} "
            f"({first_few(unknown, 3)}); give outputs for the same instructions"
        )
    if missing and not allow_missing:
        raise BenchmarkError(
            f"{model.source}: {len(missing)} of the {len(baseline.outputs)} instruction(s) of {baseline.source} have no output "
            f"({first_few(missing, 3)}); answer them, or compare the others with --allow-missing"
        )
    return Sides(baseline, model, common)


def read_template(judge: Judge) -> Template:
    """Template for a judge's protocol; AlpacaEval's is read from the installed package; errors as of `read_alpaca_template`."""
    return read_alpaca_template() if judge.protocol == "logprobs" else verdict_template()


def comparisons_of(judge: Judge, template: Template, sides: Sides, orders: Orders) -> list[Comparison]:
    """List the comparisons: each instruction in AlpacaEval's order of the two outputs, or in both orders."""
    return [
        _comparison(judge, template, sides, instruction, switched)
        for instruction in sides.instructions
        for switched in ((is_model_shown_first(instruction),) if orders == "alpaca" else (False, True))
    ]


def _comparison(
    judge: Judge, template: Template, sides: Sides, instruction: str, switched: bool
) -> Comparison:
    baseline, model = sides.baseline.outputs[instruction], sides.model.outputs[instruction]
    if baseline == model:
        return Comparison(instruction, baseline, model, switched, None)
    first, second = (model, baseline) if switched else (baseline, model)
    options = judge.options()
    texts = {"instruction": instruction, "output_1": first, "output_2": second}
    question = Question(
        question_id(judge, template.id, list(texts.values()), options),
        _label(instruction),
        template.filled(texts),
        options,
    )
    return Comparison(instruction, baseline, model, switched, question)


def questions_of(comparisons: Sequence[Comparison]) -> list[Question]:
    """The questions to ask; identical outputs need none."""
    return [comparison.question for comparison in comparisons if comparison.question]


def parse_judgments(
    judge: Judge, sides: Sides, comparisons: Sequence[Comparison], answers: Mapping[str, JudgeAnswer]
) -> list[Judgment]:
    """Parse a judge's answers into verdicts; comparisons without an answer are left out."""
    judgments = []
    for comparison in comparisons:
        answer = answers.get(comparison.question.id) if comparison.question else JudgeAnswer("", "")
        if answer is not None:
            judgments.append(_judgment(judge, sides, comparison, answer))
    return judgments


def _judgment(judge: Judge, sides: Sides, comparison: Comparison, answer: JudgeAnswer) -> Judgment:
    if comparison.question is None:
        of_second: float | None = DRAW
    elif judge.protocol == "logprobs":
        of_second = preference_from_logprobs(answer.first_token)
    else:
        of_second = preference_from_verdict(answer.text)
    return Judgment(
        key=answer.question,
        judge=judge.model,
        instruction=comparison.instruction,
        model_1=sides.baseline.name,
        model_2=sides.model.name,
        length_1=len(comparison.baseline),
        length_2=len(comparison.model),
        switched=comparison.switched,
        preference=3 - of_second if comparison.switched and of_second is not None else of_second,
        text=answer.text,
        log_probabilities=answer.first_token,
        input_tokens=answer.num_prompt_tokens,
        output_tokens=answer.num_tokens,
        cost=answer.cost,
    )


def unparsed_ids(judgments: Sequence[Judgment]) -> frozenset[str]:
    """Ids of the questions whose answers hold no verdict."""
    return frozenset(judgment.key for judgment in judgments if judgment.preference is None)


def annotation_rows(judge: Judge, sides: Sides, judgments: Sequence[Judgment]) -> list[dict[str, Any]]:
    """Rows in the format of alpaca-eval's annotations.json; two orders of a comparison become one row with the mean preference.

    `preference` is 1 (output_1, the baseline) to 2 (output_2, the model), or null if no verdict could be parsed.
    """
    by_instruction: dict[str, list[Judgment]] = {}
    for judgment in judgments:
        by_instruction.setdefault(judgment.instruction, []).append(judgment)
    rows = []
    for instruction, judged in by_instruction.items():
        read = [each.preference for each in judged if each.preference is not None]
        rows.append(
            {
                "instruction": instruction,
                "output_1": sides.baseline.outputs[instruction],
                "generator_1": sides.baseline.name,
                "dataset": sides.model.datasets.get(
                    instruction, sides.baseline.datasets.get(instruction, "")
                ),
                "output_2": sides.model.outputs[instruction],
                "generator_2": sides.model.name,
                "annotator": judge.model,
                "preference": sum(read) / len(read) if len(read) == len(judged) else None,
                "raw_completion": judged[0].text,
            }
        )
    return rows


def _label(instruction: str) -> str:
    return repr(shown(instruction, 40))
