"""The OpenAI-compatible endpoint of a job: Serve's HTTP proxy, and an ingress in front of the engines of every name."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.llm.ingress import make_fastapi_ingress

from expo_ray.config import Serving
from expo_ray.errors import JobError, in_one_line
from expo_ray.evaluation.responses.client import Client
from expo_ray.evaluation.responses.endpoint import KEY_VARIABLE
from expo_ray.interrupt import raise_if_interrupted
from expo_ray.on_ray.cluster import is_private
from expo_ray.on_ray.serving.engine_adapter import Proxies, check_version, read_proxies, shut_serve_down
from expo_ray.on_ray.serving.engine_groups import (
    ANSWER_S,
    Deployed,
    EngineGroup,
    delete_left_over,
    deploy,
    job_name,
)
from expo_ray.on_ray.serving.ingress import ENDPOINTS, Ingress, web_app
from expo_ray.serving.request_checks import HEALTH

log = logging.getLogger("expo_ray")

INGRESS = "ingress"
HOST = "127.0.0.1"
# A resource that Ray gives to the head alone.
_HEAD = "node:__internal_head__"
_PROXY_START_S = 300.0
_LOOK_S = 0.2
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
    """Start Serve's HTTP proxies on loopback, or join running ones; yields the endpoint's URL, and its path below them.

    A proxy runs on every node with a replica. The ingress runs where this driver does, so that one is here, and no port is open
    to other machines wherever the driver is.

    A Serve on a cluster that others use is left running at the end: another job may be about to use it. Applications that a
    killed job has left there are deleted.

    Raises:
        JobError: if the port is taken, the variable of the key is not set, or running proxies cannot be reached from here.
    """
    check_version()
    keyed, name = bool(key_digest(settings.api_key_env)), job_name()
    if proxies := read_proxies():  # another job's, or left by one that has ended
        delete_left_over()
        log.info("joining the Ray Serve that listens at %s:%d", proxies.host, proxies.port)
        if not _is_loopback(proxies.host):
            log.warning(
                "that Ray Serve listens at %s:%d, for other machines as well%s",
                proxies.host, proxies.port, "" if keyed else "; set `serving.api_key_env` to ask for a key",
            )  # fmt: skip
        yield f"http://{_host_to_ask(proxies)}:{proxies.port}/{name}", f"/{name}"
        return
    port, path = _free_port(settings.port), "" if is_private() else f"/{name}"
    _start_proxies(port)
    try:
        yield f"http://{HOST}:{port}{path}", path or "/"
    finally:
        if is_private():
            shut_serve_down()


def _start_proxies(port: int) -> None:
    """Start Serve with proxies on loopback.

    Raises:
        JobError: if the head's does not start.
    """
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": HOST, "port": port},
            logging_config={"log_level": "WARNING"},
        )
    except (RayError, RayServeException, TimeoutError, OSError) as error:
        shut_serve_down()
        raise JobError(
            f"Ray Serve does not start at port {port} of the head ({in_one_line(error)}); if something else listens there, give another "
            "with --port or `serving.port`"
        ) from error


def _host_to_ask(proxies: Proxies) -> str:
    """Address of a proxy of a running Serve, as this driver reaches it.

    Raises:
        JobError: if there is none.
    """
    address = "::1" if ":" in proxies.host else HOST
    local = address if _is_wildcard(proxies.host) else proxies.host
    if proxies.location == "EveryNode":
        if not _has_proxy():
            _free_port(proxies.port)
        return f"[{local}]" if ":" in local else local
    head: dict[str, Any] = next((node for node in ray.nodes() if _HEAD in node["Resources"]), {})
    on_head = head.get("NodeID") == ray.get_runtime_context().get_node_id()
    if proxies.location != "HeadOnly" or (_is_loopback(proxies.host) and not on_head):
        raise JobError(
            f"the Ray Serve of this cluster has its proxy at {proxies.host}:{proxies.port} ({proxies.location}), where this driver does not "
            "reach it; submit without --entrypoint-num-cpus, so that the driver runs on the head, or end that Serve with `serve "
            "shutdown` if nobody uses it"
        )
    reached = head.get("NodeManagerAddress", "") if _is_wildcard(proxies.host) and not on_head else local
    return f"[{reached}]" if ":" in reached else str(reached)


def _has_proxy() -> bool:
    """True if a proxy of Serve runs on this node already."""
    return ray.get_runtime_context().get_node_id() in serve.status().proxies


@contextlib.contextmanager
def ingress(
    groups: Sequence[EngineGroup],
    url: str,
    path: str,
    settings: Serving,
    failures: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Run the ingress on this node, and the proxy that comes with it: it finds the engines of a request by the model's name.

    Args:
        groups: that have started, or that will before anybody asks for them.
        url, path: of the endpoint, from `http_proxy`.
        failures: why other models have no engines, by name.

    Raises:
        JobError: if it does not start.
    """
    application = serve.deployment(
        name=INGRESS,
        num_replicas=1,
        max_ongoing_requests=1_000_000,
        ray_actor_options={
            "num_cpus": 0,
            "runtime_env": _ingress_environment(),
            "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        },
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
        _await_proxy(url)
        yield


def _await_proxy(url: str) -> None:
    """Wait until the endpoint answers: a proxy starts on a node only once a replica is there.

    Raises:
        JobError: if it does not.
    """
    deadline = time.monotonic() + _PROXY_START_S
    while True:
        try:
            if httpx.get(f"{url}{HEALTH}", timeout=ANSWER_S, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.TransportError as error:
            reason = str(error)
        else:
            reason = "its application is not there yet"
        if time.monotonic() > deadline:
            states = ", ".join(str(state.value) for state in serve.status().proxies.values())
            raise JobError(
                f"the proxy of Ray Serve at {url} does not answer after {_PROXY_START_S:.0f} s ({reason}; proxies: {states}); look at "
                "`serve/proxy_*.log` in the folder of Ray's logs on this machine, or give another port with `serving.port`"
            )
        raise_if_interrupted()
        time.sleep(_LOOK_S)


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


def _is_wildcard(host: str) -> bool:
    return host in {"0.0.0.0", "::"}


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
