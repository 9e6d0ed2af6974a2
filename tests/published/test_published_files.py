"""What a published model's folder holds beside its shards, and what may not lie beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from expo_ray.cli.process import main
from expo_ray.errors import StorageError
from expo_ray.serving.node_cache import download_model
from tests.support.pairs import expo, llama_tensors, moved, nearest, read_json, read_weights, write_pair


def test_files_that_the_model_names_travel_and_the_rest_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, dpo = write_pair(tmp_path)
    (dpo / "modules.json").write_text('[{"path": "1_Pooling"}, {"path": "2_Dense"}]')
    (dpo / "1_Pooling").mkdir()
    (dpo / "1_Pooling/config.json").write_text("{}")
    (dpo / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, dpo / "2_Dense/model.safetensors")
    (dpo / "vocab.txt").write_bytes(os.urandom(3 * 2**20 + 5))  # more than is copied in one piece
    (dpo / "notes|`x`.txt").write_text("")
    out = tmp_path / "out"
    assert expo(sft, dpo, out, 0.5, more="--dry-run") == 0
    printed = capsys.readouterr().out
    assert "1 file(s) are not carried over" in printed
    assert "notes|`x`.txt" in printed
    assert "2_Dense/model.safetensors" in printed
    assert not out.exists()
    assert expo(sft, dpo, out, 0.5) == 0
    assert "not carried over" in capsys.readouterr().err
    for key in ("1_Pooling/config.json", "2_Dense/model.safetensors", "vocab.txt", "modules.json"):
        assert (out / key).read_bytes() == (dpo / key).read_bytes()
    assert read_json(out / "expo.json")["not_carried_over"] == ["notes|`x`.txt"]
    assert "were not carried over: <code>notes&#124;" in (out / "README.md").read_text()
    assert main(["verify", str(out)]) == 0
    assert expo(sft, dpo, out, 0.5) == 0  # a rerun finds it complete


@pytest.mark.parametrize("shard_size", ["1GB", "40kB"])
def test_a_model_of_diffusers_keeps_the_names_that_diffusers_looks_for(
    tmp_path: Path, shard_size: str
) -> None:
    weights = llama_tensors()
    for side, tensors in (("sft", weights), ("dpo", moved(weights))):
        (tmp_path / side).mkdir()
        (tmp_path / side / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        for variant in ("", ".fp16"):
            save_file(tensors, tmp_path / side / f"diffusion_pytorch_model{variant}.safetensors")
    out = tmp_path / "out"
    assert expo(tmp_path / "sft", tmp_path / "dpo", out, 0.5, more=f"--shard-size {shard_size}") == 0
    names = {path.name for path in out.iterdir() if "safetensors" in path.name}
    assert all(name.startswith("diffusion_pytorch_model") for name in names)
    assert ("diffusion_pytorch_model.safetensors.index.json" in names) == (len(names) > 1)
    name = "model.norm.weight"
    assert torch.equal(read_weights(out)[name], nearest(weights[name], moved(weights)[name], 0.5))
    assert main(["verify", str(out), "--sft", str(tmp_path / "sft"), "--dpo", str(tmp_path / "dpo")]) == 0


def test_an_index_may_name_a_constant_that_no_file_holds(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path, dpo_shards=2)
    path = dpo / "model.safetensors.index.json"
    index = read_json(path)
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = file
    path.write_text(json.dumps(index))
    assert expo(sft, dpo, tmp_path / "out", 0.5) == 0
    index["weight_map"]["model.layers.0.mlp.up_proj.bias"] = file
    path.write_text(json.dumps(index))
    assert expo(sft, dpo, tmp_path / "other", 0.5) == 2


PLANTED: dict[str, Callable[[Path], Any]] = {
    **{
        name: lambda path: path.write_text("x")
        for name in (
            "modeling_evil.py", "chat_template.jinja", "adapter_config.json", "tokenizer.model", "x.pt", "x.pth", "x.gguf",
            "model.safetensors.index.json", "pytorch_model.bin", "additional_chat_templates/tool.jinja", "params.json", "x.npz",
        )
    },
    "merges.txt": os.mkfifo,
    "vocab.txt": lambda path: path.symlink_to("/nowhere"),
    "1_Pooling": lambda path: path.symlink_to("/tmp"),
    "x\udcff.txt": lambda path: path.write_text("x"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    assert expo(*write_pair(folder), folder / "out", 0.5) == 0
    return folder / "out"


@pytest.mark.parametrize("name", PLANTED)
def test_what_the_manifest_does_not_know_is_a_verdict_and_is_not_served(
    model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    PLANTED[name](folder / name)
    assert main(["verify", str(folder)]) == 1
    assert "is not part of the model" in capsys.readouterr().err
    with pytest.raises(StorageError, match="not part of the published model"):
        download_model(str(folder))


@pytest.mark.parametrize("key", [".expo/claim.json", "README.md", "config.json"])
def test_a_fifo_in_an_output_is_refused_before_any_work(tmp_path: Path, key: str) -> None:
    sft, dpo = write_pair(tmp_path)
    out = tmp_path / "out"
    assert expo(sft, dpo, out, 0.5) == 0
    for name in ("expo.json", key):
        (out / name).unlink()
    os.mkfifo(out / key)
    assert expo(sft, dpo, out, 0.5) == 2


def test_what_git_and_the_hubs_client_keep_there_is_let_be(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for name in (".gitattributes", ".git/config", ".cache/huggingface/download/config.json.metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert main(["verify", str(folder)]) == 0
    assert download_model(str(folder)) == folder


@pytest.mark.parametrize("key", ["model.safetensors", "config.json", "expo.json"])
@pytest.mark.parametrize("kind", ["fifo", "zero", "sparse"])
def test_a_flaw_of_a_published_file_is_a_verdict(model: Path, tmp_path: Path, key: str, kind: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    path = folder / key
    if kind == "sparse":
        with path.open("r+b") as file:
            file.truncate(1 << 40)
    else:
        path.unlink()
        os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    assert main(["verify", str(folder)]) in (1, 2)
