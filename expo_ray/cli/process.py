"""The command line `expo-ray` as a process: signals, streams, and the text and exit status of errors. The commands are in `expo_ray.cli.commands`.

Little is imported here, so that signals are handled before the seconds that the rest takes to import.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from typing_extensions import Buffer

from expo_ray.cli.exit_status import BAD_INPUT, BROKEN_PIPE, FAILED, INTERRUPTED
from expo_ray.cli.extras import missing_extra
from expo_ray.cli.terminal import guard_terminal
from expo_ray.errors import ExpoError, JobError, Problems
from expo_ray.interrupt import forget_signals, remember_signal
from expo_ray.text import visible

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
T = TypeVar("T")
# Errors of the machine, which a traceback does not explain.
_OF_THE_MACHINE = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space, the quota is used up",
    errno.EROFS: "this file system can only be read",
    errno.EACCES: "give this user the right to it",
    errno.EPERM: "give this user the right to it",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "free memory",
    errno.EAGAIN: "raise `ulimit -u`, or end other processes",
    errno.EIO: "the disk or the network file system failed; the system's log says more",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for work that failed, 2 for bad input, 130 when interrupted."""
    flags: list[str] = []

    def command() -> int:
        from expo_ray.cli.commands import run_command_line

        return run_command_line(sys.argv[1:] if arguments is None else arguments, flags)

    return guarded(command, flags)


def guarded(command: Callable[[], int], flags: Collection[str] = ()) -> int:
    """Run `command`, turning errors that a user can fix into text and an exit status.

    Args:
        flags: see `with_flags`; looked at only once there is an error.

    Raises:
        SystemExit: of argparse, which has printed help or what is wrong.
    """
    _handle_signals()
    try:
        _prepare_streams()
        guard_terminal()
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("expo_ray").setLevel(logging.INFO)
        try:
            return _flushed(command())
        except SystemExit as end:
            raise SystemExit(_flushed(end.code)) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        return INTERRUPTED
    except (ExpoError, ModuleNotFoundError, OSError) as error:
        text, status = _described(error)
        if not text and status != BROKEN_PIPE:
            raise
    finally:
        forget_signals()
    if text:
        from expo_ray.cli.flags import with_flags

        print(with_flags(text, flags), file=sys.stderr)
    return status


def _described(error: Exception) -> tuple[str, int]:
    """The text to print about an error, and the exit status; an empty text where a traceback explains more."""
    if isinstance(error, Problems):
        return f"{len(error.problems)} problem(s), nothing was written:\n{error}", BAD_INPUT
    if isinstance(error, ExpoError):
        return f"error: {error}", BAD_INPUT
    if isinstance(error, ModuleNotFoundError):
        remedy = missing_extra(error)
        return remedy and f"error: {remedy}", BAD_INPUT
    if isinstance(error, _UnwritableOutput):
        if error.errno == errno.EPIPE:
            return "", BROKEN_PIPE
        return f"error: the standard output cannot be written: {error.strerror}; send it elsewhere", FAILED
    remedy = _OF_THE_MACHINE.get(getattr(error, "errno", None) or 0, "")
    place = f"{getattr(error, 'filename', None) or ''}: ".removeprefix(": ")
    return remedy and visible(f"error: {place}{getattr(error, 'strerror', '')}; {remedy}"), FAILED


def _handle_signals() -> None:
    """Clean up on SIGTERM, and on the SIGHUP of a lost terminal, as on Ctrl-C. What `nohup` ignores stays ignored."""
    forget_signals()

    def interrupt(*_: object) -> None:
        if remember_signal():
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, interrupt)


def _prepare_streams() -> None:
    """Make sure that any text can be printed, and that no file of ours gets the number of a closed stream.

    Raises:
        JobError: if the standard output is closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stdout is None:
        raise JobError("the standard output is closed; send it to a file, or to /dev/null")
    if sys.stdout is sys.__stdout__ and type(sys.stdout) is io.TextIOWrapper:
        encoding, by_line = sys.stdout.encoding, sys.stdout.line_buffering
        sys.stdout.flush()
        output = io.BufferedWriter(_StandardOutput(sys.stdout.fileno(), "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(output, encoding, "backslashreplace", line_buffering=by_line)


class _UnwritableOutput(OSError):
    """The standard output is full, or its reader is gone."""


class _StandardOutput(io.FileIO):
    """The standard output, whose errors have a class of their own; after the first one it drops everything that is written."""

    _failed = False

    def write(self, data: Buffer, /) -> int:
        if not self._failed:
            try:
                return super().write(data)
            except OSError as error:
                self._failed = True
                raise _UnwritableOutput(*error.args) from error
        return memoryview(data).nbytes


def _flushed(status: T) -> T:
    sys.stdout.flush()
    return status
