from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from expo_ray.checkpoint.folder import read_checkpoint
from expo_ray.errors import CheckpointError, Problems
from tests.support.stored_files import CountingStore, stored, stored_folder, weights

Files = dict[str, bytes | Mapping[str, Any]]
CONFIG: Files = {"config.json": {"model_type": "llama"}}
INDEX = "model.safetensors.index.json"


def index(**files: str) -> dict[str, Any]:
    return {"metadata": {"total_size": 1}, "weight_map": files}


def sharded(**more: bytes | Mapping[str, Any]) -> Files:
    return {
        **CONFIG,
        "model-00001-of-00002.safetensors": weights("a", "b"),
        "model-00002-of-00002.safetensors": weights("c"),
        INDEX: index(
            a="model-00001-of-00002.safetensors",
            b="model-00001-of-00002.safetensors",
            c="model-00002-of-00002.safetensors",
        ),
        **more,
    }


def refusal(files: Files) -> str:
    """The text of the problems of a folder."""
    with pytest.raises((CheckpointError, Problems)) as caught:
        read_checkpoint(stored(files))
    return str(caught.value)


def test_a_saved_model_is_read_as_transformers_names_it(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    store = stored_folder(tmp_path)
    checkpoint = read_checkpoint(store)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == expected
    assert len({tensor.file for tensor in checkpoint.tensors.values()}) > 2
    for name, tensor in checkpoint.tensors.items():
        raw = bytearray(store.read(tensor.file)[tensor.start : tensor.start + tensor.nbytes])
        assert torch.equal(
            torch.frombuffer(raw, dtype=torch.bfloat16).view(tensor.shape), model.state_dict()[name]
        )
    assert checkpoint.config["hidden_size"] == 16
    assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) == 2 * sum(
        tensor.numel() for tensor in model.state_dict().values()
    )
    assert checkpoint.side_files == ("config.json", "generation_config.json")
    assert set(checkpoint.files) == {
        *checkpoint.side_files,
        INDEX,
        *(tensor.file for tensor in checkpoint.tensors.values()),
    }
    assert checkpoint.files["config.json"] == store.stat("config.json")
    assert not checkpoint.adapter
    assert checkpoint.revision == ""


def test_the_order_is_file_by_file_front_to_back() -> None:
    checkpoint = read_checkpoint(stored(sharded()))
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    keys = [(tensor.file, tensor.start) for tensor in checkpoint.tensors.values()]
    assert keys == sorted(keys)


def test_several_files_without_an_index_are_read_by_their_headers() -> None:
    files = sharded()
    del files[INDEX]
    assert list(read_checkpoint(stored(files)).tensors) == ["a", "b", "c"]


def test_files_outside_the_index_are_left_alone() -> None:
    checkpoint = read_checkpoint(stored(sharded(**{"consolidated.safetensors": weights("other")})))
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert "consolidated.safetensors" not in checkpoint.files


@pytest.mark.parametrize(
    ("files", "tensors"),
    [
        (["model.safetensors", "model.fp16.safetensors", "model.fp16-00001-of-00001.safetensors"], "model.safetensors"),
        (["model-00001-of-00001.safetensors", "model.fp16-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors"),
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
    ],
)  # fmt: skip
def test_variants_beside_the_weights_are_left_alone(files: list[str], tensors: str) -> None:
    checkpoint = read_checkpoint(stored({**CONFIG, **dict.fromkeys(files, weights("w"))}))
    assert checkpoint.tensors["w"].file == tensors
    assert set(checkpoint.files) == {"config.json", tensors}


def test_an_index_of_a_variant_is_another_models() -> None:
    variant = "model.safetensors.index.fp16.json"
    checkpoint = read_checkpoint(
        stored(sharded(**{variant: index(z="model.fp16-00001-of-00001.safetensors")}))
    )
    assert variant not in checkpoint.files


def test_a_revision_is_passed_on() -> None:
    class Pinned(CountingStore):
        revision = "abc123"

    source = stored({**CONFIG, "model.safetensors": weights("w")})
    assert read_checkpoint(Pinned(source.uri)).revision == "abc123"


def test_headers_of_many_files_are_read_at_once() -> None:
    class Slow(CountingStore):
        """Each read waits until eight are under way."""

        barrier = threading.Barrier(8, timeout=20)

        def read_into(self, key: str, start: int, out: memoryview, *, etag: str, once: bool = False) -> None:
            if key.endswith(".safetensors"):
                self.barrier.wait()
            super().read_into(key, start, out, etag=etag)

    files = {f"model-{i:05d}-of-00008.safetensors": weights(f"w{i}") for i in range(1, 9)}
    assert len(read_checkpoint(Slow(stored({**CONFIG, **files}).uri)).tensors) == 8


def test_safetensors_win_over_pickles() -> None:
    files = {**CONFIG, "model.safetensors": weights("w"), "pytorch_model.bin": b"never opened"}
    checkpoint = read_checkpoint(stored(files), allow_pickle=True)
    assert list(checkpoint.tensors) == ["w"]
    assert "pytorch_model.bin" not in checkpoint.files


def test_an_adapter_folder() -> None:
    files: Files = {
        "adapter_config.json": {"peft_type": "LORA"},
        "adapter_model.safetensors": weights("base_model.model.q.lora_A.weight"),
        "tokenizer.json": b"{}",
        "README.md": b"",
    }
    checkpoint = read_checkpoint(stored(files))
    assert checkpoint.adapter == {"peft_type": "LORA"}
    assert checkpoint.config == {}
    assert list(checkpoint.tensors) == ["base_model.model.q.lora_A.weight"]
    assert set(checkpoint.files) == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert checkpoint.side_files == ("tokenizer.json",)


REFUSALS: list[tuple[Files, str]] = [
    ({}, "no such folder, or nothing in it; check the path, and your access to it"),
    ({"model.safetensors": weights("w")}, "no config.json; pass a folder as `save_pretrained` writes it"),
    ({"model.safetensors": weights("w"), "config.json": b"{"}, "/config.json: not valid JSON (Expecting property name"),
    ({"model.safetensors": weights("w"), "config.json": b"[1]"}, "/config.json: a JSON list instead of an object"),
    ({**CONFIG, "notes.md": b""}, "no weights; there are config.json, notes.md; pass the folder that holds the *.safetensors"),
    ({**CONFIG, "tf_model.h5": b"", "a.pth": b""}, "only other formats (PyTorch pickle: a.pth; TensorFlow: tf_model.h5); pass"),
    ({**CONFIG, "b/model.safetensors": b"", "a/m.safetensors": b""}, "no weights at its top level; there are some in a, b: pass"),
    ({**CONFIG, "checkpoint-9/model.safetensors": b"", "x/y.pt": b""}, "/checkpoint-9"),
    ({"a/config.json": b""}, "no weights; there are only subfolders; pass the folder that holds the *.safetensors"),
    (
        {**CONFIG, "pytorch_model-00001-of-00001.bin": b"", "pytorch_model.bin.index.json": b"{}"},
        "no safetensors, only PyTorch pickles (pytorch_model-00001-of-00001.bin, pytorch_model.bin.index.json); convert them "
        "(load and `save_pretrained` with transformers), or allow restricted unpickling with "
        "`allow_pickle: true`",
    ),
    (
        {"adapter_config.json": b"{}", "adapter_model.bin": b""},
        "no safetensors, only PyTorch pickles (adapter_model.bin); convert",
    ),
    ({"adapter_config.json": b"{}"}, "adapter_config.json without adapter_model.safetensors; save the adapter again, or remove"),
    ({"adapter_config.json": b"{", "adapter_model.safetensors": weights("w")}, "/adapter_config.json: not valid JSON"),
    (
        {**CONFIG, "adapter_config.json": b"{}", "adapter_model.safetensors": weights("w"), "model.safetensors": weights("w")},
        "holds both a model (model.safetensors) and adapter_config.json, and programs differ in which they load; move the adapter",
    ),
    (
        sharded(**{"model.safetensors": weights("a")}),
        "holds both model.safetensors and model.safetensors.index.json, and programs differ in which they read; remove one",
    ),
    (
        {**CONFIG, "model.safetensors": weights("a"), "model-00001-of-00001.safetensors": weights("a")},
        "holds both model.safetensors and model-00001-of-00001.safetensors",
    ),
    (
        {**CONFIG, "x.safetensors.index.json": b"{}", "y.safetensors.index.json": b"{}"},
        "2 indexes (x.safetensors.index.json, y.safetensors.index.json) and no model.safetensors.index.json; keep one of them",
    ),
    (
        {**CONFIG, "model-00002-of-00003.safetensors": weights("a")},
        "2 of the 3 weight files are missing: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors; download",
    ),
    (
        {**CONFIG, "model-00001-of-00001.safetensors": weights("a"), "old-00001-of-00001.safetensors": weights("a")},
        "several sets of weights and no index: model-*-of-00001.safetensors, old-*-of-00001.safetensors; keep one of them",
    ),
    ({**CONFIG, "model-00000-of-00000.safetensors": weights("a")}, "numbers that are not from 1 to 0; name the files as"),
    ({**CONFIG, "model-00003-of-00002.safetensors": weights("a")}, "numbers that are not from 1 to 2"),
    (
        {**CONFIG, "x.safetensors": weights("a", "b"), "y.safetensors": weights("b")},
        "b stands in several files (x.safetensors and y.safetensors); remove the stale ones",
    ),
    ({**CONFIG, "model.safetensors": weights()}, "model.safetensors holds no tensors; save the model again"),
    ({**CONFIG, "model.safetensors": weights("w")[:-1]}, "/model.safetensors: truncated: the header promises"),
    (sharded(**{INDEX: b"{"}), f"/{INDEX}: not valid JSON"),
    (sharded(**{INDEX: b'{"weight_map":{"a":"x.safetensors","a":"x.safetensors"}}'}), "the key 'a' stands twice"),
    (sharded(**{INDEX: {"weight_map": []}}), f"/{INDEX}: no `weight_map` from tensor names to files; save the checkpoint again"),
    (sharded(**{INDEX: {"weight_map": {}}}), "no `weight_map`"),
    (sharded(**{INDEX: {"weight_map": {"a": 3}}}), "'a' is mapped to '3', which is not the plain name of a .safetensors file"),
    (sharded(**{INDEX: index(a="pytorch_model.bin")}), "'a' is mapped to 'pytorch_model.bin', which is not the plain name"),
    (
        sharded(**{INDEX: index(a="gone.safetensors", c="model-00002-of-00002.safetensors")}),
        "1 of the 2 weight files are missing: gone.safetensors; download or copy them",
    ),
    (
        sharded(**{INDEX: index(a="model-00001-of-00002.safetensors", c="model-00002-of-00002.safetensors")}),
        f"/{INDEX}: does not name 1 tensor(s) where they are: b (model-00001-of-00002.safetensors); save the checkpoint again",
    ),
    (
        sharded(**{INDEX: {"weight_map": {**index(a="model-00001-of-00002.safetensors", b="model-00001-of-00002.safetensors", c="model-00002-of-00002.safetensors")["weight_map"], "d": "model-00001-of-00002.safetensors"}}}),
        f"/{INDEX}: 1 tensor(s) are not in the file it names: d (model-00001-of-00002.safetensors); save the checkpoint again",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(files: Files, message: str) -> None:
    refused = refusal(files)
    assert message in refused
    assert refused.startswith(("memory://checkpoints/", "- memory://checkpoints/"))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "..",
    ],
)
def test_an_index_cannot_leave_the_folder(name: str) -> None:
    store = stored(sharded(**{INDEX: index(a=name)}))
    with pytest.raises(
        CheckpointError, match=r"which is not the plain name of a \.safetensors file in the same folder"
    ):
        read_checkpoint(store)
    assert store.reads == 2  # config.json and the index; nothing else was opened


def test_all_problems_of_a_folder_are_reported_at_once() -> None:
    files = sharded(**{"model-00001-of-00002.safetensors": b"bad"})
    del files["config.json"], files["model-00002-of-00002.safetensors"]
    with pytest.raises(Problems) as caught:
        read_checkpoint(stored(files))
    texts = [str(problem) for problem in caught.value.problems]
    assert len(texts) == 3
    assert "no config.json" in texts[0]
    assert "model-00001-of-00002.safetensors: truncated" in texts[1]
    assert "1 of the 2 weight files are missing: model-00002-of-00002.safetensors" in texts[2]


def test_two_files_swapped_by_the_index_are_both_reported() -> None:
    swapped = {"weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors",
                              "c": "model-00001-of-00002.safetensors"}}  # fmt: skip
    with pytest.raises(Problems) as caught:
        read_checkpoint(stored(sharded(**{INDEX: swapped})))
    text = str(caught.value)
    assert (
        "2 tensor(s) are not in the file it names: a (model-00002-of-00002.safetensors), c (model-00001"
        in text
    )
    assert (
        "does not name 2 tensor(s) where they are: a (model-00001-of-00002.safetensors), c (model-00002"
        in text
    )
