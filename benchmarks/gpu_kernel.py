"""The parts of `gpu.py` about bits and speed of the arithmetic."""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu import Findings, NotHere
from benchmarks.measure import EXPO_RAY, ROOT, fresh
from benchmarks.pair import DELTA_STD, WEIGHT_STD, llama_pair, one_tensor_pair
from expo_ray.arithmetic.cpu.kernel import CpuKernel
from expo_ray.arithmetic.gpu.kernel import GpuKernel
from expo_ray.arithmetic.gpu.launch import extrapolate_into
from expo_ray.arithmetic.rule import Rule, random_key
from expo_ray.config import RoundingName
from tests.support.triton_checks import RULES, assert_equal_to_the_cpu

ROUNDINGS: tuple[RoundingName, ...] = ("nearest", "stochastic", "reference")
KEY = random_key(0, "model.layers.0.mlp.up_proj.weight")
MISTRAL_PARAMETERS = 7.24e9
# Parts of a pinned copy, and streams that copy and compute at the same time.
STAGED_ELEMENTS, STREAMS = 1 << 25, 3


def measure_copies(findings: Findings, on_gpu: bool, quick: bool) -> None:
    """The card's own limits: what no kernel and no swap can be faster than."""
    if not on_gpu:
        raise NotHere("there is no GPU to copy to")
    size = 1 << (26 if quick else 30)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    pageable = torch.zeros(size, dtype=torch.uint8)
    held, other = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    copies: dict[str, tuple[Callable[[], object], int]] = {
        "pinned memory to GPU": (lambda: held.copy_(pinned, non_blocking=True), size),
        "GPU to pinned memory": (lambda: pinned.copy_(held, non_blocking=True), size),
        "pageable memory to GPU": (lambda: held.copy_(pageable), size),
        "within GPU memory, read and written": (lambda: other.copy_(held), 2 * size),
    }
    for name, (copy, moved) in copies.items():
        findings.add("copies", name, f"{moved / seconds(copy) / 1e9:.1f} GB/s")


def measure_bits(findings: Findings, on_gpu: bool, quick: bool) -> None:
    """Words and sums of every rule, of many elements, and of many threads, against the CPU's."""
    device = device_of(on_gpu)
    differing = []
    rules = RULES[::12] if quick else RULES
    for rule in rules:
        try:
            assert_equal_to_the_cpu(rule, device)
        except AssertionError:
            differing.append(str(rule))
    name = f"{len(rules)} rules of dtypes and roundings, words and sums"
    findings.compare("bits", f"{name} {differing or ''}".strip(), equal=not differing)
    count = 1 << (13 if quick else 26)
    dpo, sft = (words.cpu() for words in pair(count, "cpu" if not on_gpu else "cuda"))
    # NaN, infinities and subnormals among the weights.
    dpo[: count // 4] = torch.randint(-(1 << 15), 1 << 15, (count // 4,), dtype=torch.int16)
    for rounding in ROUNDINGS:
        rule = Rule("BF16", "BF16", "BF16", rounding)
        results = [whole(kernel, dpo, sft) for kernel in (CpuKernel(rule), GpuKernel(rule, device))]
        findings.compare("bits", f"{count:,} elements, {rounding}", equal=results[0] == results[1])
    if on_gpu:  # the interpreter computes one program at a time
        sizes = [1 + 7919 * k % (5_000 if quick else 1_500_000) for k in range(1, 65)]
        rule = Rule("BF16", "BF16", "BF16", "stochastic")
        kernels = CpuKernel(rule), GpuKernel(rule, device)

        def agree(size: int) -> bool:
            results = [whole(kernel, dpo[:size], sft[:size]) for kernel in kernels]
            return results[0] == results[1]

        with ThreadPoolExecutor(8) as pool:
            findings.compare("bits", "8 threads, chunks of many sizes", equal=all(pool.map(agree, sizes)))


def measure_kernel(findings: Findings, on_gpu: bool, quick: bool) -> None:
    """Elements a second from bytes to bytes, as a shard computes them: what `device: cuda` can gain at most."""
    if not on_gpu:
        raise NotHere("the interpreter's speed says nothing of a GPU's")
    rule = Rule("BF16", "BF16", "BF16", "stochastic")
    for chunk_bytes in (1 << 20, 16 << 20):
        dpo, sft = (words.cpu() for words in pair(chunk_bytes // 2, "cuda"))
        calls = 2 if quick else 64
        for name, kernel in (("CPU", CpuKernel(rule)), ("GPU", GpuKernel(rule, "cuda"))):
            for threads in (1, 4, os.cpu_count() or 1):
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(lambda _: whole(kernel, dpo, sft), range(threads)))  # noqa: B023
                    started = time.perf_counter()
                    list(pool.map(lambda _: whole(kernel, dpo, sft), range(calls)))  # noqa: B023
                    rate = calls * dpo.numel() / (time.perf_counter() - started)
                text = f"{name}, {threads} threads, chunks of {chunk_bytes >> 20} MiB"
                findings.add("kernel", text, f"{rate / 1e9:.2f} G elements/s")


def measure_command(findings: Findings, on_gpu: bool, quick: bool) -> None:
    """`expo-ray extrapolate` as a user runs it, on both devices in turns: the same files, and the time of each."""
    source = one_tensor_pair(1 << 20) if quick else llama_pair()
    devices = ("cpu", "cuda") if on_gpu else ("cpu",)
    costs: dict[str, list[float]] = {device: [] for device in devices}
    digests = {}
    for _ in range(1 if quick else 3):
        for device in devices:
            out = fresh("gpu-out")
            words = ("--sft", source.sft, "--dpo", source.dpo, "--alpha", 0.3, "--output", out)
            command = [*EXPO_RAY, "extrapolate", *map(str, words), "--device", device]
            started = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            costs[device].append(time.perf_counter() - started)
            digests[device] = digest_of(out)
    for device, took in costs.items():
        findings.add("command", f"device: {device}", f"{statistics.median(took):.2f} s")
    if on_gpu:
        findings.compare("command", "files of both devices", equal=digests["cpu"] == digests["cuda"])
    else:
        findings.not_run.append(("command", "`device: cuda`: there is no GPU"))


def measure_swap(findings: Findings, on_gpu: bool, quick: bool) -> None:
    """The kernel writing into an engine's parameters: bits, then time with the parents on the GPU and in pinned memory."""
    count = 1 << (13 if quick else 26)
    dpo, sft = pair(count, device_of(on_gpu))
    for rounding in ROUNDINGS:
        out = swapped(dpo, sft, rounding=rounding, first=4_000_000)
        rule = Rule("BF16", "BF16", "BF16", rounding)
        expected, _ = whole(CpuKernel(rule), dpo.cpu(), sft.cpu(), first=4_000_000)
        equal = hashlib.sha256(bytes_of(out.cpu())).hexdigest() == expected
        findings.compare("swap", f"{count:,} elements, {rounding}", equal=equal)
    if not on_gpu:
        raise NotHere("its times: there is no GPU")
    free, _ = torch.cuda.mem_get_info()
    count = 1 << (24 if quick else 31 if free > (14 << 30) else 29)
    dpo, sft = pair(count, "cuda")
    copy = seconds(sft.clone)
    for rounding in ROUNDINGS:
        took = seconds(lambda: swapped(dpo, sft, rounding=rounding))  # noqa: B023
        findings.add(
            "swap", f"parents in GPU memory, {rounding}",
            f"{6 * count / took / 1e9:.0f} GB/s, {6 * count / took / (4 * count / copy):.0%} of a copy's; "
            f"{took * MISTRAL_PARAMETERS / count * 1e3:.0f} ms for 7.24 B parameters",
        )  # fmt: skip
    hosts = [words.cpu().pin_memory() for words in (dpo[: count // 2], sft[: count // 2])]
    bus = seconds(lambda: dpo[: count // 2].copy_(hosts[0], non_blocking=True)) * 2
    for name, way in (("read by the kernel", swapped), ("copied in parts on three streams", staged)):
        took = seconds(lambda: way(*hosts))  # noqa: B023
        findings.add(
            "swap", f"parents in pinned memory, {name}",
            f"{took / bus:.2f} x the bus's own time; {took * MISTRAL_PARAMETERS / (count // 2):.2f} s for 7.24 B parameters",
        )  # fmt: skip


def device_of(on_gpu: bool) -> str:
    """`cuda`, or `cpu` where Triton's interpreter runs the kernel.

    Raises:
        NotHere: if neither can.
    """
    if not on_gpu and not triton.knobs.runtime.interpret:
        raise NotHere("on a CPU the kernel needs Triton's interpreter: set TRITON_INTERPRET=1")
    return "cuda" if on_gpu else "cpu"


def pair(count: int, device: str) -> tuple[Tensor, Tensor]:
    """Words of dpo and sft, int16: BF16 weights, and deltas of about one unit in the last place."""
    generator = torch.Generator(device).manual_seed(1)
    sides = []
    for part in parts_of(count):
        sft = torch.randn(part, generator=generator, device=device) * WEIGHT_STD
        dpo = sft + torch.randn(part, generator=generator, device=device) * DELTA_STD
        sides.append((dpo.bfloat16().view(torch.int16), sft.bfloat16().view(torch.int16)))
    dpo, sft = (torch.cat(side) for side in zip(*sides, strict=True))
    return dpo, sft


def parts_of(count: int) -> Iterator[int]:
    for start in range(0, count, STAGED_ELEMENTS):
        yield min(STAGED_ELEMENTS, count - start)


def whole(kernel: CpuKernel | GpuKernel, dpo: Tensor, sft: Tensor, first: int = 77) -> tuple[str, object]:
    """Digest of the words and statistics of a kernel that is given everything at once."""
    out = bytearray(2 * dpo.numel())
    parents = [bytes_of(words) for words in (dpo, sft)]
    statistics = kernel(parents[0], parents[1], [memoryview(out)], alphas=[0.3], key=KEY, first=first)
    return hashlib.sha256(out).hexdigest(), statistics


def bytes_of(words: Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    array: NDArray[np.uint8] = words.contiguous().view(torch.uint8).numpy()
    return array.data


def swapped(dpo: Tensor, sft: Tensor, *, rounding: RoundingName = "stochastic", first: int = 0) -> Tensor:
    """Compute a whole parameter; parents in pinned memory are read over the bus."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.empty(dpo.numel(), dtype=torch.bfloat16, device=device)
    broken = torch.zeros(1, dtype=torch.int64, device=device)
    sides = [words.view(torch.bfloat16) for words in (dpo, sft)]
    extrapolate_into(out, sides[0], sides[1], 0.3, broken=broken, rounding=rounding, key=KEY, first=first)
    return out


def staged(dpo: Tensor, sft: Tensor) -> Tensor:
    """Compute a whole parameter from pinned memory, in parts that are copied while others are computed."""
    out = torch.empty(dpo.numel(), dtype=torch.bfloat16, device="cuda")
    broken = torch.zeros(1, dtype=torch.int64, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    start = 0
    for number, size in enumerate(parts_of(dpo.numel())):
        part = slice(start, start + size)
        with torch.cuda.stream(streams[number % STREAMS]):
            sides = [words[part].to("cuda", non_blocking=True).view(torch.bfloat16) for words in (dpo, sft)]
            extrapolate_into(
                out[part], sides[0], sides[1], 0.3, broken=broken, rounding="stochastic", key=KEY, first=start
            )
        start += size
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    return out


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Median time of some GPU work, after a first run that compiles and allocates."""
    work()
    took = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def digest_of(folder: Path) -> str:
    """Digest of a folder's weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
