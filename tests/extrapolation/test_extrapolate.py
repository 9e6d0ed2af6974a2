"""`expo-ray extrapolate` on local folders: what it writes, checked against the formula and the libraries that read it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from expo_ray.config import format_alpha
from expo_ray.extrapolation import stream
from expo_ray.report.model_card import model_card
from expo_ray.storage.local import LocalStore
from tests.support.pairs import (
    LLAMA,
    Tensors,
    expo,
    files_of,
    llama_tensors,
    moved,
    nearest,
    read_json,
    read_weights,
    same_bits,
    stepwise,
    write_both,
    write_model,
    write_pair,
)
from tests.support.paths import ROOT

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ALPHAS = (0.5, 0.3, -0.5, 8.0)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def cast(tensors: Tensors, dtype: torch.dtype, only: str = "") -> Tensors:
    return {name: tensor.to(dtype) if only in name else tensor for name, tensor in tensors.items()}


def formula(sft: Tensors, dpo: Tensors, alpha: float) -> Tensors:
    return {name: nearest(sft[name], tensor, alpha) for name, tensor in dpo.items()}


def parents(sft_dtype: torch.dtype, dpo_dtype: torch.dtype, wide: str = "nothing") -> tuple[Tensors, Tensors]:
    """A pair with more than one chunk's worth of odd sizes; tensors with `wide` in their names are float32."""
    sft = llama_tensors(dtype=F32)
    return tuple(  # type: ignore[return-value]
        cast(cast(tensor, dtype), F32, only=wide)
        for tensor, dtype in ((sft, sft_dtype), (moved(sft), dpo_dtype))
    )


@pytest.mark.parametrize(
    ("sft_dtype", "dpo_dtype", "wide"),
    [
        (BF16, BF16, "nothing"),
        (F16, F16, "nothing"),
        (F32, F32, "nothing"),
        (BF16, BF16, "norm"),
        (F32, BF16, "nothing"),
        (BF16, F32, "nothing"),
        (BF16, F16, "nothing"),
    ],
    ids=["bf16", "fp16", "fp32", "bf16 with fp32 norms", "fp32 and bf16", "bf16 and fp32", "bf16 and fp16"],
)
def test_nearest_is_the_formula_in_every_tensor_and_alpha(
    tmp_path: Path, sft_dtype: torch.dtype, dpo_dtype: torch.dtype, wide: str
) -> None:
    sft, dpo = parents(sft_dtype, dpo_dtype, wide)
    folders = write_both(tmp_path, sft, dpo, sft_shards=2)
    assert expo(*folders, tmp_path / "out", *ALPHAS) == 0
    for alpha in ALPHAS:
        result = read_weights(tmp_path / "out" / f"alpha={format_alpha(alpha)}")
        assert same_bits(result, formula(sft, dpo, alpha)), alpha


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F16), (F32, F32)], ids=["bf16", "fp16", "fp32"])
def test_alpha_0_is_dpo_and_alpha_minus_1_is_sft(
    tmp_path: Path, rounding: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    sft, dpo = parents(*dtypes)
    dpo[HEAD].view(-1)[:3] = torch.tensor([0.0, -0.0, 1e-30])
    folders = write_both(tmp_path, sft, dpo, dpo_shards=2)
    assert expo(*folders, tmp_path / "out", 0, -1, rounding=rounding) == 0
    assert same_bits(read_weights(tmp_path / "out" / "alpha=0"), dpo)
    assert same_bits(read_weights(tmp_path / "out" / "alpha=-1"), sft)


def test_a_small_negative_alpha_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    sft, dpo = parents(F32, F32)
    folders = write_both(tmp_path, sft, dpo)
    assert expo(*folders, tmp_path / "out", "-2e-1") == 0
    assert same_bits(read_weights(tmp_path / "out"), formula(sft, dpo, -0.2))


def test_alpha_minus_1_of_another_dtype_is_sft_rounded_once(tmp_path: Path) -> None:
    sft, dpo = parents(F32, BF16)
    folders = write_both(tmp_path, sft, dpo)
    assert expo(*folders, tmp_path / "out", -1) == 0
    assert same_bits(read_weights(tmp_path / "out"), cast(sft, BF16))


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32)], ids=["bf16", "fp32"])
def test_reference_is_the_papers_script(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sft, dpo = parents(*dtypes)
    folders = write_both(tmp_path, sft, dpo)
    assert expo(*folders, tmp_path / "out", *ALPHAS, rounding="reference") == 0
    for alpha in ALPHAS:
        folder = tmp_path / "out" / f"alpha={format_alpha(alpha)}"
        assert same_bits(read_weights(folder), {name: stepwise(sft[name], dpo[name], alpha) for name in dpo})
        assert read_json(folder / "config.json")["dtype"] == "bfloat16"


def test_stochastic_takes_one_of_the_two_neighbours_and_is_right_in_the_mean(tmp_path: Path) -> None:
    sft, dpo = parents(BF16, BF16)
    folders = write_both(tmp_path, sft, dpo)
    assert expo(*folders, tmp_path / "out", 0.1, rounding="stochastic") == 0
    off, units = [], []
    for name, weight in read_weights(tmp_path / "out").items():
        exact = dpo[name].double() + 0.1 * (dpo[name].double() - sft[name].double())
        unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
        assert ((weight.double() - exact).abs() < unit * (1 + 1e-3)).all(), name
        off.append(((weight.double() - exact) / unit).flatten())
        units.append((weight != dpo[name]).flatten())
    error = torch.cat(off)
    assert abs(error.mean().item()) < 5 * error.std().item() / len(error) ** 0.5
    assert torch.cat(units).double().mean() > 0.05  # nearest would leave nearly all as they are


@pytest.mark.parametrize(("sft_shards", "dpo_shards"), [(1, 4), (3, 1), (4, 3)])
def test_any_sharding_on_either_side_gives_the_same_tensors(
    tmp_path: Path, sft_shards: int, dpo_shards: int
) -> None:
    for name, shards in (("plain", (1, 1)), ("sharded", (sft_shards, dpo_shards))):
        sft, dpo = write_pair(tmp_path / name, *shards)
        assert expo(sft, dpo, tmp_path / name / "out", 0.5, rounding="stochastic") == 0
    result = read_weights(tmp_path / "sharded" / "out")
    assert same_bits(result, read_weights(tmp_path / "plain" / "out"))


def test_shard_size_splits_the_model_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    out = tmp_path / "out"
    assert expo(sft, dpo, out, 0.5, more="--shard-size 40kB") == 0
    shards = sorted(out.glob("*.safetensors"))
    count = len(shards)
    assert count > 3
    assert [file.name for file in shards] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert all(file.stat().st_size < 40_000 + 2_000 for file in shards)
    index = read_json(out / "model.safetensors.index.json")
    weights = read_weights(out)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    for shard in shards:
        mapped = {name for name, file in index["weight_map"].items() if file == shard.name}
        from safetensors import safe_open

        with safe_open(shard, "pt") as file:
            assert mapped == set(file.keys())
    assert same_bits(weights, formula(llama_tensors(), moved(llama_tensors()), 0.5))


def test_every_tensor_begins_where_readers_that_map_files_want_it(tmp_path: Path) -> None:
    sft = {"flag": torch.ones(3, dtype=torch.bool), **llama_tensors(), "scale": torch.rand(5)}
    sft["odd"] = torch.rand(7).bfloat16()
    folders = write_both(tmp_path, sft, moved(sft), dpo_shards=3)  # each file begins with its widest again
    assert expo(*folders, tmp_path / "out", 0.5) == 0
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    width = {"BOOL": 1, "BF16": 2, "F32": 4}
    assert all(entry["data_offsets"][0] % width[entry["dtype"]] == 0 for entry in header.values())
    assert {entry["dtype"] for entry in header.values()} == set(width)


def test_one_tensor_larger_than_a_shard_gets_a_file_of_its_own(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    assert expo(sft, dpo, tmp_path / "out", 0.5, more="--shard-size 1kB") == 0
    assert same_bits(read_weights(tmp_path / "out"), formula(llama_tensors(), moved(llama_tensors()), 0.5))


@pytest.mark.parametrize(("dtype", "wanted"), [("fp32", F32), ("fp16", F16), ("bf16", BF16)])
def test_dtype_is_that_of_the_weights_and_of_the_configuration(
    tmp_path: Path, dtype: str, wanted: torch.dtype
) -> None:
    sft, dpo = parents(BF16, BF16, wide="norm")
    sft["steps"] = dpo["steps"] = torch.arange(7)
    folders = write_both(tmp_path, sft, dpo)
    assert expo(*folders, tmp_path / "out", 0.5, more=f"--dtype {dtype}") == 0
    expected = {
        name: nearest(sft[name], tensor, 0.5, wanted) if tensor.is_floating_point() else tensor
        for name, tensor in dpo.items()
    }
    assert same_bits(read_weights(tmp_path / "out"), expected)
    config = read_json(tmp_path / "out" / "config.json")
    assert config == {**LLAMA, "dtype": str(wanted).removeprefix("torch.")}


def test_the_dtype_of_an_old_or_nested_configuration_is_changed_where_it_stands(tmp_path: Path) -> None:
    old = {key: value for key, value in LLAMA.items() if key != "dtype"} | {"torch_dtype": "bfloat16"}
    nested = {"model_type": "llava", "dtype": "bfloat16", "text_config": LLAMA, "vision_config": {"depth": 2}}
    for name, config in (("old", old), ("nested", nested)):
        sft, dpo = parents(BF16, BF16)
        folders = write_both(tmp_path / name, sft, dpo, config)
        assert expo(*folders, tmp_path / name / "out", 0.5, more="--dtype fp32") == 0
    assert read_json(tmp_path / "old" / "out" / "config.json") == {**old, "torch_dtype": "float32"}
    assert read_json(tmp_path / "nested" / "out" / "config.json") == {
        **nested,
        "dtype": "float32",
        "text_config": {**LLAMA, "dtype": "float32"},
    }


def test_multipliers_freeze_and_scale_and_the_first_pattern_counts(tmp_path: Path) -> None:
    sft, dpo = parents(BF16, BF16)
    folders = write_both(tmp_path, sft, dpo)
    more = "--multiplier 'embed_tokens|lm_head=0' --multiplier 'layers.0=0.5' --multiplier 'layers=2'"
    assert expo(*folders, tmp_path / "out", 0.5, more=more) == 0
    expected = {}
    for name, tensor in dpo.items():
        factor = (
            0.0 if name in (EMBEDDING, HEAD) else 0.5 if "layers.0" in name else 2 if "layers" in name else 1
        )
        expected[name] = nearest(sft[name], tensor, 0.5 * factor)
    assert same_bits(read_weights(tmp_path / "out"), expected)
    assert same_bits({HEAD: expected[HEAD]}, {HEAD: dpo[HEAD]})


def test_a_pattern_that_no_tensor_has_is_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, dpo = write_pair(tmp_path)
    assert expo(sft, dpo, tmp_path / "out", 0.5, more="--multiplier embd=0 --multiplier norm=0") == 0
    assert capsys.readouterr().err.count("note: ") == 1
    assert (
        expo(sft, dpo, tmp_path / "out", 0.5, more="--multiplier embd=0 --multiplier norm=0 --dry-run") == 0
    )
    assert "no tensor has a name with the pattern `embd` of `multipliers`" in capsys.readouterr().out


def test_multipliers_in_another_order_are_another_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, dpo = write_pair(tmp_path)
    patterns = ["--multiplier layers.0=0", "--multiplier layers=2"]
    assert expo(sft, dpo, tmp_path / "out", 0.5, more=" ".join(patterns)) == 0
    assert expo(sft, dpo, tmp_path / "out", 0.5, more=" ".join(reversed(patterns))) == 2
    assert "model of another plan" in capsys.readouterr().err


@pytest.mark.parametrize("sft_head", [True, False], ids=["sft stores the head", "sft does not"])
@pytest.mark.parametrize("dpo_head", [True, False], ids=["dpo stores the head", "dpo does not"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_tied_weights_stay_equal_and_are_stored_as_dpo_has_them(
    tmp_path: Path, sft_head: bool, dpo_head: bool, rounding: str
) -> None:
    sft = llama_tensors()
    dpo = moved(sft)
    for tensors, stored in ((sft, sft_head), (dpo, dpo_head)):
        if stored:
            tensors[HEAD] = tensors[EMBEDDING].clone()
        else:
            del tensors[HEAD]
    folders = write_both(tmp_path, sft, dpo, {**LLAMA, "tie_word_embeddings": True}, dpo_shards=2)
    more = "--multiplier embed_tokens=0.5"
    assert expo(*folders, tmp_path / "out", 0.6, rounding=rounding, more=more) == 0
    result = read_weights(tmp_path / "out")
    assert result.keys() == dpo.keys()
    if rounding == "nearest":
        assert same_bits(
            {EMBEDDING: result[EMBEDDING]}, {EMBEDDING: nearest(sft[EMBEDDING], dpo[EMBEDDING], 0.3)}
        )
    if dpo_head:
        assert torch.equal(result[HEAD], result[EMBEDDING])


def test_an_untied_head_is_matched_with_the_tied_one_of_sft(tmp_path: Path) -> None:
    sft = llama_tensors()
    dpo = moved(sft)
    del sft[HEAD]
    sft_folder = write_model(tmp_path / "sft", sft, {**LLAMA, "tie_word_embeddings": True})
    dpo_folder = write_model(tmp_path / "dpo", dpo)
    assert expo(sft_folder, dpo_folder, tmp_path / "out", 0.5) == 0
    head = read_weights(tmp_path / "out")[HEAD]
    assert torch.equal(head, nearest(sft[EMBEDDING], dpo[HEAD], 0.5))


def test_buffers_on_one_side_and_integers_are_kept_as_dpo_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = llama_tensors()
    dpo = moved(sft)
    dpo["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    sft["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    sft["counts"], dpo["counts"] = torch.arange(5), torch.arange(5) + 1
    dpo["mask"], sft["mask"] = torch.tensor([True, False, True]), torch.tensor([False, True, True])
    folders = write_both(tmp_path, sft, dpo)
    assert expo(*folders, tmp_path / "out", 0.5, more="--dry-run") == 0
    note = "1 buffer(s) are in dpo only and kept as they are: model.layers.0.self_attn.rotary_emb.inv_freq"
    assert note in capsys.readouterr().out
    assert expo(*folders, tmp_path / "out", 0.5) == 0
    assert note in capsys.readouterr().err
    kept = ("model.layers.0.self_attn.rotary_emb.inv_freq", "counts", "mask")
    expected = {
        name: tensor if name in kept else nearest(sft[name], tensor, 0.5) for name, tensor in dpo.items()
    }
    assert same_bits(read_weights(tmp_path / "out"), expected)


def test_empty_and_scalar_tensors_pass(tmp_path: Path) -> None:
    sft = llama_tensors() | {"scale": torch.tensor(1.5), "nothing": torch.zeros(0, 4)}
    dpo = moved(sft)
    folders = write_both(tmp_path, sft, dpo)
    assert expo(*folders, tmp_path / "out", 0.5) == 0
    assert same_bits(read_weights(tmp_path / "out"), formula(sft, dpo, 0.5))


# Pickles


def pickled(folder: Path, tensors: Tensors, shards: int = 1) -> Path:
    write_model(folder, {"x": torch.zeros(1)})
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: tensors[name] for name in names[index::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[index::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_pickled_parents_are_read_where_that_is_allowed(tmp_path: Path) -> None:
    sft, dpo = parents(F32, BF16)
    folders = pickled(tmp_path / "sft", sft), pickled(tmp_path / "dpo", dpo, shards=2)
    assert expo(*folders, tmp_path / "out", 0.5, more="--allow-pickle") == 0
    assert same_bits(read_weights(tmp_path / "out"), formula(sft, dpo, 0.5))
    assert not list((tmp_path / "out").glob("*.bin*"))


# Chunks, threads, passes


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "reference"])
def test_the_bytes_do_not_depend_on_pages_chunks_or_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    sft, dpo = write_pair(tmp_path, sft_shards=2, dpo_shards=3, dtype=F32 if rounding == "nearest" else BF16)
    digests = []
    for page_bytes, chunk_bytes, threads in (
        (4 << 20, 1 << 20, 2), (32768, 8192, 1), (5000, 1000, 4), (4 << 20, 514, 7), (8, 8, 2),
    ):  # fmt: skip
        monkeypatch.setattr(stream, "PAGE_BYTES", page_bytes)
        monkeypatch.setattr(LocalStore, "chunk_bytes", chunk_bytes)
        monkeypatch.setattr(LocalStore, "concurrency", threads)
        out = tmp_path / f"out-{page_bytes}-{chunk_bytes}"
        assert expo(sft, dpo, out, 0.3, rounding=rounding, more="--shard-size 100kB") == 0
        digests.append(digest(out))
    assert len(digests[0]) > 1
    assert all(other == digests[0] for other in digests)


def test_four_alphas_in_one_pass_are_four_passes(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    assert expo(sft, dpo, tmp_path / "once", *ALPHAS, rounding="stochastic") == 0
    for alpha in ALPHAS:
        folder = f"alpha={format_alpha(alpha)}"
        assert expo(sft, dpo, tmp_path / "each" / folder, alpha, rounding="stochastic") == 0
        assert digest(tmp_path / "once" / folder) == digest(tmp_path / "each" / folder)


def test_the_seed_changes_the_random_bits(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    for seed in (0, 1):
        assert expo(sft, dpo, tmp_path / f"{seed}", 0.3, rounding="stochastic", more=f"--seed {seed}") == 0
    assert digest(tmp_path / "0") != digest(tmp_path / "1")


# What lies beside the weights

SIDE_FILES = {
    "chat_template.jinja": b"{{ messages }}\r\n",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "tokenizer.json": '{"name": "\u2028"}'.encode(),
    "tokenizer_config.json": b'{ "b": 1,   "a": 2 }',
    "special_tokens_map.json": b"{}",
    "tokenizer.model": bytes(range(256)),
    "generation_config.json": b'{"temperature": 0.70}\n\n',
    "modeling_tiny.py": b"raise SystemExit('never run')\n",
    "preprocessor_config.json": b"{}",
    "LICENSE": b"Apache-2.0\n",
    "NOTICE": b"",
}
NOT_COPIED = {
    "README.md": b"---\nlicense: other\n---\ndpo's own card",
    "training_args.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "trainer_state.json": b"{}",
    ".gitattributes": b"x",
    "runs/events.out": b"x",
}


def test_side_files_are_dpos_byte_for_byte(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    (dpo / "config.json").write_text(json.dumps(LLAMA, indent=7))
    (sft / "tokenizer.json").write_text("sft's")
    (sft / "vocab.txt").write_text("sft's")
    for key, data in (SIDE_FILES | NOT_COPIED).items():
        (dpo / key).parent.mkdir(exist_ok=True)
        (dpo / key).write_bytes(data)
    assert expo(sft, dpo, tmp_path / "out", 0.5) == 0
    files = files_of(tmp_path / "out")
    assert {key: files.get(key) for key in SIDE_FILES} == SIDE_FILES
    assert files["config.json"] == (dpo / "config.json").read_bytes()
    own = {"config.json", "model.safetensors", "README.md", "expo.json"}
    assert {key for key in files if not key.startswith(".expo/")} == {*SIDE_FILES, *own}
    assert b"dpo's own card" not in files["README.md"]


def test_the_manifest_names_everything_with_size_and_digest(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    assert expo(sft, dpo, tmp_path / "out", 0.5, more="--shard-size 100kB") == 0
    manifest = read_json(tmp_path / "out" / "expo.json")
    files = {key: data for key, data in files_of(tmp_path / "out").items() if not key.startswith(".expo/")}
    del files["expo.json"]
    listed = {entry["file"]: entry for entry in manifest["shards"]} | manifest["files"]
    assert {key: (entry["size"], entry["sha256"]) for key, entry in listed.items()} == {
        key: (len(data), hashlib.sha256(data).hexdigest()) for key, data in files.items()
    }
    assert manifest["parents"]["dpo"]["uri"] == str(dpo)
    assert manifest["alpha"] == 0.5
    assert manifest["arithmetic"]["rounding"] == "nearest"


def test_the_statistics_are_those_of_the_written_weights(tmp_path: Path) -> None:
    sft, dpo = parents(BF16, BF16)
    folders = write_both(tmp_path, sft, dpo)
    assert expo(*folders, tmp_path / "out", 0.5, more="--multiplier norm=0") == 0
    statistics = read_json(tmp_path / "out" / "expo.json")["statistics"]
    assert statistics["tensors"].keys() == {name for name in dpo if "norm" not in name}
    for name, described in statistics["tensors"].items():
        d, s, out = (side[name].double() for side in (dpo, sft, read_weights(tmp_path / "out")))
        delta = d - s
        assert described["elements"] == d.numel()
        assert described["changed_share"] == pytest.approx((delta != 0).double().mean().item(), rel=1e-5)
        assert described["rms_weight"] == pytest.approx(d.square().mean().sqrt().item(), rel=1e-4)
        assert described["rms_delta"] == pytest.approx(delta.square().mean().sqrt().item(), rel=1e-4)
        assert described["effective_alpha"] == pytest.approx(
            (((out - d) * delta).sum() / delta.square().sum()).item(), rel=1e-4
        )


# The model card


def front_matter(card: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return data


def test_the_card_is_one_the_hub_can_read(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    sft, dpo = write_pair(tmp_path)
    assert expo(sft, dpo, tmp_path / "out", 0.5) == 0
    card = hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert "merge" in card.data.tags
    assert card.data.base_model is None  # a local folder is no model of the Hub
    assert "alpha = 0.5" in card.text
    assert str(dpo) in card.text


@pytest.mark.parametrize(
    ("adapter", "base", "relation"),
    [(None, ["org/dpo-7b", "org/sft-7b"], "merge"), ("merge", ["org/dpo-7b", "org/sft-7b"], "merge"),
     ("scale", ["org/sft-7b"], "adapter")],
)  # fmt: skip
def test_the_card_names_parents_that_are_on_the_hub(
    tmp_path: Path, adapter: str | None, base: list[str], relation: str
) -> None:
    sft, dpo = write_pair(tmp_path)
    assert expo(sft, dpo, tmp_path / "out", 0.5) == 0
    manifest = read_json(tmp_path / "out" / "expo.json")
    for side in ("sft", "dpo"):
        manifest["parents"][side] |= {"uri": f"hf://org/{side}-7b@main", "revision": "0" * 40}
    manifest["arithmetic"]["adapter"] = adapter
    card = model_card(manifest)
    assert front_matter(card)["base_model"] == base
    assert front_matter(card)["base_model_relation"] == relation
    assert "0" * 40 in card
    assert manifest["shards"][0]["sha256"] in card


def test_the_card_and_the_command_warn_of_alphas_that_rounding_swallowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = llama_tensors()
    dpo = {name: (tensor.float() * (1 + 2**-8)).bfloat16() for name, tensor in sft.items()}  # one ulp or none
    folders = write_both(tmp_path, sft, dpo)
    for rounding, words in (("nearest", "rounding to nearest loses small changes"), ("stochastic", "")):
        out = tmp_path / rounding
        assert expo(*folders, out, 0.2, rounding=rounding) == 0
        printed = capsys.readouterr().out
        warnings = read_json(out / "expo.json")["warnings"]
        assert [words in warning for warning in warnings] == ([True] if words else [])
        assert (
            (words in printed and words in (out / "README.md").read_text())
            if words
            else "warning" not in printed
        )


def test_a_delta_too_large_for_alignment_is_pointed_out(tmp_path: Path) -> None:
    sft = llama_tensors()
    folders = write_both(tmp_path, sft, moved(sft, scale=5e-3))
    assert expo(*folders, tmp_path / "out", 0.5) == 0
    assert "more than alignment training does" in read_json(tmp_path / "out" / "expo.json")["warnings"][0]


# As a process


def command(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = ROOT
    return subprocess.run(
        [sys.executable, "-m", "expo_ray.cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(root)},
        check=False,
    )


def test_the_command_prints_what_it_wrote_and_relative_paths_work(tmp_path: Path) -> None:
    write_pair(tmp_path)
    words = [
        "extrapolate",
        "--sft",
        "sft",
        "--dpo",
        "dpo/.",
        "--alpha",
        "0.5",
        "--alpha",
        "-0.5",
        "--output",
        "out",
    ]
    dry = command(*words, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0
    assert "21       1       -0.5 0.5" in dry.stdout or "21       1       0.5 -0.5" in dry.stdout
    assert not (tmp_path / "out").exists()
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split(" (")[0] for line in done.stdout.splitlines()] == [
        f"{tmp_path}/out/alpha={alpha}: alpha {alpha}" for alpha in ("-0.5", "0.5")
    ]
    assert "1/1 shards" in done.stderr
    assert "Traceback" not in done.stderr
    checked = command("verify", "out/alpha=0.5", cwd=tmp_path)
    assert (checked.returncode, "are as published" in checked.stdout) == (0, True)


def test_a_second_run_writes_nothing(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    assert expo(sft, dpo, tmp_path / "out", 0.5) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert expo(sft, dpo, tmp_path / "out", 0.5) == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before
