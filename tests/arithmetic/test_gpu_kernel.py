"""The fused kernel on machines without a GPU: in Triton's interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expo_ray.arithmetic.gpu.failures import gpu_failures
from expo_ray.errors import JobError
from tests.support.exact_arithmetic import DTYPES
from tests.support.pairs import write_pair
from tests.support.paths import ROOT
from tests.support.triton_process import FOLDER, run_check


@pytest.mark.parametrize("dpo_dtype", DTYPES)
def test_interpreted_and_compiled_arithmetic_agree_to_the_bit(tmp_path: Path, dpo_dtype: str) -> None:
    # 4 dtypes of sft, each with 4 of the output in 2 roundings and one in `reference`; 4 alphas, 5000 elements.
    assert run_check(tmp_path, "rules", dpo_dtype) == 4 * (4 * 2 + 1) * 4 * 5000


def test_any_division_into_chunks_gives_the_same(tmp_path: Path) -> None:
    assert run_check(tmp_path, "chunks") == 2 * 6


def test_parts_of_a_parameter_get_the_words_of_the_whole_tensor(tmp_path: Path) -> None:
    whole = 24 * 96
    assert run_check(tmp_path, "parts") == 6 * (whole + 6 * 96 + 23 * 89 + 24 * 24 + 16 * 24 + 98)


def test_nothing_is_fused_or_flushed_on_an_h100(tmp_path: Path) -> None:
    assert run_check(tmp_path, "fused_operations", interpret=False) == 2 * 6  # two kernels, six rules


@pytest.mark.gpu
def test_a_gpu_agrees_to_the_bit() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from tests.support.triton_checks import RULES, assert_equal_to_the_cpu

    for rule in RULES:
        assert_equal_to_the_cpu(rule, "cuda")
    # Streams and pinned buffers of several threads, used again for chunks of other sizes.
    sizes = [1 + 7919 * k % 100_000 for k in range(1, 65)]
    with ThreadPoolExecutor(8) as pool:
        assert (
            list(pool.map(lambda count: assert_equal_to_the_cpu(RULES[1], "cuda", (0.3,), count), sizes))
            == sizes
        )


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
            "no memory left .*nvidia-smi",
        ),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "no memory left .*CUDA_VISIBLE_DEVICES"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "install gcc and the headers"),
        (subprocess.CalledProcessError(1, ["gcc"]), "install gcc and the headers"),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 12020)"), "R580 or newer"),
    ],
)
def test_a_gpu_that_fails_is_reported_with_a_remedy(error: Exception, remedy: str) -> None:
    with (
        pytest.raises(JobError, match=rf"^`device: cuda`: .*{remedy}.*`device: cpu`") as raised,
        gpu_failures(),
    ):
        raise error
    assert "\n" not in str(raised.value)


# A machine whose torch has CUDA, and whose card another process has filled.
FULL_CARD = """
import sys, torch
from expo_ray.arithmetic import kernels

def refuse(device):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 79.1 GiB")

kernels.shutil.which = lambda program: "/usr/bin/nvidia-smi"
torch.version.cuda, torch.cuda.is_available, torch.cuda.Stream = "13.0", lambda: True, refuse
from expo_ray.cli.process import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_card_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    words = ["extrapolate", "--sft", sft, "--dpo", dpo, "--alpha", "0.5", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{FOLDER}:{ROOT}", "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-c", FULL_CARD, *map(str, words), "--device"]
    refused = subprocess.run([*command, "cuda"], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "the GPU has no memory left (CUDA out of memory." in refused.stderr
    assert "`nvidia-smi` lists them" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
    # What the message advises.
    done = subprocess.run([*command, "cpu"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_mistake_of_our_own_is_no_failure_of_the_gpu() -> None:
    with pytest.raises(AssertionError), gpu_failures():
        raise AssertionError("wrong size")
