"""`expo-ray verify`: what is stored against its manifest and its parents, and models that other tools made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expo_ray.cli.process import main
from tests.support.pairs import (
    LLAMA,
    Tensors,
    expo,
    llama_tensors,
    moved,
    nearest,
    read_weights,
    stepwise,
    write_both,
    write_model,
    write_pair,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Print = pytest.CaptureFixture[str]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    sft, dpo = write_pair(tmp_path, dpo_shards=2)
    assert expo(sft, dpo, tmp_path / "out", 0.5, rounding="stochastic", more="--shard-size 60kB") == 0
    return tmp_path / "out"


def flip(file: Path, offset: int = -100) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def foreign(file: Path) -> None:
    save_file({"x": torch.zeros(1)}, file)


def first_shard(folder: Path) -> str:
    return min(file.name for file in folder.glob("*.safetensors"))


def test_an_untouched_model_is_as_published(published: Path, capsys: Print) -> None:
    assert main(["verify", str(published)]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"{published}: 4 shard(s) and 4 file(s) are as published"
    )


@pytest.mark.parametrize(
    ("harm", "file", "expected"),
    [
        (flip, "SHARD", "has sha256 .*, the manifest says .*; run its job again with --overwrite"),
        (lambda file: flip(file, 20), "SHARD", "has sha256 .*, the manifest says"),
        (flip, "config.json", "has sha256 .*, the manifest says"),
        (cut, "SHARD", r"has \d+ bytes, the manifest says \d+; run its job again"),
        (Path.unlink, "SHARD", "is missing; run its job again"),
        (Path.unlink, "model.safetensors.index.json", "is missing"),
        (foreign, "model-00005-of-00005.safetensors", "is not part of the model, and what loads it may read it; move it elsewhere"),
        (foreign, "pytorch_model.bin", "is not part of the model, and what loads it may read it; move it elsewhere"),
    ],
    ids=["flipped weight", "flipped header", "flipped config", "cut", "shard gone", "index gone", "foreign shard", "pickle"],
)  # fmt: skip
def test_every_harm_is_found_and_named(
    published: Path, capsys: Print, harm: Callable[[Path], None], file: str, expected: str
) -> None:
    harmed = published / (first_shard(published) if file == "SHARD" else file)
    harm(harmed)
    capsys.readouterr()
    assert main(["verify", str(published)]) == 1
    captured = capsys.readouterr()
    assert re.search(f"failed: {harmed}: {expected}", captured.err)
    assert captured.err.count("failed: ") == 1
    assert "as published" not in captured.out


def test_a_moved_model_is_still_whole(published: Path, tmp_path: Path) -> None:
    moved_to = published.rename(tmp_path / "elsewhere")
    assert main(["verify", str(moved_to)]) == 0


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "reference"])
def test_the_weights_are_computed_again_from_the_parents(
    tmp_path: Path, capsys: Print, rounding: str
) -> None:
    sft, dpo = write_pair(tmp_path, dpo_shards=3)
    more = "--shard-size 80kB --multiplier norm=0 --multiplier q_proj=0.5 --seed 7"
    assert expo(sft, dpo, tmp_path / "out", 0.3, rounding=rounding, more=more) == 0
    words = ["verify", str(tmp_path / "out"), "--sft", str(sft), "--dpo", str(dpo)]
    assert main(words) == 0
    assert "computed again from both parents: the same bytes" in capsys.readouterr().out
    other = write_model(tmp_path / "other", moved(llama_tensors(), seed=9))
    assert main([*words[:-1], str(other)]) == 1
    captured = capsys.readouterr()
    assert "give other weights; name the parents that the manifest names" in captured.err
    assert "the same bytes" not in captured.out


def test_flipped_weights_with_a_manifest_to_match_are_found_by_the_parents(
    tmp_path: Path, capsys: Print
) -> None:
    sft, dpo = write_pair(tmp_path)
    out = tmp_path / "out"
    assert expo(sft, dpo, out, 0.5) == 0
    before = json.loads((out / "expo.json").read_text())["shards"][0]["sha256"]
    flip(out / "model.safetensors")
    capsys.readouterr()
    assert main(["verify", str(out)]) == 1
    reported = re.search("has sha256 ([0-9a-f]{64})", capsys.readouterr().err)
    assert reported
    manifest = (out / "expo.json").read_text().replace(before, reported[1])
    (out / "expo.json").write_text(manifest)
    assert main(["verify", str(out)]) == 0
    assert main(["verify", str(out), "--sft", str(sft), "--dpo", str(dpo)]) == 1


# Models of other tools


def summary(printed: str) -> tuple[float, float, float]:
    """Best alpha, least, most."""
    line = re.search(
        r"alpha (\S+) fits best over the \d+ tensors with a delta, (\S+) to (\S+) one by one", printed
    )
    assert line, printed
    return float(line[1]), float(line[2]), float(line[3])


def table(printed: str) -> dict[str, tuple[float, float, float]]:
    """Alpha, relative delta and residual by tensor."""
    rows = [line.split() for line in printed.splitlines() if line.startswith(("model.", "lm_head"))]
    return {name: (float(alpha), float(delta), float(rest)) for name, alpha, delta, rest in rows}


def other_tool(folder: Path, tensors: Tensors, shards: int = 5) -> Path:
    """Other file names, another order, no manifest."""
    names = sorted(tensors, reverse=True)
    write_model(folder, {"unused": torch.zeros(1)})
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"merged_{index}.safetensors"
        save_file({name: tensors[name] for name in names[index::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[index::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def fits(capsys: Print, model: Path, sft: Path, dpo: Path) -> str:
    capsys.readouterr()
    assert main(["verify", str(model), "--sft", str(sft), "--dpo", str(dpo)]) == 0
    return capsys.readouterr().out


def test_alpha_is_found_in_what_an_exact_tool_wrote(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors(dtype=torch.float32)
    dpo = moved(sft)
    folders = write_both(tmp_path, sft, dpo)
    exact = {
        name: (tensor.double() + 0.37 * (tensor.double() - sft[name].double())).float()
        for name, tensor in dpo.items()
    }
    printed = fits(capsys, other_tool(tmp_path / "other", exact), *folders)
    assert summary(printed) == pytest.approx((0.37, 0.37, 0.37), abs=2e-4)
    assert table(printed).keys() == dpo.keys()
    for alpha, delta, rest in table(printed).values():
        assert alpha == pytest.approx(0.37, abs=2e-4)
        assert delta == pytest.approx(1e-2, rel=0.4)
        assert rest < 1e-6


@pytest.mark.parametrize("formula", [stepwise, nearest])
def test_alpha_is_found_in_what_bf16_tools_wrote(
    tmp_path: Path, capsys: Print, formula: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
) -> None:
    sft = llama_tensors()
    dpo = moved(sft, scale=4e-3)
    folders = write_both(tmp_path, sft, dpo)
    model = {name: formula(sft[name], tensor, 0.37) for name, tensor in dpo.items()}
    printed = fits(capsys, other_tool(tmp_path / "other", model), *folders)
    best, least, most = summary(printed)
    assert best == pytest.approx(0.37, abs=2e-3)
    assert 0.34 < least < best < most < 0.40
    assert 1e-4 < table(printed)[HEAD][2] < 5e-3  # what rounding to bf16 leaves


def test_alpha_is_printed_for_each_tensor(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors(dtype=torch.float32)
    dpo = moved(sft)
    dpo["model.norm.weight"] = sft["model.norm.weight"].clone()
    folders = write_both(tmp_path, sft, dpo)
    model = {name: nearest(sft[name], tensor, 2.0 if name == HEAD else 0.5) for name, tensor in dpo.items()}
    model["model.norm.weight"] += 1
    rows = table(fits(capsys, other_tool(tmp_path / "other", model), *folders))
    assert rows[HEAD][0] == pytest.approx(2, abs=1e-3)
    assert rows[EMBEDDING][0] == pytest.approx(0.5, abs=1e-3)
    assert rows["model.norm.weight"][:2] == (0, 0)
    assert rows["model.norm.weight"][2] > 1  # no alpha explains it


def test_dpo_itself_has_alpha_0_and_sft_minus_1(tmp_path: Path, capsys: Print) -> None:
    sft, dpo = write_pair(tmp_path)
    assert summary(fits(capsys, dpo, sft, dpo)) == (0, 0, 0)
    assert summary(fits(capsys, sft, sft, dpo)) == (-1, -1, -1)


def test_another_dtype_and_a_head_that_the_tool_dropped_as_tied(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors()
    del sft[HEAD]
    dpo = moved(sft)
    dpo[HEAD] = dpo[EMBEDDING].clone()
    folders = write_both(tmp_path, sft, dpo, {**LLAMA, "tie_word_embeddings": True})
    model = {name: nearest(sft[name], dpo[name], 0.37, torch.float32) for name in sft}
    printed = fits(
        capsys, write_model(tmp_path / "m", model, {**LLAMA, "tie_word_embeddings": True}), *folders
    )
    assert summary(printed)[0] == pytest.approx(0.37, abs=1e-3)
    assert "not compared" not in printed


def test_tensors_that_cannot_be_compared_are_listed_and_the_others_fitted(
    tmp_path: Path, capsys: Print
) -> None:
    sft = llama_tensors(rows=256)
    dpo = moved(llama_tensors(rows=264)) | {
        name: tensor for name, tensor in moved(sft).items() if name not in (HEAD, EMBEDDING)
    }
    folders = write_both(tmp_path, sft, dpo)
    assert expo(*folders, tmp_path / "out", 0.5, more="--vocab keep-dpo") == 0
    printed = fits(capsys, tmp_path / "out", *folders)
    assert f"not compared: {HEAD} (model [264, 64], sft [256, 64], dpo [264, 64])" in printed
    assert "computed again from both parents: the same bytes" in printed
    model = read_weights(tmp_path / "out")
    del model["model.norm.weight"]
    printed = fits(capsys, other_tool(tmp_path / "other", model), *folders)
    assert "not compared: model.norm.weight (not in the model)" in printed


def test_rows_matched_by_token_are_not_fitted_by_position(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors(dtype=torch.float32)
    dpo = moved(sft)
    folders = write_both(tmp_path, sft, dpo)
    rows = len(sft[EMBEDDING])
    for folder, shift in zip(folders, (0, 5), strict=True):
        vocab = {f"token {row}": (row + shift) % rows for row in range(rows)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocab}}))
    assert expo(*folders, tmp_path / "out", 0.5, rounding="nearest", more="--vocab by-token") == 0
    printed = fits(capsys, tmp_path / "out", *folders)
    for name in (HEAD, EMBEDDING):
        assert f"not compared: {name} (its rows were matched by token, not by position)" in printed
    assert table(printed).keys() == dpo.keys() - {HEAD, EMBEDDING}
    assert summary(printed) == pytest.approx((0.5, 0.5, 0.5), abs=1e-3)
    assert "computed again from both parents: the same bytes" in printed


def test_pickles_of_the_papers_script(tmp_path: Path, capsys: Print) -> None:
    sft, dpo = write_pair(tmp_path)
    folder = write_model(tmp_path / "other", {"x": torch.zeros(1)})
    (folder / "model.safetensors").unlink()
    before, after = read_weights(sft), read_weights(dpo)
    torch.save(
        {name: stepwise(before[name], tensor, 4.0) for name, tensor in after.items()},
        folder / "pytorch_model.bin",
    )
    words = ["verify", str(folder), "--sft", str(sft), "--dpo", str(dpo)]
    assert main(words) == 2
    assert "only PyTorch pickles" in capsys.readouterr().err
    assert main([*words, "--allow-pickle"]) == 0
    assert summary(capsys.readouterr().out)[0] == pytest.approx(4, abs=0.05)


# Folders that cannot be verified


def test_a_folder_that_cannot_be_verified_is_refused_with_the_reason(tmp_path: Path, capsys: Print) -> None:
    sft, dpo = write_pair(tmp_path)
    out = tmp_path / "out"
    assert expo(sft, dpo, out, 0.5) == 0

    def error_of(*words: object) -> str:
        capsys.readouterr()
        assert main(["verify", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    assert f"{tmp_path}/nowhere: no such folder, or nothing in it" in error_of(tmp_path / "nowhere")
    assert f"{dpo} has no expo.json; give --sft and --dpo to see which alpha fits" in error_of(dpo)
    assert "give both --sft and --dpo, or neither" in error_of(out, "--sft", sft)
    assert f"{tmp_path}/nowhere: no such folder" in error_of(out, "--sft", sft, "--dpo", tmp_path / "nowhere")
    (out / "expo.json").write_text("{")
    assert "expo.json: not valid JSON" in error_of(out)
    (out / "expo.json").write_text("[]")
    assert "a JSON list instead of an object; run its job again with --overwrite" in error_of(out)
    (out / "expo.json").unlink()
    assert f"{out}: the model is unfinished; its job is still running, or was stopped" in error_of(out)
    small = write_model(tmp_path / "small", {"x": torch.zeros(1)})
    assert "shares no weight of one shape with both parents" in error_of(small, "--sft", sft, "--dpo", dpo)
