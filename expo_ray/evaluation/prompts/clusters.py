"""Prompts that hang together: near-duplicates, and those that fill the same template. Found by their words alone, without a model.

What a search learns on one of them it has learned on all: a half that has seen a template cannot confirm on it, and an interval over such
prompts as if they were independent is too narrow.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from expo_ray.evaluation.records import Prompt, digest

# So few clusters say nothing of other prompts. Sizes count: one that holds most of a set leaves about one. The largest then fall apart, and
# what is found holds for prompts of their form.
FEWEST_CLUSTERS = 6
# A word in more prompts than this share belongs to the form of the whole set, and tells no two prompts apart.
_OF_THE_SET = 0.5
# Words of a text that are looked at.
_MOST_WORDS = 400
# Runs of two words that so many prompts share, one of the words of five letters or more, are taken for the fixed words of a template; a prompt
# with fewer than three of them has none.
_FIXED_IN, _LONG_WORD, _FEWEST_FIXED = 3, 5, 3
# Words at the beginning or the end of a prompt that are a template by themselves, if the prompt has more.
_EDGE = 6
# Near-duplicates have this share of their runs of three words in common (Jaccard), prompts of one template of their fixed words. MinHash
# (Broder 1997) finds candidates: with 16 bands of 2 hashes, 99 % of those with one half.
_SHINGLE, _SIMILAR, _BANDS, _ROWS = 3, 0.5, 16, 2
# Categories are drawn from in proportion, and are strata. So many of them are samples of a kind, and each is a cluster.
_MANY_CATEGORIES = 20
_PRIME = (1 << 31) - 1
_STANDING_FOR = 8
# The fixed words of a template are those in this share of its prompts, if it has so many; another prompt with this share of them fills it too.
_CORE, _TEMPLATE_SIZE = 0.75, 5


def cluster_prompts(prompts: Sequence[Prompt]) -> Mapping[str, int]:
    """Number the clusters that prompts belong to, by prompt id; a prompt that resembles no other has one of its own.

    The form that most of a set has makes no cluster (`FEWEST_CLUSTERS`). Deterministic, whatever the order.
    """
    ordered = sorted(prompts, key=lambda prompt: prompt.id)
    groups = _Groups(len(ordered))
    texts = _without_common_words([_words(prompt) for prompt in ordered])
    for number, text in enumerate(texts):
        for key in _edges(text):
            groups.join_by_key(key, number)
    near = [_runs(text, _SHINGLE) for text in texts]
    for first, second in [*_similar_pairs(near), *_similar_pairs(_fixed_words(texts))]:
        groups.join(first, second)
    _join_stragglers(groups, texts)
    categories = Counter(prompt.category for prompt in ordered)
    if len(categories) >= _MANY_CATEGORIES and "" not in categories:
        for number, prompt in enumerate(ordered):
            groups.join_by_key(("category", prompt.category), number)
    labels = _without_the_largest(groups.labels())
    return {prompt.id: label for prompt, label in zip(ordered, labels, strict=True)}


def _without_the_largest(labels: Sequence[int]) -> list[int]:
    """Let the largest clusters fall apart until there are enough: the square of the prompts over the sum of the squared sizes (Kish 1965)."""
    sizes = Counter(labels)
    squares = sum(size**2 for size in sizes.values())
    fallen = set[int]()
    for label, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if len(labels) ** 2 >= FEWEST_CLUSTERS * squares or size == 1:
            break
        fallen.add(label)
        squares -= size**2 - size
    return [number if label in fallen else label for number, label in enumerate(labels)]


def deal_clusters(clusters: Mapping[str, int]) -> Mapping[str, bool]:
    """Give each cluster of several prompts a half: by prompt id, True for the confirming one. Prompts that stand alone are left out.

    Large clusters come first, and each pair of clusters is split, so that the halves have about as many prompts and clusters.
    """
    members = defaultdict[int, list[str]](list)
    for prompt_id, label in clusters.items():
        members[label].append(prompt_id)
    shared = sorted(
        (sorted(ids) for ids in members.values() if len(ids) > 1),
        key=lambda ids: (-len(ids), digest(["cluster", ids[0]])),
    )
    # 0 1 1 0 0 1 1 0: no half always gets the larger one.
    return {prompt_id: (place + 1) // 2 % 2 == 1 for place, ids in enumerate(shared) for prompt_id in ids}


class _Groups:
    """Disjoint sets of numbers."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))
        self._first: dict[object, int] = {}

    def join(self, first: int, second: int) -> None:
        """Make one set of those that hold the two."""
        first, second = self._root(first), self._root(second)
        self._parents[max(first, second)] = min(first, second)

    def join_by_key(self, key: object, number: int) -> None:
        """Join `number` with all others of that key."""
        self.join(self._first.setdefault(key, number), number)

    def labels(self) -> list[int]:
        """The smallest member of each number's set."""
        return [self._root(number) for number in range(len(self._parents))]

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number


def _words(prompt: Prompt) -> list[str]:
    """The user's words, in lower case, with all numbers alike."""
    turns = [turn["content"] for turn in prompt.messages if turn["role"] == "user"]
    text = " ".join([*turns, *prompt.follow_ups]).lower()
    return [re.sub(r"\d+", "0", word) for word in re.findall(r"\w+", text)[:_MOST_WORDS]]


def _without_common_words(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    frequencies = Counter(word for text in texts for word in set(text))
    most = len(texts) * _OF_THE_SET
    return [[word for word in text if frequencies[word] <= most] for text in texts]


def _edges(text: Sequence[str]) -> Iterator[object]:
    """The first and the last words of a prompt that has more, and all of a short one."""
    if len(text) > _EDGE + 1:
        yield ("first", *text[:_EDGE])
        yield ("last", *text[-_EDGE:])
    elif text:
        yield ("all", *text)


def _runs(text: Sequence[str], length: int) -> set[str]:
    if not text:
        return set()
    return {" ".join(text[at : at + length]) for at in range(max(len(text) - length + 1, 1))}


def _with_ends(text: Sequence[str]) -> set[str]:
    """The runs of two words of a text, its beginning and its end among them."""
    return _runs(["^", *text, "$"], 2) if text else set()


def _fixed_words(texts: Sequence[Sequence[str]]) -> list[set[str]]:
    """The runs of two words of each text, its ends among them, that other texts have as well and that say something; none where they are few."""
    runs = [{run for run in _with_ends(text) if max(map(len, run.split())) >= _LONG_WORD} for text in texts]
    frequencies = Counter(run for of_text in runs for run in of_text)
    fixed = [{run for run in of_text if frequencies[run] >= _FIXED_IN} for of_text in runs]
    return [of_text if len(of_text) >= _FEWEST_FIXED else set() for of_text in fixed]


def _join_stragglers(groups: _Groups, texts: Sequence[Sequence[str]]) -> None:
    """Join a prompt that stands alone, for what fills its gaps is long, with the template whose fixed words it has."""
    labels, runs = groups.labels(), [_with_ends(text) for text in texts]
    sizes = Counter(labels)
    for template in (label for label, size in sizes.items() if size >= _TEMPLATE_SIZE):
        counted = Counter(
            run for number, label in enumerate(labels) if label == template for run in runs[number]
        )
        core = {run for run, count in counted.items() if count >= _CORE * sizes[template]}
        if len(core) >= _FEWEST_FIXED:
            for number, label in enumerate(labels):
                if sizes[label] < _TEMPLATE_SIZE and len(core & runs[number]) >= _CORE * len(core):
                    groups.join(number, template)


def _similar_pairs(sets: Sequence[set[str]]) -> Iterator[tuple[int, int]]:
    """Pairs of sets with at least half of their members in common; enough pairs to join all of them."""
    generator = np.random.default_rng(20_240_425)
    factors, shifts = generator.integers(1, _PRIME, (2, _BANDS * _ROWS, 1))
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for number, members in enumerate(sets):
        if not members:
            continue
        hashes = np.array([zlib.crc32(member.encode()) % _PRIME for member in sorted(members)], np.int64)
        smallest = ((factors * hashes + shifts) % _PRIME).min(axis=1).reshape(_BANDS, _ROWS)
        for band, row in enumerate(smallest):
            bucket = buckets.setdefault((band, row.tobytes()), [])
            # The first few of a bucket stand for all of it: the bucket of a large template stays cheap.
            for other in bucket:
                common = len(members & sets[other])
                if common >= _SIMILAR * (len(members) + len(sets[other]) - common):
                    yield other, number
                    break
            else:
                if len(bucket) < _STANDING_FOR:
                    bucket.append(number)
