"""What an OpenAI-compatible endpoint is, and what it tells of the models that it serves."""

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
from expo_ray.text import first_few, remember_secret, remember_url_secrets, shown
from expo_ray.untrusted import Foreign, kind_of, parse_json, validated, without_halves

CONNECT_TIMEOUT_S = 10.0
KEY_VARIABLE = "OPENAI_API_KEY"
_LONGEST_WAIT_S = 600.0
_PAUSE_S = 1.0
# With the log-probabilities of a prompt of 128k tokens an answer has some 20 MB.
MOST_BYTES = 64 * 2**20
_REMEDY = "see to the endpoint"


@dataclass(frozen=True)
class Card:
    """What an endpoint tells of a model; empty where it does not tell.

    Attributes:
        name: as requested.
        engine: name and version, such as `vllm 0.29.0`.
        template: digest of the chat template.
        weights: identity of the weights.
        files: digest of the files beside the weights: configuration, tokenizer, stop tokens.
        settings: digest of the engine's arguments that decide answers.
        dtype: that it computes in.
        max_model_len: longest prompt and response together, in tokens; 0 if unknown.
        vllm: whether requests may have the fields that vLLM adds to OpenAI's.
        special_ids: of the tokens that its tokenizer calls special; empty if unknown.
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


def connect(url: str, timeout_s: float, key_variable: str = KEY_VARIABLE) -> httpx.AsyncClient:
    """Open a client of the endpoint at `url`, with or without its `/v1`.

    The key in the variable `key_variable` goes along if it is set; no key does if that is empty.

    Raises:
        EndpointError: for a URL that names no endpoint, or a key that no request can carry.
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
            # A proxy for the outside world does not know this machine's ports.
            trust_env=urlsplit(root).hostname not in {"127.0.0.1", "localhost", "::1"},
        )
    except (httpx.InvalidURL, ValueError) as error:
        raise EndpointError(
            f"{url}: is no URL ({shown(error)}); write it like http://127.0.0.1:8000"
        ) from error


def read_key(variable: str) -> str:
    """The key in a variable, without the line break that mounted files end with; empty if it is not set.

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


async def card_of(http: httpx.AsyncClient, name: str) -> Card:
    """What the endpoint tells of a model.

    Raises:
        EndpointError: if it cannot be reached, or does not serve the model.
    """
    page: Mapping[str, Any] | None = await _page(http, f"/v1/models/{quote(name, safe='@')}")
    if page is None or page.get("id") != name:  # not every endpoint has this page
        cards = {str(card.get("id")): card for card in await _cards(http)}
        if name not in cards:
            served = first_few([shown(name) for name in cards]) or "no models at all"
            raise EndpointError(f"{http.base_url}: does not serve {shown(name)}; it serves {served}")
        page = cards[name]
    where = f"{http.base_url}: its card of {shown(name)}"
    card = validated(_ForeignCard, page, where, error=EndpointError, remedy=_REMEDY)
    own = _Metadata()
    if isinstance(card.metadata, Mapping):  # others may mean something else by the word
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
    )


async def names_at(http: httpx.AsyncClient) -> list[str]:
    """What the endpoint serves.

    Raises:
        EndpointError: if it cannot be reached.
    """
    return [str(card.get("id")) for card in await _cards(http)]


def refusal(response: httpx.Response, key_variable: str = KEY_VARIABLE) -> EndpointError | None:
    """The error of an answer that says that nothing can be had with this key, URL or name; None for any other answer."""
    told = f"{response.request.url}: status {response.status_code}, {reason_of(response)}"
    if response.status_code in {401, 403}:
        remedy = (
            f"set {key_variable} to a key that the endpoint takes"
            if key_variable
            else "name the variable that holds its key with --key-env"
        )
        return EndpointError(f"{told}; {remedy}")
    if response.status_code in {404, 405}:
        return EndpointError(
            f"{told}; give the URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000, and the name of a "
            "model that it serves"
        )
    return None


def wait_asked_for(response: httpx.Response) -> float:
    """Seconds that the `Retry-After` of an answer asks to wait, a number or an HTTP date (RFC 9110, 10.2.3); 0 without one."""
    header = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(_LONGEST_WAIT_S, seconds) if seconds > 0 else 0.0  # not a number compares as false


def reason_of(response: httpx.Response) -> str:
    """What an endpoint says of a failure, in one line."""
    text: object = None
    with contextlib.suppress(EndpointError):
        data = parse_answer(response)
        error = data.get("error", data)
        text = error.get("message") if isinstance(error, Mapping) else error
    return shown(" ".join(str(text or response.text or response.reason_phrase)[:2000].split()), 400)


def broken_by(error: Exception) -> str:
    """What became of a request that got no answer."""
    return shown(" ".join(f"{type(error).__name__} {error}".split()), 400)


async def _cards(http: httpx.AsyncClient) -> list[Mapping[str, Any]]:
    found = await _page(http, "/v1/models")
    cards = None if found is None else found.get("data")
    if not isinstance(cards, list):
        raise EndpointError(
            f"{http.base_url}: does not answer like an OpenAI-compatible endpoint; give its URL without a path, such as "
            "http://127.0.0.1:8000"
        )
    return [card for card in cards if isinstance(card, Mapping)]


async def _page(http: httpx.AsyncClient, path: str) -> dict[str, Any] | None:
    """A page's JSON object; None if there is no such page.

    Raises:
        EndpointError: if there is no answer; only an endpoint that is busy is asked a second time.
    """
    for last in (False, True):
        try:
            response = await send(http, "GET", path)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise EndpointError(
                f"{http.base_url}: cannot be reached ({broken_by(error)}); start the endpoint, or correct its URL"
            ) from error
        if last or response.status_code < 500:
            break
        await asyncio.sleep(_PAUSE_S)
    if response.status_code in {401, 403} and (refused := refusal(response)):
        raise refused
    if response.status_code >= 500:
        raise EndpointError(
            f"{response.request.url}: status {response.status_code}, {reason_of(response)}; see to the endpoint"
        )
    try:
        return parse_answer(response) if response.status_code == httpx.codes.OK else None
    except EndpointError:
        return None


def parse_answer(response: httpx.Response) -> dict[str, Any]:
    """Parse the JSON object in an answer that `send` received.

    Raises:
        EndpointError: if it is none.
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
        Status and body; of its headers `Retry-After` alone, so that none decides how the body is read.

    Raises:
        httpx.TransportError: if there is no such answer.
    """
    request = http.build_request(method, path, **content)
    try:
        async with asyncio.timeout(http.timeout.read):
            answer = await http.send(request, stream=True)
            try:
                body = await _body(answer)
            finally:
                await answer.aclose()
    except TimeoutError as error:
        raise httpx.ReadTimeout("the answer did not end", request=request) from error
    kept = {name: answer.headers[name] for name in ("Retry-After",) if name in answer.headers}
    return httpx.Response(answer.status_code, headers=kept, content=body, request=request)


async def _body(answer: httpx.Response) -> bytes:
    coding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    # httpx would unpack a megabyte to a gigabyte before anyone can count.
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
