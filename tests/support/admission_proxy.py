"""A store that says no: a proxy that admits so many requests a second to a real server, and answers 503 to the others."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tests.support.fault_proxy import FaultProxy

_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class AdmissionProxy(FaultProxy):
    """Admits `rate` requests in each second, and refuses the rest as S3 does.

    Attributes:
        rate: requests a second; 0 admits none, None all.
        retry_after_s: what a refusal asks the client to wait; None to leave it out.
        admitted, refused: when, by `time.monotonic`.
    """

    def __init__(self, upstream: str, rate: float | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(upstream)
        self.rate, self.retry_after_s = rate, retry_after_s
        self.admitted: list[float] = []
        self.refused: list[float] = []
        self._second = -1

    def _admits(self) -> bool:
        if self.rate is None:
            return True
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._in_second = second, 0
        self._in_second += 1
        return self._in_second <= self.rate

    async def _exchange(self, request: Any, client: asyncio.StreamWriter, *ends: Any) -> None:
        if self._admits():
            self.admitted.append(time.monotonic())
            await super()._exchange(request, client, *ends)
            return
        self.refused.append(time.monotonic())
        method, _, _ = request.first_line.split(" ", 2)
        wait = b"" if self.retry_after_s is None else b"retry-after: %d\r\n" % self.retry_after_s
        head = b"HTTP/1.1 503 Slow Down\r\ncontent-type: application/xml\r\n%scontent-length: %d\r\n\r\n"
        client.write(head % (wait, len(_BODY)) + (b"" if method == "HEAD" else _BODY))
        await client.drain()
