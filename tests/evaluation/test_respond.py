"""Responses from an endpoint that fails as real ones do: nothing is lost, nothing asked twice, each fault reported once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from expo_ray.cli.process import main
from expo_ray.config import Job, Pair, PublishedModel, Sampling
from expo_ray.errors import EndpointError
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.records import Response, response_from_row, seed_of
from expo_ray.evaluation.responses import client as client_module
from expo_ray.evaluation.responses.ask_missing import ModelResponses, ask_model
from expo_ray.evaluation.responses.ask_models import ask_job_models
from expo_ray.evaluation.responses.ask_question import origin_fields, origin_of
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.endpoint import Card
from expo_ray.evaluation.row_store import RowStore
from expo_ray.progress import Counters, Progress
from expo_ray.status_file import StatusFile
from expo_ray.storage import open_store
from tests.support.disks import disk, remount
from tests.support.fake_endpoint import LINE_ENDS, Body, FakeEndpoint, fake_endpoint, text_for
from tests.support.paths import ROOT
from tests.support.ray_cluster import free_port, wait_until

NAME = "p@0.5"
Print = pytest.CaptureFixture[str]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setattr(client_module, "LONGEST_DELAY_S", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with fake_endpoint(NAME) as running:
        yield running


def sample_set(count: int, name: str = "s") -> PromptSet:
    return PromptSet.of(
        name, [prompt_of([{"role": "user", "content": f"q{number}{LINE_ENDS}"}]) for number in range(count)]
    )


def answers_of(
    endpoint: FakeEndpoint, prompts: PromptSet, uri: str, sampling: Sampling | None = None, slots: int = 32
) -> ModelResponses:
    settings, store = sampling or Sampling(), open_store(uri)
    return ask_model(endpoint.url, NAME, [prompts], settings, store, progress=Counters(), slots=slots)


def prompt_file(folder: Path, count: int) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{number}"}) + "\n" for number in range(count)))
    return path


def run(endpoint: FakeEndpoint, prompts: Path, output: Path, *more: str) -> int:
    return main(
        ["respond", "--model", endpoint.url, "--prompts", str(prompts), "--output", str(output), *more]
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


# --- what is asked and stored


def test_rows_hold_what_was_asked_and_answered(endpoint: FakeEndpoint) -> None:
    prompts = sample_set(5)
    responses = answers_of(endpoint, prompts, "memory://rows/out", Sampling(samples=2)).responses
    assert sorted(responses) == sorted((prompt.id, sample) for prompt in prompts.prompts for sample in (0, 1))
    by_request = {(body["messages"][0]["content"], body["seed"]): body for body in endpoint.chats}
    for (prompt_id, sample), row in responses.items():
        body = by_request[row.messages[0]["content"], seed_of(Sampling(), prompt_id, sample)]
        assert row.text == text_for(body)
        assert (row.seed, row.model, row.engine, row.template) == (body["seed"], NAME, "vllm 0.0-fake", "t1")
        assert {key: body[key] for key in ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")} == {
            "temperature": 0.7, "top_p": 0.9, "top_k": 50, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        }  # fmt: skip
        assert body["max_tokens"] == 2048
    (about,) = (
        json.loads(open_store("memory://rows/out").read(info.key))
        for info in open_store("memory://rows/out").list("evaluation/p@0.5/")
        if info.key.endswith("about.json")
    )
    assert about["weights"] == "w-p@0.5"
    assert "samples" not in about["sampling"]


def test_seeds_are_the_same_for_every_alpha_and_size() -> None:
    prompts = sample_set(200)
    seeds = {seed_of(Sampling(), prompt.id, sample) for prompt in prompts.prompts for sample in range(5)}
    assert len(seeds) == 1000
    with fake_endpoint("p@0", NAME) as endpoint:
        for name, part in (("p@0", prompts), (NAME, prompts.limit(20))):
            store = open_store("memory://seeds/out")
            ask_model(endpoint.url, name, [part], Sampling(), store, progress=Counters(), slots=8)
        by_model = {
            name: {
                body["messages"][0]["content"]: body["seed"]
                for body in endpoint.chats
                if body["model"] == name
            }
            for name in ("p@0", NAME)
        }
    assert len(by_model[NAME]) == 20
    assert by_model[NAME].items() <= by_model["p@0"].items()


def test_only_what_is_missing_is_asked(endpoint: FakeEndpoint) -> None:
    uri = "memory://missing/out"
    answers_of(endpoint, sample_set(10), uri)
    answers_of(endpoint, sample_set(30, "larger"), uri)
    assert len(endpoint.chats) == 30
    again = answers_of(endpoint, sample_set(30, "another name"), uri, Sampling(samples=2))
    assert (len(endpoint.chats), len(again.responses)) == (60, 60)
    assert set(endpoint.asked().values()) == {1}
    # Another temperature, other weights: other responses.
    answers_of(endpoint, sample_set(10), uri, Sampling(temperature=0))
    endpoint.cards[NAME]["weights"] = "replaced"
    answers_of(endpoint, sample_set(10), uri)
    assert len(endpoint.chats) == 80


def test_the_engine_is_kept_full_but_not_flooded(endpoint: FakeEndpoint) -> None:
    endpoint.gate.clear()
    asking = threading.Thread(target=answers_of, args=(endpoint, sample_set(100), "memory://full/out"))
    asking.start()
    wait_until(lambda: endpoint.most_at_once >= 32, "as many requests as slots are in flight")
    endpoint.gate.set()
    asking.join()
    assert 32 < endpoint.most_at_once <= 48


def test_a_job_asks_every_alpha_dpo_itself_and_every_model() -> None:
    job = Job(
        output="memory://job/out",
        pairs=(Pair(name="p", sft="s", dpo="d", alphas=(0.5, 2)),),
        models=(PublishedModel(name="m", uri="u"),),
    )
    sets = [sample_set(8, "one"), sample_set(12, "two")]  # the first 8 are shared
    store = open_store(job.output)
    with (
        fake_endpoint("p@0", "p@0.5", "p@2", "m") as endpoint,
        StatusFile(store) as status_file,
        Progress("respond", status_file, rows="responses", quiet=True) as progress,
    ):
        endpoint.failing = lambda body: (400, "no") if body["model"] == "p@2" and "q3" in str(body) else None
        done = ask_job_models(job, sets, store, Client(endpoint.url, slots=8), progress)
        progress.finish(done.failures)
    assert Counter(body["model"] for body in endpoint.chats) == {"p@0": 12, "p@0.5": 12, "p@2": 12, "m": 12}
    assert {name: len(answers.responses) for name, answers in done.by_model.items()} == {
        "p@0": 12, "p@0.5": 12, "p@2": 11, "m": 12,
    }  # fmt: skip
    assert [text.split(" (")[0] for text in done.failures] == [
        "p@2: one: p@2 refuses 1 prompt(s)",
        "p@2: two: p@2 refuses 1 prompt(s)",
    ]
    status = json.loads(store.read("status.json"))
    assert (status["stage"], status["responses"]) == ("respond", {"done": 47, "all": 48, "kept": 0})


# --- faults


def test_failures_that_may_pass_are_asked_again_with_the_same_seed(endpoint: FakeEndpoint) -> None:
    faults = iter([(0, ""), (500, "engine died"), (503, "no replica"), (429, "slow down"), (0, "")] * 3)
    endpoint.failing = lambda body: next(faults, None)
    prompts = sample_set(40)
    answered = answers_of(endpoint, prompts, "memory://faults/out")
    assert (len(answered.responses), answered.problems) == (40, ())
    assert sum(endpoint.asked().values()) == 55
    assert len(endpoint.asked()) == 40  # the same question with another seed would be another one


def test_prompts_that_always_fail_cost_only_themselves(endpoint: FakeEndpoint) -> None:
    hurts = {
        f"q{number}{LINE_ENDS}" for number in (3, 9)
    }  # the last one fails when no others are left to be answered
    endpoint.failing = lambda body: (500, "it hurts") if body["messages"][0]["content"] in hurts else None
    answered = answers_of(endpoint, sample_set(10), "memory://one/out", slots=1)
    assert len(answered.responses) == 8
    (problem,) = answered.problems
    assert "failed on 2 prompt(s) (status 500, it hurts; asked 10 times)" in str(problem)


def test_an_endpoint_that_stops_is_reported_once_and_its_answers_are_kept(
    endpoint: FakeEndpoint, tmp_path: Path, capsys: Print
) -> None:
    prompts, output = prompt_file(tmp_path, 300), tmp_path / "out.jsonl"
    endpoint.failing = lambda body: (0, "") if len(endpoint.chats) > 200 else None
    assert run(endpoint, prompts, output) == 1
    said = capsys.readouterr().err
    assert said.count("failed: ") == 1
    assert "see to the endpoint, then run the same command again" in said
    kept = {row["prompt_id"] for row in rows_of(output)}
    assert 40 < len(kept) <= 200

    with fake_endpoint(NAME) as another:  # what had been sent may still arrive at the first one
        assert run(another, prompts, output) == 0
    assert len(another.chats) == 300 - len(kept)
    assert len({row["prompt_id"] for row in rows_of(output)}) == len(rows_of(output)) == 300


def test_a_missing_endpoint_is_reported_at_once(tmp_path: Path, capsys: Print) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    arguments = ["--prompts", str(prompt_file(tmp_path, 3)), "--output", str(tmp_path / "o.jsonl")]
    assert main(["respond", "--model", url, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {url}: cannot be reached")
    assert said.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_prompts_longer_than_the_context_cost_only_themselves(
    endpoint: FakeEndpoint, tmp_path: Path, capsys: Print
) -> None:
    endpoint.context = endpoint.cards[NAME]["max_model_len"] = 60
    prompts = tmp_path / "prompts.jsonl"
    texts = ["short", "word " * 70 + "first", "word " * 55 + "fits", "word " * 80 + "second"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    output = tmp_path / "o.jsonl"
    # 20 more tokens do not fit after the third prompt: it gets what there is, as it does offline.
    assert run(endpoint, prompts, output, "--max-tokens", "20") == 1
    said = capsys.readouterr().err
    assert said.count("failed: ") == 1
    assert "2 prompt(s) do not fit into 60 tokens" in said
    assert "raise `max_model_len`" in said
    assert [row["messages"][0]["content"] for row in rows_of(output)] == [texts[0], texts[2]]


def test_every_request_has_a_limit_and_every_sampling_setting(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.context = endpoint.cards[NAME]["max_model_len"] = 60
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "word " * count}) + "\n" for count in (1, 30, 59)))
    for asked, limits in ((2048, {59, 30, 1}), (40, {40, 30, 1}), (1, {1})):
        endpoint.chats.clear()
        assert run(endpoint, prompts, tmp_path / f"{asked}.jsonl", "--max-tokens", str(asked)) == 0
        # Without one, the model's own generation_config.json would cut; those that do not fit are refused and asked again.
        assert {body["max_tokens"] for body in endpoint.chats} == limits
        for body in endpoint.chats:
            assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"} <= body.keys()
            assert {"presence_penalty", "frequency_penalty"} <= body.keys()


def test_an_endpoint_that_counts_no_tokens_is_asked_without_a_limit_at_its_context(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "word " * 30}) + "\n")
    with fake_endpoint("gpt", owned_by="someone", engine="") as foreign:
        foreign.context = 60
        assert run(foreign, prompts, tmp_path / "o.jsonl", "--top-k", "0") == 0
        assert [body.get("max_tokens") for body in foreign.chats] == [2048, None]


CARD: dict[str, Any] = {
    "name": NAME, "engine": "vllm 0.29.0", "template": "t", "weights": "w", "dtype": "float32", "max_model_len": 512,
    "files": "f", "settings": "s",
}  # fmt: skip


@pytest.mark.parametrize(
    ("of_card", "of_sampling", "same"),
    [
        *(({name: "other"}, {}, False) for name in ("engine", "template", "weights", "dtype", "files", "settings")),
        ({"max_model_len": 256}, {}, False),
        *(({}, {name: value}, False) for name, value in {
            "temperature": 0.3, "top_p": 0.5, "top_k": 7, "presence_penalty": 0.3, "frequency_penalty": 0.3,
            "max_tokens": 99, "seed": 43,
        }.items()),
        ({"name": "another"}, {}, True),  # weights are known by their digest
        ({}, {"samples": 5}, True),  # further rows of the same
    ],
)  # fmt: skip
def test_the_origin_depends_on_all_that_decides_a_response(
    of_card: dict[str, Any], of_sampling: dict[str, Any], same: bool
) -> None:
    before = origin_of(Card(**CARD), Sampling())
    assert (origin_of(Card(**{**CARD, **of_card}), Sampling(**of_sampling)) == before) == same


def test_the_origin_names_every_setting() -> None:
    origin = origin_fields(Card(**CARD), Sampling())
    # Neither what a card says for the asking alone, nor the number of samples, decides a response.
    assert {field.name for field in fields(Card)} - {
        "name",
        "vllm",
        "special_ids",
        "alphas_at_once",
    } <= origin.keys()
    assert set(Sampling.model_fields) - {"samples"} == origin["sampling"].keys()


def test_a_prompt_s_id_holds_its_content_and_the_order_of_its_turns() -> None:
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    ids = [
        prompt_of(turns).id,
        prompt_of(turns[1:]).id,
        prompt_of([turns[0], {"role": "user", "content": "c"}]).id,
        prompt_of([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]).id,
        prompt_of(turns, follow_ups=["d"]).id,
        prompt_of(turns, follow_ups=["e"]).id,
    ]
    assert len(set(ids)) == len(ids)


def test_a_key_is_sent_and_asked_for(
    endpoint: FakeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Print
) -> None:
    endpoint.key = "sesame"
    prompts = prompt_file(tmp_path, 3)
    assert run(endpoint, prompts, tmp_path / "o.jsonl") == 2
    assert "set OPENAI_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    assert run(endpoint, prompts, tmp_path / "o.jsonl") == 0
    assert "sesame" not in capsys.readouterr().err + (tmp_path / "o.jsonl").read_text()


def test_an_endpoint_that_tells_nothing_and_refuses_top_k(tmp_path: Path, capsys: Print) -> None:
    def strict(body: Body) -> tuple[int, str] | None:
        return (400, "unknown field top_k") if "top_k" in body else None

    prompts, output = prompt_file(tmp_path, 3), tmp_path / "o.jsonl"
    with fake_endpoint("gpt", owned_by="someone", engine="") as endpoint:
        endpoint.failing = strict
        assert run(endpoint, prompts, output) == 1
        assert "set top_k to 0" in capsys.readouterr().err
        output.unlink()
        assert run(endpoint, prompts, output, "--top-k", "0") == 0
        assert run(endpoint, prompts, output, "--top-k", "0", "--name", "gtp") == 2
        assert "does not serve gtp; it serves gpt" in capsys.readouterr().err
    assert {row["engine"] for row in rows_of(output)} == {""}


def test_a_full_disk_is_reported_once_and_no_row_is_torn(
    endpoint: FakeEndpoint, tmp_path: Path, capsys: Print
) -> None:
    with disk(tmp_path / "disk", "128k") as folder:
        prompts = prompt_file(tmp_path, 600)
        assert run(endpoint, prompts, folder / "o.jsonl") == 1
        said = capsys.readouterr().err
        assert said.count("failed: ") == 1
        assert "free space there, or choose another output" in said
        parts = RowStore[Response](open_store(str(folder)), "o.jsonl.parts", response_from_row)
        kept = parts.read()  # whole rows alone
        assert 64 <= len(kept) < 600
        remount(folder, "size=4m")
        with fake_endpoint(NAME) as another:
            assert run(another, prompts, folder / "o.jsonl") == 0
        assert len(another.chats) == 600 - len(kept)
        assert [path.name for path in folder.iterdir()] == ["o.jsonl"]


def test_a_driver_killed_with_500_prompts_in_flight(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    prompts, output = prompt_file(tmp_path, 500), tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "expo_ray.cli",
        "respond",
        "--prompts",
        str(prompts),
        "--output",
        str(output),
        "--model",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # 200 are answered, and all others wait.
    endpoint.failing = lambda body: endpoint.gate.clear() if len(endpoint.chats) >= 200 else None
    first = subprocess.Popen(
        [*command, endpoint.url], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: len(endpoint.chats) >= 300, "requests wait beyond the answered ones")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not output.exists()
    kept = RowStore[Response](open_store(str(tmp_path)), "out.jsonl.parts", response_from_row).read()
    assert len(kept) >= 128  # answers come in parts of 64

    with fake_endpoint(NAME) as another:  # what the killed driver had sent may still arrive at the first one
        subprocess.run([*command, another.url], env=environment, check=True, capture_output=True)
    asked_again = {body["messages"][0]["content"] for body in another.chats}
    assert len(another.chats) == len(asked_again) == 500 - len(kept)
    assert not asked_again & {row.messages[0]["content"] for row in kept.values()}
    assert [row["messages"][0]["content"] for row in rows_of(output)] == [
        f"q{number}" for number in range(500)
    ]


# --- files and flags


def test_a_file_is_completed_and_never_mixed(endpoint: FakeEndpoint, tmp_path: Path, capsys: Print) -> None:
    prompts, output = prompt_file(tmp_path, 40), tmp_path / "o.jsonl"
    assert run(endpoint, prompts, output, "--limit", "10") == 0
    assert run(endpoint, prompts, output) == 0
    assert len(endpoint.chats) == 40
    before = output.read_bytes()
    assert run(endpoint, prompts, output, "--limit", "5") == 0
    assert (output.read_bytes(), len(endpoint.chats)) == (before, 40)
    assert run(endpoint, prompts, output, "--temperature", "0.1") == 2
    assert "give another --output, or remove it" in capsys.readouterr().err
    assert output.read_bytes() == before
    output.write_bytes(before[:-40])
    assert run(endpoint, prompts, output) == 2
    assert "line 40: not a row" in capsys.readouterr().err


def test_all_problems_are_reported_before_anything_starts(tmp_path: Path, capsys: Print) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 1}\n')
    arguments = ["--prompts", str(bad), "--output", str(tmp_path) + "/", "--top-p", "2", "--seed", "x"]
    assert main(["respond", "--model", str(tmp_path / "no-model"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("5 problem(s)")
    for part in ("--top-p", "--seed", "1 bad row", "names no file", "no-model"):
        assert part in said


def test_a_job_and_flags_do_not_mix(tmp_path: Path, capsys: Print) -> None:
    assert main(["respond", "job.yaml", "--limit", "3", "--top-k", "0"]) == 2
    assert "--limit, --top-k beside a job file" in capsys.readouterr().err
    assert main(["respond", "--model", "http://127.0.0.1:1"]) == 2
    assert "--prompts, --output missing" in capsys.readouterr().err
    assert (
        main(
            [
                "respond",
                "--model",
                "http://127.0.0.1:1",
                "--prompts",
                str(prompt_file(tmp_path, 1)),
                "--output",
                "hf://org/name/r.jsonl",
            ]
        )
        == 2
    )
    assert "hf://org/name: the Hub is only read from here" in capsys.readouterr().err
    job = tmp_path / "job.yaml"
    job.write_text("output: hf://org/name\nmodels: [{name: m, uri: nowhere}]\n")
    assert main(["respond", str(job)]) == 2
    assert "output: hf://org/name: the Hub is only read from here" in capsys.readouterr().err
    job.write_text("output: out\nmodels: [{name: m, uri: nowhere}]\n")
    assert main(["respond", str(job)]) == 2
    said = capsys.readouterr().err
    assert "no `prompts`" in said
    assert "nowhere" in said


def test_the_error_of_an_endpoint_that_is_none() -> None:
    with fake_endpoint() as endpoint:
        endpoint.page = lambda path: (200, {"hello": "world"})  # type: ignore[method-assign]
        with pytest.raises(EndpointError, match="does not answer like an OpenAI-compatible endpoint"):
            answers_of(endpoint, sample_set(1), "memory://none/out")
