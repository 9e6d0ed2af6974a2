"""What is written loads in `transformers`, with no key missing or left over, and computes finite logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlavaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from tests.support.pairs import Tensors, expo, nearest, read_json, read_weights, same_bits
from tests.support.tiny_models import SIZES, after_training, causal_model, save_lora, save_pair, tiny_llama

TOKENS = torch.tensor([[1, 5, 9, 80, 33]])

MODELS: dict[str, PretrainedConfig] = {
    "llama": tiny_llama(),
    "llama, tied": tiny_llama(tie_word_embeddings=True),
    "qwen2, tied, with biases": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(
        **SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    ),
}


def load(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """Load the model and check that every key was used."""
    model, loading = auto.from_pretrained(folder, output_loading_info=True, **options)
    complaints = {key: names for key, names in loading.items() if names}
    assert not complaints
    loaded: PreTrainedModel = model
    return loaded


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**({"input_ids": TOKENS} | inputs)).logits
    assert output.isfinite().all()
    return output.float()


def expected(sft: Path, dpo: Path, alpha: float = 0.5) -> Tensors:
    before = read_weights(sft)
    return {name: nearest(before[name], tensor, alpha) for name, tensor in read_weights(dpo).items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_causal_models_load_and_answer(tmp_path: Path, name: str, sharded: bool) -> None:
    sizes = {"sft_shard_size": "20KB", "dpo_shard_size": "35KB"} if sharded else {}
    sft, dpo = save_pair(tmp_path, causal_model(MODELS[name]), **sizes)
    assert len(list(sft.glob("*.safetensors"))) > 1 if sharded else (sft / "model.safetensors").exists()
    out = tmp_path / "out"
    assert expo(sft, dpo, out, 0.5, more="--shard-size 25kB" if sharded else "") == 0
    assert (out / "model.safetensors.index.json").exists() == sharded
    assert same_bits(read_weights(out), expected(sft, dpo))
    model = load(out)
    assert model.dtype == torch.bfloat16
    actual = logits(model)
    assert not torch.equal(actual, logits(load(dpo)))
    assert not torch.equal(actual, logits(load(sft)))


def test_extrapolated_logits_lie_past_dpos(tmp_path: Path) -> None:
    """In float32 and for a small step the logits are nearly linear in alpha."""
    sft, dpo = save_pair(tmp_path, causal_model(tiny_llama(), dtype=torch.float32))
    assert expo(sft, dpo, tmp_path / "out", 0.5) == 0
    before, at_dpo, actual = (logits(load(folder)) for folder in (sft, dpo, tmp_path / "out"))
    step = (actual - at_dpo).flatten()
    wanted = 0.5 * (at_dpo - before).flatten()
    assert torch.nn.functional.cosine_similarity(step, wanted, dim=0) > 0.99
    assert step.norm() == pytest.approx(wanted.norm().item(), rel=0.1)


def test_another_dtype_loads_as_that_dtype(tmp_path: Path) -> None:
    sft, dpo = save_pair(tmp_path, causal_model(tiny_llama()))
    assert expo(sft, dpo, tmp_path / "out", 0.5, more="--dtype fp32") == 0
    assert load(tmp_path / "out").dtype == torch.float32
    assert load(tmp_path / "out", dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_loads(tmp_path: Path, tied: bool) -> None:
    model = causal_model(tiny_llama(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "sft")
    model.resize_token_embeddings(104)
    after_training(model).save_pretrained(tmp_path / "dpo")
    out = tmp_path / "out"
    assert expo(tmp_path / "sft", tmp_path / "dpo", out, 0.5, more="--vocab keep-dpo") == 0
    assert read_json(out / "config.json")["vocab_size"] == 104
    assert logits(load(out)).shape[-1] == 104


def test_a_merged_adapter_loads_as_a_whole_model(tmp_path: Path) -> None:
    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama(tie_word_embeddings=True)))
    assert expo(sft, dpo, tmp_path / "out", 0.5, more="--adapter merge --shard-size 20kB") == 0
    assert not torch.equal(logits(load(tmp_path / "out")), logits(load(sft)))


def test_a_scaled_adapter_loads_through_peft_and_is_the_merged_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama(), dtype=torch.float32))
    assert expo(sft, dpo, tmp_path / "scaled", 0.5) == 0
    assert expo(sft, dpo, tmp_path / "merged", 0.5, more="--adapter merge") == 0
    adapted = peft.PeftModel.from_pretrained(load(sft), tmp_path / "scaled")
    actual = logits(adapted)
    torch.testing.assert_close(actual, logits(load(tmp_path / "merged")), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual, logits(load(sft)), atol=1e-3)


@pytest.mark.parametrize("dtype", ["keep", "fp32"])
def test_a_model_that_sees_loads_with_its_tower(tmp_path: Path, dtype: str) -> None:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_llama(), image_token_index=95)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    sft, dpo = save_pair(tmp_path, model)
    assert expo(sft, dpo, tmp_path / "out", 0.5, more=f"--dtype {dtype}") == 0
    loaded = load(tmp_path / "out", AutoModelForImageTextToText)
    wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    pixels = torch.rand(1, 3, 8, 8).to(wanted)
    tokens = torch.tensor([[1, 95, 95, 95, 95, 7]])
    assert logits(loaded, input_ids=tokens, pixel_values=pixels).shape == (1, 6, 96)


@pytest.mark.parametrize("sft_tied", [True, False])
@pytest.mark.parametrize("dpo_tied", [True, False])
def test_tied_and_untied_parents_load(tmp_path: Path, sft_tied: bool, dpo_tied: bool) -> None:
    causal_model(tiny_llama(tie_word_embeddings=sft_tied)).save_pretrained(tmp_path / "sft")
    after_training(causal_model(tiny_llama(tie_word_embeddings=dpo_tied))).save_pretrained(tmp_path / "dpo")
    assert expo(tmp_path / "sft", tmp_path / "dpo", tmp_path / "out", 0.5) == 0
    model = load(tmp_path / "out")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == dpo_tied
    logits(model)
