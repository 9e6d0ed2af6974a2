"""Loading by slices into models of vLLM that were loaded and packed before, without an engine around them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from expo_ray.cli.process import main
from expo_ray.config import Pair
from expo_ray.errors import ArithmeticFault
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.step import DPO, Step
from expo_ray.on_ray.serving import swap
from expo_ray.on_ray.serving.swap import PairWorker
from expo_ray.serving import parent_tiers
from expo_ray.serving.slices import Slices
from expo_ray.serving.weight_check import Comparison
from tests.support.tiny_models import causal_model, save_lora, tiny_llama
from tests.support.vllm_models import ADAPTED_SIZES, save_architecture, worker

pytestmark = pytest.mark.vllm


@contextmanager
def loaded(folder: Path, weights: Path, workers: int) -> Iterator[Any]:
    """The last worker's model with weights loaded, and packed for a CPU."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    with worker(folder, workers, workers - 1) as model:
        model.load_weights(load_file(weights / "model.safetensors").items())
        process_weights_after_loading(model, get_current_vllm_config().model_config, torch.device("cpu"))
        yield model


def computed_values(model: Any) -> dict[str, torch.Tensor]:
    """What each layer computes with: products of linear layers and heads with unit vectors, other parameters as they are stored."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    values = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.numel()}
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase | ParallelLMHead):
            head = isinstance(layer, ParallelLMHead)
            width: Any = (
                layer.embedding_dim if head else getattr(layer, "input_size_per_partition", layer.input_size)
            )
            units = torch.eye(width, dtype=torch.bfloat16)
            values[f"{name} multiplied"] = layer.quant_method.apply(layer, units)
    return values


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[PairPlan, Path]:
    return published_pair(tmp_path_factory.mktemp("mixture"), "mixtral")


def published_pair(folder: Path, name: str) -> tuple[PairPlan, Path]:
    sft, dpo = (
        save_architecture(name, folder / side, ADAPTED_SIZES, seed)
        for seed, side in enumerate(("sft", "dpo"))
    )
    flags = ["--sft", str(sft), "--dpo", str(dpo), "--alpha", "0.5", "--rounding", "stochastic"]
    assert main(["extrapolate", *flags, "--output", f"{folder}/out"]) == 0
    return plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo), rounding="stochastic"), {}), folder / "out"


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_layers_of_a_mixture_compute_as_those_loaded_from_the_published_folder(
    workers: int, mixture: tuple[PairPlan, Path]
) -> None:
    check_swap(*mixture, workers)


def test_a_tied_head_is_packed_again(tmp_path: Path) -> None:
    check_swap(*published_pair(tmp_path, "qwen2-tied"), 2)


def check_swap(plan: PairPlan, published: Path, workers: int) -> None:
    from expo_ray.on_ray.serving.engine_weights import VllmWeights, pack_experts_again, repack_heads
    from expo_ray.on_ray.serving.load_slices import load_step, map_of, obstacle_to_slices

    dpo = Path(plan.dpo.uri)
    pack_experts_again()
    with loaded(dpo, published, workers) as model:
        wanted = computed_values(model)
    with loaded(dpo, dpo, workers) as model:
        assert differing(computed_values(model), wanted)
        index_map = map_of(plan, model)
        assert obstacle_to_slices(plan, index_map, model) == ""
        comparison = Comparison(plan, VllmWeights(model, torch.bfloat16, index_map))
        comparison.check_coverage()
        assert comparison.share == 1
        assert comparison.find_differing(DPO) == []
        assert comparison.find_differing(Step(0.5)) != []
        slices = Slices(plan, index_map, threads=2)
        load_step(model, slices.at(Step(0.5)), torch.bfloat16)
        repack_heads(model)
        assert differing(computed_values(model), wanted) == []
        assert comparison.find_differing(Step(0.5)) == []
        check_a_fault(model, slices)
        load_step(model, slices.at(Step(0.5)), torch.bfloat16)
        repack_heads(model)
        assert differing(computed_values(model), wanted) == []
        slices.close()


class Worker(PairWorker):
    """As much of vLLM's worker as the swap needs, around a model."""

    def __init__(self, model: Any) -> None:
        from vllm.config import get_current_vllm_config

        self.vllm_config: Any = get_current_vllm_config()
        self.model_config, self.parallel_config = (
            self.vllm_config.model_config,
            self.vllm_config.parallel_config,
        )
        self.get_model = lambda: model

    def reload_weights(self, weights_iterator: Any) -> None:
        reload: Any = import_module("vllm.model_executor.model_loader.reload")
        model = self.get_model()
        reload.initialize_layerwise_reload(model)
        model.load_weights(weights_iterator)
        reload.finalize_layerwise_reload(model, self.model_config)


def published_adapter(folder: Path) -> tuple[PairPlan, Path]:
    sft, dpo = map(str, save_lora(folder, causal_model(tiny_llama())))
    words = ["--sft", sft, "--dpo", dpo, "--alpha", "0.5", "--adapter", "merge"]
    assert main(["extrapolate", *words, "--output", f"{folder}/out"]) == 0
    return plan_pair(Pair(name="pair", sft=sft, dpo=dpo, adapter="merge"), {}), folder / "out"


@pytest.mark.parametrize(
    ("publish", "described"),
    [
        (partial(published_pair, name="llama"), {"swap": "slices", "parents": "host memory"}),
        (
            published_adapter,
            {"swap": "whole tensors: an adapter is merged into whole tensors", "parents": "files"},
        ),
    ],
    ids=["slices", "whole tensors"],
)
def test_a_worker_swaps_by_slices_or_else_by_whole_tensors_and_says_which(
    publish: Callable[[Path], tuple[PairPlan, Path]],
    described: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swap, "keep_freed_memory", lambda: True)  # which is for the whole process
    plan, published = publish(tmp_path)
    by_slices = described["swap"] == "slices"
    first = Path(plan.dpo.uri if by_slices else plan.sft.uri)
    with loaded(first, published, 2) as model:
        wanted = computed_values(model)
    with loaded(first, first, 2) as model:
        tensor_worker = Worker(model)
        assert tensor_worker.expo_open(pickle.dumps(plan), holds_dpo=by_slices) == described
        assert "overflowing" in tensor_worker.expo_swap("1e+41")
        assert tensor_worker.expo_swap("0.5") == ""
        assert differing(computed_values(model), wanted) == []
        bytes_read, elements = tensor_worker.expo_work()
        assert (bytes_read > 0, elements > 0) == (by_slices, by_slices)
        tensor_worker.expo_make_ahead("0.25")
        assert (tensor_worker.expo_ahead._process is None) == by_slices  # whose parents are in memory
        monkeypatch.setattr(parent_tiers, "spare_bytes", lambda: -1)
        assert tensor_worker.expo_swap("0.5") == ""
        tensor_worker.expo_make_ahead("0.25")
        assert tensor_worker.expo_ahead._process is not None
        tensor_worker.expo_ahead.give_up()
        assert tensor_worker.expo_describe_swap()["parents"].startswith("files")
        assert differing(computed_values(model), wanted) == []
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.numel()).add_(1)
        with pytest.raises(RuntimeError, match=r"does not hold the weights of alpha 0\.5"):
            tensor_worker.expo_compare(Step(0.5))


def check_a_fault(model: Any, slices: Slices) -> None:
    """A step that overflows leaves the layers ready for another."""
    from expo_ray.on_ray.serving.load_slices import load_step

    with pytest.raises(ArithmeticFault, match="overflowing"):
        load_step(model, slices.at(Step(1e41)), torch.bfloat16)


def differing(values: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    assert values.keys() == wanted.keys()
    assert all(math.prod(tensor.shape) for tensor in values.values())
    return [name for name, tensor in values.items() if not torch.equal(tensor, wanted[name])]
