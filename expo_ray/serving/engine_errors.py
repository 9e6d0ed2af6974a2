"""Find the reason why an engine did not start among tracebacks, links and pointers to logs, and say it in one line."""

from __future__ import annotations

import re
from pathlib import Path

from expo_ray.text import shown

_MOST = 600
_LOG_BYTES = 1 << 18
_POINTER = re.compile(
    r"See (?:the )?root cause above|Failed core proc|Engine core init|engine dead|EngineDeadError",
    re.IGNORECASE,
)
_LINK = re.compile(r"^\s*For further information visit ")
_TYPED = re.compile(r"\s*\[type=\w+.*$")
# A line of a log that ends a traceback, whatever the process and the logger put before it.
_ERROR = re.compile(
    r"(?:^|[\s\]])((?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Fault|Changed|NotFound)): (\S.*)$"
)
# A sentence that is mostly a list: vLLM gives the names of all 300 architectures that it knows after the one that it does not.
_LISTING = re.compile(r"\s*[^.:;]*: ?(?:\w+\()?[\[({][^\[\](){}]{300,}(?:[\])}]+|$)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def root_cause(text: str, log: str = "") -> str:
    """The line of an error's text that gives the reason; if the text only points to a log, the last error in `log`."""
    lines = [_LISTING.sub("", line) for line in _ANSI.sub("", text).splitlines() if line.strip()]
    value_errors = [line.partition("Value error, ")[2] for line in lines if "Value error, " in line]
    if value_errors:
        return shown(_TYPED.sub("", value_errors[-1]), _MOST)
    if len(lines) > 1 and _LINK.match(lines[-1]):  # pydantic: the field, what is wrong with it, a link
        field = lines[-3].strip() + ": " if len(lines) > 2 else ""
        return shown(field + _TYPED.sub("", lines[-2]).strip(), _MOST)
    if any(_POINTER.search(line) for line in lines):
        errors = (_LISTING.sub("", line) for line in _ANSI.sub("", log).splitlines())
        logged = [match for line in errors if (match := _ERROR.search(line))]
        causes = [match[2] for match in logged if not _POINTER.search(match[0])]
        if causes:
            return shown(causes[-1].strip(), _MOST)
    last = lines[-1].strip() if lines else ""
    return shown(re.sub(r"^(?:ray\.exceptions\.\w+: )?(?:RuntimeError|ValueError): ", "", last), _MOST)


def read_own_log() -> str:
    """Read the end of the log of this process and its children: the file that Ray connects to a worker's standard error."""
    try:
        with Path("/proc/self/fd/2").resolve().open("rb") as file:
            file.seek(max(0, Path("/proc/self/fd/2").stat().st_size - _LOG_BYTES))
            return file.read(_LOG_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""
