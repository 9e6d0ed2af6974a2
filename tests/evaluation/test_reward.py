"""What is stored is not scored again, whatever stops the scoring; files of rewards."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expo_ray.errors import ExpoError, OutputError
from expo_ray.evaluation.records import Response, Reward, reward_from_row, scored_digest
from expo_ray.evaluation.rewards.reward_file import RewardFile, read_responses
from expo_ray.evaluation.rewards.reward_inputs import RewardInput, ScoreFailure, function_inputs
from expo_ray.evaluation.rewards.score_missing import RewardStore, score_responses, summarise_rewards
from expo_ray.evaluation.row_store import RowStore, rows_text
from expo_ray.progress import Counters
from expo_ray.storage import open_store


def row(number: int, sample: int = 0, text: str = "") -> Response:
    messages = ({"role": "user", "content": f"q{number}"},)
    return Response(f"p{number}", sample, "m", messages, text or "x" * number, number, 0, "stop", 0)


class Lengths:
    """Scores with the text's length, two at a time; records the prompts, and may fail after some batches."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.asked: list[str] = []
        self._left = stop_after

    def inputs(self, responses: Sequence[Response]) -> list[RewardInput]:
        return function_inputs(responses)

    def score(self, inputs: Sequence[RewardInput]) -> Iterator[Sequence[Reward | ScoreFailure]]:
        for first in range(0, len(inputs), 2):
            if self._left <= 0:
                raise ExpoError("stopped")
            self._left -= 1
            batch = inputs[first : first + 2]
            self.asked += [scored.prompt_id for scored in batch]
            yield [
                Reward(scored.prompt_id, scored.sample, float(len(scored.text)), scored=scored.digest)
                if scored.prompt_id != "p7"
                else ScoreFailure("p7", scored.sample, "no 7")
                for scored in batch
            ]


def test_what_was_scored_before_a_stop_is_stored_and_not_scored_again(tmp_path: Path) -> None:
    row_store = RowStore(open_store(str(tmp_path)), "rewards/rm-1", reward_from_row)
    rows = [row(number) for number in range(1, 12)]
    first, second = Lengths(stop_after=3), Lengths()
    with pytest.raises(ExpoError, match="stopped"):
        score_responses(rows, first, row_store, Counters())
    outcome = score_responses(rows, second, row_store, Counters())
    assert first.asked == [f"p{number}" for number in range(1, 7)]
    assert second.asked == [f"p{number}" for number in range(7, 12)]
    assert {key: reward.reward for key, reward in outcome.rewards.items()} == {
        (f"p{number}", 0): number for number in range(1, 12) if number != 7
    }
    assert [failure.prompt_id for failure in outcome.failed] == ["p7"]
    assert outcome.num_new == 4
    third = Lengths()
    score_responses([*rows, row(12)], third, row_store, Counters())
    assert third.asked == ["p7", "p12"]  # a failed response is tried again


@pytest.mark.parametrize(
    "changed",
    [
        {"text": "another answer"},
        {"text": "a "},
        {"messages": ({"role": "user", "content": "q2"},)},
        {"messages": ({"role": "system", "content": "s"}, {"role": "user", "content": "q1"})},
        {"messages": ({"role": "assistant", "content": "q1"},)},
        {"messages": tuple({"role": "user", "content": text} for text in ("q0", "q1"))},
        {"sample": 1},
        {"prompt_id": "p2"},
    ],
)
@pytest.mark.parametrize("kept_as", ["parts", "file"])
def test_a_reward_belongs_to_the_exact_response_that_was_scored(
    tmp_path: Path, changed: dict[str, Any], kept_as: str
) -> None:
    first, second = row(1, text="a"), replace(row(1, text="a"), **changed)

    def reward_store() -> RewardStore:
        if kept_as == "parts":
            return RowStore(open_store(str(tmp_path)), "rewards/rm-1", reward_from_row)
        return RewardFile(str(tmp_path / "r.jsonl"), [first.key, second.key], {"model": "a"})

    quiet = Counters()
    score_responses([first], Lengths(), reward_store(), quiet)
    again = Lengths()
    score_responses([first], again, reward_store(), quiet)
    assert again.asked == []
    other = Lengths()
    outcome = score_responses([second], other, reward_store(), quiet)
    assert other.asked == [second.prompt_id]
    assert outcome.rewards[second.key].reward == len(second.text)
    at_last = Lengths()
    score_responses([second], at_last, reward_store(), quiet)
    assert at_last.asked == []


def test_the_samples_of_a_prompt_count_once_in_the_standard_error() -> None:
    rows = [row(number, sample) for number in range(5) for sample in range(2)]
    values = [0.5, 1.5, 3, 3, -2, 0, 4, 5, 1, 2]
    rewards: dict[Hashable, Reward] = {
        response.key: Reward(*response.key, value) for response, value in zip(rows, values, strict=True)
    }
    summary = summarise_rewards(rows, rewards)
    means = [1.0, 3.0, -1.0, 4.5, 1.5]
    assert summary.mean == pytest.approx(statistics.mean(means))
    assert summary.standard_error == pytest.approx(statistics.stdev(means) / math.sqrt(5))
    assert summary.prompts == 5
    assert summary.num_tokens == pytest.approx(2.0)


def test_a_file_is_completed_in_the_order_of_the_responses(tmp_path: Path) -> None:
    file = str(tmp_path / "rewards.jsonl")
    rows = [row(number) for number in (3, 1, 2)]
    order = [response.key for response in rows]
    kept = [
        Reward(
            response.prompt_id,
            0,
            float(len(response.text)),
            scored=scored_digest(response.messages, response.text),
        )
        for response in (rows[2], rows[0])
    ]
    RewardFile(file, order, {"model": "a"}).write(kept)
    scorer = Lengths()
    score_responses(rows, scorer, RewardFile(file, order, {"model": "a"}), Counters())
    assert scorer.asked == ["p1"]
    written = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    assert [(reward["prompt_id"], reward["reward"]) for reward in written] == [
        ("p3", 3.0),
        ("p1", 1.0),
        ("p2", 2.0),
    ]


def test_a_file_of_another_reward_model_is_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "rewards.jsonl")
    RewardFile(file, [], {"model": "a"}).write([Reward("p2", 0, 2.0)])
    with pytest.raises(OutputError, match="another reward model"):
        RewardFile(file, [], {"model": "b"})
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="give another --output"):
        RewardFile(str(tmp_path / "mine.txt"), [], {"model": "a"})


def test_a_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    good = rows_text([row(1, text="one\u2028line")])
    file.write_text(good)
    assert read_responses(str(file))[0].text == "one\u2028line"
    for bad, message in (
        ("{", "line 2"),
        ('{"prompt_id": "a", "sample": 0, "text": "b"}', "line 2.*`messages`"),
        ('{"prompt_id": "a", "sample": 0, "messages": [{"role": "user", "content": "q"}]}', "line 2.*`text`"),
    ):
        file.write_text(good + bad + "\n" + good)
        with pytest.raises(ExpoError, match=message):
            read_responses(str(file))
    file.write_text(good + good)
    with pytest.raises(ExpoError, match="p1 sample 0"):
        read_responses(str(file))
    file.write_text("")
    with pytest.raises(ExpoError, match="holds no responses"):
        read_responses(str(file))
