"""A fault proxy that also holds requests back, so that a test can act while a job is in the middle of something."""

from __future__ import annotations

import asyncio
import re
import socket
from collections import Counter
from typing import Any

from tests.support.fault_proxy import FaultProxy


class SlowProxy(FaultProxy):
    """Requests are held from `hold` to `release`; `slow` lets each of them wait a while."""

    def __init__(self, upstream: str, listener: socket.socket | None = None) -> None:
        super().__init__(upstream, listener=listener)
        self._hold = self._slow = ("", "(?!)")
        self._delay_s = 0.0
        self.waiting: set[str] = set()
        self.held = 0

    def hold(self, method: str, path: str) -> None:
        """From now on, requests like this get no answer; `held` counts them, `waiting` names the objects they are for."""
        self.waiting, self.held = set(), 0
        self._hold = (method, path)

    def slow(self, method: str, path: str, delay_s: float) -> None:
        """From now on, requests like this are passed on after `delay_s`."""
        self._slow, self._delay_s = (method, path), delay_s

    def release(self) -> None:
        """Pass everything on as it comes."""
        self._hold = self._slow = ("", "(?!)")

    def count(self, method: str, path: str) -> Counter[str]:
        """How often each object was the aim of requests like this, since the last `inject`."""
        targets = [target for asked, target in self.requests if asked == method and re.search(path, target)]
        return Counter(target.partition("?")[0] for target in targets)

    async def _exchange(self, request: Any, *ends: Any) -> None:
        method, target, _ = request.first_line.split(" ", 2)
        if _matches(self._slow, method, target):
            await asyncio.sleep(self._delay_s)
        if _matches(self._hold, method, target):
            self.held += 1
            self.waiting.add(target.partition("?")[0])
            while _matches(self._hold, method, target):
                await asyncio.sleep(0.01)
        await super()._exchange(request, *ends)


def _matches(rule: tuple[str, str], method: str, target: str) -> bool:
    return rule[0] in {"", method} and re.search(rule[1], target) is not None
