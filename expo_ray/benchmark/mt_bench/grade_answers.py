"""Grade answers to MT-Bench by a judge, one answer at a time, with the files and rules of FastChat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expo_ray.benchmark.downloads import (
    MT_BENCH_PROMPTS,
    MT_BENCH_QUESTIONS,
    MT_BENCH_REFERENCES,
    PublicFile,
    fetch_public_file,
)
from expo_ray.benchmark.judges.ask_judge import JudgeAnswer, Question, question_id
from expo_ray.benchmark.judges.judge import Judge, rating_from
from expo_ray.benchmark.judges.prompt_templates import Template
from expo_ray.benchmark.row_files import parse_rows, read_unpacked
from expo_ray.errors import BenchmarkError, NotFound, PromptError
from expo_ray.storage import join_uri
from expo_ray.text import first_few, shown, shown_names
from expo_ray.untrusted import kind_of

# FastChat's categories with a reference answer, which the judge is shown.
_WITH_REFERENCE = frozenset({"math", "reasoning", "coding", "arena-hard-200"})
_MAX_TOKENS = 2048


@dataclass(frozen=True)
class MtBench:
    """Questions, reference answers and judge prompts of MT-Bench.

    Attributes:
        questions: by `question_id`: category and turns.
        references: reference answers of the questions that have them, by `question_id`.
        templates: judge prompts by FastChat's names.
    """

    questions: Mapping[int, tuple[str, Sequence[str]]]
    references: Mapping[int, Sequence[str]]
    templates: Mapping[str, Template]


@dataclass(frozen=True)
class ChatAnswers:
    """A model's answers to the questions, by `question_id`: one text for each turn."""

    name: str
    turns: Mapping[int, Sequence[str]]


@dataclass(frozen=True)
class Grading:
    """A question to the judge about one answer.

    Attributes:
        model: name of the model that answered.
        question_id: of MT-Bench.
        turn: 1 or 2.
        template: FastChat's name of the judge prompt.
        question: request to the judge.
    """

    model: str
    question_id: int
    turn: int
    template: str
    question: Question


def read_mt_bench(folder: str | None) -> MtBench:
    """Read questions, judge prompts and references from a folder, or download them from FastChat at a pinned commit.

    Raises:
        BenchmarkError: if they cannot be downloaded.
        PromptError: if a file has other content.
        StorageError: if the folder cannot be read.
    """
    questions = {
        _id_of(row, place): (str(row.get("category", "")), _texts(row.get("turns"), place))
        for place, row in _rows(folder, MT_BENCH_QUESTIONS)
    }
    references = {
        _id_of(row, place): _first_choice(row, place) for place, row in _rows(folder, MT_BENCH_REFERENCES)
    }
    templates = {
        str(row.get("name")): Template(
            (
                {"role": "system", "content": str(row.get("system_prompt"))},
                {"role": "user", "content": str(row.get("prompt_template"))},
            )
        )
        for _, row in _rows(folder, MT_BENCH_PROMPTS)
    }
    needed = {"single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"}
    if not questions or not needed <= templates.keys():
        raise PromptError(
            f"{folder or MT_BENCH_PROMPTS.url}: not MT-Bench's files: {len(questions)} question(s), and the judge prompts "
            f"{first_few(sorted(needed - templates.keys())) or 'are there'} missing; give FastChat's question.jsonl and judge_prompts.jsonl"
        )
    return MtBench(questions, references, templates)


def read_chat_answers(uri: str, bench: MtBench) -> ChatAnswers:
    """Read FastChat's model answers, as `expo-ray respond --format mt-bench` writes them; the first choice of each counts.

    Raises:
        BenchmarkError: if a row is not JSON, or the file is damaged or too large.
        PromptError: with all other bad rows, two answer sets in one file, and questions without an answer.
    """
    turns: dict[int, Sequence[str]] = {}
    names: dict[str, None] = {}
    wrong: list[str] = []
    for place, row in parse_rows(read_unpacked(uri), uri):
        try:
            number = _id_of(row, place)
            texts = _first_choice(row, place)
        except PromptError as error:
            wrong.append(str(error))
            continue
        names[str(row.get("model_id") or "")] = None
        if number in turns and list(turns[number]) != list(texts):
            wrong.append(
                f"{place}: a second, different answer to question {number}: two answer sets in one file"
            )
        elif number in bench.questions and len(texts) != len(bench.questions[number][1]):
            wrong.append(
                f"{place}: {len(texts)} turn(s) for question {number}, which has {len(bench.questions[number][1])}"
            )
        turns[number] = texts
    missing = [str(number) for number in bench.questions if number not in turns]
    if missing:
        wrong.append(f"no answer to {len(missing)} question(s): {first_few(missing)}")
    if len(names) > 1:
        wrong.append(f"answers of several models: {shown_names(names, longest=60)}")
    if wrong:
        listed = "\n    ".join(wrong[:20])
        raise PromptError(f"{uri}: {len(wrong)} problem(s), correct the file:\n    {listed}")
    return ChatAnswers(next(iter(names), "") or uri, {number: turns[number] for number in bench.questions})


def list_gradings(judge: Judge, bench: MtBench, answers: ChatAnswers) -> list[Grading]:
    """List the questions to the judge about one model's answers: one for each turn, as in FastChat's `single` mode."""
    gradings = []
    for number, (category, asked) in bench.questions.items():
        reference = bench.references.get(number) if category in _WITH_REFERENCE else None
        for turn in range(1, len(asked) + 1):
            name = f"single{'-math' if reference else ''}-v1{'-multi-turn' if turn > 1 else ''}"
            values = _values(turn, asked, answers.turns[number], reference)
            question = _question(judge, bench.templates[name], values, f"question {number} turn {turn}")
            gradings.append(Grading(answers.name, number, turn, name, question))
    return gradings


def _values(
    turn: int, asked: Sequence[str], replied: Sequence[str], reference: Sequence[str] | None
) -> dict[str, str]:
    values: dict[str, str] = {}
    if turn == 1:
        values |= {"question": asked[0], "answer": replied[0]}
    for place in range(1, turn + 1):
        values |= {f"question_{place}": asked[place - 1], f"answer_{place}": replied[place - 1]}
        if reference:
            values[f"ref_answer_{place}"] = reference[place - 1]
    return values


def _question(judge: Judge, template: Template, values: Mapping[str, str], label: str) -> Question:
    options = judge.with_extra({"max_tokens": _MAX_TOKENS, "temperature": 0.0})
    texts = sorted(f"{slot}={text}" for slot, text in values.items())
    return Question(question_id(judge, template.id, texts, options), label, template.filled(values), options)


def fastchat_rows(
    judge: Judge, gradings: Sequence[Grading], answers: Mapping[str, JudgeAnswer], seconds: float
) -> list[dict[str, Any]]:
    """Rows in the format of FastChat's `*_single.jsonl`; an answer without a rating has the score -1, as in FastChat."""
    return [
        {
            "question_id": grading.question_id,
            "model": grading.model,
            "judge": [judge.model, grading.template],
            "user_prompt": grading.question.messages[-1]["content"],
            "judgment": answers[grading.question.id].text,
            "score": rating_from(answers[grading.question.id].text),
            "turn": grading.turn,
            "tstamp": seconds,
        }
        for grading in gradings
        if grading.question.id in answers
    ]


def json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Serialise rows as JSON lines, in ASCII because answers may contain half of a surrogate pair."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")


def _rows(folder: str | None, file: PublicFile) -> list[tuple[str, Any]]:
    if folder is None:
        return parse_rows(fetch_public_file(file), file.url)
    uri = join_uri(folder, file.name)
    try:
        return parse_rows(read_unpacked(uri), uri)
    except NotFound as error:
        if file is not MT_BENCH_REFERENCES:
            raise BenchmarkError(
                f"{uri}: is missing; give a folder with FastChat's question.jsonl, judge_prompts.jsonl and reference_answer_gpt-4.jsonl"
            ) from error
        uri = join_uri(folder, "reference_answer/gpt-4.jsonl")
        return parse_rows(read_unpacked(uri), uri)


def _id_of(row: Any, place: str) -> int:
    if not isinstance(row, Mapping) or type(row.get("question_id")) is not int:
        raise PromptError(
            f"{place}: no `question_id`" if isinstance(row, Mapping) else f"{place}: a JSON {kind_of(row)}"
        )
    return int(row["question_id"])


def _texts(value: Any, place: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise PromptError(f"{place}: `turns` is {shown(value, 60)}, not a list of texts")
    return value


def _first_choice(row: Mapping[str, Any], place: str) -> list[str]:
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise PromptError(f"{place}: no `choices`")
    return _texts(choices[0].get("turns"), place)
