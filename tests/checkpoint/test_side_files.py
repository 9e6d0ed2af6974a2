"""Which files beside the weights travel, and what is wrong with them: known from a plan, before anything is written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from expo_ray.checkpoint import side_files
from expo_ray.checkpoint.folder import Checkpoint, read_checkpoint
from expo_ray.errors import CheckpointError, Problems, StorageError
from expo_ray.storage import open_store
from tests.support.stored_files import stored, weights

CONFIG = json.dumps({"model_type": "llama"}).encode()


def read(files: dict[str, Any]) -> Checkpoint:
    data = {
        key: value if isinstance(value, bytes) else json.dumps(value).encode() for key, value in files.items()
    }
    return read_checkpoint(stored({"config.json": CONFIG, "model.safetensors": weights("w"), **data}))


def test_side_files_travel_and_the_rest_stays() -> None:
    travel = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
        "sentencepiece.bpe.model", "qwen.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json",
        "additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "processor_config.json",
        "video_preprocessor_config.json", "modeling_custom.py", "configuration_custom.py", "LICENSE", "LICENSE.txt",
        "LICENSE.md", "NOTICE", "Notice", "USE_POLICY.md", "Gemma_LICENSE", "spk_dict.pt", "voices.npz",
    ]  # fmt: skip
    silent = [
        "model.fp16.safetensors", "model.safetensors.index.fp16.json", "pytorch_model.bin",
        "pytorch_model.bin.index.json", "consolidated.00.pth", "model.gguf", "tf_model.h5", "flax_model.msgpack",
        "model.onnx", "README.md", "expo.json", ".expo/claim.json", ".gitattributes", ".git/config", "training_args.bin",
        "trainer_state.json", "all_results.json", "eval_results.json", "scheduler.pt", "optimizer.pt", "optimizer.bin",
        "rng_state_0.pth", "checkpoint-500/config.json", "runs/events.out.tfevents.1", "weights.npz", "zero_to_fp32.py",
        "onnx/model.onnx", "global_step9/x.json",
    ]  # fmt: skip
    named = [
        "original/params.json",
        "image.png",
        "additional_chat_templates/deep/x.jinja",
        "notes.txt",
        "data/train.jsonl",
    ]
    checkpoint = read(dict.fromkeys([*travel, *silent, *named], b"{}") | {"config.json": CONFIG})
    assert checkpoint.side_files == tuple(sorted(travel))
    assert checkpoint.left_behind == tuple(sorted(named))
    assert set(checkpoint.files) == {*travel, "model.safetensors"}


def test_every_vocabulary_of_transformers_travels() -> None:
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL):
            names |= set(re.findall(r': "([^"]+)"', table))
    assert len(names) > 15
    assert names <= set(read(dict.fromkeys(names, b"{}")).side_files)


def test_a_file_that_another_file_names_travels() -> None:
    checkpoint = read({
        "tokenizer_config.json": {"special": {"units": "units.lst"}, "codes": "./fr.codes2", "auto_map": {"AutoTokenizer": ["t.T", None]}},
        "t.py": b'NAME = "rwkv_20230424.txt"\n# don\'t\nTABLE = f"{root}/rare.table"\n',
        "units.lst": b"", "fr.codes2": b"", "rwkv_20230424.txt": b"", "rare.table": b"", "other.txt": b"",
        "processor_config.json": {"speakers": {"path": "speakers", "one": "v2/a.npy"}, "encoder": "campplus.onnx"},
        "speakers/v2/a.npy": b"", "speakers/v2/b.npy": b"", "speakers/list.txt": b"", "campplus.onnx": b"",
    })  # fmt: skip
    assert {"units.lst", "fr.codes2", "rwkv_20230424.txt", "rare.table", "campplus.onnx"} <= set(
        checkpoint.side_files
    )
    assert {"speakers/v2/a.npy", "speakers/list.txt"} <= set(checkpoint.side_files)
    assert checkpoint.left_behind == ("other.txt", "speakers/v2/b.npy")


def test_a_named_file_may_name_others() -> None:
    checkpoint = read(
        {"config.json": {"vision": "vit"}, "vit/config.json": {"code": "vit/table.txt"}, "vit/table.txt": b""}
    )
    assert {"vit/config.json", "vit/table.txt"} <= set(checkpoint.side_files)


def test_code_that_names_the_models_own_weights_does_not_make_them_side_files() -> None:
    code = b'NAMES = ["pytorch_model.bin", "model.safetensors", "model.fp16.safetensors", "optimizer.pt"]'
    files = ("pytorch_model.bin", "model.fp16.safetensors", "optimizer.pt")
    assert read({"modeling.py": code, **dict.fromkeys(files, b"")}).side_files == (
        "config.json",
        "modeling.py",
    )


def test_modules_of_sentence_transformers_travel_with_their_weights() -> None:
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    checkpoint = read({
        "modules.json": modules, "1_Pooling/config.json": {}, "2_Dense/config.json": {}, "2_Dense/model.safetensors": weights("w"),
        "onnx/config.json": {}, "onnx/model.onnx": b"",
    })  # fmt: skip
    assert {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"} <= set(
        checkpoint.side_files
    )
    assert checkpoint.side_weights == ("2_Dense/model.safetensors",)
    assert checkpoint.left_behind == ("onnx/config.json",)


def test_weights_in_a_folder_that_is_only_mentioned_are_named() -> None:
    checkpoint = read(
        {
            "modeling.py": b'load("speech-lora")',
            "speech-lora/adapter_model.safetensors": b"",
            "speech-lora/a.txt": b"",
        }
    )
    assert "speech-lora/a.txt" in checkpoint.side_files
    assert checkpoint.left_behind == ("speech-lora/adapter_model.safetensors",)


@pytest.mark.parametrize("config", [{"has_lora_adapter": True}, {"model_type": "granite_speech"}])
def test_an_adapter_that_belongs_to_the_model_is_carried_over(config: dict[str, Any]) -> None:
    checkpoint = read(
        {"config.json": config, "adapter_config.json": {}, "adapter_model.safetensors": weights("w.lora_A")}
    )
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(checkpoint.side_files)
    assert checkpoint.side_weights == ("adapter_model.safetensors",)
    assert (list(checkpoint.tensors), checkpoint.adapter) == (["w"], {})


def test_an_adapter_that_does_not_belong_is_refused() -> None:
    with pytest.raises(CheckpointError, match="holds both a model"):
        read(
            {
                "config.json": {"has_lora_adapter": False},
                "adapter_config.json": {},
                "adapter_model.safetensors": weights("w"),
            }
        )


def model_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_bytes(CONFIG)
    (path / "model.safetensors").write_bytes(weights("w"))
    return path


def faults(folder: Path) -> str:
    with pytest.raises((CheckpointError, Problems, StorageError)) as caught:
        read_checkpoint(open_store(str(folder)))
    return str(caught.value)


def test_all_that_cannot_be_copied_is_known_from_the_plan(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (tmp_path / "secret").write_text("key")
    (folder / "license").symlink_to("../secret")
    (folder / "vocab.txt").symlink_to("gone")
    os.mkfifo(folder / "merges.txt")
    (folder / "chat_template.jinja").symlink_to("/dev/zero")
    (folder / "a\\b.json").write_text("{}")
    Path(os.fsdecode(os.fsencode(folder) + b"/vocab\xff.json")).write_text("{}")
    with (folder / "tokenizer.model").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "1_Pooling").symlink_to("/tmp")
    (folder / "modules.json").write_text('[{"path": "1_Pooling"}]')
    text = faults(folder)
    for part in (
        "/license: a link to ../secret, outside of this folder; put the file itself in its place, or remove it",
        "/vocab.txt: a link to gone, which leads nowhere",
        "/merges.txt: a FIFO; put",
        "/chat_template.jinja: a link to /dev/zero, a device",
        "a backslash or a control character in its name; rename it, or remove it",
        "its name is not UTF-8; rename it, or remove it",
        "/tokenizer.model: 1099511627776 bytes, more than the",
        "/1_Pooling: a link to /tmp, a folder",
    ):
        assert part in text
    assert len(text.splitlines()) == 8


def test_links_that_lead_out_are_refused_for_weights_and_configuration(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    for name in ("model.safetensors", "config.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    text = faults(folder)
    assert text.count("outside of this folder") == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_side_file_is_known_from_the_plan(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "vocab.txt").write_text("a")
    (folder / "vocab.txt").chmod(0)
    assert "vocab.txt: Permission denied" in faults(folder)


def test_a_large_array_is_left_behind_and_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files, "_ARRAYS_BYTES", 3)
    assert read({"train.npz": b"1234", "voices.npz": b"123"}).left_behind == ("train.npz",)
