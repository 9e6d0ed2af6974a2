"""A limit on the time that Python code of somebody else takes, such as a chat template with loops inside loops."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# An ordinary chat template takes milliseconds.
RENDER_S = 20.0


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise a `TimeoutError` inside the block, in whatever thread it runs, once it has taken `seconds`.

    A signal could do so in the main thread alone. Only code between two steps of the interpreter is interrupted: a single
    long call of C code ends first.
    """
    thread, lock, ended = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not ended:
                _raise_in(thread, ctypes.py_object(TimeoutError))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            ended = True
            _raise_in(thread, None)  # takes back what was raised and has not arrived


def _raise_in(thread: int, kind: ctypes.py_object[type[BaseException]] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)
