from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from expo_ray.checkpoint.adapter import LoraLayer, match_lora_layers, scaled_adapter_config
from expo_ray.checkpoint.folder import Checkpoint, read_checkpoint
from expo_ray.errors import CheckpointError
from tests.support.stored_files import stored_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model .* `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]


def llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | changes)).double()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)
    return GPT2LMHeadModel(config).double()


def save_adapter(base: PreTrainedModel, path: Path, **settings: Any) -> None:
    """Save `base` and a random LoRA on it in two folders."""
    base.save_pretrained(path / "base")
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    model.save_pretrained(str(path / "adapter"))


def layers_of(path: Path, *, merging: bool = False) -> list[LoraLayer]:
    return list(match_lora_layers(*parents(path), merging=merging).layers)


def parents(path: Path) -> tuple[Checkpoint, Checkpoint]:
    return read_checkpoint(stored_folder(path / "adapter")), read_checkpoint(stored_folder(path / "base"))


def change_config(path: Path, **changes: Any) -> None:
    file = path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def merged_by_peft(model: PreTrainedModel, adapter: Path) -> dict[str, torch.Tensor]:
    """Every weight with the adapter merged by PEFT itself, in float64."""
    loaded = PeftModel.from_pretrained(model, str(adapter)).double()
    return {name: tensor.clone() for name, tensor in loaded.merge_and_unload().state_dict().items()}


def merged_by_hand(path: Path, alpha: float) -> dict[str, torch.Tensor]:
    """sft + (1 + alpha) * delta, with each layer as `match_lora_layers` describes it."""
    weights = load_file(path / "base" / "model.safetensors")
    factors = load_file(path / "adapter" / "adapter_model.safetensors")
    for layer in layers_of(path):
        delta = layer.scale * (factors[layer.b.name].double() @ factors[layer.a.name].double())
        weights[layer.base_name] += (1 + alpha) * (delta.T if layer.transposed else delta)
    return weights


LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "every linear layer": {"target_modules": "all-linear"},
    "rank_pattern": {
        "target_modules": LINEAR,
        "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 6, r".*\.2\.mlp\.down_proj": 3, "proj": 7},
    },
    "alpha_pattern": {
        "target_modules": LINEAR,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {r"layers\.[01]\.self_attn\.v_proj": 3, "v_proj": 5, "own_proj": 11, "model.layers.2.mlp.down_proj": 7},
        "use_rslora": True,
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "alpha_pattern": {"embed_tokens": 3}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "lora_dropout": 0.1},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_layers_and_scaled_configuration_are_what_peft_merges(
    case: str, alpha: float, tmp_path: Path
) -> None:
    save_adapter(llama(), tmp_path, **CASES[case])
    by_hand = merged_by_hand(tmp_path, alpha)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    scaled = scaled_adapter_config(config, alpha)
    assert scaled.keys() == config.keys()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(scaled))
    by_peft = merged_by_peft(llama(), tmp_path / "adapter")
    assert by_hand.keys() == by_peft.keys()
    for name, expected in by_peft.items():
        torch.testing.assert_close(by_hand[name], expected, rtol=1e-12, atol=1e-12)


def test_the_layers_are_those_that_peft_adapted(tmp_path: Path) -> None:
    save_adapter(llama(), tmp_path, **CASES["rank_pattern"])
    layers = {layer.base_name: layer for layer in layers_of(tmp_path)}
    assert set(layers) == {f"model.layers.{i}.{m}.weight" for i in range(3) for m in
                           ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")}  # fmt: skip
    ranks = {name: layer.a.shape[0] for name, layer in layers.items()}
    assert ranks["model.layers.1.self_attn.q_proj.weight"] == 6
    assert ranks["model.layers.0.self_attn.q_proj.weight"] == 4
    assert layers["model.layers.0.self_attn.v_proj.weight"].scale == 8 / 2


def test_layers_of_conv1d_are_transposed_even_where_they_are_square(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        save_adapter(gpt2(), tmp_path, target_modules=["c_attn", "attn.c_proj", "mlp.c_proj"])
    layers = layers_of(tmp_path)
    assert all(layer.transposed for layer in layers)
    assert any(layer.b.shape[0] == layer.a.shape[1] for layer in layers)
    by_peft = merged_by_peft(gpt2(), tmp_path / "adapter")
    for name, mine in merged_by_hand(tmp_path, 0.0).items():
        torch.testing.assert_close(mine, by_peft[name], rtol=1e-12, atol=1e-12)


def test_a_square_embedding_is_transposed(tmp_path: Path) -> None:
    save_adapter(llama(vocab_size=16), tmp_path, target_modules=["embed_tokens", "q_proj"])
    assert {layer.base_name: layer.transposed for layer in layers_of(tmp_path)} == {
        "model.embed_tokens.weight": True,
        **{f"model.layers.{i}.self_attn.q_proj.weight": False for i in range(3)},
    }
    by_peft = merged_by_peft(llama(vocab_size=16), tmp_path / "adapter")
    for name, mine in merged_by_hand(tmp_path, 0.0).items():
        torch.testing.assert_close(mine, by_peft[name], rtol=1e-12, atol=1e-12)


def test_a_square_layer_of_unknown_orientation_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        save_adapter(gpt2(), tmp_path, target_modules=["c_attn", "attn.c_proj"])
    change_config(tmp_path, fan_in_fan_out=False)
    with pytest.raises(CheckpointError) as caught:
        layers_of(tmp_path)
    assert "fan_in_fan_out is False, which transformer.h.0.attn.c_attn.weight, transformer.h.1" in str(
        caught.value
    )
    assert "so the orientation of transformer.h.0.attn.c_proj.weight" in str(caught.value)
    assert "merge the adapter first (`merge_and_unload`, save) and pass the merged folder" in str(
        caught.value
    )


def test_a_scaled_adapter_is_loaded_by_peft_and_acts_as_the_merged_model(tmp_path: Path) -> None:
    save_adapter(llama(), tmp_path, **CASES["alpha_pattern"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    expected = llama()
    expected.load_state_dict(merged_by_hand(tmp_path, 0.3))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(scaled_adapter_config(config, 0.3)))
    model = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")).double()
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)


def test_scaled_numbers_stay_readable() -> None:
    config = {"lora_alpha": 16, "alpha_pattern": {"q": 8, "v": 4.5}, "r": 8}
    assert scaled_adapter_config(config, 0.5) == {
        "lora_alpha": 24,
        "alpha_pattern": {"q": 12, "v": 6.75},
        "r": 8,
    }
    assert json.dumps(scaled_adapter_config(config, 0.5)["lora_alpha"]) == "24"
    assert scaled_adapter_config({"lora_alpha": 16}, 0.3)["lora_alpha"] == 16 * 1.3
    assert config["alpha_pattern"] == {"q": 8, "v": 4.5}
    with pytest.raises(CheckpointError, match="lora_alpha is None, not a number; save the adapter again"):
        scaled_adapter_config({}, 0.5)


VARIANTS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora is True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    ({"bias": "lora_only"}, "bias is lora_only"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is [1, 2]"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is [[0, 2], [1, 3]]"),
    (
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        "target_parameters is ['mlp.experts.gate_up_proj']",
    ),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is [5]"),
    ({"use_qalora": True}, "use_qalora is True"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changes the base weights"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is loftq, which"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is olora, which"),
    ({"a_variant_of_next_year": {"x": 1}}, "a_variant_of_next_year is {'x': 1}"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    save_adapter(llama(), path, target_modules=["q_proj"])
    return path


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    for file in adapter.rglob("*.*"):
        target = tmp_path / file.relative_to(adapter)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    return tmp_path


def refusal(path: Path, *, merging: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        layers_of(path, merging=merging)
    assert str(caught.value).startswith("memory://checkpoints/")
    return str(caught.value)


@pytest.mark.parametrize(("change", "named"), VARIANTS)
def test_variants_of_lora_are_refused_by_name(change: dict[str, Any], named: str, copy: Path) -> None:
    change_config(copy, **change)
    assert f"not plain LoRA ({named}" in refusal(copy)
    assert "; merge the adapter first (`merge_and_unload`, save) and pass the merged folder" in refusal(copy)


def test_all_reasons_are_reported_at_once(copy: Path) -> None:
    change_config(copy, use_dora=True, bias="all")
    assert "not plain LoRA (use_dora is True; bias is all)" in refusal(copy)


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", "VERA", "ADALORA", "LOHA", None])
def test_other_methods_are_refused_by_name(kind: str | None, copy: Path) -> None:
    change_config(copy, peft_type=kind)
    assert f"peft_type is {kind}, and only plain LoRA can be rescaled; merge the adapter first" in refusal(
        copy
    )


def test_a_real_ia3_adapter_is_refused(copy: Path) -> None:
    model = get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    model.save_pretrained(str(copy / "adapter"))
    assert "peft_type is IA3" in refusal(copy)


def test_a_real_dora_adapter_is_refused(tmp_path: Path) -> None:
    save_adapter(llama(), tmp_path, target_modules=["q_proj"], use_dora=True)
    assert "use_dora is True" in refusal(tmp_path)
    # Its tensors give it away even where the setting is lost.
    change_config(tmp_path, use_dora=False)
    assert "holds 3 tensor(s) that are no LoRA matrices: base_model.model.model.layers.0" in refusal(tmp_path)


def test_saved_modules_are_refused_by_their_tensors(tmp_path: Path) -> None:
    save_adapter(llama(), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "modules_to_save is ['lm_head']" in refusal(tmp_path)
    change_config(tmp_path, modules_to_save=None)
    assert "holds 1 tensor(s) that are no LoRA matrices: base_model.model.lm_head.weight; merge" in refusal(
        tmp_path
    )


def rewrite(path: Path, change: Any) -> None:
    file = path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != Q0 + "lora_B.weight"},
         "model.layers.0.self_attn.q_proj has lora_A instead of A and B; save the adapter again"),
        (lambda t: {"base_model.model.x.base_layer.weight": torch.ones(2)}, "1 tensor(s) that are no LoRA matrices"),
        (lambda t: {}, "holds no tensors; save the model again"),
        (lambda t: t | {Q0 + "lora_A.weight": torch.ones(3, 16)},
         "q_proj: A [3, 16], B [16, 4], base [16, 16], and adapter_config.json says rank 4; save the adapter again"),
        (lambda t: t | {Q0 + "lora_A.weight": torch.ones(4, 8)},
         "A [4, 8], B [16, 4], base [16, 16] do not fit; pass as sft the model the adapter was trained on"),
        (lambda t: t | {Q0 + "lora_A.weight": torch.ones(4, 16, 1, 1), Q0 + "lora_B.weight": torch.ones(16, 4, 1, 1)},
         "not a linear layer or an embedding (A [4, 16, 1, 1]"),
        (lambda t: t | {Q0 + "lora_A.weight": torch.ones(4, 16, dtype=torch.int8)},
         "A is I8, B is F64; save the adapter in bf16, fp16 or fp32"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change: Any, message: str, copy: Path) -> None:
    rewrite(copy, change)
    assert message in refusal(copy)


def test_a_layer_that_sft_lacks_is_refused_when_merging_and_noted_when_scaling(copy: Path) -> None:
    rewrite(copy, lambda t: {k.replace("layers.0", "layers.9"): v for k, v in t.items()})
    assert "adapts 1 weight(s) that memory://checkpoints/" in refusal(copy, merging=True)
    fitted = match_lora_layers(*parents(copy))
    assert {layer.base_name.split(".")[2] for layer in fitted.layers} == {"1", "2"}
    assert "model.layers.9.self_attn.q_proj.weight" in fitted.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0, "rank_pattern": {}}, "model.layers.0.self_attn.q_proj has rank 0; save the adapter again"),
        ({"r": "4"}, "r is 4, not a number"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number; save the adapter again"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "Infinity is no JSON number"),
        ({"alpha_pattern": [3]}, "alpha_pattern is [3], not an object; save the adapter again"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '(' is not a regular expression"),
    ],
)
def test_settings_that_are_none(change: dict[str, Any], message: str, copy: Path) -> None:
    change_config(copy, **change)
    assert message in refusal(copy)


def test_merging_into_tied_embeddings_is_refused_and_rescaling_is_not(tmp_path: Path) -> None:
    save_adapter(llama(tie_word_embeddings=True), tmp_path, target_modules=["embed_tokens", "q_proj"])
    assert len(layers_of(tmp_path)) == 4
    message = refusal(tmp_path, merging=True)
    assert "adapts model.embed_tokens.weight, and memory://" in message
    assert (
        "ties embedding and output head, so that merging would change both; such an adapter can be scaled"
        in message
    )
    # So it is: PEFT's merged model answers otherwise than the adapter did.
    ids = torch.arange(8)[None]
    model = PeftModel.from_pretrained(llama(tie_word_embeddings=True), str(tmp_path / "adapter")).double()
    before = model(ids).logits
    assert not torch.allclose(before, model.merge_and_unload()(ids).logits, rtol=1e-2, atol=1e-2)


def test_an_adapter_on_a_head_that_is_stored_as_the_embedding(tmp_path: Path) -> None:
    save_adapter(llama(tie_word_embeddings=True), tmp_path, target_modules=["lm_head"])
    assert [layer.base_name for layer in layers_of(tmp_path)] == ["lm_head.weight"]
    assert "ties embedding and output head" in refusal(tmp_path, merging=True)
