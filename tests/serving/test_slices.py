"""Weights computed by slices: each parameter of each worker is what vLLM's loader makes of the published folder, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from expo_ray.cli.process import main
from expo_ray.config import Pair
from expo_ray.errors import ArithmeticFault, InputChanged
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.step import Step
from expo_ray.serving import pieces as pieces_module
from expo_ray.serving.index_map import Axis, Copy, IndexMap, simplified, strides_of
from expo_ray.serving.parent_tiers import hold_parents, same_bits
from expo_ray.serving.pieces import pieces_of
from expo_ray.serving.slices import Slices
from tests.support.pairs import moved
from tests.support.triton_process import run_check
from tests.support.vllm_models import ADAPTED_SIZES, forms_of, save_architecture, worker

WORKERS = (1, 2, 4, 8)
ALPHA = 0.7


Case = tuple[PairPlan, IndexMap, Step, dict[str, torch.Tensor]]


def pair(sft: Path, dpo: Path, **options: Any) -> PairPlan:
    return plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo), **options), {})


NOTHING = np.empty(0, np.uint8)


def computed(
    plan: PairPlan, index_map: IndexMap, alpha: float, dtype: torch.dtype, made: Any = NOTHING
) -> dict[str, torch.Tensor]:
    """The parameters at a step: the same whether the parents are read from their files or from memory."""
    slices = Slices(plan, index_map, threads=2)
    outs, from_memory = (
        {name: torch.full(shape, 77, dtype=dtype) for name, shape in index_map.shapes.items()}
        for _ in range(2)
    )
    slices.at(Step(alpha), made).fill(outs)
    assert hold_parents(slices, 1, torch.device("cpu"), whole_gpu=False) == "host memory"
    slices.mapped.address = None  # type: ignore[assignment,method-assign]
    slices.at(Step(alpha), made).fill(from_memory)
    assert all(same_bits(from_memory[name], tensor) for name, tensor in outs.items())
    slices.close()
    return outs


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_pieces_take_each_element_of_a_copy_once(shape: list[int], data: st.DataObject) -> None:
    source = np.arange(math.prod(shape)).reshape(shape)
    index = tuple(
        slice(first := data.draw(st.integers(0, size - 1)), data.draw(st.integers(first + 1, size)), data.draw(st.integers(1, 3)))
        for size in shape
    )  # fmt: skip
    part = source[index].transpose(data.draw(st.permutations(range(len(shape)))))
    axes = [
        Axis(size, stride // 8, step)
        for size, stride, step in zip(part.shape, part.strides, strides_of(part.shape), strict=True)
    ]
    copy = Copy("tensor", "parameter", int(part.flat[0]), 0, simplified(axes))
    filled = np.full(part.size, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "_BLOCK", 1)
        for piece in pieces_of(copy, data.draw(st.integers(1, 9))):
            rows = [source.flat[piece.first + row * piece.pitch :][: piece.run] for row in range(piece.rows)]
            dense = np.concatenate(rows)
            sources, targets = np.zeros(1, int), np.full(1, piece.target)
            for axis in piece.taken:
                steps = np.arange(axis.size)
                sources = (sources[:, None] + steps * axis.source).ravel()
                targets = (targets[:, None] + steps * axis.target).ravel()
            assert (filled[targets] == -1).all()
            filled[targets] = dense[sources]
    assert (filled == part.ravel()).all()


def column_map(shape: tuple[int, int], first: int, count: int, *, transposed: bool = False) -> IndexMap:
    """A worker that holds some columns of one matrix."""
    rows, columns = shape
    steps = (1, rows) if transposed else (count, 1)
    axes = simplified([Axis(rows, columns, steps[0]), Axis(count, 1, steps[1])])
    held = (count, rows) if transposed else (rows, count)
    return IndexMap({"weight": held}, [Copy("weight", "weight", first, 0, axes)])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "reference"])
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 3, ("float16", "float32", "bfloat16"), ("float32",) * 3])
def test_columns_have_the_published_bytes_in_every_rule(
    rounding: str, dtypes: tuple[str, str, str], tmp_path: Path
) -> None:
    sft_dtype, dpo_dtype, held_dtype = (getattr(torch, name) for name in dtypes)
    torch.manual_seed(1)
    sft = torch.randn(37, 300)
    save(tmp_path / "sft", sft.to(sft_dtype))
    save(tmp_path / "dpo", moved({"weight": sft})["weight"].to(dpo_dtype))
    flags = [
        "--sft",
        f"{tmp_path}/sft",
        "--dpo",
        f"{tmp_path}/dpo",
        "--alpha",
        str(ALPHA),
        "--rounding",
        rounding,
    ]
    assert main(["extrapolate", *flags, "--output", f"{tmp_path}/out"]) == 0
    published = load_file(tmp_path / "out/model.safetensors")["weight"].to(held_dtype)
    plan = pair(tmp_path / "sft", tmp_path / "dpo", rounding=rounding)
    for first, count in ((0, 300), (0, 75), (75, 75), (299, 1), (13, 7)):
        for transposed in (False, True):
            index_map = column_map((37, 300), first, count, transposed=transposed)
            (held,) = computed(plan, index_map, ALPHA, held_dtype).values()
            wanted = published[:, first : first + count]
            assert torch.equal(held, wanted.T if transposed else wanted)


def test_rows_that_sft_lacks_have_the_published_bytes(tmp_path: Path) -> None:
    for plan, index_map, _, expected in cases_of_rows_that_sft_lacks(tmp_path):
        assert all(
            torch.equal(held, expected[key])
            for key, held in computed(plan, index_map, ALPHA, torch.bfloat16).items()
        )


def cases_of_rows_that_sft_lacks(tmp_path: Path) -> Iterator[Case]:
    torch.manual_seed(2)
    name = "model.embed_tokens.weight"
    save(tmp_path / "sft", torch.randn(37, 20, dtype=torch.bfloat16), name)
    save(tmp_path / "dpo", torch.randn(40, 20, dtype=torch.bfloat16), name)
    flags = [
        "--sft",
        f"{tmp_path}/sft",
        "--dpo",
        f"{tmp_path}/dpo",
        "--alpha",
        str(ALPHA),
        "--vocab",
        "keep-dpo",
    ]
    assert main(["extrapolate", *flags, "--output", f"{tmp_path}/out"]) == 0
    published = load_file(tmp_path / "out/model.safetensors")[name]
    plan = pair(tmp_path / "sft", tmp_path / "dpo", vocab="keep-dpo")
    for axes, wanted in (
        ([Axis(35 * 20, 1, 1)], published[5:]),
        ([Axis(40, 20, 6), Axis(6, 1, 1)], published[:, 4:10]),
    ):
        first = 100 if len(axes) == 1 else 4
        index_map = IndexMap({"weight": tuple(wanted.shape)}, [Copy(name, "weight", first, 0, tuple(axes))])
        yield plan, index_map, Step(ALPHA), {"weight": wanted.contiguous()}


def save(folder: Path, weight: torch.Tensor, name: str = "weight") -> None:
    folder.mkdir()
    save_file({name: weight}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")


def test_an_overflow_and_a_replaced_parent_are_errors(tmp_path: Path) -> None:
    save(tmp_path / "sft", torch.full((8, 8), 1.0, dtype=torch.float16))
    save(tmp_path / "dpo", torch.full((8, 8), 2.0, dtype=torch.float16))
    plan = pair(tmp_path / "sft", tmp_path / "dpo")
    index_map = column_map((8, 8), 0, 4)
    slices = Slices(plan, index_map, threads=1)
    out = {"weight": torch.zeros(8, 4, dtype=torch.float16)}
    with pytest.raises(ArithmeticFault, match="weight at alpha 70000: 0 NaN, 0 infinite and 32 overflowing"):
        slices.at(Step(70000.0)).fill(out)
    slices.at(Step(1.0)).fill(out)
    assert (out["weight"] == 3).all()
    (tmp_path / "new").mkdir()
    save_file({"weight": torch.zeros(8, 8, dtype=torch.float16)}, tmp_path / "new/model.safetensors")
    (tmp_path / "new/model.safetensors").rename(tmp_path / "dpo/model.safetensors")
    with pytest.raises(InputChanged, match="was replaced since it was planned"):
        slices.at(Step(1.0))
    slices.close()


# Fused in the engine, fused in the checkpoint, interleaved, one key for all, transposed, tied, biases, experts.
COVERED = ("llama", "qwen2-tied", "phi3", "gpt-neox", "gpt-bigcode", "gpt2", "falcon-new", "mixtral")


@pytest.mark.vllm
@pytest.mark.parametrize("name", COVERED)
def test_every_parameter_of_an_architecture_is_what_vllm_loads_from_the_published_folder(
    name: str, tmp_path: Path
) -> None:
    from expo_ray.on_ray.serving.record_map import record_map

    plan, dpo, published = published_pair(name, tmp_path)
    file = np.frombuffer((tmp_path / "out/model.safetensors").read_bytes(), np.uint8)
    for workers in WORKERS:
        for rank in {0, workers - 1}:
            with worker(dpo, workers, rank) as model:
                before = held(model)
                index_map = record_map(model, forms_of(dpo))
                assert index_map.obstacle == ""
                assert all(torch.equal(tensor, before[key]) for key, tensor in held(model).items())
                model.load_weights(published.items())
                loaded = held(model)
            assert index_map.shapes.keys() == loaded.keys() == before.keys()
            for made in (0, len(file) // 2, len(file)):
                for key, values in computed(plan, index_map, ALPHA, torch.bfloat16, file[:made]).items():
                    assert torch.equal(values, loaded[key]), (
                        f"{key} of worker {rank} of {workers}, {made} bytes made ahead"
                    )


def published_pair(
    name: str, folder: Path, sizes: Mapping[str, int] = ADAPTED_SIZES
) -> tuple[PairPlan, Path, dict[str, torch.Tensor]]:
    """A tiny pair of an architecture: its plan, the folder of dpo, and what is published at `ALPHA`."""
    sft, dpo = (
        save_architecture(name, folder / side, sizes, seed) for seed, side in enumerate(("sft", "dpo"))
    )
    flags = ["--sft", str(sft), "--dpo", str(dpo), "--alpha", str(ALPHA), "--rounding", "stochastic"]
    assert main(["extrapolate", *flags, "--output", f"{folder}/out"]) == 0
    return pair(sft, dpo, rounding="stochastic"), dpo, load_file(folder / "out/model.safetensors")


def held(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the parameters; what was never written may be NaN, which equals nothing."""
    return {key: tensor.detach().clone().nan_to_num() for key, tensor in model.named_parameters()}


# Transposed; and fused, with experts. Each as one of two workers.
ON_A_GPU = ("gpt2", "mixtral")
SMALL = ADAPTED_SIZES | {"num_hidden_layers": 1, "n_layer": 1, "num_local_experts": 2}


@pytest.mark.vllm
def test_a_gpu_would_fill_parameters_with_the_published_bytes(tmp_path: Path) -> None:
    from expo_ray.on_ray.serving.record_map import record_map

    cases = list(cases_of_rows_that_sft_lacks(tmp_path))
    for name in ON_A_GPU:
        plan, dpo, published = published_pair(name, tmp_path / name, SMALL)
        with worker(dpo, 2, 1) as model:
            index_map = record_map(model, forms_of(dpo))
            model.load_weights(published.items())
            cases.append((plan, index_map, Step(ALPHA), held(model)))
    torch.save(cases, tmp_path / "cases")
    words = [f"{tmp_path}/cases"]
    compared = run_check(tmp_path / "cache", *words, module="tests.support.gpu_slices_check")
    assert compared == sum(tensor.numel() for *_, expected in cases for tensor in expected.values()) > 30_000
