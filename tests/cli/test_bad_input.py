"""What cannot be extrapolated is refused by name, with the remedy, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from expo_ray.cli import commands
from expo_ray.cli.process import main
from expo_ray.extrapolation import stream
from expo_ray.extrapolation.run_job import run_job
from expo_ray.progress import Progress
from expo_ray.storage.local import LocalStore
from tests.support.disks import remount
from tests.support.pairs import (
    LLAMA,
    Tensors,
    expo,
    files_of,
    llama_tensors,
    moved,
    read_weights,
    same_bits,
    write_both,
    write_model,
    write_pair,
)

BAD_INPUT, FAILED = 2, 1
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
Print = pytest.CaptureFixture[str]
Change = Callable[[Tensors], None]


def refused(capsys: Print, *words: object, more: str = "", alphas: tuple[object, ...] = (0.5,)) -> str:
    """What the command says on its way out, after making sure that it has written nothing."""
    sft, dpo, out = map(Path, map(str, words))
    before = files_of(out)
    existed = out.exists()
    capsys.readouterr()
    assert expo(sft, dpo, out, *alphas, more=more) == BAD_INPUT
    assert files_of(out) == before
    assert out.exists() == existed
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# Two parents that do not fit


def without(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def with_one(name: str, *shape: int) -> Change:
    return lambda tensors: tensors.__setitem__(name, torch.zeros(shape, dtype=torch.bfloat16))


def rows(count: int) -> Change:
    def change(tensors: Tensors) -> None:
        tensors |= {name: torch.zeros(count, 64).bfloat16() for name in (EMBEDDING, "lm_head.weight")}

    return change


def nothing(tensors: Tensors) -> None:
    pass


@pytest.mark.parametrize(
    ("change_sft", "change_dpo", "expected"),
    [
        (without(NORM), nothing, f"sft lacks 1 tensor(s) of dpo: {NORM}; give two whole checkpoints of one architecture"),
        (nothing, without(NORM), f"sft has 1 tensor(s) that dpo lacks: {NORM}; give two whole checkpoints of one"),
        (nothing, with_one("value_head.weight", 1, 64), "sft lacks 1 tensor(s) of dpo: value_head.weight"),
        (nothing, with_one(NORM, 32), f"1 tensor(s) do not fit: {NORM}: dpo has shape [32], sft has [64]; name as sft the model"),
        (with_one(NORM, 8, 8), nothing, f"{NORM}: dpo has shape [64], sft has [8, 8]"),
        (nothing, rows(264), f"vocabularies differ, dpo has 264 rows and sft 256 (lm_head.weight, {EMBEDDING}); set `--vocab by-token`"),
        (rows(264), nothing, "dpo has 256 rows and sft 264"),
    ],
    ids=["missing", "extra", "missing head", "shape", "dimensions", "vocabulary", "smaller vocabulary"],
)  # fmt: skip
def test_parents_that_do_not_fit(
    tmp_path: Path, capsys: Print, change_sft: Change, change_dpo: Change, expected: str
) -> None:
    sft = llama_tensors()
    dpo = moved(sft)
    change_sft(sft)
    change_dpo(dpo)
    folders = write_both(tmp_path, sft, dpo)
    said = refused(capsys, *folders, tmp_path / "out")
    assert "1 problem(s), nothing was written:\n- dpo: " in said
    assert expected in said


def test_remedies_are_flags_for_a_command_and_keys_for_a_job_file(tmp_path: Path, capsys: Print) -> None:
    dpo = moved(llama_tensors())
    rows(264)(dpo)
    folders = write_both(tmp_path, llama_tensors() | {"extra.weight": dpo[NORM]}, dpo)
    job = tmp_path / "job.yaml"
    job.write_text(
        f"output: {tmp_path}/o\npairs: [{{name: p, sft: {folders[0]}, dpo: {folders[1]}, alphas: [1]}}]"
    )
    said = refused(capsys, *folders, tmp_path / "out")
    for remedy in ("`--vocab by-token`", "`--vocab keep-dpo`", "`--multiplier '<pattern>=0'`"):
        assert remedy in said
    assert main(["plan", str(job)]) == BAD_INPUT
    said = capsys.readouterr().err
    for remedy in ("`vocab: by-token`", "`vocab: keep-dpo`", "`multipliers: {<pattern>: 0}`"):
        assert remedy in said


def test_everything_wrong_with_a_pair_is_reported_at_once(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors()
    dpo = moved(sft)
    rows(264)(dpo)
    without(NORM)(sft)
    with_one("model.layers.0.mlp.up_proj.weight", 3, 3)(dpo)
    folders = write_both(tmp_path, sft, dpo)
    said = refused(capsys, *folders, tmp_path / "out", alphas=(0.5, -1), more="--multiplier norm=2")
    for text in (
        "4 problem(s)",
        "sft lacks 1",
        "vocabularies differ",
        "do not fit",
        "times the multiplier 2.0 of `norm` is -2.0",
    ):
        assert text in said


def test_a_sample_of_many_names_is_shown(tmp_path: Path, capsys: Print) -> None:
    dpo = moved(llama_tensors())
    sft = {name: tensor for name, tensor in llama_tensors().items() if "layers" not in name}
    said = refused(capsys, *write_both(tmp_path, sft, dpo), tmp_path / "out")
    assert "sft lacks 18 tensor(s) of dpo" in said
    assert "and 13 more" in said


# Quantised parents


def gptq(tensors: Tensors, config: dict[str, Any]) -> None:
    prefix = "model.layers.0.self_attn.q_proj."
    del tensors[prefix + "weight"]
    tensors |= {
        prefix + part: torch.zeros(8, 8, dtype=torch.int32) for part in ("qweight", "qzeros", "g_idx")
    }


def awq(tensors: Tensors, config: dict[str, Any]) -> None:
    gptq(tensors, config)
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "version": "gemm"}


def bitsandbytes(tensors: Tensors, config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    tensors["model.layers.0.mlp.up_proj.SCB"] = torch.zeros(4)


def fp8(tensors: Tensors, config: dict[str, Any]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name + "_scale"] = torch.ones(1)


def fp8_blocks(tensors: Tensors, config: dict[str, Any]) -> None:
    fp8(tensors, config)
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("quantise", "scheme"),
    [(gptq, "gptq"), (awq, "awq (4 bit)"), (bitsandbytes, "bitsandbytes (8 bit)"), (fp8, "fp8 (with scales)"),
     (fp8_blocks, "fp8 (block scales)")],
)  # fmt: skip
@pytest.mark.parametrize("side", ["sft", "dpo"])
def test_quantised_parents_are_refused_by_the_name_of_their_scheme(
    tmp_path: Path, capsys: Print, side: str, quantise: Callable[[Tensors, dict[str, Any]], None], scheme: str
) -> None:
    sft, dpo = write_pair(tmp_path)
    tensors, config = llama_tensors(), dict(LLAMA)
    quantise(tensors, config)
    write_model(tmp_path / side, tensors, config)
    said = refused(capsys, sft, dpo, tmp_path / "out")
    assert (
        f"dpo: {side}: {tmp_path / side} is quantised ({scheme}); extrapolate the checkpoint it was made from"
        in said
    )


# Files that are not what their names say


def damage(folder: Path, data: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(data(file.read_bytes()))


def with_header(text: bytes) -> Callable[[bytes], bytes]:
    return lambda data: struct.pack("<Q", len(text)) + text + data[8 + int.from_bytes(data[:8], "little") :]


OVERLAP = json.dumps({
    "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}
}).encode()  # fmt: skip


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (lambda data: data[:-100], "truncated: the header promises"),
        (lambda data: data[:50], "truncated: the header alone needs"),
        (lambda data: b"", "truncated: 0 bytes"),
        (lambda data: data + b"x", "1 bytes past the last tensor"),
        (lambda data: struct.pack("<Q", 2**62) + data[8:], "announce a header of 4611686018427387904 bytes"),
        (with_header(b"[" * 100_000), "the header begins with"),
        (with_header(b'{"a":' * 100_000), "JSON nested too deeply"),
        (with_header(OVERLAP), "b overlaps it"),
        (with_header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'), "shape [-1] is not a list of whole"),
        (with_header(b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}'), "unknown dtype Q9"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "run `git lfs pull`"),
    ],
    ids=["data cut", "header cut", "empty", "tail", "length", "no object", "nesting", "overlap", "shape", "dtype", "lfs"],
)  # fmt: skip
def test_damaged_weight_files(
    tmp_path: Path, capsys: Print, data: Callable[[bytes], bytes], expected: str
) -> None:
    sft, dpo = write_pair(tmp_path)
    damage(sft, data)
    said = refused(capsys, sft, dpo, tmp_path / "out")
    assert f"- dpo: sft: {sft}/model.safetensors: " in said
    assert expected in said


def index(**weight_map: str) -> str:
    return json.dumps({"weight_map": weight_map})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (index(a="../sft/model.safetensors"), "which is not the plain name of a .safetensors file in the same folder"),
        (index(a="/etc/passwd"), "which is not the plain name"),
        (index(a="model-00009-of-00009.safetensors"), "1 of the 1 weight files are missing: model-00009-of-00009.safetensors"),
        (index(a="model-00001-of-00003.safetensors"), "1 tensor(s) are not in the file it names: a"),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "the key 'a' stands twice"),
        ("[1, 2]", "a JSON list instead of an object"),
        ("{", "not valid JSON"),
        ("{}", "no `weight_map` from tensor names to files"),
    ],
)  # fmt: skip
def test_damaged_indexes(tmp_path: Path, capsys: Print, text: str, expected: str) -> None:
    sft, dpo = write_pair(tmp_path, dpo_shards=3)
    (dpo / "model.safetensors.index.json").write_text(text)
    said = refused(capsys, sft, dpo, tmp_path / "out")
    assert f"- dpo: dpo: {dpo}" in said
    assert expected in said


def test_a_missing_shard_a_broken_configuration_and_a_missing_folder_are_reported_together(
    tmp_path: Path, capsys: Print
) -> None:
    sft, _ = write_pair(tmp_path, sft_shards=3)
    (sft / "model-00002-of-00003.safetensors").unlink()
    (sft / "config.json").write_text("{]")
    said = refused(capsys, sft, tmp_path / "nowhere", tmp_path / "out")
    assert "3 problem(s)" in said
    assert (
        f"{sft}: 1 of the 3 weight files are missing: model-00002-of-00003.safetensors; download or copy them"
        in said
    )
    assert f"{sft}/config.json: not valid JSON" in said
    assert f"nowhere: dpo: {tmp_path / 'nowhere'}: no such folder, or nothing in it; check the path" in said


def test_pickles_are_refused_unless_asked_for(tmp_path: Path, capsys: Print) -> None:
    sft, dpo = write_pair(tmp_path)
    (dpo / "model.safetensors").unlink()
    torch.save(moved(llama_tensors()), dpo / "pytorch_model.bin")
    said = refused(capsys, sft, dpo, tmp_path / "out")
    assert f"{dpo}: no safetensors, only PyTorch pickles (pytorch_model.bin); convert them" in said
    assert "`--allow-pickle`" in said


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, capsys: Print, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sft, dpo = write_pair(tmp_path)
    (dpo / "model.safetensors").unlink()
    torch.save(moved(llama_tensors()) | {"x": Malice()}, dpo / "pytorch_model.bin")
    said = refused(capsys, sft, dpo, tmp_path / "out", more="--allow-pickle")
    assert f"{dpo}/pytorch_model.bin" in said
    assert not (tmp_path / "executed").exists()


# Words of the command line


@pytest.mark.parametrize(
    ("alphas", "more", "expected"),
    [
        (("nan",), "", "alpha is nan; it must be a finite number of at least -1 (-1 gives sft, 0 gives dpo)"),
        (("inf",), "", "alpha is inf; it must be a finite number"),
        (("-inf",), "", "alpha is -inf; it must be"),
        (("-1.01",), "", "alpha is -1.01; it must be"),
        (("-1e3",), "", "alpha is -1000.0; it must be"),
        (("0.5", "0.50"), "", "alpha 0.5 is listed twice; list each alpha once"),
        (("0", "-0"), "", "alpha 0 is listed twice"),
        (("half",), "", "(found 'half')"),
        ((0.5,), "--shard-size 5XB", "'5XB' is not a size; write it like 5GB or 512MiB"),
        ((0.5,), "--multiplier '(=1'", "'(' is not a regular expression"),
        ((0.5,), "--multiplier norm=-1", "should be greater than or equal to 0"),
        ((0.5,), "--multiplier norm=much", "(found 'much')"),
        ((-0.75,), "--multiplier norm=2", "alpha -0.75 times the multiplier 2.0 of `norm` is -1.5; it must be"),
        ((0.5,), "--rounding reference --dtype fp32", "rounding is reference, which writes bf16, and dtype is fp32; drop one"),
        ((0.5,), "--seed -3", "should be greater than or equal to 0 (found '-3')"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(
    tmp_path: Path, capsys: Print, alphas: tuple[object, ...], more: str, expected: str
) -> None:
    sft, dpo = write_pair(tmp_path)
    assert expected in refused(capsys, sft, dpo, tmp_path / "out", alphas=alphas, more=more)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["extrapolate", "--sft", "a"], "the following arguments are required: --dpo, --alpha, --output"),
        (
            ["extrapolate", "--multiplier", "norm"],
            "'norm' has no factor; write it like 'embed_tokens|lm_head=0'",
        ),
        (["plan", "job.yaml", "--workers", "0"], "'0' is not a whole number of at least 1"),
        (["plan", "job.yaml", "--bandwidth", "fast"], "'fast' is not a size"),
        (["distil"], "invalid choice: 'distil'"),
    ],
)
def test_command_lines_that_cannot_be(capsys: Print, words: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == BAD_INPUT
    assert expected in capsys.readouterr().err


def test_the_same_folder_twice_is_refused(tmp_path: Path, capsys: Print) -> None:
    _, dpo = write_pair(tmp_path)
    said = refused(capsys, dpo, tmp_path / "sft" / ".." / "dpo", tmp_path / "out")
    assert f"sft ({dpo}) and dpo ({dpo}) are the same files; name two different models" in said
    (tmp_path / "link").symlink_to(dpo)
    assert "are the same files" in refused(capsys, dpo, tmp_path / "link", tmp_path / "out")


# Where the output may go


@pytest.mark.parametrize("where", ["sft", "dpo", "dpo/out", ".", "link", "link/below"])
def test_an_output_in_a_parent_or_around_it_is_refused(tmp_path: Path, capsys: Print, where: str) -> None:
    sft, dpo = write_pair(tmp_path / "in")
    (tmp_path / "in" / "link").symlink_to(sft)
    out = tmp_path / "in" / where
    said = refused(capsys, sft, dpo, out)
    assert f"dpo: output {os.path.abspath(out)} and " in said
    assert "lie in each other; choose another output folder" in said


def test_an_output_that_holds_other_files_is_refused_and_they_stay(tmp_path: Path, capsys: Print) -> None:
    sft, dpo = write_pair(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for more in ("", "--overwrite"):
        said = refused(capsys, sft, dpo, out, more=more)
        assert f"output {out} holds other files (thesis.tex); choose an empty or new folder" in said


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (
            "hf://org/model",
            "hf://org/model: the Hub is only read from here; write to a local folder or S3, from where `expo-ray push` sends",
        ),
        ("ftp://host/folder", "unknown scheme ftp://; use a local path or one of"),
        ("", "an empty path names no folder"),
    ],
)
def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: Print, uri: str, expected: str) -> None:
    assert expo(*write_pair(tmp_path), uri, 0.5) == BAD_INPUT
    assert expected in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, capsys: Print) -> None:
    sft, dpo = write_pair(tmp_path)
    out = tmp_path / "out"
    out.write_text("no folder")
    assert expo(sft, dpo, out, 0.5) == BAD_INPUT
    assert "a part of the path is a file; choose another folder" in capsys.readouterr().err
    assert out.read_text() == "no folder"


def test_another_plans_model_is_refused_and_overwritten_only_when_asked(
    tmp_path: Path, capsys: Print
) -> None:
    sft, dpo = write_pair(tmp_path)
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert expo(sft, dpo, out, 0.5, more="--shard-size 60kB") == 0
    for more in ("", "--shard-size 60kB --seed 1", "--dtype fp32"):
        said = refused(capsys, sft, dpo, out, alphas=(1,), more=more)
        assert f"output {out} holds the model of another plan (" in said
        assert "choose another output folder, or remove this one" in said
    assert expo(sft, dpo, out, 1, more="--overwrite") == 0
    assert expo(sft, dpo, fresh, 1) == 0
    assert files_of(out).keys() == files_of(fresh).keys()
    assert same_bits(read_weights(out), read_weights(fresh))


def test_overwrite_never_deletes_what_expo_ray_did_not_write(tmp_path: Path, capsys: Print) -> None:
    sft, dpo = write_pair(tmp_path)
    out = tmp_path / "out"
    assert expo(sft, dpo, out, 0.5) == 0
    (out / "scores").mkdir()
    (out / "scores" / "mt-bench.json").write_text("{}")
    said = refused(capsys, sft, dpo, out, alphas=(1,), more="--overwrite")
    assert (
        f"output {out} holds files that expo-ray did not write (scores/mt-bench.json); move them elsewhere"
        in said
    )


def test_a_damaged_claim_is_refused(tmp_path: Path, capsys: Print) -> None:
    sft, dpo = write_pair(tmp_path)
    out = tmp_path / "out"
    assert expo(sft, dpo, out, 0.5) == 0
    for text in ("{", "[]", "{}", '{"plan": 1}'):
        (out / ".expo" / "claim.json").write_text(text)
        assert "delete the folder and run again" in refused(capsys, sft, dpo, out)


def test_a_disk_that_is_too_small_is_found_out_before(
    tmp_path: Path, capsys: Print, small_disk: Path
) -> None:
    sft, dpo = write_pair(tmp_path)
    said = refused(capsys, sft, dpo, small_disk / "out", alphas=tuple(range(6)))
    assert (
        f"{small_disk}: 1.15 MB are to be written, 1.05 MB are free; free space or choose another output"
        in said
    )


def at_first_bytes(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Run `action` once, when the first bytes of output have been written; pages are small, so more follow."""
    monkeypatch.setattr(LocalStore, "chunk_bytes", 4096)
    monkeypatch.setattr(stream, "PAGE_BYTES", 4096)
    add = Progress.add
    done: list[object] = []

    def watch(self: Progress, **counts: int) -> None:
        add(self, **counts)
        if not done:
            done.append(action())

    monkeypatch.setattr(Progress, "add", watch)


def nothing_published(out: Path) -> None:
    """Not even a claim, so that another try may have other options."""
    assert files_of(out) == {}


def test_a_disk_that_fills_up_meanwhile(
    tmp_path: Path, capsys: Print, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    sft, dpo = write_pair(tmp_path)

    def fill() -> None:
        with pytest.raises(OSError, match="No space left"):
            (small_disk / "other").write_bytes(bytes(2 << 20))

    at_first_bytes(monkeypatch, fill)
    out = small_disk / "out"
    assert expo(sft, dpo, out, 0.5) == FAILED
    said = capsys.readouterr().err
    assert (
        f"failed: dpo: {out}/model.safetensors: No space left on device; free space there, or choose another"
        in said
    )
    nothing_published(out)
    monkeypatch.undo()
    (small_disk / "other").unlink()
    assert expo(sft, dpo, out, 0.5) == 0


def test_a_read_only_output_is_refused(tmp_path: Path, capsys: Print, small_disk: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    remount(small_disk, "ro")
    said = refused(capsys, sft, dpo, small_disk / "out")
    assert f"{small_disk}/out" in said
    assert "Read-only file system; choose an output on a writable file system" in said


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder open to all, while this process has no special rights."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        try:
            if user == 0:
                os.chown(folder, 65534, -1)
                os.seteuid(65534)
            yield Path(folder)
        finally:
            os.seteuid(user)


def test_missing_permissions_are_reported(capsys: Print, as_nobody: Path) -> None:
    sft, dpo = write_pair(as_nobody)
    locked = as_nobody / "locked"
    locked.mkdir(mode=0o500)
    said = refused(capsys, sft, dpo, locked / "out")
    assert f"{locked}/out" in said
    assert "Permission denied; give this user the right to it, or choose another folder" in said
    (dpo / "model.safetensors").chmod(0)
    said = refused(capsys, sft, dpo, as_nobody / "out")
    assert f"- dpo: dpo: {dpo}/model.safetensors: Permission denied; give this user the right to it" in said


# What only the weights themselves tell: the work begins, fails, and publishes nothing


def failing(capsys: Print, sft: Path, dpo: Path, out: Path, *alphas: object, more: str = "") -> str:
    assert expo(sft, dpo, out, *alphas, more=more) == FAILED
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("side", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("value", "expected"), [("nan", "(1 NaN, 0 infinite)"), ("-inf", "(0 NaN, 1 infinite)")]
)
def test_nan_and_infinity_in_a_parent(
    tmp_path: Path, capsys: Print, side: str, value: str, expected: str
) -> None:
    pair = {"sft": llama_tensors(), "dpo": moved(llama_tensors())}
    pair[side][NORM][5] = float(value)
    folders = write_both(tmp_path, pair["sft"], pair["dpo"])
    out = tmp_path / "out"
    said = failing(capsys, *folders, out, 0.5)
    assert (
        f"failed: dpo: 1 tensor(s) of the parents hold values that no alpha can repair: {NORM} {expected}; repair"
        in said
    )
    nothing_published(out)
    assert expo(*folders, out, 0.5, more="--multiplier norm=0") == 0


def test_infinities_that_both_parents_share_are_kept(tmp_path: Path) -> None:
    """Masks are stored so by some models."""
    sft, dpo = llama_tensors(), moved(llama_tensors())
    sft[NORM][5] = dpo[NORM][5] = float("-inf")
    folders = write_both(tmp_path, sft, dpo)
    assert expo(*folders, tmp_path / "out", 0.5) == 0
    assert read_weights(tmp_path / "out")[NORM][5] == float("-inf")


def test_an_overflow_of_fp16(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors(dtype=torch.float16)
    dpo = moved(sft)
    sft[NORM][3], dpo[NORM][3] = 20_000, 40_000
    folders = write_both(tmp_path, sft, dpo)
    said = failing(capsys, *folders, tmp_path / "out", 8)
    assert (
        f"alpha 8 overflows the output's dtype in 1 tensor(s): {NORM} (1 elements); choose a smaller alpha, or"
        in said
    )
    nothing_published(tmp_path / "out")
    assert expo(*folders, tmp_path / "out", 8, more="--dtype fp32") == 0
    assert read_weights(tmp_path / "out")[NORM][3] == 200_000


def test_an_alpha_that_overflows_costs_the_others_nothing(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors(dtype=torch.float16)
    dpo = moved(sft)
    sft[NORM][3], dpo[NORM][3] = 20_000, 40_000
    folders = write_both(tmp_path, sft, dpo)
    shards = "--shard-size 40kB"
    assert expo(*folders, tmp_path / "out", 0.5, 8, 1, more=shards) == FAILED
    printed = capsys.readouterr()
    assert [line.split(": ")[:2] for line in printed.err.splitlines() if "failed: " in line] == [
        ["failed", "dpo alpha=8"]
    ]
    assert f"alpha 8 overflows the output's dtype in 1 tensor(s): {NORM} (1 elements)" in printed.err
    assert [line.partition(": ")[0] for line in printed.out.splitlines() if ": alpha " in line] == [
        str(tmp_path / "out" / f"alpha={alpha}") for alpha in ("0.5", "1")
    ]
    assert not (tmp_path / "out" / "alpha=8" / "expo.json").exists()
    for alpha in (0.5, 1):
        alone = tmp_path / f"alone-{alpha}"
        assert expo(*folders, alone, alpha, more=shards) == 0
        assert same_bits(read_weights(tmp_path / "out" / f"alpha={alpha}"), read_weights(alone))


def test_copies_of_one_model_are_found_out(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors()
    folders = write_both(tmp_path, sft, sft, dpo_shards=3)
    faithful = shutil.copytree(folders[0], tmp_path / "copy")  # keeps the times, as `cp -a` does
    for copy in (folders[1], faithful):
        out = tmp_path / f"out-{copy.name}"
        said = failing(capsys, folders[0], copy, out, 0.5)
        assert "dpo equals sft in all" in said
        assert "name the model from before and the model from after alignment" in said
        assert [path for path in out.rglob("*") if path.is_file()] == []


def test_different_models_of_one_size_and_time_are_no_copies(tmp_path: Path) -> None:
    """Unpacked archives and container images give every file the same time."""
    sft, dpo = write_pair(tmp_path)
    for file in (*sft.iterdir(), *dpo.iterdir()):
        os.utime(file, (1, 1))
    assert expo(sft, dpo, tmp_path / "out", 0.5) == 0


@pytest.mark.parametrize(
    "replaced", ["sft/model.safetensors", "dpo/model-00002-of-00003.safetensors", "dpo/config.json"]
)
@pytest.mark.parametrize("when", ["before", "during"])
def test_an_input_replaced_while_the_job_runs_stops_it(
    tmp_path: Path, capsys: Print, monkeypatch: pytest.MonkeyPatch, replaced: str, when: str
) -> None:
    sft, dpo = write_pair(tmp_path, dpo_shards=3)
    file = tmp_path / replaced

    def replace() -> None:
        other = file.with_name("other")
        other.write_bytes(file.read_bytes())
        other.replace(file)

    if when == "during":
        at_first_bytes(monkeypatch, replace)
    else:

        def late(*words: Any) -> Any:
            replace()
            return run_job(*words)

        monkeypatch.setattr(commands, "run_job", late)
    out = tmp_path / "out"
    said = failing(capsys, sft, dpo, out, 0.5)
    assert f"{file} was replaced since it was planned; plan again" in said
    assert not (out / "expo.json").exists()
    assert not list(out.glob(".partial-*"))


# A job of several pairs


def test_a_job_tells_every_problem_of_every_pair(tmp_path: Path, capsys: Print) -> None:
    write_pair(tmp_path / "good")
    write_pair(tmp_path / "cut")
    damage(tmp_path / "cut" / "dpo", lambda data: data[:-1])
    sft = llama_tensors()
    without(NORM)(sft)
    write_both(tmp_path / "short", sft, moved(llama_tensors(rows=264)))
    (tmp_path / "out" / "pairs" / "taken" / "alpha=0.5").mkdir(parents=True)
    (tmp_path / "out" / "pairs" / "taken" / "alpha=0.5" / "mine").touch()
    names = ["good", "cut", "short", "taken"]
    pairs = [
        {"name": name, "sft": str(tmp_path / folder / "sft"), "dpo": str(tmp_path / folder / "dpo")}
        for name, folder in zip(names, ["good", "cut", "short", "good"], strict=True)
    ]
    job = {
        "output": str(tmp_path / "out"),
        "defaults": {"alphas": [0.5]},
        "pairs": [*pairs, {"name": "none", "sft": "a", "dpo": "b", "alphas": []}],
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    before = files_of(tmp_path)
    assert main(["plan", str(tmp_path / "job.yaml")]) == BAD_INPUT
    assert files_of(tmp_path) == before
    said = capsys.readouterr().err
    assert [line.split(": ")[0] for line in said.splitlines()[1:]] == [
        "- cut",
        "- short",
        "- short",
        "- taken",
        "- none",
    ]
    for text in (
        "5 problem(s)",
        "truncated",
        "sft lacks 1",
        "vocabularies differ",
        "holds other files",
        "no alpha is given",
    ):
        assert text in said


def test_a_good_job_prints_its_table(tmp_path: Path, capsys: Print) -> None:
    write_pair(tmp_path / "a")
    write_pair(tmp_path / "b")
    job = {
        "output": str(tmp_path / "out"),
        "defaults": {"alphas": [0.5, 1], "shard_size": "100kB"},
        "pairs": [{"name": name, "sft": str(tmp_path / name / "sft"), "dpo": str(tmp_path / name / "dpo")} for name in "ab"],
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    assert expo(tmp_path / "a/sft", tmp_path / "a/dpo", tmp_path / "elsewhere", 0.5) == 0
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "job.yaml"), "--workers", "4", "--bandwidth", "10kB"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[1:3]] == [
        [name, "21", "2", "0.5", "1", "378", "kB", "382", "kB", "0", "B"] for name in "ab"
    ]
    assert printed[3] == "2 pair(s): 756 kB to read, 765 kB to write, about 0:39 with 4 worker(s) of 10 kB/s"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output: [", "is not YAML"),
        ("- 1", "holds list; a job file is a mapping with `output` and `pairs`"),
        ("output: o\npairs: [{sft: a, dpo: b, alpha: 1}]", "pairs[0].alpha is not a known key; did you mean `alphas`?"),
        ("output: o\npairs: [{sft: a, dpo: x/b}, {sft: a, dpo: y/b}]", "pairs: b is used twice; give each its own `name`"),
    ],
)  # fmt: skip
def test_a_job_file_that_cannot_be(tmp_path: Path, capsys: Print, text: str, expected: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "job.yaml")]) == BAD_INPUT
    assert expected in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "none.yaml")]) == BAD_INPUT
    assert "cannot be read" in capsys.readouterr().err


def test_two_weight_files_that_both_hold_a_tensor(tmp_path: Path, capsys: Print) -> None:
    sft, dpo = write_pair(tmp_path, sft_shards=2)
    (sft / "model.safetensors.index.json").unlink()
    save_file({NORM: torch.zeros(64)}, sft / "model-00003-of-00003.safetensors")
    assert "several sets of weights and no index" in refused(capsys, sft, dpo, tmp_path / "out")
