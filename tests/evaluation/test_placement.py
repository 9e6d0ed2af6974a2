"""Where engines and reward models run: sizes and clusters in, places out. No cluster, no GPU."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo_ray.errors import ExpoError
from expo_ray.evaluation.placement import UTILIZATION, Need, Node, Placement, place

GB = 10**9
H100, L40S, RTX4090 = 85 * GB, 48 * GB, int(25.3 * GB)
# What `examples/evaluate-7b.yaml` wants, by the headers of its models.
CACHED = 2 * 2 * 32 * 8 * 128  # bytes of a token's keys and values: 32 layers of 8 heads of 128
ENGINE = Need("zephyr-7b", 2 * 7_241_732_096, 32_768 * CACHED, most=4)
REWARDS = (
    Need("rm-mistral-7b", 2 * 7_110_660_096, 16_384 * CACHED, most=2, cpus=1, setting="num_gpus"),
    Need("skywork-8b", 2 * 7_504_924_672, 16_384 * CACHED, most=2, cpus=1, setting="num_gpus"),
)
SEVENTY = Need("llama-70b", 2 * 70_553_706_496, 32_768 * 2 * 2 * 80 * 8 * 128)


def machines(*gpus: int, gpu_bytes: int | None = H100, cpus: float = 64) -> list[Node]:
    return [Node(many, gpu_bytes, cpus) for many in gpus]


def counts(placement: Placement) -> dict[str, tuple[int, int]]:
    """Groups of each model and hundredths of a GPU of each worker."""
    return {place.need.name: (place.count, place.share) for place in (*placement.engines, *placement.rewards)}


@pytest.mark.parametrize(
    ("gpus", "gpu_bytes", "turns", "expected"),
    [
        ((1,), H100, "", [(1, 46), (1, 26), (1, 28)]),
        ((2,), H100, "", [(1, 100), (1, 26), (1, 28)]),
        ((1, 1), H100, "", [(1, 100), (1, 26), (1, 28)]),
        ((4,), H100, "", [(2, 100), (1, 100), (1, 100)]),
        ((8,), H100, "", [(4, 100), (2, 100), (2, 100)]),
        ((2, 2, 2, 2), H100, "", [(4, 100), (2, 100), (2, 100)]),
        ((2,), L40S, "", [(1, 100), (1, 46), (1, 49)]),
        ((1,), 56 * GB, "rewards", [(1, 58), (1, 40), (1, 42)]),
        ((2,), RTX4090, "rewards", [(1, 100), (1, 100), (1, 100)]),
        ((1,), L40S, "all", [(1, 100), (1, 100), (1, 100)]),
        ((1,), RTX4090, "all", [(1, 100), (1, 100), (1, 100)]),
        ((3,), RTX4090, "", [(1, 100), (1, 100), (1, 100)]),
        ((4, 4), RTX4090, "", [(4, 100), (2, 100), (2, 100)]),
    ],
)
def test_the_example_runs_on_one_to_eight_gpus(
    gpus: tuple[int, ...], gpu_bytes: int, turns: str, expected: list[tuple[int, int]]
) -> None:
    placement = place([ENGINE], REWARDS, machines(*gpus, gpu_bytes=gpu_bytes))
    assert placement.turns == turns
    assert list(counts(placement).values()) == expected


def wide(need: Need, workers: int) -> Need:
    return Need(need.name, need.weight_bytes, need.cache_bytes, workers, most=need.most)


@pytest.mark.parametrize(
    ("engine", "gpus", "expected"),
    [
        (wide(ENGINE, 4), (8,), [(1, 100), (2, 100), (2, 100)]),
        (wide(ENGINE, 4), (4, 4), [(1, 100), (2, 100), (2, 100)]),
        (wide(SEVENTY, 4), (4,), [(1, 72), (1, 26), (1, 28)]),
        (wide(SEVENTY, 8), (8,), [(1, 72), (1, 26), (1, 28)]),
        (wide(SEVENTY, 8), (8, 2), [(1, 100), (1, 100), (1, 100)]),
        (wide(SEVENTY, 8), (8, 1), [(1, 100), (1, 26), (1, 28)]),
    ],
)
def test_engines_over_several_gpus_stay_on_one_node(
    engine: Need, gpus: tuple[int, ...], expected: list[tuple[int, int]]
) -> None:
    placement = place([engine], REWARDS, machines(*gpus))
    assert list(counts(placement).values()) == expected
    holding = [sum(engine.name in dict(card) for card in node) for node in placement.gpus]
    assert all(many % engine.workers == 0 for many in holding)


def test_eight_gpus_on_four_nodes_hold_no_engine_of_four() -> None:
    with pytest.raises(ExpoError, match=r"`tensor_parallel_size` 4 .* the largest node has 2; set at most 2"):
        place([wide(SEVENTY, 4)], REWARDS, machines(2, 2, 2, 2))


def test_all_that_can_fit_nowhere_is_reported_at_once_with_what_would_help() -> None:
    with pytest.raises(ExpoError) as caught:
        place([SEVENTY], [Need("huge", 1000 * GB, setting="num_gpus"), *REWARDS], machines(8))
    engine, huge = str(caught.value).strip().split("\n")
    assert "llama-70b: a worker needs 181.1 GB of GPU memory, and may use 78.2 GB" in engine
    assert "set `tensor_parallel_size: 4`" in engine
    assert "huge: a worker needs" in huge
    assert huge.endswith("use larger GPUs")
    # What is advised works.
    place([wide(SEVENTY, 4)], REWARDS, machines(8))


def test_a_long_context_that_does_not_fit_can_be_lowered() -> None:
    long = Need("long", 14 * GB, 100 * GB)
    with pytest.raises(ExpoError, match=r"set `tensor_parallel_size: 2` or lower `max_model_len`"):
        place([long], (), machines(2))
    with pytest.raises(ExpoError, match=r"; lower `max_model_len`"):
        place([long], (), machines(1))


def test_the_smallest_gpu_decides_and_can_be_left_out() -> None:
    mixed = [*machines(8), *machines(1, gpu_bytes=16 * GB)]
    with pytest.raises(ExpoError, match=r"start Ray with `--num-gpus 0` on nodes with smaller GPUs"):
        place([ENGINE], REWARDS, mixed)
    assert counts(place([ENGINE], REWARDS, [*machines(8), Node(0)])) == counts(
        place([ENGINE], REWARDS, machines(8))
    )
    # A share is as large in bytes on the smaller of two kinds as it must be.
    placement = place([ENGINE], REWARDS, [*machines(1), *machines(1, gpu_bytes=L40S)])
    assert counts(placement)["skywork-8b"] == (1, 49)


def test_gpus_of_unknown_memory_are_taken_whole_or_as_the_job_says() -> None:
    assert set(counts(place([ENGINE], REWARDS, machines(3, gpu_bytes=None))).values()) == {(1, 100)}
    assert place([ENGINE], REWARDS, machines(2, gpu_bytes=None)).turns == "rewards"
    assert place([ENGINE], REWARDS, machines(1, gpu_bytes=None)).turns == "all"
    halves = [Need("half", 1, share=50), Need("other", 1, share=50)]
    placement = place([ENGINE], halves, machines(2, gpu_bytes=None))
    assert counts(placement) == {"zephyr-7b": (1, 100), "half": (1, 50), "other": (1, 50)}


def test_a_share_that_is_too_small_is_refused_with_the_smallest_that_is_not() -> None:
    tight = Need("tight", 14 * GB, share=20)
    with pytest.raises(ExpoError, match=r"give it at least 0\.23 of a GPU"):
        place([], [tight], machines(1))
    assert counts(place([], [Need("tight", 14 * GB, share=23)], machines(1))) == {"tight": (1, 23)}


def test_reward_actors_need_cpus_beside_the_gpu() -> None:
    with pytest.raises(ExpoError, match=r"wants 8 CPU\(s\) and 1 GPU\(s\), and no node has both"):
        place([], [Need("rm", GB, cpus=8)], machines(4, cpus=4))
    placement = place([], [Need("rm", GB, cpus=2, most=4)], machines(4, cpus=4))
    assert counts(placement) == {"rm": (2, 100)}


def test_engines_of_several_models_share_a_gpu_and_are_refused_where_they_cannot() -> None:
    several = [Need(f"model-{number}", 14 * GB, 4 * GB) for number in range(5)]
    assert counts(place(several[:1], (), machines(1))) == {"model-0": (1, 100)}
    assert counts(place(several[:2], (), machines(1))) == {"model-0": (1, 50), "model-1": (1, 50)}
    with pytest.raises(
        ExpoError, match=r"the engines of model-0 .* do not fit on 1 GPU\(s\) of 85\.0 GB; serve fewer"
    ):
        place(several, (), machines(1))


NEEDS = st.builds(
    Need,
    st.sampled_from(["a", "b", "c", "d", "e", "f"]),
    st.integers(1, 60 * GB),
    st.integers(0, 20 * GB),
    st.sampled_from([1, 1, 1, 2, 4]),
    most=st.integers(1, 5),
    cpus=st.sampled_from([0, 1]),
)
CLUSTERS = st.lists(
    st.builds(
        Node, st.sampled_from([0, 1, 2, 4, 8]), st.sampled_from([RTX4090, L40S, H100]), st.integers(1, 9)
    ),
    min_size=1,
    max_size=5,
).filter(lambda nodes: any(node.gpus for node in nodes))


@given(
    st.lists(NEEDS, min_size=1, max_size=6, unique_by=lambda need: need.name),
    st.integers(0, 3),
    CLUSTERS,
)
def test_no_gpu_ever_holds_more_than_it_has(needs: list[Need], split: int, nodes: list[Node]) -> None:
    engines, rewards = needs[:split], needs[split:]
    try:
        placement = place(engines, rewards, nodes)
    except ExpoError:
        return
    smallest = min(node.gpu_bytes or 0 for node in nodes if node.gpus)
    names = [need.name for need in rewards]
    served = {need.name for need in engines}
    at_a_time = {
        "": [{*names} | served],
        "rewards": [{name} | served for name in names],
        "all": [served, *({name} for name in names)],
    }
    for active in at_a_time[placement.turns]:
        for card in (card for node in placement.gpus for card in node):
            assert sum(share for name, share in card if name in active) <= 100
    for taken in (*placement.engines, *placement.rewards):
        need = taken.need
        assert need.least <= taken.count <= need.most
        assert UTILIZATION * smallest * taken.share / 100 >= need.num_bytes
        by_node = [Counter(name for card in node for name, _ in card)[need.name] for node in placement.gpus]
        assert sum(by_node) == taken.count * need.workers
        assert all(many % need.workers == 0 for many in by_node)
        if need.workers > 1:  # two workers of a group on one GPU would not start
            assert taken.share > 50
