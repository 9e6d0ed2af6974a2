"""Folders that are no checkpoint yet, or none at all: the message names what they are and the next step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from expo_ray.checkpoint.folder import read_checkpoint
from expo_ray.errors import CheckpointError, ExpoError, Problems
from expo_ray.published.verify import read_manifest
from expo_ray.serving.node_cache import download_model
from expo_ray.serving.served_models import check_model
from expo_ray.storage import open_store
from tests.support.stored_files import stored

UNCONVERTED = {
    "zero_to_fp32.py . OUTPUT": ["latest", "zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"],
    "DeepSpeed checkpoint (memory://{}/last.ckpt/checkpoint)": ["last.ckpt/checkpoint/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
    "accelerate merge-weights memory://{}/pytorch_model_fsdp_0 OUTPUT": ["pytorch_model_fsdp_0/__0_0.distcp"],
    "accelerate merge-weights memory://{} OUTPUT": ["__0_0.distcp", ".metadata"],
    "verl.model_merger merge --backend fsdp --local_dir memory://{} --target_dir OUTPUT": ["model_world_size_8_rank_0.pt"],
    "--local_dir memory://{}/actor --target_dir": ["actor/model_world_size_2_rank_1.pt", "actor/huggingface/config.json"],
    "a folder named memory://{}/pytorch_model.bin, as DeepSpeed's": ["pytorch_model.bin/pytorch_model-00001-of-00002.bin"],
    "a folder named memory://{}/model.safetensors": ["model.safetensors/model.safetensors"],
    "Megatron-Bridge": ["iter_0000010/__0_0.distcp", "iter_0000010/common.pt"],
    "checkpoint of Megatron-LM (memory://{}/release)": ["release/mp_rank_00/model_optim_rng.pt"],
    "checkpoint_converters": ["llama.nemo"],
    "nanotron": ["model/lm_head/model_weight_pp-rank-0-of-1_tp-rank-0-of-2.safetensors"],
    "m.Q4_K_M.gguf, made for llama.cpp": ["m.Q4_K_M.gguf"],
    "convert_llama_weights_to_hf.py": ["consolidated.00.pth", "params.json"],
    "litgpt convert_from_litgpt": ["lit_model.pth"],
    "Orbax": ["manifest.ocdbt", "d/abc"],
    "a download that was cut off": [".cache/huggingface/download/abc.incomplete"],
}  # fmt: skip


@pytest.mark.parametrize("part", UNCONVERTED)
def test_a_checkpoint_of_a_training_program_gets_its_next_step(part: str) -> None:
    store = stored({"config.json": b"{}", **dict.fromkeys(UNCONVERTED[part], b"x")})
    with pytest.raises((CheckpointError, Problems)) as caught:
        read_checkpoint(store)
    assert part.replace("memory://{}", store.uri) in str(caught.value)


def message(path: str) -> str:
    with pytest.raises(ExpoError) as caught:
        read_checkpoint(open_store(path))
    return str(caught.value)


def test_a_place_that_is_no_folder_gets_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for given, part in {
        "org/name-7B.v2": "did you mean hf://org/name-7B.v2",
        "./org/name": "did you mean hf://org/name",
        "huggingface.co/org/name": "did you mean hf://org/name on",
        "model.safetensors": f"is a file; pass its folder, {tmp_path}",
        "empty": "an empty folder",
        "a/b/c": "no such folder, or nothing in it",
        "../other/name": "no such folder, or nothing in it",
        "memory://x/model.safetensors": "pass the folder that holds it, memory://x",
        "https://huggingface.co/org/name": "write hf://org/name",
        "https://huggingface.co/org/name/tree/v1.0/unet": "write hf://org/name@v1.0/unet",
        "https://hf.co/org/name/blob/main/config.json": "write hf://org/name",
        "https://huggingface.co/org/name/resolve/main/a/b.json": "write hf://org/name@main/a",
        "https://huggingface.co/datasets/org/name": "unknown scheme https://",
        "https://[": "unknown scheme https://",
    }.items():
        assert part in message(given), given


@pytest.mark.parametrize("look", [lambda path: read_manifest(open_store(path)), check_model, download_model])
def test_the_hint_is_given_wherever_a_folder_is_asked_for(
    look: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for given, part in {"org/name": "hf://org/name", "model.safetensors": "is a file"}.items():
        with pytest.raises(ExpoError, match=part):
            look(given)


def test_the_folder_that_zero_to_fp32_makes_is_read_once_its_files_are_moved(tmp_path: Path) -> None:
    import torch

    inner = tmp_path / "pytorch_model.bin"
    inner.mkdir()
    (tmp_path / "config.json").write_text("{}")
    torch.save({"w": torch.ones(2)}, inner / "pytorch_model.bin")
    assert "rename that folder, and move the files in it" in message(str(tmp_path))
    inner.rename(tmp_path / "old")
    (tmp_path / "old" / "pytorch_model.bin").rename(inner)
    assert list(read_checkpoint(open_store(str(tmp_path)), allow_pickle=True).tensors) == ["w"]
