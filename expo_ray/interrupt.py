"""Signals that end a command: none is lost, and none cuts the cleaning up short.

Python raises the `KeyboardInterrupt` of a signal wherever the main thread happens to be. In a callback of a library, or in a
destructor, the exception is printed or translated and then dropped, and the command goes on. So a signal is remembered as well,
and everything that counts its work looks for it.
"""

from __future__ import annotations

import time

# Users press Ctrl-C twice: within this time after a signal, another one belongs to it.
SAME_SIGNAL_S = 5.0
# Kubernetes waits as long between SIGTERM and SIGKILL.
CLEAN_UP_S = 30.0


class _Signals:
    """The signals of this process since its command began."""

    came = False
    quiet_until = float("-inf")


_signals = _Signals()


def remember_signal() -> bool:
    """Remember that the command shall end; returns True if the signal handler shall raise `KeyboardInterrupt` now.

    Takes no lock: it runs in a signal handler, which may have stopped the holder of that lock.
    """
    _signals.came = True
    if time.monotonic() < _signals.quiet_until:
        return False
    _signals.quiet_until = time.monotonic() + SAME_SIGNAL_S
    return True


def raise_if_interrupted() -> None:
    """End the work that a signal should have ended.

    Raises:
        KeyboardInterrupt: if a signal came since the command began.
    """
    if _signals.came:
        raise KeyboardInterrupt


def begin_clean_up() -> None:
    """Hold further signals back for `CLEAN_UP_S`, as the first one has arrived and the command is ending."""
    _signals.quiet_until = max(_signals.quiet_until, time.monotonic() + CLEAN_UP_S)


def forget_signals() -> None:
    """Start anew, for a process that runs several commands."""
    _signals.came, _signals.quiet_until = False, float("-inf")
