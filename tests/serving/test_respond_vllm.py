"""`expo-ray respond` against a real engine whose replicas and drivers are killed."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from examples.local_s3 import SeaweedFS
from expo_ray.cli.process import main
from expo_ray.evaluation.records import Response, response_from_row
from expo_ray.evaluation.row_store import RowStore
from expo_ray.storage import open_store
from tests.support.ray_cluster import Process, RayBox, wait_until
from tests.support.stage import upload
from tests.support.vllm_engine import SMALL, START_S, Running

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(2400)]

NAME = "tiny@0.5"
LENGTH = 24
Print = pytest.CaptureFixture[str]


@pytest.fixture
def box() -> Iterator[RayBox]:
    with RayBox() as box:
        yield box


def prompt_file(folder: Path, count: int) -> Path:
    path = folder / "prompts.jsonl"
    texts = [f"Tell me\u2028about {number}." for number in range(count)]
    path.write_text("".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def arguments(endpoint: Running, prompts: Path, output: Path) -> list[str]:
    words = ["respond", "--model", endpoint.url, "--name", NAME, "--prompts", str(prompts)]
    return [*words, "--output", str(output), "--max-tokens", str(LENGTH)]


def start(box: RayBox, words: list[str]) -> Process:
    return box.run(sys.executable, "-m", "expo_ray.cli", *words)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def stored(folder: Path) -> dict[Any, Response]:
    return RowStore[Response](open_store(str(folder)), "o.jsonl.parts", response_from_row).read()


def assert_each_once(output: Path, count: int) -> None:
    rows = rows_of(output)
    assert [row["messages"][0]["content"] for row in rows] == [
        f"Tell me\u2028about {n}." for n in range(count)
    ]
    assert {row["engine"] for row in rows} == {"vllm 0.29.0"}
    assert all(row["template"] and row["origin"] and row["num_prompt_tokens"] for row in rows)
    for row in rows:
        assert 1 <= row["num_tokens"] <= LENGTH
        assert row["finish_reason"] == ("stop" if row["num_tokens"] < LENGTH else row["finish_reason"])
        # Each token is a character, but for the special ones.
        stopped = row["finish_reason"] == "stop"
        assert len(row["text"]) + row["num_special"] + stopped == row["num_tokens"]
    assert count < 100 or any(row["num_special"] for row in rows)


def test_a_driver_killed_in_mid_work_goes_on_where_it_was(
    endpoint: Running, box: RayBox, tmp_path: Path
) -> None:
    words = arguments(endpoint, prompt_file(tmp_path, 500), tmp_path / "o.jsonl")
    first = start(box, words)
    wait_until(lambda: stored(tmp_path) or not first.running, "a part is stored")
    first.signal(signal.SIGKILL)
    first.wait()
    kept = stored(tmp_path)
    assert 0 < len(kept) < 500

    second = start(box, words)
    assert second.wait() == 0, second.stderr
    assert_each_once(tmp_path / "o.jsonl", 500)
    again = {(row["prompt_id"], row["sample"]): row["text"] for row in rows_of(tmp_path / "o.jsonl")}
    assert {key: row.text for key, row in kept.items()}.items() <= again.items()
    # Its last line counts what this run has asked for.
    assert f"{500 - len(kept)}/{500 - len(kept)} responses" in second.stderr


def test_a_replica_killed_with_prompts_in_flight_costs_no_prompt(
    endpoint: Running, box: RayBox, tmp_path: Path
) -> None:
    wait_until(lambda: len(endpoint.replicas()) == 2, "both replicas are there", START_S)
    job = start(box, arguments(endpoint, prompt_file(tmp_path, 500), tmp_path / "o.jsonl"))
    wait_until(lambda: stored(tmp_path) or not job.running, "a part is stored")
    victim = endpoint.replicas()[0]
    for process in [*victim.children(recursive=True), victim]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert job.running  # in mid-work
    assert job.wait() == 0, job.stderr
    assert_each_once(tmp_path / "o.jsonl", 500)
    wait_until(lambda: len(endpoint.replicas()) == 2, "Serve has replaced it", START_S)


def test_a_prompt_longer_than_the_context(endpoint: Running, tmp_path: Path, capsys: Print) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = ["Tell me\u2028about 0.", "word " * 2000]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert main(arguments(endpoint, prompts, tmp_path / "o.jsonl")) == 1
    errors = capsys.readouterr().err
    assert errors.count("failed: ") == 1
    assert "1 prompt(s) do not fit into 256 tokens of tiny@0.5" in errors
    assert_each_once(tmp_path / "o.jsonl", 1)


def test_without_room_for_max_tokens_an_answer_ends_with_the_context(
    endpoint: Running, tmp_path: Path
) -> None:
    prompts, output = prompt_file(tmp_path, 4), tmp_path / "o.jsonl"
    for longest in ("250", "2048"):
        words = arguments(endpoint, prompts, output)
        assert main([*words[:-1], longest]) == 0
        for row in rows_of(output):
            assert row["num_prompt_tokens"] + row["num_tokens"] <= 256
            assert row["finish_reason"] == "stop" or row["num_prompt_tokens"] + row["num_tokens"] == 256
        output.unlink()


def test_a_job_asks_every_alpha_and_a_published_model_from_a_bucket(
    endpoint: Running, box: RayBox, tmp_path: Path, s3_server: SeaweedFS, s3_uri: str
) -> None:
    prefix = s3_uri.rpartition("/")[2]
    sft, dpo = (
        upload(s3_server, folder, f"{prefix}/{folder.name}") for folder in (endpoint.sft, endpoint.dpo)
    )
    job = {
        "output": f"{s3_uri}/out",
        "pairs": [{"name": "tiny.1", "sft": sft, "dpo": dpo, "alphas": [2]}],
        "models": [{"name": "published", "uri": dpo}],
        "prompts": [{"source": str(prompt_file(tmp_path, 12)), "name": "s"}],
        "sampling": {"max_tokens": LENGTH, "samples": 2},
        "serving": {"port": 0, **SMALL},
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    cache = str(box.folder / "cache")
    process = box.run("expo-ray", "respond", str(file), EXPO_RAY_CACHE=cache, **s3_server.environment)
    wait_until(lambda: not process.running, "the job is done", 2 * START_S)
    assert process.wait() == 0, process.stderr
    out = open_store(f"{s3_uri}/out")
    texts = {}
    for name in ("tiny.1@0", "tiny.1@2", "published"):
        (about,) = (info.key for info in out.list(f"evaluation/{name}/") if info.key.endswith("/about.json"))
        folder_of_rows = about.removesuffix("about.json") + "responses"
        rows = RowStore[Response](out, folder_of_rows, response_from_row).read()
        assert len(rows) == 24
        texts[name] = [row.text for _, row in sorted(rows.items())]
    assert texts["tiny.1@0"] != texts["tiny.1@2"]
    assert texts["tiny.1@0"] == texts["published"]  # the same seeds, and dpo's own weights
    status = json.loads(out.read("status.json"))
    assert (status["state"], status["responses"]) == ("done", {"done": 72, "all": 72, "kept": 0})
    assert len(out.list("evaluation/prompts/")) == 1
