"""The rungs of a search as they were asked, stored beside its result.

A search is a function of its rows, so a rerun asks the same. But `surface` computes alphas with the machine's linear algebra, whose last bits
differ between machines: a search that is resumed elsewhere takes the alphas that were asked.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError

from expo_ray.errors import NotFound
from expo_ray.evaluation.search.history import Rung
from expo_ray.report.results import OtherLooks
from expo_ray.storage import Store

_RUNGS = TypeAdapter(tuple[Rung, ...])
# The end of `rungs_key`, behind the name of the pair.
_SEARCH_ID = re.compile(r"-[0-9a-f]{16}\.rungs\.json$")


class RungLog:
    """The rungs of one search, in the order in which they were asked.

    Args:
        store: the job's output.
        key: of the file in it.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key

    def read(self) -> tuple[Rung, ...]:
        """Read the rungs; none where the search has not begun, or the file cannot be read: they are then computed again."""
        try:
            return _RUNGS.validate_json(self._store.read(self._key))
        except (NotFound, ValidationError):
            return ()

    def other_looks(self) -> OtherLooks | None:
        """Count the looks at untouched prompts by other searches of the same pair in this output; None if there were none.

        A prompt's half follows from its text, so that what is untouched is the same for all of them. Searches of the time before rungs were
        stored are not counted.
        """
        name = _SEARCH_ID.split(self._key)[0]
        counts = [
            sum(rung.half == "confirm" for rung in RungLog(self._store, info.key).read())
            for info in self._store.list(name)
            if info.key != self._key and _SEARCH_ID.sub("", info.key) == name
        ]
        looked = [count for count in counts if count]
        return OtherLooks(len(looked), sum(looked)) if looked else None

    def write(self, rungs: Sequence[Rung]) -> None:
        """Store the rungs that were asked so far, in place of those that were stored, if they are more."""
        if len(rungs) > len(self.read()):
            self._store.put(self._key, json.dumps([dataclasses.asdict(rung) for rung in rungs]).encode())
