"""dpo as a LoRA adapter on sft, checked against `peft` in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pairs import Tensors, expo, files_of, nearest, read_json, read_weights, rounded, same_bits

pytest.importorskip("peft")
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import causal_model, save_lora, tiny_llama

F32, F64 = torch.float32, torch.float64

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 16}},
    "all linear": {"target_modules": "all-linear"},
    "untied head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


def merged(sft: Path, adapter: Path, dtype: torch.dtype = F64) -> Tensors:
    """The weights of base and adapter, multiplied out by peft."""
    base = AutoModelForCausalLM.from_pretrained(sft, dtype=dtype)
    model = PeftModel.from_pretrained(base, str(adapter)).to(dtype).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_scaled_adapter_is_the_extrapolated_model(tmp_path: Path, name: str) -> None:
    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama(), dtype=F32), **SETTINGS[name])
    assert expo(sft, dpo, tmp_path / "out", 0.5) == 0
    base, before, after = read_weights(sft), merged(sft, dpo), merged(sft, tmp_path / "out")
    assert before.keys() == base.keys()
    moved_names = []
    for key, weight in base.items():
        exact = before[key] + 0.5 * (before[key] - weight.double())
        torch.testing.assert_close(after[key], exact, rtol=1e-12, atol=1e-14)
        if not torch.equal(exact, weight.double()):
            moved_names.append(key)
    assert len(moved_names) >= 3


@pytest.mark.parametrize("alpha", [0.5, -1.0, 0.0])
def test_only_the_scale_of_a_scaled_adapter_changes(tmp_path: Path, alpha: float) -> None:
    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama()), **SETTINGS["patterns"])
    (dpo / "tokenizer.json").write_text("{}")
    # An adapter is one file for its readers, whatever the largest file of a model may be.
    assert expo(sft, dpo, tmp_path / "out", alpha, more="--shard-size 1kB") == 0
    files = files_of(tmp_path / "out")
    assert same_bits(read_weights(tmp_path / "out"), read_weights(dpo))
    own = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "expo.json"}
    assert {key for key in files if not key.startswith(".expo/")} == own
    before, after = (
        read_json(dpo / "adapter_config.json"),
        read_json(tmp_path / "out" / "adapter_config.json"),
    )
    assert after["lora_alpha"] == 6 * (1 + alpha)
    assert after["alpha_pattern"] == {"layers.1.mlp.down_proj": 16 * (1 + alpha)}
    changed = {"lora_alpha", "alpha_pattern"}
    assert {k: v for k, v in after.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }
    assert "effective alpha" not in files["README.md"].decode()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_merged_adapter_is_the_formula_over_what_peft_merges(tmp_path: Path, name: str) -> None:
    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama(), dtype=F32), **SETTINGS[name])
    assert expo(sft, dpo, tmp_path / "out", 0.5, more="--adapter merge --shard-size 20kB") == 0
    base, trained, result = read_weights(sft), merged(sft, dpo), read_weights(tmp_path / "out")
    assert result.keys() == base.keys()
    for key, weight in base.items():
        exact = trained[key] + 0.5 * (trained[key] - weight.double())
        assert result[key].dtype == F32
        torch.testing.assert_close(
            result[key], exact.float(), rtol=2e-7, atol=1e-9
        )  # one unit in the last place
        if torch.equal(trained[key], weight.double()):
            assert torch.equal(result[key], weight)


def test_a_merged_adapter_on_bf16_is_rounded_once(tmp_path: Path) -> None:
    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama()))
    more = "--adapter merge --multiplier q_proj=0"
    assert expo(sft, dpo, tmp_path / "out", 0.5, more=more) == 0
    base, trained, result = read_weights(sft), merged(sft, dpo), read_weights(tmp_path / "out")
    for key, weight in base.items():
        alpha = 0.0 if "q_proj" in key else 0.5
        exact = rounded(trained[key] + alpha * (trained[key] - weight.double()), torch.bfloat16)
        assert (result[key] == exact).double().mean() > 0.999, (
            key
        )  # the sum over ranks may end an ulp of float64 off
        assert torch.equal(exact, weight) == (not ("q_proj" in key or "down_proj" in key))


def test_a_merged_model_takes_its_configuration_from_sft_and_its_tokenizer_from_the_adapter(
    tmp_path: Path,
) -> None:
    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama()))
    for folder, text in ((sft, "sft"), (dpo, "dpo")):
        (folder / "tokenizer_config.json").write_text(f'"{text}"')
    (sft / "tokenizer.json").write_text("{}")
    assert expo(sft, dpo, tmp_path / "out", 0.5, more="--adapter merge") == 0
    files = files_of(tmp_path / "out")
    assert files["config.json"] == (sft / "config.json").read_bytes()
    assert files["tokenizer_config.json"] == b'"dpo"'
    assert files["tokenizer.json"] == b"{}"
    assert "adapter_config.json" not in files


def test_the_merge_does_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expo_ray.storage.local import LocalStore

    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama()), **SETTINGS["all linear"])
    results = []
    for chunk_bytes in (1 << 20, 1000, 258):
        monkeypatch.setattr(LocalStore, "chunk_bytes", chunk_bytes)
        out = tmp_path / f"out-{chunk_bytes}"
        assert expo(sft, dpo, out, 0.3, rounding="stochastic", more="--adapter merge") == 0
        results.append(read_weights(out))
    assert all(same_bits(other, results[0]) for other in results)


def test_what_an_adapter_cannot_take_is_refused_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama()))
    assert expo(sft, dpo, tmp_path / "out", 0.5, more="--dtype fp32 --multiplier norm=0") == 2
    assert "set `--adapter merge` to write a whole model" in capsys.readouterr().err
    assert expo(dpo, sft, tmp_path / "out", 0.5) == 2
    assert "sft is an adapter; merge it first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verify_computes_adapters_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from expo_ray.cli.process import main

    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama()))
    for policy in ("scale", "merge"):
        out = tmp_path / policy
        assert expo(sft, dpo, out, 0.5, more=f"--adapter {policy}") == 0
        assert main(["verify", str(out), "--sft", str(sft), "--dpo", str(dpo)]) == 0
        assert "computed again from both parents: the same bytes" in capsys.readouterr().out


def test_the_formula_of_the_tests_and_the_one_of_peft_agree(tmp_path: Path) -> None:
    """`nearest` on a dpo that peft merged and saved is what merging on the way gives, but for dpo's own rounding."""
    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama(), dtype=F32))
    assert expo(sft, dpo, tmp_path / "out", 0.5, more="--adapter merge") == 0
    base, trained = read_weights(sft), merged(sft, dpo, F32)
    for key, result in read_weights(tmp_path / "out").items():
        torch.testing.assert_close(result, nearest(base[key], trained[key], 0.5), rtol=1e-6, atol=1e-7)
