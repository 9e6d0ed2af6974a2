"""A set of prompts: a name, a fixed order, reproducible subsets, and two halves that never mix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from expo_ray.evaluation.paths import prompt_set_key
from expo_ray.evaluation.records import Message, Prompt, digest
from expo_ray.evaluation.row_store import rows_text
from expo_ray.storage import Store


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their source, each of them once.

    Attributes:
        name: of the set in paths and reports.
        repeated: rows of the source that repeated an earlier one and were left out.
    """

    name: str
    prompts: tuple[Prompt, ...]
    repeated: int = 0
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        rows = [[prompt.id, prompt.category, prompt.temperature] for prompt in self.prompts]
        object.__setattr__(self, "digest", digest(rows))

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def of(cls, name: str, prompts: Iterable[Prompt]) -> Self:
        """The set of `prompts`, of equal ones the first."""
        listed = list(prompts)
        kept = {prompt.id: prompt for prompt in reversed(listed)}
        order = dict.fromkeys(prompt.id for prompt in listed)
        return cls(name, tuple(kept[one] for one in order), len(listed) - len(kept))

    def limit(self, count: int | None) -> PromptSet:
        """The subset of `count` prompts, each category and half in proportion, in the set's order; all of them for None.

        A larger subset contains every smaller one, and the order of the source does not matter.
        """
        if count is None or count >= len(self):
            return self
        chosen = {prompt.id for prompt in self.drawn().prompts[:count]}
        return replace(self, prompts=tuple(one for one in self.prompts if one.id in chosen))

    def drawn(self) -> PromptSet:
        """The set in the order in which subsets are drawn: its first `n` prompts are those of `limit(n)`."""
        return replace(self, prompts=tuple(_drawn(self.prompts)))

    def halves(self) -> tuple[PromptSet, PromptSet]:
        """The prompts to choose an alpha on, and those to confirm the choice on.

        A prompt's half follows from its id alone: however the set grows, is cut or is ordered, and in whichever set the prompt
        is met again, one that was chosen on is never confirmed on. So the halves are equal but for chance.
        """
        choose, confirm = (
            tuple(prompt for prompt in self.prompts if _confirms(prompt) is half) for half in (False, True)
        )
        return replace(self, prompts=choose), replace(self, prompts=confirm)


def prompt_of(
    messages: Sequence[Message],
    category: str = "",
    *,
    follow_ups: Sequence[str] = (),
    temperature: float | None = None,
    label: str = "",
) -> Prompt:
    """A prompt with its id."""
    return Prompt(
        _id(messages, follow_ups), tuple(map(dict, messages)), category, tuple(follow_ups), temperature, label
    )


def store_prompts(store: Store, prompts: PromptSet) -> None:
    """Store a set beside the responses to it, for those who read the output later."""
    store.put(prompt_set_key(prompts.name, prompts.digest), rows_text(prompts.prompts).encode())


def _id(messages: Sequence[Message], follow_ups: Sequence[str]) -> str:
    asked: list[Any] = [dict(message) for message in messages]
    return digest([asked, list(follow_ups)] if follow_ups else asked)


def _confirms(prompt: Prompt) -> bool:
    return int(digest(["half", prompt.id]), 16) % 2 == 1


def _drawn(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts in the order in which subsets take them.

    Any number of the first holds each category in proportion, and of each category both halves.
    """
    by_chance = sorted(prompts, key=lambda prompt: digest(["subset", prompt.id]))
    mixed = _spread(by_chance, lambda prompt: (prompt.category, _confirms(prompt)))
    return _spread(mixed, lambda prompt: (prompt.category,))


def _spread(prompts: Sequence[Prompt], stratum_of: Callable[[Prompt], tuple[object, ...]]) -> list[Prompt]:
    """The prompts so ordered that each stratum is spaced evenly, as in systematic sampling."""
    sizes = Counter(map(stratum_of, prompts))
    seen = Counter[tuple[object, ...]]()
    places = []
    for prompt in prompts:
        stratum = stratum_of(prompt)
        # Each stratum is shifted by chance, so that small ones do not all come last.
        shift = int(digest(["shift", *stratum]), 16) / 16**16
        places.append(((seen[stratum] + shift) / sizes[stratum], prompt.id))
        seen[stratum] += 1
    by_id = {prompt.id: prompt for prompt in prompts}
    return [by_id[one] for _, one in sorted(places)]
