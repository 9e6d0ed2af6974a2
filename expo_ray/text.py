"""Text that somebody else wrote, made fit for a line of output: one line, visible characters, bounded, no secrets.

Every `ExpoError` passes its message through `redact` and `visible`, and `expo_ray.cli.terminal` does so with all that is printed, so
a message may quote whatever it refused. Names from outside that stand inside a line go through `shown`, which also escapes
line breaks and cuts.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from urllib.parse import parse_qsl, quote, unquote

# A secret shorter than this is indistinguishable from an ordinary word.
_SHORTEST_SECRET = 8
_SHORTEST_PASSWORD = 6
_LONGEST_MESSAGE = 4000
# A text is cut before it is searched: a name of 10 MB needs no more.
_SEARCHED = 100_000

_SECRET_WORDS = {
    "APIKEY", "AUTH", "AUTHORIZATION", "CREDENTIAL", "CREDENTIALS", "KEY", "PASS", "PASSWD", "PASSWORD", "PAT", "PWD", "SAS",
    "SECRET", "SIGNATURE", "TOKEN",
}  # fmt: skip
# `RAY_AUTH_TOKEN_PATH` names a file, `RAY_AUTH_MODE` a mode.
_NO_SECRET_LAST = {"DIR", "ENABLED", "ENDPOINT", "FILE", "FORMAT", "MODE", "NAME", "PATH", "SOCK", "TTL", "TYPE", "URI", "URL", "VARIABLE"}  # fmt: skip
_PASSWORD_INSIDE = re.compile(r"PASSWORD|PASSWD|APIKEY|SECRET", re.IGNORECASE)

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,31})://(?P<rest>[^\s\"'<>`]*)")
_PORTLESS = re.compile(r"^[^\[{]*:(?!\d*$|PORT$)[^{]{3,}")
_CLOSING = ".,;:)]}"
_USER = re.compile(r"(?<![\w:@.*-])(?<![^/]/)[\w.+%-]{0,256}:[^\s/@:'\"]{3,}@(?=[\w\[])")
_NAME = r"(?:[\w-]{0,64}(?:signature|credential|security[_-]token|secret|access[_-]?key(?:[_-]?id)?|secret[_-]key|api[_-]?key|access[_-]token|auth[_-]token|password|passwd)|sig|token)"
_HEADER = re.compile(r"\b((?i:bearer|basic|aws4-hmac-sha256))(\s+)(?=[^\s]*[^a-z\s])[^\s'\",;\\]{8,}")
_PARAMETER = re.compile(rf"(?i)\b({_NAME})=(?!\*\*\*)[^\s&'\",;)]+")
_FIELD = re.compile(rf"(?i)\b({_NAME}['\"]?\s*[=:]\s*['\"]?)(?=\S*[0-9])[A-Za-z0-9+/=_.~-]{{16,}}")
_KNOWN_FORMAT = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[opsu]_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|"
    r"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
)
_remembered: set[str] = set()


def shown(text: object, most: int = 200) -> str:
    r"""`text` as one line of at most about `most` visible characters, without secrets; other characters are escaped.

    Example:
        >>> shown("a\nb\x1b[31m")
        'a\\nb\\x1b[31m'
    """
    return _escaped(_cut(text if isinstance(text, str) else str(text), most), kept="")


def shown_end(text: object, most: int = 200) -> str:
    """As `shown`, but a long text keeps its end as well, by which paths and messages differ."""
    string = text if isinstance(text, str) else str(text)
    if len(string) <= most:
        return shown(string, most)
    half = most // 2
    safe = (
        redact(string)
        if len(string) <= _SEARCHED
        else redact(string[:_SEARCHED]) + redact(string[-_SEARCHED:])
    )
    return _escaped(f"{safe[:half]}... ({len(string)} characters) ...{safe[-half:]}", kept="")


def first_few(texts: Sequence[str], most: int = 5) -> str:
    """The first `most` of `texts`, joined with commas, and the number of the others."""
    others = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + others


def shown_names(names: Iterable[object], most: int = 5, longest: int = 200) -> str:
    """The first `most` of some names from outside, each of at most `longest` characters as by `shown`, and the number of the others."""
    return first_few([shown(name, longest) for name in names], most)


def visible(text: str, *, kept: str = "\n") -> str:
    """`text` with every control, formatting and lone surrogate character escaped, but for those `kept`."""
    return text if text.isprintable() else _escaped(text, kept=kept)


def message(text: str, *, lines: bool = False) -> str:
    """The text of an error: redacted, visible, at most 4,000 characters, on one line unless `lines`."""
    if lines:
        return visible(redact(text))
    if len(text) <= _LONGEST_MESSAGE:
        return visible(redact(text), kept="")
    return shown_end(text, _LONGEST_MESSAGE)


def redact(text: str) -> str:
    """`text` without secrets.

    Removed are user and password before a host, everything after a URL's `?`, the values of authorization headers and of
    parameters with a secret's name, keys in well-known formats, and the secrets of this process: the values of variables that
    are named like a secret (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`, ...), passwords in the URLs of variables, and whatever was
    given to `remember_secret`, also where they are percent-encoded, escaped or in base64.
    """
    if "://" in text:
        text = _URL.sub(_bare_url, text)
    if "@" in text:
        text = _USER.sub("***@", text)
    text = _HEADER.sub(r"\1\2***", text)
    text = _PARAMETER.sub(r"\1=***", text)
    text = _FIELD.sub(r"\1***", text)
    text = _KNOWN_FORMAT.sub("***", text)
    pattern = _pattern(_secrets())
    return pattern.sub("***", text) if pattern else text


def remember_secret(value: str) -> None:
    """Keep `value` out of everything that `redact` makes from now on, for a secret that came from a file."""
    if len(value.strip()) >= _SHORTEST_SECRET:
        _remembered.add(value.strip())


def remember_url_secrets(value: object) -> None:
    """Keep passwords and signatures in the URLs of `value`, a text or what a job file holds, out of all output from now on."""
    if isinstance(value, str):
        _remembered.update(_url_secrets(value))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            remember_url_secrets(key)
            remember_url_secrets(inner)
            if isinstance(key, str) and isinstance(inner, str) and _is_secret(key):
                remember_secret(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            remember_url_secrets(inner)


def remember_file_secrets(text: str) -> None:
    """Keep every value out of all output whose key, in an ini file, is named like a secret."""
    for line in text.splitlines():
        key, _, value = line.replace("=", " ", 1).strip().partition(" ")
        if value.strip() and _is_secret(key):
            remember_secret(value)


def _cut(text: str, most: int) -> str:
    """Redacted before it is cut, or half of a secret could stay."""
    safe = redact(text[:_SEARCHED])
    return (
        safe if len(safe) <= most and len(text) <= _SEARCHED else f"{safe[:most]}... ({len(text)} characters)"
    )


def _bare_url(match: re.Match[str]) -> str:
    scheme, rest = match["scheme"], match["rest"]
    tail = rest[len(rest.rstrip(_CLOSING)) :]
    whole = rest.removesuffix(tail) if tail else rest
    path = whole.partition("?")[0]
    if "=" in path.partition("#")[2]:  # a signature behind `#` is one as well
        path = path.partition("#")[0]
    host = path.partition("/")[0]
    user, at, _ = host.rpartition("@")
    if at:
        path = "***@" + path[len(user) + 1 :]
    elif _PORTLESS.search(host):  # a password with a slash in it, or one that was cut off
        path = "***" + (f"@{path.rpartition('@')[2]}" if "@" in path else "")
    return f"{scheme}://{path}{tail}"


def _url_secrets(text: str) -> Iterator[str]:
    """Passwords and signatures in the URLs of `text`."""
    for match in _URL.finditer(text):
        rest = match["rest"]
        before, _, query = rest.replace("#", "?", 1).partition("?")
        user, at, _ = before.rpartition("@") if "@" in before else ("", "", "")
        password = user.partition(":")[2] if at else ""
        for secret in (password, unquote(password)):
            if len(secret) >= _SHORTEST_PASSWORD:
                yield secret
        for name, value in parse_qsl(query):
            if len(value) >= _SHORTEST_SECRET and (re.fullmatch(rf"(?i){_NAME}", name) or len(value) >= 20):
                yield value
    if "://" not in text and (user_at := _USER.search(text)):
        secret = user_at[0].partition(":")[2].rstrip("@")
        if len(secret) >= _SHORTEST_PASSWORD:
            yield secret


def _secrets() -> frozenset[str]:
    secrets = set(_remembered)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _is_secret(name) and not _is_path(value):
            secrets.add(value.strip())
        elif "://" in value or "@" in value:
            secrets.update(_cached_url_secrets(value))
    return frozenset(secrets)


@lru_cache(maxsize=256)
def _cached_url_secrets(value: str) -> tuple[str, ...]:
    return tuple(_url_secrets(value))


@lru_cache(maxsize=256)
def _is_path(value: str) -> bool:
    return value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))


@lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    words = re.split(r"[_\W]+", name.upper())
    if words[-1] in _NO_SECRET_LAST or name in {"PWD", "OLDPWD"}:
        return False
    return not _SECRET_WORDS.isdisjoint(words) or bool(_PASSWORD_INSIDE.search(name))


@lru_cache(maxsize=16)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str] | None:
    forms = {form for secret in secrets for form in _forms(secret) if len(form) >= _SHORTEST_PASSWORD}
    # The longest first, as one may be the beginning of another.
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True)))) if forms else None


def _forms(secret: str) -> Iterator[str]:
    """The ways to write `secret`: as it is, escaped for a URL, Python, JSON or HTML, or as a part of base64."""
    data = secret.encode("utf-8", "surrogateescape")
    yield from (
        secret,
        secret.strip(),
        quote(data),
        quote(data, safe=""),
        repr(secret)[1:-1],
        repr(data)[2:-1],
    )
    yield from (json.dumps(secret)[1:-1], html.escape(secret))
    for shift in range(3):  # where it begins in a group of three bytes
        encoded = base64.b64encode(b"\0" * shift + data).decode()
        inner = encoded[0 if not shift else 4 : (len(data) + shift) // 3 * 4]
        if len(inner) >= _SHORTEST_SECRET:
            yield from (inner, inner.translate(str.maketrans("+/", "-_")))


def _escaped(text: str, *, kept: str) -> str:
    return "".join(
        character
        if character.isprintable() or character in kept or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
