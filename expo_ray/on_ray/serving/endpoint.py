"""The OpenAI-compatible endpoint of a job: Serve's HTTP proxy, and an ingress in front of the engines of every name."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.serve.llm.ingress import make_fastapi_ingress

from expo_ray.config import Serving
from expo_ray.errors import JobError
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.endpoint import KEY_VARIABLE
from expo_ray.on_ray.cluster import is_private
from expo_ray.on_ray.serving.engine_adapter import check_version, http_address, shut_serve_down
from expo_ray.on_ray.serving.engine_groups import Deployed, EngineGroup, delete_left_over, deploy, job_name
from expo_ray.on_ray.serving.ingress import ENDPOINTS, Ingress, web_app

log = logging.getLogger("expo_ray")

INGRESS = "ingress"
HOST = "127.0.0.1"
# Of one request, the wait for other alphas included. Ray's limit of ten minutes is too short for an engine on a CPU.
REQUEST_TIMEOUT_S = 24 * 3600


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that answers for models.

    Attributes:
        url: without `/v1`.
        slots: requests worth having in flight, over all engines.
        key_variable: names the variable with the key that it asks for.
        failures: why some models are not served, by name.
    """

    url: str
    slots: int = 0
    key_variable: str = KEY_VARIABLE
    failures: Mapping[str, str] = field(default_factory=dict)

    def client(self) -> Client:
        """A client that keeps the engines busy."""
        return Client(self.url, slots=self.slots, key_variable=self.key_variable)

    def alphas_at_once(self, pair: str) -> int:
        """Ask how many alphas of a pair one engine answers at the same time.

        Raises:
            EndpointError: if the endpoint does not answer.
        """

        async def ask() -> int:
            async with self.client() as client:
                return (await client.card(pair)).alphas_at_once

        return asyncio.run(ask())


@contextlib.contextmanager
def http_proxy(settings: Serving) -> Iterator[tuple[str, str]]:
    """Start Serve's HTTP proxy on loopback, or join a running one; yields the endpoint's URL, and its path below the proxy.

    A Serve on a cluster that others use is left running at the end: another job may be about to use it. Applications that a
    killed job has left there are deleted.

    Raises:
        JobError: if the port is taken, or the variable of the key is not set.
    """
    check_version()
    keyed, name = bool(key_digest(settings.api_key_env)), job_name()
    if address := http_address():  # another job's, or left by one that has ended
        delete_left_over()
        host, port = address
        log.info("joining the Ray Serve that listens at %s:%d", host, port)
        if not _is_loopback(host):
            log.warning(
                "that Ray Serve listens at %s:%d, for other machines as well%s",
                host, port, "" if keyed else "; set `serving.api_key_env` to ask for a key",
            )  # fmt: skip
        yield f"http://{HOST if host == '0.0.0.0' else host}:{port}/{name}", f"/{name}"
        return
    port, path = _free_port(settings.port), "" if is_private() else f"/{name}"
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": HOST, "port": port},
        logging_config={"log_level": "WARNING"},
    )
    try:
        yield f"http://{HOST}:{port}{path}", path or "/"
    finally:
        if is_private():
            shut_serve_down()


@contextlib.contextmanager
def ingress(
    groups: Sequence[EngineGroup], path: str, settings: Serving, failures: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run the ingress: it finds the engines of a request by the model's name, once they have started.

    Args:
        groups: that have started, or that will before anybody asks for them.
        path: of the endpoint below Serve's proxy.
        failures: why other models have no engines, by name.

    Raises:
        JobError: if it does not start.
    """
    application = serve.deployment(
        name=INGRESS,
        num_replicas=1,
        max_ongoing_requests=1_000_000,
        ray_actor_options={"num_cpus": 0, "runtime_env": _ingress_environment()},
    )(
        make_fastapi_ingress(
            Ingress, endpoint_map=dict(ENDPOINTS), app=web_app(settings.hosts, key_digest(settings.api_key_env))
        )
    ).bind(
        engines={group.name: group.address for group in groups},
        pairs={group.name: group.alphas for group in groups if group.alphas is not None},
        failures=dict(failures or {}),
    )  # fmt: skip
    with deploy(application, Deployed("", job_name(), "the endpoint"), path) as deployed:
        deployed.wait(settings.start_timeout)
        yield


def key_digest(variable: str) -> str:
    """SHA-256 of the key that requests need; empty if they need none.

    Raises:
        JobError: if the variable is not set.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        state = "holds characters that no header can" if key else "is not set"
        raise JobError(
            f"`api_key_env`: the variable {variable} {state}; set it to the key that clients are to send"
        )
    return hashlib.sha256(key.encode()).hexdigest()


def _ingress_environment() -> dict[str, Any]:
    job = dict(ray.get_runtime_context().runtime_env)
    timeout = {"RAY_SERVE_LLM_ROUTER_HTTP_TIMEOUT": str(REQUEST_TIMEOUT_S)}
    return job | {"env_vars": {**(job.get("env_vars") or {}), **timeout}}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _free_port(port: int) -> int:
    """Check that the port is free, and return it; for 0, find a free one.

    Raises:
        JobError: if it is taken.
    """
    try:
        with socket.create_server((HOST, port)) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise JobError(
            f"port {port} of {HOST} is unavailable ({os.strerror(error.errno or 0)}); give another with --port or `serving.port`, 0 for any free one"
        ) from error
