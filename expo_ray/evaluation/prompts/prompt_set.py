"""A set of prompts: a name, a fixed order, reproducible subsets, and two halves that never mix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from expo_ray.evaluation.paths import prompt_set_key
from expo_ray.evaluation.prompts.clusters import cluster_prompts, deal_clusters
from expo_ray.evaluation.records import Message, Prompt, digest
from expo_ray.evaluation.row_store import rows_text
from expo_ray.storage import Store


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their source, without repetitions.

    Attributes:
        name: in paths and reports.
        repeated: number of rows that were left out because they repeat an earlier prompt.
        digest: of ids, categories and temperatures, in order.
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
        """The set of `prompts`; of equal prompts the first is kept."""
        listed = list(prompts)
        kept = {prompt.id: prompt for prompt in reversed(listed)}
        order = dict.fromkeys(prompt.id for prompt in listed)
        return cls(name, tuple(kept[prompt_id] for prompt_id in order), len(listed) - len(kept))

    @cached_property
    def clusters(self) -> Mapping[str, int]:
        """The cluster of each prompt, by id; see `cluster_prompts`."""
        return cluster_prompts(self.prompts)

    def limit(self, count: int | None) -> PromptSet:
        """The subset of `count` prompts in the set's order, with each category and half in proportion; the whole set for None.

        A larger subset contains every smaller one, whatever the order of the source.
        """
        if count is None or count >= len(self):
            return self
        chosen = {prompt.id for prompt in self.drawn().prompts[:count]}
        return replace(self, prompts=tuple(prompt for prompt in self.prompts if prompt.id in chosen))

    def first(self, count: int) -> PromptSet:
        """The first prompts of the set, in its order."""
        return replace(self, prompts=self.prompts[:count])

    def between(self, start: int, stop: int) -> PromptSet:
        """A slice of the set, in its order."""
        return replace(self, prompts=self.prompts[start:stop])

    def drawn(self) -> PromptSet:
        """The set in the order in which subsets are drawn: its first `n` prompts are those of `limit(n)`."""
        return replace(self, prompts=tuple(_in_order_of_drawing(self.prompts)))

    def halves(self) -> tuple[PromptSet, PromptSet]:
        """The prompts on which an alpha is chosen, and those on which the choice is confirmed.

        A prompt's half follows from its id alone: a prompt that once chose never confirms, however sets grow, are cut or share
        prompts. The price is that the halves are of equal size only by chance. Near-duplicates and prompts of one template stay together,
        and are dealt to the halves in turn: there, the half may follow from the rest of the set.
        """
        dealt = deal_clusters(self.clusters)
        choose, confirm = (
            tuple(prompt for prompt in self.prompts if dealt.get(prompt.id, _confirms(prompt)) is half)
            for half in (False, True)
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
    """A prompt, with the id that follows from its turns."""
    return Prompt(
        _id(messages, follow_ups), tuple(map(dict, messages)), category, tuple(follow_ups), temperature, label
    )


def store_prompts(store: Store, prompts: PromptSet) -> None:
    """Store a set beside the responses to it, for those who read the output later."""
    store.put(prompt_set_key(prompts.name, prompts.digest), rows_text(prompts.prompts).encode())


def _id(messages: Sequence[Message], follow_ups: Sequence[str]) -> str:
    turns: list[Any] = [dict(message) for message in messages]
    return digest([turns, list(follow_ups)] if follow_ups else turns)


def _confirms(prompt: Prompt) -> bool:
    """True if the prompt belongs to the half on which the choice is confirmed."""
    return int(digest(["half", prompt.id]), 16) % 2 == 1


def _in_order_of_drawing(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Order prompts so that the first `n` hold each category in proportion, and both halves of each category."""
    shuffled = sorted(prompts, key=lambda prompt: digest(["subset", prompt.id]))
    mixed = _spread(shuffled, lambda prompt: (prompt.category, _confirms(prompt)))
    return _spread(mixed, lambda prompt: (prompt.category,))


def _spread(prompts: Sequence[Prompt], stratum_of: Callable[[Prompt], tuple[object, ...]]) -> list[Prompt]:
    """Order prompts so that each stratum is spaced evenly, as in systematic sampling."""
    sizes = Counter(map(stratum_of, prompts))
    seen = Counter[tuple[object, ...]]()
    places = []
    for prompt in prompts:
        stratum = stratum_of(prompt)
        # A random shift for each stratum: without it, the first prompts of all strata would stand together at the beginning.
        shift = int(digest(["shift", *stratum]), 16) / 16**16
        places.append(((seen[stratum] + shift) / sizes[stratum], prompt.id))
        seen[stratum] += 1
    by_id = {prompt.id: prompt for prompt in prompts}
    return [by_id[prompt_id] for _, prompt_id in sorted(places)]
