"""Decide where the engines and reward models of a job run: how much of which GPUs each takes, and who waits for whom.

Arithmetic over sizes and counts; nothing here asks a cluster. A worker takes a whole GPU where there are enough of them. Where not,
several share one, each with a fraction that Ray keeps account of and vLLM keeps to. Where even that does not hold them, the reward
models take turns, and where that does not, the engines take turns with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from expo_ray.errors import Collected, JobError

# Shares are counted in hundredths of a GPU, so that sums are exact.
WHOLE = 100
# vLLM's default for `gpu_memory_utilization`; of a fraction, the same part is used. The rest is for what vLLM does not count.
UTILIZATION = 0.92
# Of each process on a GPU: what CUDA and its libraries take.
CONTEXT_BYTES = 1 << 30
# Weights, and what computing with them takes beside: activations of a batch, CUDA graphs. A 7 B model has 2.9 GB for that.
WORKING_SHARE = 1.2
# Two workers with more than this cannot be put on the same GPU.
_HALF = 50


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as Ray counts it.

    Attributes:
        gpus: number of its GPUs.
        gpu_bytes: memory of the smallest of them; None if unknown.
        cpus: number of its CPUs.
    """

    gpus: int
    gpu_bytes: int | None = None
    cpus: float = math.inf


@dataclass(frozen=True)
class Need:
    """Groups of workers that a job wants on GPUs: the engines of a model, or the actors of a reward model.

    Attributes:
        name: of the model.
        weight_bytes: of the model in the data type that computes.
        cache_bytes: of the keys and values of as many tokens as it must hold at least.
        workers: of a group: each on its own GPU, all on one node, and each with its part of weights and cache.
        least, most: number of groups that must and that may run at the same time.
        cpus: of each group.
        share: hundredths of a GPU for each worker, where the job says so; None to choose.
        setting: the key of the job file that sets `workers`, for messages.
    """

    name: str
    weight_bytes: int
    cache_bytes: int = 0
    workers: int = 1
    least: int = 1
    most: int = 1
    cpus: float = 0
    share: int | None = None
    setting: str = "tensor_parallel_size"

    @property
    def num_bytes(self) -> int:
        """GPU memory that each worker needs at least."""
        split = WORKING_SHARE * self.weight_bytes + self.cache_bytes
        return math.ceil(split / self.workers) + CONTEXT_BYTES


@dataclass(frozen=True)
class Place:
    """What a need gets.

    Attributes:
        count: number of groups.
        share: hundredths of a GPU for each worker.
    """

    need: Need
    count: int
    share: int

    @property
    def gpus(self) -> float:
        """GPUs of each worker, as Ray counts them."""
        return self.share / WHOLE

    @property
    def utilization(self) -> float:
        """Part of the GPU's whole memory that a worker may use: vLLM's `gpu_memory_utilization`."""
        return round(UTILIZATION * self.share / WHOLE, 4)


TakingTurns = Literal["", "rewards", "all"]


@dataclass(frozen=True)
class Placement:
    """Where everything runs.

    Attributes:
        engines, rewards: in the order in which they were given.
        turns: who takes turns: nobody, the reward models, of which one is loaded at a time, or the engines as well.
        gpus: what each GPU of each node holds, as names and hundredths; those that take turns are all listed.
    """

    engines: tuple[Place, ...]
    rewards: tuple[Place, ...]
    turns: TakingTurns
    gpus: tuple[tuple[tuple[tuple[str, int], ...], ...], ...]

    def of(self, name: str) -> Place:
        """The place of a model.

        Raises:
            KeyError: if there is none of that name.
        """
        return {place.need.name: place for place in (*self.engines, *self.rewards)}[name]


def place(engines: Sequence[Need], rewards: Sequence[Need], nodes: Sequence[Node]) -> Placement:
    """Find a place for engines and reward models that are wanted at the same time.

    The first of these that fits: all on whole GPUs; reward models share GPUs; engines and reward models share GPUs; reward models
    take turns; engines and reward models take turns. Then groups are added one by one, up to `most`, while there is room.

    Args:
        nodes: of the cluster.

    Raises:
        Problems: with each need that fits nowhere even alone.
        JobError: if they do not fit beside each other, or no node has a GPU.
    """
    nodes = [node for node in nodes if node.gpus]
    if not nodes:
        raise JobError(
            f"{', '.join(need.name for need in (*engines, *rewards))}: wanted on GPUs, and the cluster has none; add GPU nodes"
            + (
                ", or set `device: cpu` under `serving`"
                if engines
                else ", or set `num_gpus: 0` under `rewards`"
            )
        )
    card = min((node.gpu_bytes for node in nodes if node.gpu_bytes), default=None)
    problems = Collected()
    for need in (*engines, *rewards):
        with problems.catching():
            _check_alone(need, nodes, card)
    problems.raise_any()
    for plan in _plans(engines, rewards, card):
        if plan.pack(nodes):
            grown = plan.grown(nodes)
            room = grown.pack(nodes)
            assert room is not None
            return Placement(grown.engines, grown.rewards, grown.turns, room.contents())
    raise _no_room(engines, nodes, card)


def _no_room(engines: Sequence[Need], nodes: Sequence[Node], card: int | None) -> JobError:
    """Which engines are wanted at the same time and do not fit, though each fits alone, and what helps."""
    names = [
        f"{need.name} ({f'{need.least} x ' if need.least > 1 else ''}{f'{need.workers} x ' if need.workers > 1 else ''}{_gigabytes(need.num_bytes)})"
        for need in engines
    ]
    gpus = f"{sum(node.gpus for node in nodes)} GPU(s){_of_size(card)}"
    return JobError(
        f"the engines of {', '.join(names)} are served at the same time and do not fit on {gpus}; serve fewer models with one job, or "
        "add GPUs"
    )


def describe(placement: Placement) -> list[str]:
    """Lines for people: one for each engine and reward model, and one if any wait for others."""
    lines = [_line(engine, "engine") for engine in placement.engines]
    lines += [_line(reward, "actor") for reward in placement.rewards]
    if placement.turns == "rewards":
        lines.append(
            "the reward models take turns: each is loaded when it has answers to score, and ends for the next"
        )
    elif placement.turns:
        lines.append(
            "the engines and the reward models take turns: the engines answer a round of the search and end, then each reward model is "
            "loaded, scores it and ends"
        )
    return lines


def _line(place: Place, kind: str) -> str:
    need = place.need
    gpus = "1 GPU" if place.share == WHOLE else f"{place.gpus:g} of a GPU"
    each = gpus if need.workers == 1 else f"{need.workers} workers on a node with {gpus} each"
    wanted = f"; {place.count} of {need.most}, as more do not fit" if place.count < need.most else ""
    return f"{need.name}: {place.count} {kind}(s), {each}, which needs at least {_gigabytes(need.num_bytes)}{wanted}"


def share_of(num_bytes: int, gpu_bytes: int | None) -> int:
    """The smallest share of a GPU, in hundredths, of whose memory a worker can use `num_bytes`; all of it if its size is unknown."""
    return WHOLE if gpu_bytes is None else math.ceil(WHOLE * num_bytes / (UTILIZATION * gpu_bytes))


@dataclass(frozen=True)
class _Plan:
    """Places under consideration."""

    engines: tuple[Place, ...]
    rewards: tuple[Place, ...]
    turns: TakingTurns

    def pack(self, nodes: Sequence[Node]) -> _Room | None:
        """Put everything on the nodes; None if there is no room at some time. Returns the room with all who take turns in it."""
        room = _Room(nodes)
        if not room.take_all(self.engines):
            return None
        if not self.turns:
            return room if room.take_all(self.rewards) else None
        beside = room.copy() if self.turns == "rewards" else _Room(nodes)
        for reward in self.rewards:
            alone = beside.copy()
            if not alone.take_all([reward]):
                return None
            room.add_contents(alone, reward.need.name)
        return room

    def grown(self, nodes: Sequence[Node]) -> _Plan:
        """Add groups in turn: to the engines first, then to each reward model, and again.

        Only those that take more than half a GPU: smaller ones would be put beside each other by Ray and gain nothing.
        """
        plan, places = self, [*self.engines, *self.rewards]
        grows = True
        while grows:
            grows = False
            for index, current in enumerate(places):
                if current.count >= current.need.most or current.share <= _HALF:
                    continue
                larger = [*places]
                larger[index] = replace(current, count=current.count + 1)
                split = len(self.engines)
                candidate = _Plan(tuple(larger[:split]), tuple(larger[split:]), self.turns)
                if candidate.pack(nodes):
                    plan, places, grows = candidate, larger, True
        return plan


def _plans(engines: Sequence[Need], rewards: Sequence[Need], card: int | None) -> Iterator[_Plan]:
    """Yield what to try, best first. `level` is what every engine gets of a GPU at least."""
    levels = range(WHOLE, 0, -1)
    if all(need.share for need in engines):
        levels = range(WHOLE, WHOLE - 1, -1)
    yield _Plan(_at_level(engines, card, WHOLE), _at_level(rewards, card, WHOLE), turns="")
    for level in levels:
        yield _Plan(_at_level(engines, card, level), _at_level(rewards, card, 0), turns="")
    for level in levels if len(rewards) > 1 else ():
        rest = WHOLE if level == WHOLE else 0
        yield _Plan(_at_level(engines, card, level), _at_level(rewards, card, rest), turns="rewards")
    if engines and rewards:
        yield _Plan(_at_level(engines, card, WHOLE), _at_level(rewards, card, WHOLE), turns="all")


def _at_level(needs: Sequence[Need], card: int | None, level: int) -> tuple[Place, ...]:
    """Give each worker `level` hundredths of a GPU, or what it needs at least if that is more.

    Workers of one group have more than half a GPU, or Ray may put two of them on the same.
    """
    places = []
    for need in needs:
        share = need.share or max(level, share_of(need.num_bytes, card))
        if need.workers > 1:
            share = max(share, _HALF + 1)
        places.append(Place(need, need.least, min(share, WHOLE)))
    return tuple(places)


class _Room:
    """What is free on every GPU, and who has the rest.

    Groups are taken as Ray takes them: onto the fullest GPUs on which they fit, of the fullest node.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._free = [[WHOLE] * node.gpus for node in nodes]
        self._cpus = [node.cpus for node in nodes]
        self._held: list[list[list[tuple[str, int]]]] = [[[] for _ in range(node.gpus)] for node in nodes]

    def copy(self) -> _Room:
        other = _Room(())
        other._free = [[*cards] for cards in self._free]
        other._cpus = [*self._cpus]
        other._held = [[[*held] for held in cards] for cards in self._held]
        return other

    def take_all(self, places: Sequence[Place]) -> bool:
        """Take room for all groups, the largest first; False if there is not enough."""
        ordered = sorted(places, key=lambda place: (place.need.workers, place.share), reverse=True)
        return all(self._take(place) for place in ordered for _ in range(place.count))

    def _take(self, place: Place) -> bool:
        need = place.need
        fitting = {
            node: [card for card in range(len(free)) if free[card] >= place.share]
            for node, free in enumerate(self._free)
            if self._cpus[node] >= need.cpus
        }
        nodes = [node for node, cards in fitting.items() if len(cards) >= need.workers]
        if not nodes:
            return False
        node = min(nodes, key=lambda node: sum(self._free[node]))
        self._cpus[node] -= need.cpus
        for card in sorted(fitting[node], key=lambda card: self._free[node][card])[: need.workers]:
            self._free[node][card] -= place.share
            self._held[node][card].append((need.name, place.share))
        return True

    def add_contents(self, other: _Room, name: str) -> None:
        """List what `name` has in another room, beside the same engines, without taking room for it."""
        for ours, theirs in zip(self._held, other._held, strict=True):
            for held, also in zip(ours, theirs, strict=True):
                held += [entry for entry in also if entry[0] == name]

    def contents(self) -> tuple[tuple[tuple[tuple[str, int], ...], ...], ...]:
        return tuple(tuple(tuple(held) for held in cards) for cards in self._held)


def _check_alone(need: Need, nodes: Sequence[Node], card: int | None) -> None:
    """Check that a group fits on some node with nothing else there.

    Raises:
        JobError: if it does not.
    """
    most = max(node.gpus for node in nodes)
    if need.workers > most:
        raise JobError(
            f"{need.name}: `{need.setting}` {need.workers} takes as many GPUs of one node, and the largest node has {most}; set at most "
            f"{most}, or add a node with {need.workers}"
        )
    if _Room(nodes).take_all([Place(need, 1, need.share or WHOLE)]) is False:
        raise JobError(
            f"{need.name}: wants {need.cpus:g} CPU(s) and {need.workers} GPU(s), and no node has both (the largest have "
            f"{max(node.cpus for node in nodes):g} and {most}); lower `num_cpus`, or give the GPU nodes more CPUs"
        )
    if card is None:
        return
    allowed = UTILIZATION * card * (need.share or WHOLE) / WHOLE
    if need.num_bytes > allowed:
        raise JobError(
            f"{need.name}: a worker needs {_gigabytes(need.num_bytes)} of GPU memory, and may use {_gigabytes(allowed)} "
            f"{'of its share ' if need.share else ''}of the cluster's smallest GPU ({_gigabytes(card)}); {_remedy(need, nodes, card)}"
        )


def _remedy(need: Need, nodes: Sequence[Node], card: int) -> str:
    """Find what would make room for a need that is alone on the smallest GPU and does not fit."""
    if need.share and need.num_bytes <= UTILIZATION * card:
        return f"give it at least {share_of(need.num_bytes, card) / WHOLE:g} of a GPU, or leave the share out"
    remedies = []
    most = max(node.gpus for node in nodes)
    larger = (2**power for power in range(1, most.bit_length()) if 2**power > need.workers)
    if workers := next((n for n in larger if replace(need, workers=n).num_bytes <= UTILIZATION * card), None):
        remedies.append(f"set `{need.setting}: {workers}`")
    if replace(need, cache_bytes=need.cache_bytes // 8).num_bytes <= UTILIZATION * card:
        remedies.append("lower `max_model_len`")
    if any((node.gpu_bytes or 0) * UTILIZATION >= need.num_bytes for node in nodes):
        remedies.append("start Ray with `--num-gpus 0` on nodes with smaller GPUs than it needs")
    return " or ".join([*remedies, "use larger GPUs"][: max(1, len(remedies))])


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _of_size(card: int | None) -> str:
    return f" of {_gigabytes(card)}" if card else ""
