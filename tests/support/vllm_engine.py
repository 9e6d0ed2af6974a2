"""An endpoint for all tests that ask a real engine: a tiny pair, two replicas, Ray and Serve on loopback."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.support.ray_cluster import Process, RayBox, wait_until

SMALL: dict[str, Any] = {
    "max_model_len": 256,
    "engine": {"max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 28},
}
START_S = 1200.0
ANSWER_S = 600.0
URL = re.compile(r"^serving at (http://127\.0\.0\.1:[0-9]+)/v1", re.MULTILINE)


@dataclass(frozen=True)
class Running:
    """A running endpoint.

    Attributes:
        url: without `/v1`.
        sft, dpo: the parents of the pair `tiny`, in float32, untied.
        process: everything that serves it is below.
    """

    url: str
    sft: Path
    dpo: Path
    process: Process

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path, timeout=ANSWER_S) as answer:
            data: dict[str, Any] = json.load(answer)
        return data

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer of a request.

        Raises:
            urllib.error.HTTPError: if it was refused.
        """
        with urllib.request.urlopen(self._request(path, body), timeout=ANSWER_S) as answer:
            data: dict[str, Any] = json.load(answer)
        return data

    def refusal(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and `error` of a request that is refused."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.post(path, **body)
        error: dict[str, Any] = json.loads(caught.value.read())["error"]
        return caught.value.code, error

    def stream(self, path: str, **body: Any) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed answer, the last `[DONE]` left out."""
        with urllib.request.urlopen(self._request(path, body | {"stream": True}), timeout=ANSWER_S) as answer:
            for line in answer:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])

    def chat(self, model: str, question: str, **options: Any) -> str:
        """Greedy, 12 tokens by default."""
        messages = [{"role": "user", "content": question}]
        options = {"temperature": 0, "max_tokens": 12} | options
        text: str = self.post("/v1/chat/completions", model=model, messages=messages, **options)["choices"][
            0
        ]["message"]["content"]
        return text

    def chats(self, asked: list[tuple[str, str]]) -> list[str]:
        """Answers to `(model, question)`, all asked at once."""
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda question: self.chat(*question), asked))

    def replicas(self) -> list[psutil.Process]:
        """The replicas' processes; an engine's own are below them."""
        return [
            child
            for child in self.process.descendants()
            if _name(child).startswith("ray::ServeReplica:expo-ray-") and ":PairServer:" in _name(child)
        ]

    def _request(self, path: str, body: dict[str, Any]) -> urllib.request.Request:
        return urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextmanager
def serve(box: RayBox, job: dict[str, Any]) -> Iterator[tuple[str, Process]]:
    """`expo-ray serve` as a user runs it: its URL, and the process."""
    file = box.folder / "job.yaml"
    file.write_text(yaml.safe_dump({"output": str(box.folder / "out")} | job))
    process = box.run("expo-ray", "serve", str(file), "--port", "0", EXPO_RAY_CACHE=str(box.folder / "cache"))
    wait_until(lambda: URL.search(process.stdout) or not process.running, "the endpoint is up", START_S)
    address = URL.search(process.stdout)
    assert address, process.stderr[-3000:]
    yield address[1], process


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The pair `tiny`, served by two replicas."""
    import torch

    from tests.support.chat_models import save_chat_pair

    sft, dpo = save_chat_pair(tmp_path_factory.mktemp("tiny"), tied=False, dtype=torch.float32)
    job = {
        "pairs": [{"name": "tiny", "sft": str(sft), "dpo": str(dpo), "alphas": [0.5]}],
        "serving": {"replicas": 2, "dtype": "fp32", **SMALL},
    }
    with RayBox() as box, serve(box, job) as (url, process):
        yield Running(url, sft, dpo, process)
