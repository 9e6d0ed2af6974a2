"""An OpenAI-compatible endpoint without a model: its texts follow from prompt, seed and temperature, and it fails on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# U+2028, U+2029 and U+0085 are line ends to str.splitlines(), and to nobody else here.
LINE_ENDS = "\u2028 \u2029 \u0085"

Body = Mapping[str, Any]
# The status and message of a failure, 0 for a connection that breaks; None to answer.
Failing = Callable[[Body], tuple[int, str] | None]


def text_for(body: Body) -> str:
    """What the endpoint answers to a request."""
    parts = [body["model"], body["messages"], body.get("seed"), body.get("temperature")]
    return f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()} {LINE_ENDS} end"


class FakeEndpoint:
    """The endpoint while it runs.

    Attributes:
        cards: metadata by served name.
        failing: decides which chats fail, and how.
        context: longest prompt and answer together, in words.
        key: what clients must send as a bearer token; anybody may ask if it is empty.
        chats: the body of every chat received.
        most_at_once: chats that were in flight at the same time.
        gate: answers wait for it.
    """

    def __init__(self, *names: str, owned_by: str = "expo-ray", engine: str = "vllm 0.0-fake") -> None:
        self.owned_by = owned_by
        self.cards: dict[str, dict[str, Any]] = {
            name: {"engine": engine, "template": "t1", "weights": f"w-{name}", "max_model_len": 4096}
            if engine
            else {}
            for name in names
        }
        self.failing: Failing = lambda body: None
        self.context, self.key = 4096, ""
        self.chats: list[Body] = []
        self.most_at_once = self._at_once = 0
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()
        self.url = ""

    def asked(self) -> Counter[str]:
        """How often each question was asked: its first turn, with the seed."""
        return Counter(f"{body['messages'][0]['content']} {body['seed']}" for body in self.chats)

    def chat(self, body: Body) -> tuple[int, Any]:
        with self._lock:
            self.chats.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.gate.wait(60)
            return self._chat(body)
        finally:
            with self._lock:
                self._at_once -= 1

    def _chat(self, body: Body) -> tuple[int, Any]:
        if body["model"] not in self.cards:
            return 404, {"error": {"message": f"no model {body['model']}"}}
        if failure := self.failing(body):
            return failure[0], {"error": {"message": failure[1]}}
        words = sum(len(turn["content"].split()) for turn in body["messages"])
        if words + body.get("max_tokens", 1) > self.context:
            # As vLLM 0.29.0 puts it.
            return 400, {
                "error": {"message": f"This model's maximum context length is {self.context} tokens. However, "
                          f"your prompt contains {words} input tokens"}
            }  # fmt: skip
        message = {"role": "assistant", "content": text_for(body)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": words, "completion_tokens": 5}}

    def tokenize(self, body: Body) -> tuple[int, Any]:
        """A token for each word, where the endpoint is one of vLLM."""
        card = self.cards.get(body["model"], {})
        if not card.get("engine"):
            return 404, {"error": {"message": "not found"}}
        words = sum(len(turn["content"].split()) for turn in body["messages"])
        return 200, {"count": words, "max_model_len": self.context, "tokens": list(range(words))}

    def page(self, path: str) -> tuple[int, Any]:
        cards = [
            {"id": name, "object": "model", "owned_by": self.owned_by, "metadata": card}
            for name, card in self.cards.items()
        ]
        if path == "/v1/models":
            return 200, {"object": "list", "data": cards}
        for card in cards:
            if path == f"/v1/models/{card['id']}":
                return 200, card
        return 404, {"error": {"message": "not found"}}


@contextmanager
def fake_endpoint(*names: str, **options: Any) -> Iterator[FakeEndpoint]:
    """An endpoint on a free port of loopback, which serves `names`."""
    endpoint = FakeEndpoint(*names, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(*self._checked(lambda: endpoint.page(self.path)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            counted = self.path == "/tokenize"
            self._answer(*self._checked(lambda: (endpoint.tokenize if counted else endpoint.chat)(body)))

        def _checked(self, answer: Callable[[], tuple[int, Any]]) -> tuple[int, Any]:
            if endpoint.key and self.headers.get("Authorization") != f"Bearer {endpoint.key}":
                return 401, {"error": {"message": "this key is not known"}}
            return answer()

        def _answer(self, status: int, data: Any) -> None:
            if status == 0:
                self.close_connection = True
                return
            sent = json.dumps(data).encode()
            with suppress(OSError):  # the client was killed
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
