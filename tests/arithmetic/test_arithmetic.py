from __future__ import annotations

import math
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path
from threading import Barrier, Thread
from time import perf_counter, sleep
from typing import Any, cast, get_args

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_ray.arithmetic.cpu import blocks, loop, machine_code, words
from expo_ray.arithmetic.cpu import kernel as cpu_kernel
from expo_ray.arithmetic.kernels import load_kernel
from expo_ray.arithmetic.rule import ROUNDINGS, Rule, random_key
from expo_ray.arithmetic.sums import TensorStatistics
from expo_ray.config import RoundingName
from tests.support.exact_arithmetic import (
    DTYPES,
    INFINITY,
    NAN,
    WORD_TYPES,
    Words,
    any_words,
    nearest,
    rounded,
    run,
    table,
    tuned,
    values,
    weights,
)

ALPHAS = (0.5, 0.3, -0.5, 8.0)
ALL = [Rule(dpo, sft, out, "nearest") for dpo, sft, out in product(DTYPES, repeat=3)]
BF16 = Rule("BF16", "BF16", "BF16", "nearest")


def named(rule: Rule) -> str:
    return f"{rule.dpo_dtype}-{rule.sft_dtype}-{rule.out_dtype}"


@pytest.mark.parametrize("rule", ALL, ids=named)
def test_nearest_is_the_formula_rounded_once(rule: Rule) -> None:
    sft = weights(rule.sft_dtype, 20_000, 1)
    dpo = tuned(sft, rule.sft_dtype, 2, rule.dpo_dtype)
    outs, _ = run(rule, dpo, sft, ALPHAS)
    for alpha, out in zip(ALPHAS, outs, strict=True):
        np.testing.assert_array_equal(out, nearest(rule, dpo, sft, alpha))


@pytest.mark.parametrize("rule", ALL, ids=named)
def test_any_bit_pattern_follows_the_declaration(rule: Rule) -> None:
    dpo, sft = any_words(rule.dpo_dtype, 20_000, 1), any_words(rule.sft_dtype, 20_000, 2)
    if rule.dpo_dtype == rule.sft_dtype:
        sft[::3] = dpo[::3]
    alphas = (*ALPHAS, 0.0, -1.0, -0.0, 1e-3, 1e30)
    outs, _ = run(rule, dpo, sft, alphas)
    for alpha, out in zip(alphas, outs, strict=True):
        np.testing.assert_array_equal(out, nearest(rule, dpo, sft, alpha), str(alpha))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_few_elements_follow_the_declaration(data: st.DataObject) -> None:
    rule = data.draw(st.sampled_from(ALL))
    count = data.draw(st.integers(1, 5))
    dpo, sft = (
        np.array(
            data.draw(
                st.lists(st.integers(0, np.iinfo(WORD_TYPES[dtype]).max), min_size=count, max_size=count)
            ),
            WORD_TYPES[dtype],
        )
        for dtype in (rule.dpo_dtype, rule.sft_dtype)
    )
    alpha = data.draw(st.floats(-1, 1e6, allow_nan=False))
    (out,), _ = run(rule, dpo, sft, [alpha], first=data.draw(st.integers(0, 5000)))
    np.testing.assert_array_equal(out, nearest(rule, dpo, sft, alpha))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_number_of_a_16_bit_format_is_read_exactly(dtype: str) -> None:
    words = np.arange(2**16, dtype=np.uint16)
    for out in ("F32", "F64"):
        (wide,), _ = run(Rule(dtype, dtype, out, "nearest"), words, words, [0.5])
        with np.errstate(invalid="ignore"):  # signalling NaN
            expected = values(words, dtype).astype(values(wide, out).dtype)
        same = (values(wide, out) == expected) & (np.signbit(values(wide, out)) == np.signbit(expected))
        assert (same | np.isnan(expected) & (wide == NAN[out])).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("source", ["F32", "F64"])
def test_rounding_to_16_bits_is_right_at_and_beside_every_tie(dtype: str, source: str) -> None:
    finite, midpoints = table(dtype)
    real: Any = np.float32 if source == "F32" else np.float64
    points = np.concatenate([finite, midpoints]).astype(real)
    points = np.concatenate([points, np.nextafter(points, real(np.inf)), np.nextafter(points, real(-np.inf))])
    words = np.concatenate([points, -points]).view(WORD_TYPES[source])
    (out,), _ = run(Rule(source, source, dtype, "nearest"), words, words, [0.5])
    for word, value in zip(out.tolist(), np.concatenate([points, -points]).tolist(), strict=True):
        assert_nearest(word & 0x7FFF, abs(value), dtype)
        assert (word >= 0x8000) == (math.copysign(1, value) < 0)


def assert_nearest(word: int, value: float, dtype: str) -> None:
    finite, midpoints = table(dtype)
    assert word <= INFINITY[dtype]
    below = midpoints[word - 1] if word else -1.0
    above = midpoints[word] if word < len(finite) else math.inf
    assert below <= value <= above
    assert value not in (below, above) or word % 2 == 0


def test_float64_is_not_rounded_twice() -> None:
    # Just above a tie of BF16, but on it once rounded to float32, from where ties to even would lead down.
    value = 1 + 2.0**-8 + 2.0**-40
    assert float(torch.tensor(value, dtype=torch.float64).bfloat16()) == 1
    words = np.array([value]).view(np.uint64)
    (out,), _ = run(Rule("F64", "F64", "BF16", "nearest"), words, words, [0.5])
    assert Fraction(float(values(out, "BF16")[0])) == 1 + Fraction(1, 128)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_no_fused_multiply_add(dtype: str) -> None:
    rule = Rule(dtype, dtype, "F32" if dtype == "BF16" else "F64", "nearest")
    sft = weights(dtype, 50_000, 3)
    real: Any = np.float32 if dtype == "BF16" else np.float64
    dpo = tuned(sft, dtype, 4, scale=0.02)
    (out,), _ = run(rule, dpo, sft, [0.3])
    d, s = values(dpo, dtype).astype(real), values(sft, dtype).astype(real)
    fused_result = np.array(
        [
            real(Fraction(float(a)) + Fraction(float(real(0.3))) * Fraction(float(a - b)))
            for a, b in zip(d[:2000], s[:2000], strict=True)
        ]
    )
    assert (values(out, rule.out_dtype)[:2000] != fused_result).sum() > 50  # the test can tell them apart
    np.testing.assert_array_equal(values(out, rule.out_dtype), d + real(0.3) * (d - s))


def test_the_machine_code_holds_no_fused_multiply_add_and_is_vectorised() -> None:
    singles = [np.zeros(blocks.BLOCK, np.float32) for _ in range(4)]
    halves = [np.zeros(blocks.BLOCK, np.uint16) for _ in range(4)]
    alpha = np.float32(0.3)
    for piece, arguments in (
        (blocks.apply_formula, (*singles[:3], alpha, False, singles[3])),
        (blocks.measure, (*halves[:2], *singles[:2])),
        (blocks.move_words, (*halves[:2], alpha, True, *halves[2:], singles[0])),
    ):
        compiled_piece: Any = numba.njit(cast(Any, piece).py_func, error_model="numpy")
        compiled_piece(*arguments)
        (code,) = compiled_piece.inspect_asm().values()
        assert not any(name in code for name in ("vfmadd", "vfmsub", "vfnmadd", "fmla ", "fmadd "))
        if platform.machine() == "x86_64":
            assert "mulps" in code


def test_alpha_0_gives_the_bytes_of_dpo_and_alpha_minus_1_the_values_of_sft() -> None:
    for rule in ALL:
        dpo, sft = any_words(rule.dpo_dtype, 5000, 5), any_words(rule.sft_dtype, 5000, 6)
        (zero, minus_one), _ = run(rule, dpo, sft, [0.0, -1.0])
        if rule.out_dtype == rule.dpo_dtype:
            assert zero.tobytes() == dpo.tobytes()
        else:
            np.testing.assert_array_equal(zero, rounded(values(dpo, rule.dpo_dtype), rule.out_dtype))
        expected = rounded(values(sft, rule.sft_dtype), rule.out_dtype)
        finite = np.isfinite(values(sft, rule.sft_dtype))
        np.testing.assert_array_equal(minus_one[finite], expected[finite])


@pytest.mark.parametrize("alpha", [0.5, -0.5, 8.0, -1.0])
def test_elements_without_a_delta_keep_the_sign_of_zero(alpha: float) -> None:
    minus_zero = np.full(3000, 0x8000, np.uint16)
    (out,), _ = run(BF16, minus_zero, minus_zero, [alpha])
    assert (out == 0x8000).all()


@pytest.mark.parametrize("dpo_dtype", DTYPES)
@pytest.mark.parametrize("sft_dtype", DTYPES)
def test_reference_is_the_papers_script(dpo_dtype: str, sft_dtype: str) -> None:
    dpo, sft = any_words(dpo_dtype, 20_000, 7), any_words(sft_dtype, 20_000, 8)
    dpo[10_000:] = weights(dpo_dtype, 10_000, 9)
    sft[10_000:] = tuned(dpo[10_000:], dpo_dtype, 10, sft_dtype)
    alphas = (*ALPHAS, 0.0, -1.0)
    outs, _ = run(Rule(dpo_dtype, sft_dtype, "BF16", "reference"), dpo, sft, alphas)
    d, s = as_torch(dpo, dpo_dtype), as_torch(sft, sft_dtype)
    d16, s16 = d.to(torch.bfloat16), s.to(torch.bfloat16)
    same = d == s if dpo_dtype != sft_dtype else torch.from_numpy(dpo == sft)
    twins = (same & ~d.isfinite()).numpy()
    for alpha, out in zip(alphas, outs, strict=True):
        script = (d16 + alpha * (d16 - s16)).view(torch.int16).numpy().view(np.uint16)
        expected = np.where(np.isnan(values(script, "BF16")), np.uint16(NAN["BF16"]), script)
        np.testing.assert_array_equal(out[~twins], expected[~twins])
        kept = dpo if dpo_dtype == "BF16" else rounded(values(dpo, dpo_dtype), "BF16")
        np.testing.assert_array_equal(out[twins], kept[twins])


def as_torch(words: Words, dtype: str) -> torch.Tensor:
    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    return torch.frombuffer(bytearray(words.tobytes()), dtype=names[dtype])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "reference"])
def test_a_mask_of_minus_infinities_survives(rounding: RoundingName) -> None:
    mask = np.where(np.triu(np.ones((64, 64), bool)), 0xFF80, 0).astype(np.uint16).reshape(-1)
    outs, statistics = run(Rule("BF16", "BF16", "BF16", rounding), mask, mask.copy(), [0.5, -0.5])
    for out, sums in zip(outs, statistics, strict=True):
        assert out.tobytes() == mask.tobytes()
        assert sums == TensorStatistics(elements=4096)


def test_nan_and_infinities_are_counted_and_do_not_hide_the_rest() -> None:
    sft = weights("BF16", 10_000, 11)
    dpo = tuned(sft, "BF16", 12)
    (_,), (clean,) = run(BF16, dpo[5:], sft[5:], [0.5], first=5)
    dpo[:5] = [0x7FC1, 0x3F80, 0x7F80, 0x7F80, 0x7FC7]
    sft[:5] = [0x3F80, 0x7FFF, 0x3F80, 0x7F80, 0x7FC7]
    (out,), (sums,) = run(BF16, dpo, sft, [0.5])
    assert out[:5].tolist() == [0x7FC0, 0x7FC0, 0x7F80, 0x7F80, 0x7FC7]
    assert (sums.nan, sums.inf, sums.overflow) == (3, 1, 0)
    assert sums.changed == clean.changed + 3
    assert sums.delta_square == pytest.approx(clean.delta_square, rel=1e-6)
    assert sums.moved_delta == pytest.approx(clean.moved_delta, rel=1e-6)
    assert sums.dpo_square == pytest.approx(clean.dpo_square + 1, rel=1e-6)  # the 1.0 beside sft's NaN


def test_overflow_is_counted() -> None:
    sft = weights("F16", 6000, 13)
    dpo = tuned(sft, "F16", 14)
    dpo[[1, 2500, 5999]] = np.array([60000, -60000, 65504], np.float16).view(np.uint16)
    outs, statistics = run(Rule("F16", "F16", "F16", "nearest"), dpo, sft, [0.5, 1e-3, -0.5])
    assert [sums.overflow for sums in statistics] == [3, 1, 0]
    assert outs[0][[1, 2500, 5999]].tolist() == [0x7C00, 0xFC00, 0x7C00]
    assert all(math.isfinite(sums.moved_delta) and not sums.inf for sums in statistics)
    narrower = np.array([1e5, 1.0], np.float32).view(np.uint32)
    (_,), (sums,) = run(Rule("F32", "F32", "F16", "nearest"), narrower, narrower, [0.0])
    assert sums.overflow == 1


def scaled_rules() -> list[tuple[Rule, float]]:
    """Also scales whose squares leave float32; F16 holds no such numbers."""
    wide = [rule for rule in ALL if "F16" not in {rule.dpo_dtype, rule.sft_dtype, rule.out_dtype}]
    return [(rule, 0.02) for rule in ALL] + list(product(wide, (3e-30, 1e30)))


@pytest.mark.parametrize(
    ("rule", "scale"), scaled_rules(), ids=lambda case: named(case) if isinstance(case, Rule) else None
)
def test_statistics_are_sums_over_the_written_weights(rule: Rule, scale: float) -> None:
    sft = weights(rule.sft_dtype, 30_000, 15, scale)
    dpo = tuned(sft, rule.sft_dtype, 16, rule.dpo_dtype, scale / 400)
    outs, statistics = run(rule, dpo, sft, ALPHAS, first=700)
    real: Any = np.float32 if rule.compute_dtype == "F32" else np.float64
    d, s = values(dpo, rule.dpo_dtype).astype(real), values(sft, rule.sft_dtype).astype(real)
    wide, delta = d.astype(np.float64), (d - s).astype(np.float64)
    for out, sums in zip(outs, statistics, strict=True):
        moved = values(out, rule.out_dtype).astype(np.float64) - wide
        assert (sums.elements, sums.changed) == (30_000, int((d != s).sum()))
        assert (sums.nan, sums.inf, sums.overflow) == (0, 0, 0)
        assert sums.dpo_square == pytest.approx(math.fsum(wide**2), rel=1e-6)
        assert sums.delta_square == pytest.approx(math.fsum(delta**2), rel=1e-6)
        assert sums.moved_delta == pytest.approx(math.fsum(moved * delta), rel=2e-6)


def test_effective_alpha_shows_what_bf16_swallows() -> None:
    sft = weights("BF16", 100_000, 17)
    dpo = tuned(sft, "BF16", 18)
    _, (swallowed, kept) = run(BF16, dpo, sft, [0.1, 2.0])
    assert swallowed.effective_alpha < 0.07
    assert kept.effective_alpha == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtypes", [("BF16", "BF16", "BF16"), ("F16", "F16", "F16"), ("F32", "BF16", "F32")])
def test_any_division_into_chunks_gives_the_same(
    rounding: RoundingName, dtypes: tuple[str, str, str]
) -> None:
    rule, first, key = Rule(*dtypes, rounding), 12_345, random_key(1, "a.weight")
    sft, dpo = any_words(rule.sft_dtype, 20_000, 19), any_words(rule.dpo_dtype, 20_000, 20)
    sft[7000:] = weights(rule.sft_dtype, 13_000, 21)
    dpo[7000:] = tuned(sft[7000:], rule.sft_dtype, 22, rule.dpo_dtype)
    whole, statistics = run(rule, dpo, sft, [0.5, 0.3], key=key, first=first)
    random = np.random.default_rng(23)
    for sizes in ([1, 2, 3, 5, 20_000], random.integers(1, 6000, 40).tolist(), [2048] * 10):
        parts: list[list[Words]] = [[], []]
        total = [TensorStatistics(), TensorStatistics()]
        start = 0
        for size in sizes:
            part = slice(start, min(start + size, 20_000))
            outs, chunk = run(rule, dpo[part], sft[part], [0.5, 0.3], key=key, first=first + start)
            for k in range(2):
                parts[k].append(outs[k])
                total[k] += chunk[k]
            start = part.stop
            if start == 20_000:
                break
        for k in range(2):
            np.testing.assert_array_equal(np.concatenate(parts[k]), whole[k])
            assert counts(total[k]) == counts(statistics[k])
            assert total[k].delta_square == pytest.approx(statistics[k].delta_square, rel=1e-6)


def counts(sums: TensorStatistics) -> tuple[int, ...]:
    return sums.elements, sums.changed, sums.nan, sums.inf, sums.overflow


def test_buffers_may_be_read_only_and_at_odd_addresses() -> None:
    rule = Rule("F32", "BF16", "F16", "nearest")
    dpo, sft = weights("F32", 5000, 23), weights("BF16", 5000, 24)
    odd = [memoryview(b"x" + words.tobytes())[1:] for words in (dpo, sft)]
    room = bytearray(b"#" * (1 + 2 * 5000 + 1))
    load_kernel(rule)(odd[0], odd[1], [memoryview(room)[1:-1]], alphas=[0.5], key=0, first=0)
    assert bytes(room[1:-1]) == nearest(rule, dpo, sft, 0.5).tobytes()
    assert room[:1] == room[-1:] == b"#"


def test_nothing_is_nothing() -> None:
    nothing = np.empty(0, np.uint16)
    (out,), (statistics,) = run(BF16, nothing, nothing, [0.5])
    assert (len(out), statistics) == (0, TensorStatistics())


def test_threads_share_a_kernel() -> None:
    sft = weights("BF16", 200_000, 25)
    dpo = tuned(sft, "BF16", 26)
    alphas = [k / 10 for k in range(1, 41)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda alpha: run(BF16, dpo, sft, [alpha]), alphas))
    for alpha, (outs, statistics) in zip(alphas, together, strict=True):
        np.testing.assert_array_equal(outs[0], nearest(BF16, dpo, sft, alpha))
        assert statistics == run(BF16, dpo, sft, [alpha])[1]


def test_the_gil_is_released() -> None:
    sft = weights("BF16", 2_000_000, 27)
    dpo = tuned(sft, "BF16", 28)
    spans: list[tuple[float, float]] = []

    def compute() -> None:
        for _ in range(20):
            begin = perf_counter()
            run(BF16, dpo, sft, [0.5])
            spans.append((begin, perf_counter()))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # seconds: a thread keeps the GIL until it gives it up
    try:
        thread = Thread(target=compute)
        thread.start()
        seen = []
        while thread.is_alive():
            seen.append(perf_counter())
            sleep(0)
    finally:
        sys.setswitchinterval(interval)
    assert any(begin < moment < end for begin, end in spans for moment in seen)


def test_the_constants_shared_with_the_compiled_code() -> None:
    dtypes, roundings = cpu_kernel.DTYPE_CODES, cpu_kernel.ROUNDING_CODES
    assert {dtype: getattr(words, dtype) for dtype in dtypes} == dtypes
    assert {name: getattr(blocks, name.upper()) for name in roundings} == roundings
    assert cpu_kernel.SCRATCH_BYTES >= loop.SCRATCH_BYTES


def test_the_machine_code_is_kept_and_loaded_without_numba() -> None:
    load_kernel(BF16)  # so that it lies in the cache
    code = """
import sys
from expo_ray.arithmetic.kernels import load_kernel
from expo_ray.arithmetic.rule import Rule
load_kernel(Rule("BF16", "BF16", "BF16", "nearest"))
print({"numba", "numpy"} & set(sys.modules))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "set()"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The types that are compiled, in order; compiling is replaced by code that is ready."""
    ready = {compute: machine_code._load_object_code(compute) for compute in ("F32", "F64")}
    asked: list[str] = []

    def compile_quickly(compute: str) -> bytes:
        asked.append(compute)
        return ready[compute]

    monkeypatch.setattr(machine_code, "_compile", compile_quickly)
    return asked


def test_without_a_folder_for_the_cache_the_kernel_is_compiled_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        machine_code, "_cache_folders", lambda: [tmp_path / "file", tmp_path / "file" / "below"]
    )
    for _ in range(2):
        assert callable(machine_code._load.__wrapped__("F32"))
    assert compilations == ["F32", "F32"]


@pytest.mark.parametrize(
    "harm", [lambda code: code[:-100], lambda code: b"", lambda code: code[:99] + b"!" + code[100:]]
)
def test_damaged_code_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str], harm: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(machine_code, "_cache_folders", lambda: [tmp_path / "cache"])
    code = machine_code._load_object_code("F64")
    (stored,) = (tmp_path / "cache").iterdir()
    stored.write_bytes(harm(stored.read_bytes()))
    for _ in range(2):
        assert machine_code._load_object_code("F64") == code
    assert compilations == ["F64", "F64"]


def test_threads_that_begin_together_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    together = Barrier(4)

    def load_slowly(compute: str) -> Any:
        asked.append(compute)
        sleep(0.2)  # so that a second thread would come in if nothing held it back

    def begin(_: int) -> None:
        together.wait()
        machine_code.load_machine_code("F32")

    monkeypatch.setattr(machine_code, "_load", cache(load_slowly))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(begin, range(4)))
    assert asked == ["F32"]


def test_every_rounding_has_its_formula_in_one_sentence() -> None:
    assert set(ROUNDINGS) == set(get_args(RoundingName))
    assert all(mode.formula.endswith(".") and "\n" not in mode.formula for mode in ROUNDINGS.values())


def test_a_rule_that_cannot_be_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Rule("BF16", "BF16", "F16", "reference")
    with pytest.raises(AssertionError):
        Rule("F8_E4M3", "BF16", "BF16", "nearest")
