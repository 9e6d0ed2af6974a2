"""The endpoint of `expo-ray serve`, asked as a client does."""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.error
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
import transformers
import yaml

from expo_ray.cli.process import main
from tests.support.chat_models import save_chat_lora, save_chat_pair
from tests.support.pairs import read_weights
from tests.support.ray_cluster import Process, RayBox, ended, wait_until
from tests.support.vllm_engine import SMALL, START_S, Running, serve

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(1200)]

QUESTIONS = tuple(f"Tell me about number {number}." for number in range(6))
ALPHAS = ("tiny", "tiny@0.5", "tiny@2")
LONG = "Say them again: " + ", ".join(map(str, range(40)))


@pytest.fixture(scope="session")
def alone(endpoint: Running) -> dict[tuple[str, str], str]:
    """The answer to every question at each alpha, one after the other."""
    return {(model, question): endpoint.chat(model, question) for model in ALPHAS for question in QUESTIONS}


def test_alphas_answer_as_transformers_does_with_the_formula(
    endpoint: Running, alone: dict[tuple[str, str], str]
) -> None:
    sft, dpo = read_weights(endpoint.sft), read_weights(endpoint.dpo)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(endpoint.dpo)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(endpoint.dpo)
    for name, alpha in zip(ALPHAS, (0, 0.5, 2), strict=True):
        model.load_state_dict({key: weight + alpha * (weight - sft[key]) for key, weight in dpo.items()})
        assert [alone[name, question] for question in QUESTIONS] == _answers(model, tokenizer)
    assert len(set(alone.values())) > 2 * len(QUESTIONS)  # the alphas do answer differently


def test_mixed_requests_at_once_get_what_each_gets_alone(
    endpoint: Running, alone: dict[tuple[str, str], str]
) -> None:
    asked = [key for key in alone for _ in range(3)]
    asked = asked[::2] + asked[1::2]  # alphas and questions shuffled, the same ones every time
    assert endpoint.chats(asked) == [alone[key] for key in asked]


def test_other_spellings_of_an_alpha_mean_the_same(
    endpoint: Running, alone: dict[tuple[str, str], str]
) -> None:
    assert endpoint.chat("tiny@0", QUESTIONS[0]) == alone["tiny", QUESTIONS[0]]
    assert endpoint.chat("tiny@+5e-1", QUESTIONS[0]) == alone["tiny@0.5", QUESTIONS[0]]


def test_streams_carry_the_same_text_and_the_served_name(
    endpoint: Running, alone: dict[tuple[str, str], str]
) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    events = list(
        endpoint.stream(
            "/v1/chat/completions", model="tiny@2", messages=messages, temperature=0, max_tokens=12
        )
    )
    assert (
        "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        == alone["tiny@2", QUESTIONS[0]]
    )
    assert {event["model"] for event in events} == {"tiny@2"}


def test_a_client_that_goes_away_in_mid_stream_gives_its_lease_back(endpoint: Running) -> None:
    events = endpoint.stream(
        "/v1/completions", model="tiny@2", prompt="Hello", max_tokens=200, ignore_eos=True
    )
    next(events)
    events.close()
    assert endpoint.chat("tiny@0.25", QUESTIONS[0])
    assert endpoint.chat("tiny@0.75", QUESTIONS[0])


def test_echoed_prompts_have_the_logprobs_of_the_formula(endpoint: Running) -> None:
    answer = endpoint.post("/v1/completions", model="tiny@0.5", prompt="Hello there", echo=True, logprobs=1, max_tokens=1, temperature=0)  # fmt: skip
    assert answer["model"] == "tiny@0.5"
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
    sft, dpo = read_weights(endpoint.sft), read_weights(endpoint.dpo)
    model = transformers.AutoModelForCausalLM.from_pretrained(endpoint.dpo)
    model.load_state_dict({key: weight + 0.5 * (weight - sft[key]) for key, weight in dpo.items()})
    ids = transformers.AutoTokenizer.from_pretrained(endpoint.dpo)("Hello there", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        by_token = torch.log_softmax(model(ids).logits[0], -1)
    wanted = [float(by_token[position, ids[0, position + 1]]) for position in range(ids.shape[1] - 1)]
    assert logprobs[0] is None
    assert logprobs[1 : len(wanted) + 1] == pytest.approx(wanted, abs=1e-4)


def test_models_are_listed_and_described(endpoint: Running) -> None:
    assert [model["id"] for model in endpoint.get("/v1/models")["data"]] == ["tiny", "tiny@0.5"]
    half, other = (endpoint.get(f"/v1/models/tiny@{alpha}")["metadata"] for alpha in (0.5, 0.3))
    assert half["engine"] == "vllm 0.29.0"
    assert half["max_model_len"] == 256
    assert half["template"]
    assert half["weights"]
    assert half["weights"] != other["weights"]
    assert half["template"] == other["template"]


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("tiny@half", 400, "'half' is not a number; write `tiny@0.5`"),
        ("tiny@nan", 400, "it must be a finite number of at least -1"),
        ("tiny@-1.5", 400, "alpha is -1.5"),
        ("huge@0.5", 404, "model 'huge@0.5' is not served here; served are `tiny@ALPHA`"),
        ("", 400, "names no model"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_served_is_refused_with_what_is(
    endpoint: Running, model: str, status: int, message: str
) -> None:
    answered, error = endpoint.refusal(
        "/v1/chat/completions", model=model, messages=[{"role": "user", "content": "Hello"}]
    )
    assert (answered, error["code"]) == (status, status)
    assert message in error["message"]


def test_bad_requests_are_refused_as_openai_refuses_them(endpoint: Running) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    for body in (
        {"messages": messages, "temperature": -1},
        {"messages": "Hello"},
        {"messages": messages, "max_tokens": 500},
    ):
        status, error = endpoint.refusal("/v1/chat/completions", model="tiny@0.5", **body)
        assert status == 400
        assert error["message"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        endpoint.get("/v1/models/huge")


def test_serve_listens_on_loopback_only(endpoint: Running) -> None:
    port = int(endpoint.url.rpartition(":")[2])
    listening = [
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    assert set(listening) == {"127.0.0.1"}


def test_a_killed_replica_is_replaced_and_answers_stay_right(
    endpoint: Running, alone: dict[tuple[str, str], str]
) -> None:
    victim = endpoint.replicas()[0]
    victim.kill()
    asked = [key for key in alone for _ in range(2)]
    for key in asked:
        assert _patiently(endpoint, *key) == alone[key]
    wait_until(lambda: len(endpoint.replicas()) == 2, "the replica is replaced", START_S)
    assert victim not in endpoint.replicas()


def test_a_replica_whose_swap_fails_is_taken_out(
    endpoint: Running, alone: dict[tuple[str, str], str]
) -> None:
    wait_until(lambda: len(endpoint.replicas()) == 2, "both replicas are there", START_S)
    before = set(endpoint.replicas())
    weights = endpoint.dpo / "model.safetensors"
    stat = weights.stat()
    os.utime(weights)  # no longer the file that was planned
    status, error = endpoint.refusal(
        "/v1/chat/completions", model="tiny@3", messages=[{"role": "user", "content": "Hello"}]
    )
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert status == 503
    assert "of this replica are unknown" in error["message"]
    wait_until(lambda: before - set(endpoint.replicas()), "the replica is gone", START_S)
    assert {key: _patiently(endpoint, *key) for key in alone} == alone


def _adapter_answers(sft: Path, dpo: Path, *, alpha: float, folder: Path) -> list[str]:
    """Answers of peft with the scaled adapter that `expo-ray extrapolate` publishes."""
    out = folder / f"scaled{alpha:g}"
    parents = ["--sft", str(sft), "--dpo", str(dpo)]
    assert main(["extrapolate", *parents, "--alpha", str(alpha), "--output", str(out)]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(sft)
    return _answers(
        peft.PeftModel.from_pretrained(base, str(out)), transformers.AutoTokenizer.from_pretrained(sft)
    )


def _answers(model: Any, tokenizer: Any) -> list[str]:
    """Greedy, 12 tokens to each question."""
    texts = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=1)
        texts.append(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def _patiently(endpoint: Running, model: str, question: str) -> str:
    """Ask again while a replica is being replaced."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            return endpoint.chat(model, question)
        except (urllib.error.HTTPError, ConnectionError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def test_a_published_model_and_a_lora_pair_are_served_until_sigterm_which_leaves_nothing_behind() -> None:
    with RayBox() as box:
        sft, dpo = save_chat_pair(box.folder, tied=True, dtype=torch.bfloat16)
        out = box.folder / "published"
        assert (
            main(
                ["extrapolate", "--sft", str(sft), "--dpo", str(dpo), "--alpha", "0.5", "--output", str(out)]
            )
            == 0
        )
        lora = save_chat_lora(box.folder / "lora")
        job = {
            "models": [{"name": "half", "uri": str(out)}],
            "pairs": [{"name": "lora", "sft": str(lora[0]), "dpo": str(lora[1])}],
            "serving": {
                "dtype": "fp32",
                **SMALL,
                # Fewer tokens a step than a long prompt has: vLLM on CPUs ends at one with a seed.
                "engine": {**SMALL["engine"], "max_loras": 2, "max_num_batched_tokens": 64},
            },
        }
        with serve(box, job) as (url, process):
            running = Running(url, sft, dpo, process)
            assert running.chat("half", "Hello")
            for model in ("half", "lora@1"):
                drawn = [running.chat(model, LONG, temperature=1, seed=seed) for seed in (1, 2, 1)]
                assert drawn[0] == drawn[2] != drawn[1]
            status, error = running.refusal("/v1/completions", model="half@1", prompt="Hello")
            assert status == 404
            assert "has no other alpha" in error["message"]
            assert f"curl {url}/v1/chat/completions" in process.stdout
            # More alphas than `max_loras`, asked together: each is loaded, answered and given up in turn.
            alphas = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
            asked = [(f"lora@{alpha:g}", question) for alpha in alphas for question in QUESTIONS]
            answers = dict(zip(asked, running.chats(asked), strict=True))
            for alpha in alphas:
                expected = _adapter_answers(*lora, alpha=alpha, folder=box.folder)
                assert [answers[f"lora@{alpha:g}", question] for question in QUESTIONS] == expected
            assert running.chat("lora", QUESTIONS[0]) == answers["lora@0", QUESTIONS[0]]
            assert running.get("/v1/models/lora@2")["metadata"]["alphas_at_once"] == 2
            status, error = running.refusal("/v1/completions", model="lora@1,mlp=0.5", prompt="Hello")
            assert (status, error["type"]) == (400, "bad_alpha")
            assert "set `adapter: merge`" in error["message"]
            status, error = running.refusal("/v1/completions", model="lora@1e300", prompt="Hello")
            assert (status, error["type"]) == (400, "bad_alpha")
            started = process.descendants()
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
        wait_until(lambda: all(map(ended, started)), "all that it started has ended", 20)


@pytest.mark.cluster
def test_an_adapter_that_vllm_has_no_place_for_is_merged_by_the_same_replica() -> None:
    with RayBox() as box:
        lora = save_chat_lora(box.folder / "lora")
        job = {
            "pairs": [{"name": "lora", "sft": str(lora[0]), "dpo": str(lora[1])}],
            "serving": {
                "dtype": "fp32",
                **SMALL,
                "engine": {**SMALL["engine"], "lora_target_modules": ["q_proj"]},
            },
        }
        with serve(box, job) as (url, process):
            running = Running(url, *lora, process)
            for alpha in (0.0, 1.0):
                expected = _adapter_answers(*lora, alpha=alpha, folder=box.folder)
                answers = running.chats([(f"lora@{alpha:g}", question) for question in QUESTIONS])
                assert answers == expected
            card = running.get("/v1/models/lora@1")["metadata"]
            assert "vLLM has no place for" in card["adapter"]
            assert "alphas_at_once" not in card
            process.signal(signal.SIGTERM)
            assert process.wait() == 0


def test_every_bad_pair_is_reported_before_anything_starts() -> None:
    pairs = [
        {"name": name, "sft": f"/nowhere/{name}/sft", "dpo": f"/nowhere/{name}/dpo"}
        for name in ("one", "two")
    ]
    with RayBox() as box:
        process = _serve(box, {"pairs": pairs}, "0")
        assert process.wait() == 2
        errors = process.stderr
    assert "4 problem(s)" in errors
    assert all(f"/nowhere/{name}/{side}" in errors for name in ("one", "two") for side in ("sft", "dpo"))
    assert "Ray" not in errors


def test_a_taken_port_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, RayBox() as box:
        port = str(listener.getsockname()[1])
        (box.folder / "config.json").write_text("{}")
        process = _serve(box, {"models": [{"name": "one", "uri": str(box.folder)}]}, port)
        assert process.wait() == 2
        errors = process.stderr
    assert (
        f"port {port} of 127.0.0.1 is unavailable (Address already in use); give another with --port"
        in errors
    )


def _serve(box: RayBox, job: dict[str, Any], port: str) -> Process:
    file = box.folder / "job.yaml"
    file.write_text(yaml.safe_dump({"output": str(box.folder / "out")} | job))
    return box.run("expo-ray", "serve", str(file), "--port", port)
