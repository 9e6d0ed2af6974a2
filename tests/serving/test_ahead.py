"""Weights made ahead in a process: the published bytes, or what there is of them, and never anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from expo_ray.cli.process import main
from expo_ray.config import Pair
from expo_ray.errors import ArithmeticFault, InputChanged
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.step import Step, stepped
from expo_ray.serving.ahead import MadeAhead
from expo_ray.serving.host_memory import KEPT_FREE, spare_bytes
from expo_ray.serving.weights import Bytes, extrapolated
from tests.support.pairs import read_weights, same_bits, write_pair

STEP = Step(0.5, (("mlp", 2.0),))
PUBLISHED = ["--alpha", "0.5", "--multiplier", r"(mlp|moe|ffn|feed_forward|experts)\.|\.fc[12]\.=2"]


def plan_of(sft: Path, dpo: Path) -> PairPlan:
    return plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})


@pytest.fixture
def parents(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path, sft_shards=2)


@pytest.fixture
def plan(parents: tuple[Path, Path]) -> PairPlan:
    return plan_of(*parents)


def made_bytes(ahead: MadeAhead) -> int:
    """Bytes that the process has made; -1 once it has ended."""
    process = ahead._process
    assert process is not None
    try:
        return os.stat(f"/proc/{process.pid}/fd/{ahead._memory}").st_size
    except FileNotFoundError:
        return -1


def wait_until(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def make_all(ahead: MadeAhead, plan: PairPlan, step: Step) -> None:
    ahead.begin(step)
    wait_until(lambda: made_bytes(ahead) == sum(shard.size for shard in plan.shards))


@pytest.fixture
def ahead(plan: PairPlan) -> Iterator[MadeAhead]:
    ahead = MadeAhead(plan)
    yield ahead
    ahead.give_up()


def test_weights_made_ahead_have_the_published_bytes_however_many_of_them_are_there(
    ahead: MadeAhead, plan: PairPlan, parents: tuple[Path, Path], tmp_path: Path
) -> None:
    sft, dpo = map(str, parents)
    out = tmp_path / "out"
    assert main(["extrapolate", "--sft", sft, "--dpo", dpo, *PUBLISHED, "--output", str(out)]) == 0
    make_all(ahead, plan, STEP)
    made = ahead.take(STEP)
    published = b"".join((out / shard.file).read_bytes() for shard in plan.shards)
    assert made.tobytes() == published
    weights = read_weights(out)
    for count in (0, 1, 5000, 70_000, len(made) // 2, len(made) - 1, len(made)):
        assert same_bits(dict(extrapolated(stepped(plan, STEP), STEP.alpha, made[:count])), weights)


def test_tensors_that_are_there_are_not_computed_again(ahead: MadeAhead, plan: PairPlan) -> None:
    make_all(ahead, plan, STEP)
    made = ahead.take(STEP)
    weights = dict(extrapolated(stepped(plan, STEP), STEP.alpha, made))
    assert all(weight.untyped_storage().data_ptr() >= made.ctypes.data for weight in weights.values())
    made[:] = 0
    assert not any(weight.float().any() for weight in weights.values())


def test_another_step_than_the_one_expected_finds_nothing_and_ends_the_process(
    ahead: MadeAhead, plan: PairPlan
) -> None:
    make_all(ahead, plan, Step(2))
    process = ahead._process
    assert process is not None
    assert len(ahead.take(STEP)) == 0
    assert process.wait(60) < 0
    make_all(ahead, plan, Step(1))
    replaced = ahead._process
    make_all(ahead, plan, STEP)
    assert replaced is not None
    assert replaced.wait(60) < 0
    assert same_bits(
        dict(extrapolated(stepped(plan, STEP), STEP.alpha, ahead.take(STEP))),
        dict(extrapolated(stepped(plan, STEP), STEP.alpha)),
    )


def test_a_step_that_is_on_its_way_is_not_begun_again(ahead: MadeAhead, plan: PairPlan) -> None:
    ahead.begin(STEP)
    process = ahead._process
    ahead.begin(STEP)
    assert ahead._process is process


def test_the_process_has_the_lowest_priority_and_is_the_first_that_the_kernel_ends(
    ahead: MadeAhead, plan: PairPlan
) -> None:
    make_all(ahead, plan, STEP)
    assert ahead._process is not None
    process = psutil.Process(ahead._process.pid)
    assert process.nice() == 19
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "1000"


def test_weights_that_do_not_fit_into_memory_are_not_made(tmp_path: Path) -> None:
    sizes = {"sft": 1 << 40, "dpo": 1 << 40}
    for name, size in sizes.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        header = json.dumps(
            {"weight": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
        ).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header + name.encode())
            file.truncate(8 + len(header) + size)  # a hole: it takes no room on the disk
    ahead = MadeAhead(plan_of(tmp_path / "sft", tmp_path / "dpo"))
    ahead.begin(STEP)
    process = ahead._process
    assert process is not None
    assert process.wait(60) == 0
    assert len(ahead.take(STEP)) == 0


@pytest.mark.parametrize("wrong", ["an overflow", "a replaced parent"])
def test_what_is_wrong_is_said_by_the_swap_and_not_before(
    ahead: MadeAhead, plan: PairPlan, parents: tuple[Path, Path], wrong: str
) -> None:
    step, error = (Step(1e39), ArithmeticFault) if wrong == "an overflow" else (STEP, InputChanged)
    if wrong == "a replaced parent":
        os.utime(parents[1] / "model.safetensors")
    ahead.begin(step)
    wait_until(lambda: made_bytes(ahead) == -1)
    made = ahead.take(step)
    assert len(made) == 0
    with pytest.raises(error):
        list(extrapolated(stepped(plan, step), step.alpha, made))


def test_the_process_ends_when_the_engine_has_ended(plan: PairPlan, tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from tests.serving.test_ahead import *\n"
        "plan = plan_of(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "ahead = MadeAhead(plan)\n"
        "make_all(ahead, plan, STEP)\n"
        "print(ahead._process.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    command = [sys.executable, "-c", script, plan.sft.uri, plan.dpo.uri]
    number = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    wait_until(
        lambda: not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    )


def test_the_smallest_of_machine_and_groups_decides_how_much_memory_may_be_taken(tmp_path: Path) -> None:
    def write(**files: str) -> int:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return spare_bytes(tmp_path)

    assert spare_bytes(tmp_path) == 0  # nothing is known
    gib = 1 << 30
    machine = f"MemTotal: {64 << 20} kB\nMemFree: 5 kB\nMemAvailable: {40 << 20} kB\n"
    of_machine = 40 * gib - int(KEPT_FREE * 64 * gib)
    assert write(proc__meminfo=machine, proc__self__cgroup="0::/pod/box\n") in {of_machine, of_machine - 1}
    second = {
        "sys__fs__cgroup__pod__memory.max": f"{20 * gib}\n",
        "sys__fs__cgroup__pod__memory.current": f"{15 * gib}\n",
    }
    second |= {"sys__fs__cgroup__pod__memory.stat": f"anon 1\nactive_file {gib}\ninactive_file {2 * gib}\n"}
    assert write(**second) == 20 * gib - 12 * gib - 2 * gib
    unlimited = {f"sys__fs__cgroup__pod__box__memory.{name}": "max\n" for name in ("max", "current")}
    assert write(**unlimited) == 6 * gib
    first = {
        "proc__self__cgroup": "4:memory:/elsewhere/box\n1:cpu:/\n",  # of the host: in a container the group is the root
        "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{10 * gib}\n",
        "sys__fs__cgroup__memory__memory.usage_in_bytes": f"{10 * gib}\n",
        "sys__fs__cgroup__memory__memory.stat": f"total_active_file 0\ntotal_inactive_file {gib // 2}\n",
    }
    assert write(**first) == -gib // 2


def test_this_machine_says_how_much_memory_may_be_taken() -> None:
    memory = psutil.virtual_memory()
    assert -KEPT_FREE * memory.total <= spare_bytes() < memory.available


def test_an_empty_hand_over_computes_everything(plan: PairPlan) -> None:
    nothing: Bytes = MadeAhead(plan).take(STEP)
    assert len(dict(extrapolated(plan, 0.5, nothing))) == sum(len(shard.tensors) for shard in plan.shards)
