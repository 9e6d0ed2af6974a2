"""Rows of the files that AlpacaEval and MT-Bench judge, made of responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expo_ray.errors import PromptError
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Prompt, Response, digest
from expo_ray.text import first_few

# Name of the only split in AlpacaEval's own outputs.
_DATASPLIT = "eval"


def alpaca_eval(prompts: PromptSet, responses: Mapping[tuple[str, int], Response]) -> list[dict[str, str]]:
    """AlpacaEval's `model_outputs`: the first response to each prompt, in the order of the prompts.

    AlpacaEval joins them by position with its baseline and with the difficulty of its instructions: in another order, or with a
    row missing, it computes another score without any warning.

    Raises:
        PromptError: if a prompt has no response, or more than one turn.
    """
    _check_complete(prompts, responses, 1)
    several = [_label(prompt) for prompt in prompts.prompts if len(prompt.messages) > 1 or prompt.follow_ups]
    if several:
        raise PromptError(
            f"{prompts.name}: {len(several)} prompt(s) have several turns, and AlpacaEval takes single instructions only "
            f"({first_few(several)}); export them as jsonl"
        )
    return [
        {
            "instruction": prompt.messages[0]["content"],
            "output": responses[prompt.id, 0].text,
            "generator": responses[prompt.id, 0].model,
            "dataset": prompt.category,
            "datasplit": _DATASPLIT,
        }
        for prompt in prompts.prompts
    ]


def mt_bench(
    prompts: PromptSet, responses: Mapping[tuple[str, int], Response], *, samples: int, seconds: float
) -> list[dict[str, Any]]:
    """MT-Bench's model answers: a row for each question, with all its turns.

    Args:
        samples: responses to each prompt; each becomes a choice of the row.
        seconds: since 1970, for the rows' `tstamp`.

    Raises:
        PromptError: if a prompt has no response, or no `question_id`.
    """
    _check_complete(prompts, responses, samples)
    nameless = [_label(prompt) for prompt in prompts.prompts if not prompt.label]
    if nameless:
        raise PromptError(
            f"{prompts.name}: {len(nameless)} prompt(s) have no `question_id`, by which MT-Bench finds its questions "
            f"({first_few(nameless)}); ask those of its question.jsonl"
        )
    rows = []
    for prompt in prompts.prompts:
        answers = [responses[prompt.id, sample] for sample in range(samples)]
        choices = [{"index": answer.sample, "turns": turns_of(prompt, answer)} for answer in answers]
        rows.append(
            {
                "question_id": int(prompt.label) if prompt.label.isdecimal() else prompt.label,
                "answer_id": digest([prompt.label, answers[0].model, choices], 22),
                "model_id": answers[0].model,
                "choices": choices,
                "tstamp": seconds,
            }
        )
    return rows


def turns_of(prompt: Prompt, response: Response) -> list[str]:
    """The answers to all turns of a prompt."""
    history: Sequence[Mapping[str, str]] = response.messages[len(prompt.messages) :]
    return [turn["content"] for turn in history if turn["role"] == "assistant"] + [response.text]


def _check_complete(prompts: PromptSet, responses: Mapping[tuple[str, int], Response], samples: int) -> None:
    missing = [
        _label(prompt)
        for prompt in prompts.prompts
        if any((prompt.id, sample) not in responses for sample in range(samples))
    ]
    if missing:
        raise PromptError(
            f"{prompts.name}: {len(missing)} prompt(s) have no response, and a benchmark's file needs all of them "
            f"({first_few(missing)}); run the same command again when they can be answered"
        )


def _label(prompt: Prompt) -> str:
    return prompt.label or prompt.id
