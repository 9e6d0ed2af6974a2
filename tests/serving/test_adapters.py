"""LoRA pairs whose alphas one engine serves side by side: without an engine. With one: `test_serving.py`."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("ray")
pytest.importorskip("peft")

from expo_ray.cli.process import main
from expo_ray.config import Serving, load_job
from expo_ray.errors import ArithmeticFault
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.step import Step
from expo_ray.on_ray.serving.adapter_worker import AdapterWorker
from expo_ray.on_ray.serving.engine_groups import settings_for
from expo_ray.serving.adapters import adapter_arguments, merged_plan, write_adapter
from expo_ray.serving.lease import MOST_WAITING, Busy
from expo_ray.serving.resident_adapters import ResidentAdapters
from expo_ray.serving.served_models import plan_served_pairs
from tests.support.tiny_models import causal_model, save_lora, tiny_llama
from tests.support.vllm_models import worker

ONE, TWO, THREE = Step(1.0), Step(2.0), Step(3.0)


def served(
    folder: Path,
    *,
    engine: dict[str, Any] | None = None,
    pair: dict[str, Any] | None = None,
    **settings: Any,
) -> PairPlan:
    """The plan of the engines of a tiny LoRA pair."""
    sft, dpo = save_lora(folder, causal_model(tiny_llama()), **settings)
    job = {
        "output": str(folder / "out"),
        "pairs": [{"name": "lora", "sft": str(sft), "dpo": str(dpo), "alphas": [0.5], **(pair or {})}],
        "serving": {"engine": engine or {}},
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    (plan,) = plan_served_pairs(load_job(str(folder / "job.yaml")))
    return plan


def test_engines_hold_what_is_published(tmp_path: Path) -> None:
    plan = served(tmp_path / "scaled")
    assert plan.scaled
    merged = served(tmp_path / "merged", pair={"adapter": "merge"})
    assert not merged.scaled
    assert {tensor.dtype for shard in merged.shards for tensor in shard.tensors} == {"BF16"}
    assert merged.notes == ()


def test_a_job_may_ask_for_merged_adapters(tmp_path: Path) -> None:
    plan = served(tmp_path, engine={"enable_lora": False})
    assert not plan.scaled
    settings = Serving(engine={"enable_lora": False, "max_loras": 3, "seed": 1})
    assert settings_for(settings, plan).engine == {"seed": 1}
    side_by_side = served(tmp_path / "scaled")
    engine = settings_for(Serving(engine={"seed": 1}), side_by_side).engine
    assert engine["enable_lora"]
    assert engine["worker_extension_cls"].endswith("AdapterWorker")


def test_answers_of_adapters_and_of_merged_weights_are_told_apart(tmp_path: Path) -> None:
    plan = served(tmp_path)
    whole = merged_plan(plan)
    assert plan.plan_id(0.5) != whole.plan_id(0.5)
    job = json.loads((tmp_path / "job.yaml").read_text())
    job["pairs"][0]["adapter"] = "merge"
    (tmp_path / "merge.yaml").write_text(json.dumps(job))
    (asked_for,) = plan_served_pairs(load_job(str(tmp_path / "merge.yaml")))
    assert whole.plan_id(0.5) == asked_for.plan_id(0.5)
    assert whole.shards == asked_for.shards


@pytest.mark.parametrize(
    ("settings", "engine", "reason"),
    [
        ({"rank_pattern": {"q_proj": 2}}, {}, "has a scale other than `lora_alpha` and `r` give"),
        ({"alpha_pattern": {"down_proj": 3}}, {}, "has a scale other than"),
        ({"r": 2048}, {}, "has a rank above the 512 that vLLM holds"),
        ({"target_modules": ["q_proj", "lm_head"]}, {}, "is on an embedding or the output head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {}, "is on an embedding or the output head"),
        ({}, {"enable_lora": False}, "`serving.engine` says `enable_lora: false`"),
    ],
)
def test_what_vllm_would_answer_wrongly_is_merged_and_says_why(
    settings: dict[str, Any],
    engine: dict[str, Any],
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "expo_ray")
    plan = served(tmp_path, engine=engine, **settings)
    assert not plan.scaled
    assert reason in plan.notes[-1]
    assert f"lora: {plan.notes[-1]}" in caplog.text
    assert plan.plan_id(0.5) == merged_plan(plan).plan_id(0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        # Other ranks, and for each the alpha that keeps the scale.
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 12}},
    ],
)
def test_one_scale_by_other_rules_is_served_side_by_side(settings: dict[str, Any], tmp_path: Path) -> None:
    plan = served(tmp_path, **settings)
    assert plan.scaled
    rank = adapter_arguments(plan, {})["max_lora_rank"]
    assert rank == 8


def test_slots_take_a_tenth_of_the_model_and_the_jobs_own_arguments_count_first(tmp_path: Path) -> None:
    plan = served(tmp_path)
    arguments = adapter_arguments(plan, {})
    assert arguments["max_loras"] == 2  # this model is tiny
    assert arguments["max_cpu_loras"] == 4
    assert arguments["lora_target_modules"] == ["down_proj", "q_proj"]
    assert adapter_arguments(plan, {"max_loras": 5})["max_cpu_loras"] == 10
    assert adapter_arguments(plan, {"max_cpu_loras": 9})["max_cpu_loras"] == 9


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 3.0])
def test_the_adapter_on_a_node_has_the_bytes_of_the_published_one(
    alpha: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPO_RAY_CACHE", str(tmp_path / "cache"))
    plan = served(tmp_path)
    out = tmp_path / "published"
    parents = ["--sft", str(tmp_path / "sft"), "--dpo", str(tmp_path / "adapter")]
    assert main(["extrapolate", *parents, "--alpha", str(alpha), "--output", str(out)]) == 0
    folder = write_adapter(plan, alpha)
    assert folder == write_adapter(plan, alpha)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (out / name).read_bytes()


def test_a_scale_that_is_no_number_is_a_fault_of_the_alpha(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPO_RAY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ArithmeticFault, match="choose a smaller alpha"):
        write_adapter(served(tmp_path), 1.7e308)


class Engine:
    """Records what is loaded; `held` never has more than `room` steps."""

    def __init__(self, room: int) -> None:
        self.held: set[Step] = set()
        self.loads: list[Step] = []
        self.failing: set[Step] = set()
        self._room = room
        self.adapters = ResidentAdapters(self._load, self._unload, room, {THREE})

    async def _load(self, step: Step) -> None:
        await asyncio.sleep(0)
        if step in self.failing:
            raise ArithmeticFault(f"alpha {step} overflows")
        self.held.add(step)
        self.loads.append(step)
        assert len(self.held) <= self._room

    async def _unload(self, step: Step) -> None:
        self.held.remove(step)

    async def ask(self, step: Step, until: asyncio.Event | None = None) -> None:
        async with self.adapters.on(step):
            assert step in self.held
            if until is not None:
                await until.wait()
            assert step in self.held


def run(test: Callable[[Engine], Any], room: int = 2) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(10):
            await test(Engine(room))

    asyncio.run(within_time())


def test_an_adapter_is_loaded_once_for_all_who_ask_and_the_longest_unused_goes_first() -> None:
    async def test(engine: Engine) -> None:
        await asyncio.gather(*(engine.ask(step) for step in (ONE, TWO) for _ in range(5)))
        assert sorted(engine.loads, key=str) == [ONE, TWO]
        await engine.ask(ONE)
        await engine.ask(THREE)
        assert engine.held == {ONE, THREE}

    run(test)


def test_an_adapter_in_use_stays_and_another_waits_for_room() -> None:
    async def test(engine: Engine) -> None:
        done = asyncio.Event()
        using = [asyncio.create_task(engine.ask(step, done)) for step in (ONE, TWO)]
        waiting = asyncio.create_task(engine.ask(THREE))
        for _ in range(50):
            await asyncio.sleep(0)
        assert engine.held == {ONE, TWO}
        assert not waiting.done()
        done.set()
        await asyncio.gather(*using, waiting)
        assert THREE in engine.held

    run(test)


def test_a_fault_fails_those_who_wait_for_it_and_nobody_else() -> None:
    async def test(engine: Engine) -> None:
        engine.failing = {TWO}
        results = await asyncio.gather(
            *(engine.ask(step) for step in (ONE, TWO, TWO, THREE)), return_exceptions=True
        )
        assert [type(result) for result in results] == [
            type(None),
            ArithmeticFault,
            ArithmeticFault,
            type(None),
        ]
        engine.failing = set()
        await engine.ask(TWO)

    run(test)


def test_a_request_that_goes_takes_nobody_with_it() -> None:
    async def test(engine: Engine) -> None:
        first, second = (asyncio.create_task(engine.ask(ONE)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first
        await asyncio.gather(engine.ask(TWO), engine.ask(THREE))  # the cancelled one keeps no adapter in use
        assert engine.held == {TWO, THREE}

    run(test)


def test_too_many_alphas_at_once_are_refused_but_for_the_expected_ones() -> None:
    async def test(engine: Engine) -> None:
        done = asyncio.Event()
        using = [asyncio.create_task(engine.ask(step, done)) for step in (ONE, TWO)]
        await asyncio.sleep(0.05)
        others = [Step(10.0 + index) for index in range(MOST_WAITING)]
        waiting = [asyncio.create_task(engine.ask(step)) for step in others]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="more than 16 different alphas"):
            await engine.ask(Step(5.0))
        waiting.append(asyncio.create_task(engine.ask(THREE)))
        done.set()
        await asyncio.gather(*using, *waiting)

    run(test)


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_adapters_agree_with_vllms_and_leave_rows_without_one_alone(dtype: torch.dtype) -> None:
    lora_ops = pytest.importorskip("vllm.lora.ops.torch_ops.lora_ops")
    from expo_ray.on_ray.serving import adapter_worker

    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(7, 24, generator=generator).to(dtype)
    a, b = (torch.randn(3, 1, *shape, generator=generator).to(dtype) for shape in ((8, 24), (16, 8)))
    slots = torch.tensor([2, 0, -1, 2, 1, -1, 0])
    with_adapter = slots >= 0
    inner, inner_vllm = torch.zeros(7, 8), torch.zeros(7, 8)
    adapter_worker.bgmv_shrink(inputs, a, inner, slots, 0.5)
    lora_ops.bgmv_shrink(inputs, a, inner_vllm, slots, 0.5)
    assert torch.allclose(inner[with_adapter], inner_vllm[with_adapter], rtol=1e-5, atol=1e-5)
    assert not inner[~with_adapter].any()
    assert inner_vllm[~with_adapter].any()  # vLLM's own reads the last slot for -1
    out = torch.randn(7, 40, generator=generator).to(dtype)
    expected = out.clone()
    adapter_worker.bgmv_expand_slice(inner, b, out, slots, 20, 16)
    lora_ops.bgmv_expand_slice(inner, b, expected, slots, 20, 16)
    tolerance = 8 * torch.finfo(dtype).eps
    assert torch.allclose(out, expected, rtol=tolerance, atol=tolerance)
    assert math.isfinite(out.float().sum())


@pytest.mark.vllm
def test_engines_on_cpus_use_these_products() -> None:
    punica_cpu = pytest.importorskip("vllm.lora.punica_wrapper.punica_cpu")
    from vllm.lora.ops.torch_ops import lora_ops

    from expo_ray.on_ray.serving import adapter_worker

    adapter_worker.use_on_cpus()
    assert punica_cpu.bgmv_shrink is adapter_worker.bgmv_shrink
    generator = torch.Generator().manual_seed(2)
    inputs, a = torch.randn(5, 24, generator=generator), torch.randn(3, 1, 8, 24, generator=generator)
    lengths, slots = torch.tensor([2, 3]), torch.tensor([1, 0])
    metadata = (torch.tensor([0, 2]), lengths, slots, 2, 3, 5)
    out, expected = torch.zeros(5, 8), torch.zeros(5, 8)
    punica_cpu.sgmv_shrink(inputs, a, out, *metadata, 1.0)
    lora_ops.sgmv_shrink(inputs, a, expected, *metadata, 1.0)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.vllm
def test_vllm_says_which_architectures_have_no_adapters() -> None:
    pytest.importorskip("vllm")
    from expo_ray.on_ray.serving.engine_adapter import refuses_adapters

    assert not refuses_adapters(["LlamaForCausalLM"])
    assert refuses_adapters(["GPT2LMHeadModel"])
    assert not refuses_adapters(["UnknownForCausalLM"])


@contextmanager
def worker_with_adapters(sft: Path, slots: int) -> Iterator[Any]:
    """vLLM's manager of adapters around its model, as a worker in float32 has it; the weights are arbitrary."""
    from vllm.config import LoRAConfig, get_current_vllm_config
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    with worker(sft, 1, 0, "float32") as model:
        config = get_current_vllm_config()
        config.lora_config = LoRAConfig(max_lora_rank=8, max_loras=slots, lora_dtype=torch.float32)
        manager = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
        manager.create_lora_manager(model, config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(std=0.1)
        yield manager


def checked(manager: Any, number: int) -> dict[str, list[str]]:
    of_worker: Any = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager))
    return AdapterWorker.expo_check_adapter(of_worker, number)


@pytest.mark.vllm
def test_one_batch_of_many_alphas_adds_to_each_row_what_its_published_adapter_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("EXPO_RAY_CACHE", str(tmp_path / "cache"))
    plan = served(tmp_path)
    alphas = (0.0, 0.5, 2.0)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    a, b = (weights[f"base_model.model.{layer}.lora_{side}.weight"].double() for side in "AB")
    with worker_with_adapters(tmp_path / "sft", slots=len(alphas)) as manager:
        requests = [
            LoRARequest(f"lora@{alpha:g}", number, str(write_adapter(plan, alpha)))
            for number, alpha in enumerate(alphas, 1)
        ]
        rows = (2, 0, 1, 3, 3, 0, 1)  # of each row its adapter; 0 is sft, and every slot is taken
        manager.set_active_adapters(set(requests), LoRAMapping(rows, rows, is_prefill=True))
        for request in requests:
            assert checked(manager, request.lora_int_id) == {"unused": [], "overflowing": []}
        module = manager._adapter_manager.modules[layer]
        module.base_layer.quant_method.process_weights_after_loading(module.base_layer)
        inputs = torch.randn(len(rows), a.shape[1], generator=torch.Generator().manual_seed(3))
        added = (module(inputs)[0] - module.base_layer(inputs)[0]).double()
    for row, number in enumerate(rows):
        scale = 0.0 if number == 0 else 6 / 4 * (1 + alphas[number - 1])
        expected = scale * (inputs[row].double() @ a.T @ b.T)
        assert torch.allclose(added[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.vllm
def test_layers_without_a_place_and_scales_that_overflow_are_found_in_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("EXPO_RAY_CACHE", str(tmp_path / "cache"))
    plan = served(tmp_path)
    save_lora(tmp_path / "deeper", causal_model(tiny_llama(num_hidden_layers=3)))
    with worker_with_adapters(tmp_path / "sft", slots=2) as manager:
        manager.add_adapter(LoRARequest("deeper", 1, str(tmp_path / "deeper" / "adapter")))
        unused = checked(manager, 1)["unused"]
        assert "model.layers.2.mlp.down_proj" in unused
        assert all(name.startswith("model.layers.2.") for name in unused)
        manager.add_adapter(LoRARequest("huge", 2, str(write_adapter(plan, 1e300))))
        assert "model.layers.0.mlp.down_proj" in checked(manager, 2)["overflowing"]
