"""A judge behind a real HTTP server, without a model: each mode judges by a rule, so the right result is known beforehand.

    python -m tests.support.judge_server --mode longer --port 8123

`replay` answers with stored log-probabilities, `indifferent` finds every two outputs equal, `longer` likes the longer one a
little, `coin` draws one by the texts, `slow` takes its time, `429` asks each new question to come again, `400` refuses, `garbage`
gives no verdict, `gone` breaks every connection.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Mapping[str, str], Any]
MODES = ("replay", "indifferent", "longer", "coin", "slow", "429", "400", "garbage", "gone")
# This difference in characters doubles the odds of the longer output, in the mode `longer`.
LIKING = 700.0
_OUTPUTS = (
    re.compile(r'"output": """(.*?)"""\n    },\n    {\n.*?"output": """(.*)"""\n    }\n}', re.DOTALL),
    re.compile(r"<output_A>\n(.*)\n</output_A>\n\n<output_B>\n(.*)\n</output_B>", re.DOTALL),
)


class JudgeServer:
    """The judge while it runs.

    Attributes:
        mode: one of `MODES`.
        key: that clients must send; anyone may ask if it is empty.
        stored: (first output, second output) -> log-probabilities of `m` and `M`, for the mode `replay`.
        delay_s: of each answer in the mode `slow`.
        stop_after: answers after which connections break; 0 for never.
        received: every request: its headers and body.
    """

    def __init__(self, mode: str) -> None:
        self.mode, self.key, self.delay_s, self.stop_after = mode, "", 0.2, 0
        self.stored: Mapping[tuple[str, str], tuple[float, float]] = {}
        self.received: list[tuple[Mapping[str, str], Mapping[str, Any]]] = []
        self.url = ""
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def reply(self, headers: Mapping[str, str], body: Mapping[str, Any]) -> Reply | None:
        """The answer to one chat; None breaks the connection."""
        with self._lock:
            self.received.append((headers, body))
            number = len(self.received)
            text = json.dumps(body["messages"])
            new = text not in self._seen
            self._seen.add(text)
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {}, {"error": {"message": "this key is not known"}}
        if self.mode == "gone" or 0 < self.stop_after < number:
            return None
        if self.mode == "429" and new:
            return 429, {"Retry-After": "0.05"}, {"error": {"message": "Rate limit reached"}}
        if self.mode == "400":
            return 400, {}, {"error": {"message": "this content is not judged"}}
        if self.mode == "slow":
            time.sleep(self.delay_s)
        return self._judged(body)

    def _judged(self, body: Mapping[str, Any]) -> Reply:
        if self.mode == "garbage":
            return _answer(body, "I like both.", {"I": -0.1, "Both": -2.0})
        outputs = outputs_in(body["messages"])
        if outputs is None:
            return _answer(body, f"It answers the question.\nRating: [[{rating_of(body['messages'])}]]", {})
        first, second = outputs
        m, capital_m = self._log_probabilities(first, second)
        if body.get("logprobs"):
            return _answer(body, "m" if m >= capital_m else "M", {"m": m, "M": capital_m})
        verdict = "[[A=B]]" if m == capital_m else "[[A>>B]]" if m > capital_m else "[[B>>A]]"
        return _answer(body, f"One says [[A>B]] at first sight.\n{verdict}", {})

    def _log_probabilities(self, first: str, second: str) -> tuple[float, float]:
        if self.mode == "replay":
            return self.stored[first, second]
        if self.mode == "longer":
            odds = 2 ** ((len(first) - len(second)) / LIKING)
            return math.log(odds / (1 + odds)), math.log(1 / (1 + odds))
        if self.mode == "coin":
            heads = hashlib.sha256(f"{first}\0{second}".encode("utf-8", "surrogatepass")).digest()[0] % 2
            return (-0.01, -5.0) if heads else (-5.0, -0.01)
        return math.log(0.5), math.log(0.5)


def outputs_in(messages: Sequence[Mapping[str, str]]) -> tuple[str, str] | None:
    """The two outputs in the order shown; None where one answer is to be graded."""
    for pattern in _OUTPUTS:
        if match := pattern.search(messages[-1]["content"]):
            return match[1], match[2]
    return None


def rating_of(messages: Sequence[Mapping[str, str]]) -> int:
    """What every mode rates one answer with: 1 to 10, by the text alone."""
    return hashlib.sha256(messages[-1]["content"].encode()).digest()[0] % 10 + 1


def _answer(body: Mapping[str, Any], text: str, first_token: Mapping[str, float]) -> Reply:
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "length" if body.get("max_tokens") == 1 else "stop",
    }
    if body.get("logprobs"):
        entries = [{"token": token, "logprob": logprob} for token, logprob in first_token.items()]
        choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
    words = sum(len(message["content"]) for message in body["messages"]) // 4
    return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": words, "completion_tokens": 1}}


@contextmanager
def judge_server(mode: str, port: int = 0) -> Iterator[JudgeServer]:
    """A judge on loopback, on a free port unless one is given."""
    judge = JudgeServer(mode)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send((200, {}, {"object": "list", "data": [{"id": "judge", "object": "model"}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = judge.reply(dict(self.headers), body)
            if reply is None:
                self.close_connection = True
            else:
                self._send(reply)

        def _send(self, reply: Reply) -> None:
            status, headers, data = reply
            sent = json.dumps(data).encode()
            with suppress(OSError):  # the client was killed
                self.send_response(status)
                for name, value in {"Content-Length": str(len(sent)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

    server = Server(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=MODES[1:], default="indifferent")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    with judge_server(given.mode, given.port) as running:
        sys.stdout.write(f"{running.url}\n")
        sys.stdout.flush()
        threading.Event().wait()
