from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from expo_ray.arithmetic import kernels
from expo_ray.arithmetic.cpu.kernel import CpuKernel
from expo_ray.arithmetic.kernels import load_kernel, resolve_device
from expo_ray.arithmetic.rule import Rule, random_key
from expo_ray.config import RoundingName
from expo_ray.errors import JobError
from tests.support.exact_arithmetic import DTYPES, any_words, run, tuned, weights
from tests.support.tensor_operations import TensorKernel

EXACT: tuple[RoundingName, ...] = ("nearest", "stochastic")
RULES = [
    Rule(dpo, sft, out, rounding) for dpo, sft, out, rounding in product(DTYPES, DTYPES, DTYPES, EXACT)
] + [Rule(dpo, sft, "BF16", "reference") for dpo, sft in product(DTYPES, repeat=2)]
ALPHAS = (0.3, -0.5, 8.0, 0.0, -1.0)
KEY = random_key(3, "lm_head.weight")


def named(rule: Rule) -> str:
    return f"{rule.dpo_dtype}-{rule.sft_dtype}-{rule.out_dtype}-{rule.rounding}"


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_tensor_operations_and_compiled_arithmetic_agree_to_the_bit(rule: Rule) -> None:
    sft = np.concatenate([any_words(rule.sft_dtype, 3000, 1), weights(rule.sft_dtype, 6000, 2)])
    dpo = any_words(rule.dpo_dtype, 9000, 3)
    dpo[3000:] = tuned(sft[3000:], rule.sft_dtype, 4, rule.dpo_dtype)
    if rule.dpo_dtype == rule.sft_dtype:
        dpo[:1000] = sft[:1000]
    expected, statistics = run(rule, dpo, sft, ALPHAS, key=KEY, first=1_000_003, kernel=CpuKernel(rule))
    outs, sums = run(rule, dpo, sft, ALPHAS, key=KEY, first=1_000_003, kernel=TensorKernel(rule))
    for out, words in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(out, words)
    assert sums == statistics


def test_a_kernel_is_made_once() -> None:
    rule = Rule("BF16", "BF16", "BF16", "nearest")
    assert isinstance(load_kernel(rule), CpuKernel)
    assert load_kernel(rule, "cpu") is load_kernel(Rule("BF16", "BF16", "BF16", "nearest"), "cpu")


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
    tried: list[str] = []
    machine.patch.setitem(sys.modules, "triton", ModuleType("triton"))
    machine.patch.setattr(kernels, "_try_gpu", lambda: tried.append("cuda"))
    assert [resolve_device(device) for device in ("auto", "cpu")] == ["cpu", "cpu"]
    assert tried == []
    assert resolve_device("cuda") == "cuda"
    assert tried == ["cuda"]


def test_without_triton(machine: Machine) -> None:
    machine.with_driver()
    machine.with_torch("12.8", usable=True)
    machine.patch.setitem(sys.modules, "triton", None)
    with pytest.raises(JobError, match=r"Triton cannot be imported \(.*pip install 'expo-ray\[torch\]'\)"):
        resolve_device("cuda")


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
