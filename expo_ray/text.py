"""Text that somebody else wrote, made fit for a line of output: one line, visible characters, bounded, no secrets.

Every `ExpoError` passes its message through `redact` and `visible`, so a message may quote whatever it refused. Names from
outside that stand inside a line go through `shown`, which also escapes line breaks and cuts.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache

# A secret shorter than this cannot be told from an ordinary word.
_SHORTEST_SECRET = 8
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE
)
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>[^\s\"'<>`]*)")
_CLOSING = ".,;:)]}"
_HEADER = re.compile(r"(?i)\b(bearer|basic|aws4-hmac-sha256)(\s+)(?=[^\s]*[^a-z\s])[^\s'\",;\\]{8,}")
_PARAMETER = re.compile(
    r"(?i)\b(x-amz-(?:signature|credential|security-token)|signature|awsaccesskeyid|sig|access_token|api[_-]?key|"
    r"token|secret|password)=(?!\*\*\*)[^\s&'\",;)]+"
)
_remembered: set[str] = set()


def shown(text: object, most: int = 200) -> str:
    r"""`text` as one line of at most about `most` visible characters; the others are escaped as in a Python string.

    Example:
        >>> shown("a\nb\x1b[31m")
        'a\\nb\\x1b[31m'
    """
    string = text if isinstance(text, str) else str(text)
    cut = string if len(string) <= most else f"{string[:most]}... ({len(string)} characters)"
    return _escaped(cut, kept="")


def visible(text: str) -> str:
    """`text` with every control, formatting and lone surrogate character escaped, but for line breaks."""
    return text if text.isprintable() else _escaped(text, kept="\n")


def redact(text: str) -> str:
    """`text` without secrets.

    Removed are user and password before a URL's host, everything after a URL's `?`, the values of authorization headers and
    of parameters with a secret's name, and the values of this process's variables that are named like a secret
    (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`, ...) and of `remember_secret`.
    """
    if "://" in text:
        text = _URL.sub(_bare_url, text)
    text = _HEADER.sub(r"\1\2***", text)
    text = _PARAMETER.sub(r"\1=***", text)
    for secret in _secrets():
        text = text.replace(secret, "***")
    return text


def remember_secret(value: str) -> None:
    """Keep `value` out of everything that `redact` makes from now on, for a secret that came from a file."""
    if len(value.strip()) >= _SHORTEST_SECRET:
        _remembered.add(value.strip())


def _bare_url(match: re.Match[str]) -> str:
    scheme, rest = match["scheme"], match["rest"]
    tail = rest[len(rest.rstrip(_CLOSING)) :]
    path = rest.removesuffix(tail).partition("?")[0] if tail else rest.partition("?")[0]
    host = path.partition("/")[0]
    user, at, _ = host.rpartition("@")
    if at:
        path = "***@" + path[len(user) + 1 :]
    elif ":" in host and not host.rpartition(":")[2].isdecimal() and not host.startswith("[") and "@" in path:
        path = "***@" + path.rpartition("@")[2]  # a password with a slash in it
    return f"{scheme}://{path}{tail}"


def _secrets() -> list[str]:
    named = [value.strip() for name, value in os.environ.items() if _is_secret(name)]
    found = {value for value in named if len(value) >= _SHORTEST_SECRET} | _remembered
    return sorted(found, key=len, reverse=True)


@lru_cache(maxsize=4096)
def _is_secret(variable: str) -> bool:
    return bool(_SECRET_VARIABLE.search(variable))


def _escaped(text: str, *, kept: str) -> str:
    return "".join(
        character
        if character.isprintable() or character in kept
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
