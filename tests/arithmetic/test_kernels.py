from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from expo_ray.arithmetic import kernels
from expo_ray.arithmetic.cpu.kernel import CpuKernel
from expo_ray.arithmetic.gpu.kernel import TorchKernel
from expo_ray.arithmetic.kernels import load_kernel, resolve_device
from expo_ray.arithmetic.rule import Rule, random_key
from expo_ray.config import RoundingName
from expo_ray.errors import JobError
from tests.support.exact_arithmetic import DTYPES, any_words, run, tuned, weights

EXACT: tuple[RoundingName, ...] = ("nearest", "stochastic")
RULES = [
    Rule(dpo, sft, out, rounding) for dpo, sft, out, rounding in product(DTYPES, DTYPES, DTYPES, EXACT)
] + [Rule(dpo, sft, "BF16", "reference") for dpo, sft in product(DTYPES, repeat=2)]
ALPHAS = (0.3, -0.5, 8.0, 0.0, -1.0)
KEY = random_key(3, "lm_head.weight")


def named(rule: Rule) -> str:
    return f"{rule.dpo_dtype}-{rule.sft_dtype}-{rule.out_dtype}-{rule.rounding}"


def assert_equal_to_the_cpu(rule: Rule, device: str, first: int) -> None:
    sft = np.concatenate([any_words(rule.sft_dtype, 3000, 1), weights(rule.sft_dtype, 6000, 2)])
    dpo = any_words(rule.dpo_dtype, 9000, 3)
    dpo[3000:] = tuned(sft[3000:], rule.sft_dtype, 4, rule.dpo_dtype)
    if rule.dpo_dtype == rule.sft_dtype:
        dpo[:1000] = sft[:1000]
    expected, statistics = run(rule, dpo, sft, ALPHAS, key=KEY, first=first, kernel=CpuKernel(rule))
    outs, sums = run(rule, dpo, sft, ALPHAS, key=KEY, first=first, kernel=TorchKernel(rule, device))
    for out, words in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(out, words)
    assert sums == statistics


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_torch_and_compiled_arithmetic_agree_to_the_bit(rule: Rule) -> None:
    assert_equal_to_the_cpu(rule, "cpu", 1_000_003)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_agrees_to_the_bit() -> None:
    for rule in RULES:
        assert_equal_to_the_cpu(rule, "cuda", 1_000_003)


@pytest.mark.parametrize("rounding", EXACT)
def test_any_division_into_chunks_gives_the_same(rounding: RoundingName) -> None:
    rule = Rule("BF16", "BF16", "F16", rounding)
    sft = weights("BF16", 9000, 5)
    dpo = tuned(sft, "BF16", 6)
    (whole,), _ = run(rule, dpo, sft, [0.5], key=KEY, first=77)
    kernel, parts, start = TorchKernel(rule, "cpu"), [], 0
    for size in (1, 3, 2044, 2048, 1, 4903):
        part = slice(start, start + size)
        (out,), _ = run(rule, dpo[part], sft[part], [0.5], key=KEY, first=77 + start, kernel=kernel)
        parts.append(out)
        start = part.stop
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_each_thread_has_its_own_buffers() -> None:
    rule = Rule("BF16", "BF16", "BF16", "stochastic")
    pairs = [(tuned(sft, "BF16", 7), sft) for sft in (weights("BF16", 1000 * k, k) for k in range(1, 21))]
    kernel = TorchKernel(rule, "cpu")
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(lambda pair: run(rule, pair[0], pair[1], [0.3, 0.5], key=KEY, kernel=kernel), pairs * 3)
        )
    for pair, (outs, statistics) in zip(pairs * 3, together, strict=True):
        expected, sums = run(rule, pair[0], pair[1], [0.3, 0.5], key=KEY)
        for out, words in zip(outs, expected, strict=True):
            np.testing.assert_array_equal(out, words)
        assert sums == statistics


def test_nothing_is_nothing() -> None:
    rule, nothing = Rule("BF16", "BF16", "BF16", "stochastic"), np.empty(0, np.uint16)
    (out,), (statistics,) = run(rule, nothing, nothing, [0.5], kernel=TorchKernel(rule, "cpu"))
    assert (len(out), statistics.elements, statistics.dpo_square) == (0, 0, 0)


def test_a_kernel_is_made_once() -> None:
    rule = Rule("BF16", "BF16", "BF16", "nearest")
    assert isinstance(load_kernel(rule), CpuKernel)
    assert load_kernel(rule, "cpu") is load_kernel(Rule("BF16", "BF16", "BF16", "nearest"), "cpu")
    assert isinstance(load_kernel(rule, "cuda"), TorchKernel)


class Machine:
    """The parts of a machine that `resolve_device` looks at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.folder = monkeypatch, folder
        monkeypatch.setattr(kernels, "Path", lambda path: folder / path.lstrip("/"))
        monkeypatch.setattr(shutil, "which", lambda program: None)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        (folder / "dev").mkdir()

    def with_driver(self) -> None:
        (self.folder / "dev" / "nvidia0").touch()

    def with_torch(self, cuda: str | None, *, usable: bool) -> None:
        self.patch.setattr(torch.version, "cuda", cuda)
        self.patch.setattr(torch.cuda, "is_available", lambda: usable)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_a_gpu_is_taken_only_if_it_is_asked_for(machine: Machine) -> None:
    machine.with_driver()
    machine.with_torch("12.8", usable=True)
    assert [resolve_device(device) for device in ("auto", "cuda", "cpu")] == ["cpu", "cuda", "cpu"]


def test_without_a_driver(machine: Machine) -> None:
    machine.with_torch("12.8", usable=True)
    with pytest.raises(
        JobError, match=r"`cuda` was asked for, but this machine has no NVIDIA driver .*choose `auto`"
    ):
        resolve_device("cuda")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_with_every_gpu_hidden(machine: Machine, hidden: str) -> None:
    machine.with_driver()
    machine.with_torch("12.8", usable=True)
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(JobError, match="CUDA_VISIBLE_DEVICES is"):
        resolve_device("cuda")


def test_with_a_torch_that_cannot_use_the_gpu(machine: Machine) -> None:
    machine.with_driver()
    machine.with_torch(None, usable=False)
    with pytest.raises(JobError, match=r"torch .* is a build without CUDA"):
        resolve_device("cuda")
    machine.with_torch("12.8", usable=False)
    with pytest.raises(JobError, match="finds no usable GPU"):
        resolve_device("cuda")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(JobError, match=r"'gpu' is not known; choose `auto`, `cpu` or `cuda`"):
        resolve_device("gpu")


def test_choosing_a_device_without_a_driver_does_not_load_torch() -> None:
    code = """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from expo_ray.arithmetic.kernels import load_kernel, resolve_device
from expo_ray.arithmetic.rule import Rule
load_kernel(Rule("BF16", "BF16", "BF16", "nearest"), resolve_device("auto"))
print("torch" in sys.modules)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "False"
