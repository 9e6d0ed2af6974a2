"""vLLM's rewards through the command: against the head applied by hand, and a real pair's against its published table."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from expo_ray.evaluation.records import Response
from expo_ray.evaluation.row_store import rows_text
from tests.support.paths import ROOT
from tests.support.ray_cluster import Process, RayBox
from tests.support.tiny_reward_models import english, last_token_scores, response, save_reward_model

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(2400)]
if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

TEXTS = 200
STORIES = ROOT.parent / "shared" / "data" / "stories"
PAIR = "dpo_10pct"
ALPHAS = ("0", "0.5", "4")


@pytest.fixture
def box() -> Iterator[RayBox]:
    with RayBox(CUDA_VISIBLE_DEVICES="") as box:
        yield box


def end_of(process: Process) -> int:
    for _ in range(5):
        try:
            return process.wait()
        except TimeoutError as error:
            last = error
    raise last


def scored_by_vllm(box: RayBox, model: Path, rows: Sequence[Response], *more: str) -> list[float]:
    (box.folder / "responses.jsonl").write_text(rows_text(rows))
    words = ["--responses", "responses.jsonl", "--reward-model", str(model), *more]
    run = box.run("expo-ray", "reward", *words, "--output", "r.jsonl")
    assert end_of(run) == 0, run.stderr
    assert "scored by vllm" in run.stderr
    written = [json.loads(line) for line in (box.folder / "r.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in written] == [row.prompt_id for row in rows]
    return [row["reward"] for row in written]


def by_hand(model: Path, rows: Sequence[Response]) -> tuple[list[list[int]], list[float]]:
    """Token ids as transformers makes them of a chat, and the scores of their last tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [[*map(dict, row.messages), {"role": "assistant", "content": row.text}] for row in rows]
    ids = [list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)) for chat in chats]
    return ids, last_token_scores(model, ids)


def test_texts_that_end_with_the_padding_token_and_begin_without_bos(box: RayBox) -> None:
    model = save_reward_model(box.folder / "rm", max_position_embeddings=1024)
    rows = [*english(TEXTS - 1), response("A long one?", "as long as it may be, " * 44)]
    ids, expected = by_hand(model, rows)
    assert {text[-1] for text in ids} == {1}  # eos, which is pad
    assert 0 not in {text[0] for text in ids}
    assert max(map(len, ids)) > 900
    assert scored_by_vllm(box, model, rows) == pytest.approx(expected, abs=1e-4)
    assert min(expected) < -1  # no sigmoid


def test_a_real_reward_model(box: RayBox) -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    prompts = json.loads((STORIES / "test_prompts.json").read_text())
    rows = [response(prompt["prompt"], prompt["reference"]) for prompt in prompts]
    others = [
        response(f"{first['prompt']} Then?", second["reference"])
        for first, second in zip(prompts[:48], prompts[9:], strict=False)
    ]
    rows += [*others, response("Nothing?", ""), response("Long?", "One day, a dog saw a cat. " * 42)]
    assert len(rows) == TEXTS
    ids, expected = by_hand(STORIES / "rm", rows)
    assert {tuple(text[:1]) for text in ids} == {(1,)}  # BOS, once
    assert 1 not in {text[1] for text in ids}
    assert max(map(len, ids)) > 400
    assert scored_by_vllm(box, STORIES / "rm", rows, "--backend", "vllm") == pytest.approx(expected, abs=1e-4)
    assert max(expected) > 2


SPLIT = """
import json, sys
from pathlib import Path

import psutil

from expo_ray.config import RewardModel
from expo_ray.evaluation.rewards.reward_model import inspect_reward_model
from expo_ray.on_ray.rewards.backends import VllmBackend

if __name__ == "__main__":  # the two processes import this file again
    model = inspect_reward_model(RewardModel(model=sys.argv[1], num_gpus=2))
    backend = VllmBackend(model, Path(sys.argv[1]), "fp32", cuda=False, parallel=2)
    scores = backend.score(json.loads(sys.argv[2]))
    titles = [child.cmdline() for child in psutil.Process().children(recursive=True)]
    workers = sum("Worker_TP" in "".join(title) for title in titles)
    print(json.dumps({"scores": scores, "workers": workers, "titles": titles}))
"""


def test_a_model_split_over_two_processes_scores_as_a_whole(tmp_path: Path) -> None:
    model = save_reward_model(tmp_path / "rm")  # two heads, one of keys and values, which both parts hold
    ids, expected = by_hand(model, english(12, longest=150))
    (tmp_path / "split.py").write_text(SPLIT)
    words = [sys.executable, str(tmp_path / "split.py"), str(model), json.dumps(ids)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["workers"] == 2, result["titles"]
    assert result["scores"] == pytest.approx(expected, abs=1e-4)


def published() -> dict[str, tuple[float, float]]:
    """Mean reward and standard error by alpha at temperature 0.7; at an alpha other than 0, that of the paired difference."""
    lines = (STORIES / "TABLE.md").read_text().split("\nt0.7 ")[1].split("\n\n")[1].splitlines()
    header = [cell.strip().removeprefix("a=") for cell in lines[0].split("|")]
    (row,) = (line.split("|") for line in lines if PAIR in line)
    figures = {}
    for alpha in ALPHAS:
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", row[header.index(alpha)])]
        figures[alpha] = numbers[0], numbers[-1]
    return figures


@pytest.mark.slow
@pytest.mark.cluster
def test_rewards_at_three_alphas_are_those_of_the_table(box: RayBox) -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    prompts = json.loads((STORIES / "test_prompts.json").read_text())
    rows = (json.dumps({"prompt": prompt["prompt"]}) + "\n" for prompt in prompts)
    (box.folder / "openings.jsonl").write_text("".join(rows))
    job = {
        "output": str(box.folder / "out"),
        "pairs": [
            {"name": "stories", "sft": str(STORIES / "sft"), "dpo": str(STORIES / PAIR), "alphas": [0, 0.5, 4]}
        ],
        "prompts": [{"source": "openings.jsonl"}],
        "sampling": {
            "temperature": 0.7, "top_p": 1, "top_k": 0, "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 64,
            "samples": 4,
        },
        "serving": {"port": 0},
        "rewards": [{"model": str(STORIES / "rm"), "backend": "transformers"}],
    }  # fmt: skip
    (box.folder / "job.yaml").write_text(yaml.safe_dump(job))
    for name in ("respond", "reward"):
        run = box.run("expo-ray", name, "job.yaml")
        assert end_of(run) == 0, run.stderr
    table = {line.split()[1]: line.split() for line in run.stdout.splitlines()[1:]}
    for alpha, (mean, error) in published().items():
        _, _, prompts_scored, ours, our_error, *_ = table[f"stories@{alpha}"]
        assert prompts_scored == str(len({prompt["prompt"] for prompt in prompts}))
        assert abs(float(ours) - mean) <= 2 * math.hypot(float(our_error), error), (alpha, ours, mean)
