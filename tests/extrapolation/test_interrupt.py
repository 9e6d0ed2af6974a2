"""Ctrl-C while a bucket, or where its credentials come from, does not answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.paths import ROOT
from tests.support.ray_cluster import wait_until

# A shell that runs the tests in the background makes its children ignore SIGINT.
COMMAND = """
import signal, sys
from expo_ray.cli.process import main
from expo_ray.storage import connection

connection.SILENCE_TIMEOUT_S = 3.0  # obstore sees no signal before it has given up
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(["verify", "s3://bucket/model"]))
"""


class Silent:
    """Gives out credentials `times` times, each too short-lived to be kept; does not answer anything else."""

    def __init__(self, times: float) -> None:
        self.asked: list[str] = []
        ended = self._ended = threading.Event()
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                if self.path != "/credentials" or asked.count(self.path) > times:
                    ended.wait()
                    return
                until = datetime.now(UTC) + timedelta(minutes=5)
                body = json.dumps(
                    {"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "c", "Expiration": f"{until:%Y-%m-%dT%H:%M:%SZ}"}
                ).encode()  # fmt: skip
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def verifying(times: float) -> Iterator[tuple[Silent, subprocess.Popen[str]]]:
    """The command, and the server that leaves it waiting."""
    server = Silent(times)
    kept = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    environment = kept | {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{server.url}/credentials",
        "AWS_ENDPOINT_URL": server.url,
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield server, process
    finally:
        process.kill()
        process.wait()
        server.close()


def interrupted(process: subprocess.Popen[str]) -> None:
    time.sleep(0.2)  # from the request on its way to its answer being waited for
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said == "interrupted; run the same command again to go on where it stopped\n"
    assert process.returncode == 130


def test_ctrl_c_ends_the_wait_for_a_bucket_and_for_its_credentials() -> None:
    with verifying(float("inf")) as (server, process):
        wait_until(lambda: any(path.startswith("/bucket") for path in server.asked), "the bucket is asked")
        times = server.asked.count("/credentials")
        interrupted(process)
    # The last time it was obstore who asked for them, to sign its request.
    with verifying(times - 1) as (server, process):
        wait_until(lambda: server.asked.count("/credentials") == times, "credentials are asked for in vain")
        interrupted(process)
