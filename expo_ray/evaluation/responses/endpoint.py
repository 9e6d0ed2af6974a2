"""Connect to an OpenAI-compatible endpoint, read the cards of its models, and bound what an answer may hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import httpx
from pydantic import Field

from expo_ray.errors import EndpointError
from expo_ray.text import remember_secret, remember_url_secrets, shown, shown_names
from expo_ray.untrusted import Foreign, kind_of, parse_json, validated, without_halves

CONNECT_TIMEOUT_S = 10.0
KEY_VARIABLE = "OPENAI_API_KEY"
_LONGEST_WAIT_S = 600.0
_PAUSE_S = 1.0
# An answer with the log-probabilities of a prompt of 128k tokens has about 20 MB.
MOST_BYTES = 64 * 2**20
_REMEDY = "see to the endpoint"


@dataclass(frozen=True)
class Card:
    """An endpoint's description of a model; a field is empty if the endpoint does not say.

    Attributes:
        name: as requested.
        engine: name and version, such as `vllm 0.29.0`.
        template: digest of the chat template.
        weights: identity of the weights.
        files: digest of the files beside the weights: configuration, tokenizer, stop tokens.
        settings: digest of the engine's arguments that decide answers.
        dtype: data type of its computations.
        max_model_len: longest prompt and response together, in tokens; 0 if unknown.
        vllm: True if requests may have the fields that vLLM adds to OpenAI's.
        alphas_at_once: alphas of its pair that its engine answers at the same time without a swap.
        special_ids: ids of the tokens that its tokenizer calls special; empty if unknown.
    """

    name: str
    engine: str = ""
    template: str = ""
    weights: str = ""
    dtype: str = ""
    max_model_len: int = 0
    vllm: bool = False
    special_ids: frozenset[int] = frozenset()
    files: str = ""
    settings: str = ""
    alphas_at_once: int = 1


class _ForeignCard(Foreign):
    root: str | None = None
    owned_by: Any = None
    max_model_len: Annotated[int, Field(ge=0, lt=2**40)] | None = None
    metadata: Any = None


class _Metadata(Foreign):
    engine: str | None = None
    template: str | None = None
    weights: str | None = None
    dtype: str | None = None
    max_model_len: Annotated[int, Field(ge=0, lt=2**40)] | None = None
    special_ids: list[int] | None = None
    files: str | None = None
    settings: str | None = None
    alphas_at_once: Annotated[int, Field(ge=1, lt=2**16)] | None = None


def connect(url: str, timeout_s: float, key_variable: str = KEY_VARIABLE) -> httpx.AsyncClient:
    """Open a client of the endpoint at `url`, with or without its `/v1`.

    Each request carries the key in the environment variable `key_variable`, if it is set; none if `key_variable` is empty.

    Raises:
        EndpointError: for a URL that is none, or a key that no request can carry.
    """
    root = url.rstrip("/").removesuffix("/v1").rstrip("/")
    key = read_key(key_variable) if key_variable else ""
    remember_url_secrets(url)
    if "?" in url or "#" in url:
        raise EndpointError(
            f"{url}: leave out what follows `?` or `#`; a key goes into {key_variable or KEY_VARIABLE}"
        )
    try:
        return httpx.AsyncClient(
            base_url=root,
            headers={"Accept-Encoding": "gzip, identity"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=None),
            # A proxy to the internet cannot reach this machine's own ports.
            trust_env=urlsplit(root).hostname not in {"127.0.0.1", "localhost", "::1"},
        )
    except (httpx.InvalidURL, ValueError) as error:
        raise EndpointError(
            f"{url}: is no URL ({shown(error)}); write it like http://127.0.0.1:8000"
        ) from error


def read_key(variable: str) -> str:
    """Read the key in an environment variable, without the line break that mounted files end with; empty if it is not set.

    Raises:
        EndpointError: if no request can carry it.
    """
    key = os.environ.get(variable, "").strip()
    remember_secret(key)
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(
            f"{variable} holds a character that no request can carry; set it to the key alone"
        )
    return key


async def get_card(http: httpx.AsyncClient, name: str) -> Card:
    """Ask the endpoint for its card of a model.

    Raises:
        EndpointError: if it cannot be reached, or does not serve the model.
    """
    page: Mapping[str, Any] | None = await _get_page(http, f"/v1/models/{quote(name, safe='@')}")
    if page is None or page.get("id") != name:  # some endpoints have no such page
        cards = {str(card.get("id")): card for card in await _get_cards(http)}
        if name not in cards:
            served = shown_names(cards) or "no models at all"
            raise EndpointError(f"{http.base_url}: does not serve {shown(name)}; it serves {served}")
        page = cards[name]
    where = f"{http.base_url}: its card of {shown(name)}"
    card = validated(_ForeignCard, page, where, error=EndpointError, remedy=_REMEDY)
    own = _Metadata()
    if isinstance(card.metadata, Mapping):  # other servers use the name for something else
        own = validated(_Metadata, card.metadata, where, error=EndpointError, remedy=_REMEDY)
    engine = own.engine or ""
    return Card(
        name,
        engine,
        own.template or "",
        own.weights or card.root or "",
        own.dtype or "",
        own.max_model_len or card.max_model_len or 0,
        vllm=engine.startswith("vllm") or card.owned_by == "vllm",
        special_ids=frozenset(own.special_ids or ()),
        files=own.files or "",
        settings=own.settings or "",
        alphas_at_once=own.alphas_at_once or 1,
    )


async def get_model_names(http: httpx.AsyncClient) -> list[str]:
    """Ask the endpoint for the names of its models.

    Raises:
        EndpointError: if it cannot be reached.
    """
    return [str(card.get("id")) for card in await _get_cards(http)]


def refusal(response: httpx.Response, key_variable: str = KEY_VARIABLE) -> EndpointError | None:
    """The error of an answer after which no request with this key, URL or name can succeed; None for any other answer."""
    answered = f"{response.request.url}: status {response.status_code}, {failure_reason(response)}"
    if response.status_code in {401, 403}:
        remedy = (
            f"set {key_variable} to a key that the endpoint takes"
            if key_variable
            else "name the variable that holds its key with --key-env"
        )
        return EndpointError(f"{answered}; {remedy}")
    if response.status_code in {404, 405}:
        return EndpointError(
            f"{answered}; give the URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000, and the name of a "
            "model that it serves"
        )
    return None


def retry_after_s(response: httpx.Response) -> float:
    """Seconds to wait by the `Retry-After` of an answer, a number or an HTTP date (RFC 9110, 10.2.3); 0 without one."""
    header = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(_LONGEST_WAIT_S, seconds) if seconds > 0 else 0.0  # NaN compares as false


def failure_reason(response: httpx.Response) -> str:
    """The endpoint's message in a failed answer, as one line."""
    text: object = None
    with contextlib.suppress(EndpointError):
        data = parse_object(response)
        error = data.get("error", data)
        text = error.get("message") if isinstance(error, Mapping) else error
    return shown(" ".join(str(text or response.text or response.reason_phrase)[:2000].split()), 400)


def connection_failure(error: Exception) -> str:
    """The error of a request without an answer, as one line."""
    return shown(" ".join(f"{type(error).__name__} {error}".split()), 400)


async def _get_cards(http: httpx.AsyncClient) -> list[Mapping[str, Any]]:
    page = await _get_page(http, "/v1/models")
    cards = None if page is None else page.get("data")
    if not isinstance(cards, list):
        raise EndpointError(
            f"{http.base_url}: does not answer like an OpenAI-compatible endpoint; give its URL without a path, such as "
            "http://127.0.0.1:8000"
        )
    return [card for card in cards if isinstance(card, Mapping)]


async def _get_page(http: httpx.AsyncClient, path: str) -> dict[str, Any] | None:
    """Get the JSON object of a page; None if there is no such page. A busy endpoint is asked a second time.

    Raises:
        EndpointError: if there is no answer.
    """
    for last in (False, True):
        try:
            response = await send(http, "GET", path)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise EndpointError(
                f"{http.base_url}: cannot be reached ({connection_failure(error)}); start the endpoint, or correct its URL"
            ) from error
        if last or response.status_code < 500:
            break
        await asyncio.sleep(_PAUSE_S)
    if response.status_code in {401, 403} and (refused := refusal(response)):
        raise refused
    if response.status_code >= 500:
        raise EndpointError(
            f"{response.request.url}: status {response.status_code}, {failure_reason(response)}; see to the endpoint"
        )
    try:
        return parse_object(response) if response.status_code == httpx.codes.OK else None
    except EndpointError:
        return None


def parse_object(response: httpx.Response) -> dict[str, Any]:
    """Parse the JSON object in an answer that `send` received.

    Raises:
        EndpointError: if it holds something else.
    """
    source = str(response.request.url)
    value = parse_json(
        response.content, source, most_bytes=MOST_BYTES, surrogates=True, error=EndpointError, remedy=_REMEDY
    )
    if not isinstance(value, dict):
        raise EndpointError(f"{source}: a JSON {kind_of(value)} instead of an object; {_REMEDY}")
    answer: dict[str, Any] = without_halves(value) if b"\\ud" in response.content.lower() else value
    return answer


async def send(http: httpx.AsyncClient, method: str, path: str, **content: Any) -> httpx.Response:
    """Send a request and receive the whole answer, up to `MOST_BYTES` unpacked and within the client's timeout.

    Returns:
        Status and body, already unpacked. Of its headers only `Retry-After`, so that none makes httpx decode the body again.

    Raises:
        httpx.TransportError: if there is no such answer in time.
    """
    request = http.build_request(method, path, **content)
    try:
        async with asyncio.timeout(http.timeout.read):
            answer = await http.send(request, stream=True)
            try:
                body = await _read_body(answer)
            finally:
                await answer.aclose()
    except TimeoutError as error:
        raise httpx.ReadTimeout("the answer did not end", request=request) from error
    kept = {name: answer.headers[name] for name in ("Retry-After",) if name in answer.headers}
    return httpx.Response(answer.status_code, headers=kept, content=body, request=request)


async def _read_body(answer: httpx.Response) -> bytes:
    coding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    # Unpacked here in bounded steps: httpx would unpack a megabyte to a gigabyte before its size can be checked.
    if coding not in {"identity", "gzip", "x-gzip"}:
        raise httpx.RemoteProtocolError(
            f"the answer is packed as {shown(coding, 40)}, which was not asked for"
        )
    unpack = None if coding == "identity" else zlib.decompressobj(zlib.MAX_WBITS | 16)
    body = bytearray()
    async for piece in answer.aiter_raw():
        try:
            body += piece if unpack is None else unpack.decompress(piece, MOST_BYTES + 1 - len(body))
        except zlib.error as error:
            raise httpx.RemoteProtocolError(f"the answer cannot be unpacked ({error})") from error
        if len(body) > MOST_BYTES:
            raise httpx.RemoteProtocolError(f"the answer has more than the {MOST_BYTES} bytes that are read")
    return bytes(body)
