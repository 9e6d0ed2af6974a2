"""The last line of defence before a terminal or a log: nothing that is printed holds a secret or moves the cursor."""

from __future__ import annotations

import io
import re
import sys
from typing import Any, TextIO

from expo_ray.text import redact, remember_url_secrets, visible

# What progress bars begin and end with, and colours (not black, not hidden), which Ray puts before the lines of its workers.
_BAR = re.compile(r"(\r?\n*(?:\x1b\[A)*)(.*?)(\r?\n?)", re.DOTALL)
_COLOUR = re.compile(r"(\x1b\[(?:0|1|2|22|3[1-7]|39|9[1-7])?m)")


class GuardedStream:
    """A text stream that passes on what `redact` and `visible` leave of each text; for the rest it is `stream` itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal in another encoding shows escapes

    def write(self, text: str) -> int:
        """Write `text` without secrets and control characters; the length of `text` itself."""
        self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)


def printable(text: str) -> str:
    """The part of `text` that a terminal may show: lines, tabs, colours and progress bars, and nothing secret."""
    if text.isprintable() and len(text) < 4:  # the separators and line ends of `print`
        return text
    match = _BAR.fullmatch(text)
    assert match is not None
    before, inner, after = match.groups()
    parts = _COLOUR.split(redact(inner))
    safe = "".join(part if index % 2 else visible(part, kept="\n\t") for index, part in enumerate(parts))
    return before + safe + after


def guard_terminal() -> None:
    """Let everything that this process prints from now on, tracebacks and logs among it, pass through `printable`.

    What the command line was given is searched for secrets, to be recognised wherever they are echoed.
    """
    remember_url_secrets(sys.argv)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, GuardedStream):
            setattr(sys, name, GuardedStream(stream))
