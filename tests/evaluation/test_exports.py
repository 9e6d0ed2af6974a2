"""The files that AlpacaEval and MT-Bench judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expo_ray.cli.process import main
from expo_ray.config import PromptSource
from expo_ray.errors import PromptError
from expo_ray.evaluation.prompts.load_prompts import load_prompt_set
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.records import Response
from expo_ray.evaluation.responses.benchmark_exports import alpaca_eval, mt_bench, turns_of
from tests.support.eval_data import read_jsonl_gz, real_data
from tests.support.fake_endpoint import LINE_ENDS, fake_endpoint, text_for


def questions(count: int) -> PromptSet:
    prompts = [
        prompt_of([{"role": "user", "content": f"q{number}"}], "koala", label=str(number))
        for number in range(count)
    ]
    return PromptSet.of("s", prompts)


def answered(prompts: PromptSet, samples: int = 1) -> dict[tuple[str, int], Response]:
    rows = [
        Response(prompt.id, sample, "m", prompt.messages, f"a{prompt.label}.{sample}", 1, 1, "stop", 0)
        for prompt in prompts.prompts
        for sample in range(samples)
    ]
    return {row.key: row for row in reversed(rows)}


def test_alpaca_evals_rows_are_in_the_order_of_the_prompts() -> None:
    prompts = questions(30)
    rows = alpaca_eval(prompts, answered(prompts, samples=2))
    assert rows[3] == {
        "instruction": "q3", "output": "a3.0", "generator": "m", "dataset": "koala", "datasplit": "eval"
    }  # fmt: skip
    assert [row["instruction"] for row in rows] == [f"q{number}" for number in range(30)]


def test_an_export_with_a_gap_is_refused() -> None:
    prompts = questions(5)
    responses = answered(prompts)
    del responses[prompts.prompts[2].id, 0]
    for export in (
        lambda: alpaca_eval(prompts, responses),
        lambda: mt_bench(prompts, responses, samples=1, seconds=0),
    ):
        with pytest.raises(PromptError, match=r"1 prompt\(s\) have no response.*\(2\)"):
            export()


def test_prompts_that_a_format_cannot_hold_are_refused() -> None:
    chat = prompt_of([{"role": "user", "content": "a"}], follow_ups=["b"])
    prompts = PromptSet.of("s", [chat])
    with pytest.raises(PromptError, match="single instructions only"):
        alpaca_eval(prompts, answered(prompts))
    with pytest.raises(PromptError, match="question_id"):
        mt_bench(prompts, answered(prompts), samples=1, seconds=0)


def test_the_second_turn_is_asked_with_the_first_answer(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question_id": 81, "category": "writing", "turns": ["t1" + LINE_ENDS, "t2"]},
        {"question_id": 101, "category": "reasoning", "turns": ["u1", "u2"]},
        {"question_id": 141, "category": "stem", "turns": ["v1", "v2"]},
    ]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exported, again, bodies = respond_twice(
        tmp_path / "question.jsonl", tmp_path / "m.jsonl", "mt-bench", "--samples", "2"
    )
    assert [row["question_id"] for row in exported] == [81, 101, 141]
    assert [row["choices"] for row in again] == [row["choices"] for row in exported]
    assert len(bodies) == 3 * 2 * 2
    assert {row["model_id"] for row in exported} == {"m"}
    for row, question in zip(exported, rows, strict=True):
        first, second = question["turns"]
        temperature = {81: 0.7, 101: 0.0, 141: 0.1}[row["question_id"]]
        assert [choice["index"] for choice in row["choices"]] == [0, 1]
        for choice in row["choices"]:
            opening = [{"role": "user", "content": first}]
            (asked,) = (
                body
                for body in bodies
                if body["messages"] == opening and text_for(body) == choice["turns"][0]
            )
            history = [
                *opening,
                {"role": "assistant", "content": choice["turns"][0]},
                {"role": "user", "content": second},
            ]
            later = {**asked, "messages": history}
            assert later in bodies
            assert choice["turns"][1] == text_for(later)
            assert asked["temperature"] == temperature
            # FastChat draws with nothing but a temperature, and up to 1,024 tokens.
            assert (asked["top_p"], asked["top_k"], asked["max_tokens"]) == (1.0, 0, 1024)
            assert asked["presence_penalty"] == asked["frequency_penalty"] == 0


def test_turns_of_a_prompt_that_began_with_an_answer() -> None:
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "given"},
        {"role": "user", "content": "b"},
    ]
    prompt = prompt_of(history, follow_ups=["c"])
    asked = [*history, {"role": "assistant", "content": "made"}, {"role": "user", "content": "c"}]
    assert turns_of(prompt, Response("i", 0, "m", asked, "last", 1, 1, "stop", 0)) == ["made", "last"]


def test_alpaca_evals_own_order() -> None:
    file = real_data("alpaca") / "prompts.jsonl.gz"
    prompts = load_prompt_set(PromptSource(source=str(file)))
    rows = read_jsonl_gz(file)
    exported = alpaca_eval(prompts, answered(prompts))
    assert [(row["instruction"], row["dataset"]) for row in exported] == [
        (row["instruction"], row["dataset"]) for row in sorted(rows, key=lambda row: row["index"])
    ]


def respond_twice(
    prompts: Path, output: Path, form: str, *more: str
) -> tuple[list[Any], list[Any], list[Any]]:
    """Run the command twice. Returns the rows of the first export, those of the second, and the requests of both runs."""
    arguments = ["--prompts", str(prompts), "--output", str(output), "--format", form, *more]
    exports = []
    with fake_endpoint("m") as endpoint:
        for _ in range(2):
            assert main(["respond", "--model", endpoint.url, *arguments]) == 0
            exports.append([json.loads(line) for line in output.read_text().split("\n") if line])
        return exports[0], exports[1], list(endpoint.chats)
