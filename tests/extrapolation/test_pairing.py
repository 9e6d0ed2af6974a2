"""Pairs whose two sides name, store or declare the same thing differently, compared with transformers, PEFT and the formula."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    PreTrainedModel,
    T5Config,
)

from expo_ray.cli.process import main
from tests.support.pairs import (
    LLAMA,
    Tensors,
    expo,
    llama_tensors,
    moved,
    nearest,
    read_weights,
    same_bits,
    write_model,
)
from tests.support.tiny_models import SIZES, after_training, causal_model, tiny_llama

Print = pytest.CaptureFixture[str]
EMBEDDING, HEAD, ROTARY = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
)


def write_both(tmp_path: Path, sft: Tensors, dpo: Tensors, **config: Any) -> tuple[Path, Path]:
    return write_model(tmp_path / "sft", sft, LLAMA | config), write_model(
        tmp_path / "dpo", dpo, LLAMA | config
    )


def plan_of(folder: Path) -> str:
    return str(json.loads((folder / "expo.json").read_text())["plan"])


def refused(capsys: Print, sft: Path, dpo: Path, out: Path, more: str = "") -> str:
    capsys.readouterr()
    assert expo(sft, dpo, out, 0.5, more=more) == 2
    assert not out.exists()
    return capsys.readouterr().err


# Constants


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        (ROTARY, torch.rand(8), torch.rand(8).bfloat16()),
        ("model.layers.0.attn.masked_bias", torch.tensor(-1e9), torch.tensor(-1e4)),
        ("model.vision.bn.running_var", torch.ones(4), torch.full((4,), 0.2)),
        ("transformer.rotary_pos_emb.inv_freq", torch.rand(8), torch.rand(8)),
        ("model.layers.0.attn.bias", torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)),
        ("model.layers.0.self_attn.k_scale", torch.ones(1), torch.full((1,), 3.0)),
        ("model.layers.0.linear_attn.slope_rate", torch.ones(4, 1, 1), torch.zeros(4, 1, 1)),
        ("encoder.embed_positions.weights", torch.rand(4, 8), torch.rand(4, 8)),
    ],
    ids=lambda value: value.rpartition(".")[2] if isinstance(value, str) else "",
)
def test_a_constant_on_both_sides_is_kept(
    tmp_path: Path, capsys: Print, name: str, before: torch.Tensor, after: torch.Tensor
) -> None:
    sft = llama_tensors()
    dpo = moved(sft)
    folders = write_both(tmp_path, sft | {name: before}, dpo | {name: after})
    assert expo(*folders, tmp_path / "out", 0.5) == 0
    assert f"differ between sft and dpo and are kept as dpo has them: {name}" in capsys.readouterr().err
    out = read_weights(tmp_path / "out")
    assert torch.equal(out.pop(name), after)
    plain = write_both(tmp_path / "plain", sft, dpo)
    assert expo(*plain, tmp_path / "plain-out", 0.5) == 0
    assert same_bits(out, read_weights(tmp_path / "plain-out"))
    said = [json.loads((tmp_path / f / "expo.json").read_text())["statistics"] for f in ("out", "plain-out")]
    assert said[0] == said[1]


def test_learned_weights_that_look_like_constants_are_extrapolated(tmp_path: Path) -> None:
    names = {"logit_scale": (), "model.layers.0.attn.bias": (64,), "model.scale": (4,), "router.bias": (8,)}
    sft = llama_tensors() | {name: torch.rand(shape) for name, shape in names.items()}
    dpo = moved(sft, scale=1e-2)
    assert expo(*write_both(tmp_path, sft, dpo), tmp_path / "out", 0.5) == 0
    out = read_weights(tmp_path / "out")
    assert all(torch.equal(out[name], nearest(sft[name], dpo[name], 0.5)) for name in names)


def test_equal_constants_change_neither_the_notes_nor_the_plan(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors() | {ROTARY: torch.rand(8)}
    assert expo(*write_both(tmp_path, sft, moved(sft) | {ROTARY: sft[ROTARY]}), tmp_path / "out", 0.5) == 0
    assert "note" not in capsys.readouterr().err
    sft[ROTARY] = sft[ROTARY] + 1
    write_model(tmp_path / "sft", sft)
    assert expo(tmp_path / "sft", tmp_path / "dpo", tmp_path / "other", 0.5) == 0
    assert plan_of(tmp_path / "other") != plan_of(tmp_path / "out")


def test_integers_that_differ_are_noted(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors() | {"model.layers.0.gate.tid2eid": torch.zeros(4, dtype=torch.int64)}
    dpo = moved(sft) | {"model.layers.0.gate.tid2eid": torch.ones(4, dtype=torch.int64)}
    assert expo(*write_both(tmp_path, sft, dpo), tmp_path / "out", 0.5) == 0
    assert (
        "differ between sft and dpo and are kept as dpo has them: model.layers.0.gate.tid2eid"
        in capsys.readouterr().err
    )


# Placeholders and stale declarations


@pytest.mark.parametrize("side", ["sft", "dpo"])
def test_placeholders_of_zero_3_are_refused(tmp_path: Path, capsys: Print, side: str) -> None:
    sft = llama_tensors()
    folders = write_both(tmp_path, sft, moved(sft))
    hollow = {name: tensor if tensor.dim() == 1 else tensor.new_empty(0) for name, tensor in sft.items()}
    write_model(tmp_path / side, hollow)
    said = refused(capsys, *folders, tmp_path / "out")
    assert f"{side}: " in said
    for text in (
        "16 weight(s) are empty placeholders",
        "zero_to_fp32.py",
        "stage3_gather_16bit_weights_on_model_save",
    ):
        assert text in said


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_placeholder_among_whole_weights_is_refused_in_a_pickle_too(
    tmp_path: Path, capsys: Print, name: str
) -> None:
    sft = llama_tensors() | {name: torch.rand(4, 8, 8)}
    folders = write_both(tmp_path, sft, moved(sft))
    (folders[1] / "model.safetensors").unlink()
    torch.save(moved(sft) | {name: torch.empty(0)}, folders[1] / "pytorch_model.bin")
    said = refused(capsys, *folders, tmp_path / "out", more="--allow-pickle")
    assert f"1 weight(s) are empty placeholders of shape [0] ({name})" in said


def test_an_adapter_of_placeholders_is_refused(tmp_path: Path, capsys: Print) -> None:
    model = causal_model(tiny_llama())
    model.save_pretrained(tmp_path / "sft")
    adapt(model, tmp_path / "dpo", ["q_proj"])
    file = tmp_path / "dpo" / "adapter_model.safetensors"
    save_file({name: tensor.new_empty(0) for name, tensor in load_file(file).items()}, file)
    for mode in ("scale", "merge"):
        said = refused(capsys, tmp_path / "sft", tmp_path / "dpo", tmp_path / "out", more=f"--adapter {mode}")
        assert "4 weight(s) are empty placeholders of shape [0]" in said


def test_a_stale_declaration_is_removed_and_the_pair_is_taken(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors()
    declared = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    folders = write_both(tmp_path, sft, moved(sft), **declared)
    said = refused(capsys, *folders, tmp_path / "out")
    assert "all 21 tensors are plain BF16" in said
    assert "remove `quantization_config` from config.json" in said
    for folder in folders:
        (folder / "config.json").write_text(json.dumps(LLAMA))
    assert expo(*folders, tmp_path / "out", 0.5) == 0


# Ties


def test_a_tied_weight_has_one_result_under_either_name(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    sft = llama_tensors()
    del sft[HEAD]
    dpo = moved(sft)
    sides = {}
    for side, tensors in (("sft", sft), ("dpo", dpo)):
        sides[side] = write_model(tmp_path / side, tensors, LLAMA | tied)
        other = {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}
        sides[f"{side}-head"] = write_model(tmp_path / f"{side}-head", other, LLAMA | tied)
    expected = {name: nearest(sft[name], tensor, 0.5) for name, tensor in dpo.items()}
    for a, b in (("sft", "dpo"), ("sft", "dpo-head"), ("sft-head", "dpo"), ("sft-head", "dpo-head")):
        out = tmp_path / f"{a}-{b}"
        assert expo(sides[a], sides[b], out, 0.5) == 0
        weights = read_weights(out)
        name = HEAD if b == "dpo-head" else EMBEDDING
        assert torch.equal(weights.pop(name), expected[EMBEDDING])
        loaded: Any = AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(loaded.lm_head.weight, expected[EMBEDDING])
        assert torch.equal(loaded.get_input_embeddings().weight, expected[EMBEDDING])


def test_an_untied_head_on_one_side_only_gets_a_remedy_that_works(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors()
    dpo = moved(sft)
    del sft[HEAD]
    folders = write_both(tmp_path, sft, dpo)
    said = refused(capsys, *folders, tmp_path / "out")
    assert "set `tie_word_embeddings` to true in config.json of sft" in said
    assert "=0" not in said
    (folders[0] / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    assert expo(*folders, tmp_path / "out", 0.5) == 0
    assert torch.equal(read_weights(tmp_path / "out")[HEAD], nearest(sft[EMBEDDING], dpo[HEAD], 0.5))


SMALL: dict[str, Any] = {"d_model": 32, "vocab_size": 96, "decoder_start_token_id": 0}
OTHER_EMBEDDINGS: dict[str, Callable[[], Any]] = {
    "t5": lambda: AutoModelForSeq2SeqLM.from_config(
        T5Config(**SMALL, d_kv=8, d_ff=48, num_layers=1, num_heads=4), dtype=torch.bfloat16
    ),
    "bart": lambda: AutoModelForSeq2SeqLM.from_config(
        BartConfig(
            **SMALL, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64,
        ), dtype=torch.bfloat16
    ),
    "bert": lambda: AutoModelForMaskedLM.from_config(
        BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4),
        dtype=torch.bfloat16,
    ),
    "mamba": lambda: AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4, expand=2), dtype=torch.bfloat16
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_EMBEDDINGS)
@pytest.mark.parametrize("side", ["sft", "dpo"])
def test_all_names_of_a_tied_weight_in_a_pickle(tmp_path: Path, kind: str, side: str) -> None:
    """`torch.save` of a state dict holds every name, safetensors one."""
    torch.manual_seed(0)
    model = OTHER_EMBEDDINGS[kind]()
    for parent in ("sft", "dpo"):
        if parent == "dpo":
            after_training(model)
        model.save_pretrained(tmp_path / parent)
        if parent == side:
            (tmp_path / parent / "model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / parent / "pytorch_model.bin")
    loaded = [type(model).from_pretrained(tmp_path / parent).state_dict() for parent in ("sft", "dpo")]
    out = tmp_path / "out"
    arguments = [
        "extrapolate",
        "--sft",
        str(tmp_path / "sft"),
        "--dpo",
        str(tmp_path / "dpo"),
        "--output",
        str(out),
    ]
    assert main([*arguments, "--alpha", "0.5", "--allow-pickle"]) == 0
    weights = read_weights(out)
    # Stochastic: tied copies stay equal, and each weight is one of the two neighbours.
    for name, tensor in weights.items():
        exact = loaded[1][name].double() + 0.5 * (loaded[1][name].double() - loaded[0][name].double())
        assert ((tensor.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-30).all()
    made = type(model).from_pretrained(out).state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("kind", OTHER_EMBEDDINGS)
def test_a_grown_vocabulary_is_recognised_whatever_its_name(tmp_path: Path, capsys: Print, kind: str) -> None:
    torch.manual_seed(0)
    model = OTHER_EMBEDDINGS[kind]()
    model.save_pretrained(tmp_path / "sft")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.resize_token_embeddings(104, mean_resizing=False)
    after_training(model).save_pretrained(tmp_path / "dpo")
    after = model.state_dict()
    said = refused(capsys, tmp_path / "sft", tmp_path / "dpo", tmp_path / "out")
    assert "vocabularies differ, dpo has 104 rows and sft 96" in said
    assert expo(tmp_path / "sft", tmp_path / "dpo", tmp_path / "out", 0.5, more="--vocab keep-dpo") == 0
    made, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    for name, tensor in made.state_dict().items():
        rows = [min(a, b) for a, b in zip(before[name].shape, after[name].shape, strict=True)]
        shared = tuple(slice(count) for count in rows)
        expected = after[name].clone()
        if name != "final_logits_bias":
            expected[shared] = nearest(before[name][shared], after[name][shared], 0.5)
        assert torch.equal(tensor, expected), name


# Rows of equally large vocabularies


def tokenizer(folder: Path, **added: int) -> None:
    words = {f"word{row}": row for row in range(250)} | added
    Tokenizer(WordLevel(words, unk_token="word0")).save(str(folder / "tokenizer.json"))


def test_by_token_means_by_token_whatever_the_sizes(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors()
    dpo = moved(sft, scale=1e-2)
    folders = write_both(tmp_path, sft, dpo)
    tokenizer(folders[0], start=250, end=251)
    tokenizer(folders[1], pad=250, start=251, end=252)
    assert expo(*folders, tmp_path / "position", 0.5) == 0
    said = capsys.readouterr().err
    assert (
        "the tokenizers name 2 row(s) of the vocabulary differently (row 250 is 'pad' in dpo and 'start' in sft)"
        in said
    )
    assert expo(*folders, tmp_path / "token", 0.5, more="--vocab by-token") == 0
    out = read_weights(tmp_path / "token")
    for name, tensor in dpo.items():
        expected = nearest(sft[name], tensor, 0.5)
        if name in (EMBEDDING, HEAD):
            expected[250:] = tensor[250:]
            expected[251:253] = nearest(sft[name][250:252], tensor[251:253], 0.5)
        assert torch.equal(out[name], expected)


def test_by_token_with_equal_tokenizers_is_by_position(tmp_path: Path) -> None:
    sft = llama_tensors()
    folders = write_both(tmp_path, sft, moved(sft))
    for folder in folders:
        tokenizer(folder)
    assert expo(*folders, tmp_path / "position", 0.5) == 0
    assert expo(*folders, tmp_path / "token", 0.5, more="--vocab by-token") == 0
    assert same_bits(read_weights(tmp_path / "token"), read_weights(tmp_path / "position"))


def test_tokenizers_without_a_common_token_are_refused(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors()
    folders = write_both(tmp_path, sft, moved(sft))
    tokenizer(folders[0])
    Tokenizer(WordLevel({f"other{row}": row for row in range(256)}, unk_token="other0")).save(
        str(folders[1] / "tokenizer.json")
    )
    assert "no token in common" in refused(capsys, *folders, tmp_path / "out", more="--vocab by-token")
    assert expo(*folders, tmp_path / "out", 0.5, more="--vocab keep-dpo") == 0


# Names


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.", "_forward_module."]
)
def test_a_wrapper_s_prefix_is_named_once_with_a_remedy_that_works(
    tmp_path: Path, capsys: Print, prefix: str
) -> None:
    sft = llama_tensors()
    dpo = moved(sft)
    folders = write_both(tmp_path, sft, {prefix + name: tensor for name, tensor in dpo.items()})
    unwrap_as_told(capsys, folders, tmp_path / "out", f"`{prefix}`")
    assert same_bits(
        read_weights(tmp_path / "out"),
        {name: nearest(sft[name], tensor, 0.5) for name, tensor in dpo.items()},
    )


def test_several_wrappers_inside_each_other(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors() | {"model.pooling_module.weight": torch.rand(4, 4)}
    dpo = moved(sft)
    wrapped = {
        "_orig_mod." + name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"): tensor
        for name, tensor in dpo.items()
    }
    folders = write_both(tmp_path, sft, wrapped)
    unwrap_as_told(capsys, folders, tmp_path / "out", "`_orig_mod.`, `_checkpoint_wrapped_module.`")
    assert read_weights(tmp_path / "out").keys() == sft.keys()


def unwrap_as_told(capsys: Print, folders: tuple[Path, Path], out: Path, named: str) -> None:
    """Rename dpo's tensors with the code in the message, after which the pair is taken."""
    said = refused(capsys, *folders, out)
    assert said.count("\n- ") == 1
    assert named in said
    remedy = re.search(r"`(save_file\(.*?\))` with", said)
    assert remedy is not None
    scope = {"save_file": save_file, "load_file": load_file, "file": str(folders[1] / "model.safetensors")}
    exec(remedy[1], scope)
    assert expo(*folders, out, 0.5) == 0


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.language_"])
def test_renamed_modules_of_sft_are_paired(tmp_path: Path, capsys: Print, prefix: str) -> None:
    sft = llama_tensors() | {"visual.blocks.0.attn.qkv.weight": torch.rand(48, 16).bfloat16()}
    dpo = moved(sft)

    def other(name: str) -> str:
        return (
            name if prefix.startswith("model.") and name.startswith(("visual", "lm_head")) else prefix + name
        )

    folders = write_both(tmp_path, {other(name): tensor for name, tensor in sft.items()}, dpo)
    assert expo(*folders, tmp_path / "out", 0.5) == 0
    assert "call" in capsys.readouterr().err
    assert same_bits(
        read_weights(tmp_path / "out"),
        {name: nearest(sft[name], tensor, 0.5) for name, tensor in dpo.items()},
    )


def test_a_model_saved_without_its_head_is_named(tmp_path: Path, capsys: Print) -> None:
    sft = llama_tensors()
    dpo = {name.removeprefix("model."): tensor for name, tensor in moved(sft).items() if name != HEAD}
    said = refused(capsys, *write_both(tmp_path, sft, dpo), tmp_path / "out")
    assert "it was saved without its head, as `AutoModel` does" in said
    assert said.count("\n- ") == 1


def test_two_layouts_are_named_once(tmp_path: Path, capsys: Print) -> None:
    sft, dpo = llama_tensors(), moved(llama_tensors())
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn."
        parts = [dpo.pop(f"{attention}{part}_proj.weight") for part in "qkv"]
        dpo[f"{attention}qkv_proj.weight"] = torch.cat(parts)
    said = refused(capsys, *write_both(tmp_path, sft, dpo), tmp_path / "out")
    assert "query, key and value are stored one by one on one side and fused on the other" in said
    assert said.count("\n- ") == 1
    assert "=0" not in said


OTHER_LAYOUTS = {
    "model.layers.0.mlp.experts.gate_up_proj": "the experts are stored one by one on one side and stacked on the other",
    "decoder.layers.0.self_attention.linear_qkv.weight": "dpo is in Megatron's layout",
    "layers.0.attention.wq.weight": "dpo is in the layout of the first release",
    "_fsdp_wrapped_module._flat_param": "dpo is a DeepSpeed or FSDP training state, not a model",
    "blk.0.attn_q.weight": "dpo is in GGUF's naming",
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_another_layout_is_named_instead_of_two_lists(tmp_path: Path, capsys: Print, name: str) -> None:
    sft = llama_tensors() | {
        f"model.layers.0.mlp.experts.{index}.up_proj.weight": torch.rand(8, 8) for index in range(2)
    }
    dpo = {EMBEDDING: moved(sft)[EMBEDDING], name: torch.rand(2, 8, 8)}
    said = refused(capsys, *write_both(tmp_path, sft, dpo), tmp_path / "out")
    assert OTHER_LAYOUTS[name] in said
    assert said.count("\n- ") == 1


# Adapters


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=95),
        dtype=torch.float64,
    )
    return model


def adapt(model: PreTrainedModel, folder: Path, targets: str | list[str]) -> None:
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapted.save_pretrained(str(folder))


@pytest.mark.parametrize("mode", ["scale", "merge"])
def test_an_adapter_names_modules_as_they_are_in_memory(tmp_path: Path, mode: str) -> None:
    model = llava()
    model.save_pretrained(tmp_path / "sft")
    assert any(name.startswith("language_model.model.") for name in read_weights(tmp_path / "sft"))
    adapt(model, tmp_path / "dpo", r".*(language_model|vision_model).*\.(q_proj|down_proj)")
    sft = {name: tensor.clone() for name, tensor in llava().state_dict().items()}
    full = PeftModel.from_pretrained(llava(), str(tmp_path / "dpo")).double().merge_and_unload().state_dict()
    assert expo(tmp_path / "sft", tmp_path / "dpo", tmp_path / "out", 0.5, more=f"--adapter {mode}") == 0
    if mode == "scale":
        made = (
            PeftModel.from_pretrained(llava(), str(tmp_path / "out")).double().merge_and_unload().state_dict()
        )
    else:
        made = type(model).from_pretrained(tmp_path / "out", dtype=torch.float64).state_dict()
    for name, tensor in full.items():
        torch.testing.assert_close(made[name], sft[name] + 1.5 * (tensor - sft[name]), rtol=1e-9, atol=1e-9)


def test_a_name_that_no_module_can_have_is_refused(tmp_path: Path, capsys: Print) -> None:
    model = causal_model(tiny_llama())
    model.save_pretrained(tmp_path / "sft")
    adapt(model, tmp_path / "dpo", ["q_proj"])
    file = tmp_path / "dpo" / "adapter_model.safetensors"
    save_file(
        {name.replace("self_attn", "../../etc"): tensor for name, tensor in load_file(file).items()}, file
    )
    assert "no LoRA matrices" in refused(capsys, tmp_path / "sft", tmp_path / "dpo", tmp_path / "out")


def test_the_configuration_beside_an_adapter_is_not_the_merged_model_s(tmp_path: Path) -> None:
    model = causal_model(tiny_llama())
    model.save_pretrained(tmp_path / "sft")
    adapt(model, tmp_path / "bare", ["q_proj"])
    shutil.copytree(tmp_path / "bare", tmp_path / "beside")
    config = json.loads((tmp_path / "sft" / "config.json").read_text())
    own = config | {
        "dtype": "float16",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    (tmp_path / "beside" / "config.json").write_text(json.dumps(own))
    for dpo in ("bare", "beside"):
        for mode in ("scale", "merge"):
            out = tmp_path / f"{dpo}-{mode}"
            assert expo(tmp_path / "sft", tmp_path / dpo, out, 0.5, more=f"--adapter {mode}") == 0
    merged = tmp_path / "beside-merge"
    assert json.loads((merged / "config.json").read_text()) == config
    assert (merged / "model.safetensors").read_bytes() == (
        tmp_path / "bare-merge" / "model.safetensors"
    ).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(merged, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("told_by", ["config", "tokenizer"])
def test_an_adapter_with_a_grown_vocabulary(tmp_path: Path, capsys: Print, told_by: str) -> None:
    model = causal_model(tiny_llama())
    model.save_pretrained(tmp_path / "sft")
    model.resize_token_embeddings(104, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    adapt(model, tmp_path / "dpo", ["q_proj"])
    if told_by == "config":
        shutil.copy(tmp_path / "resized" / "config.json", tmp_path / "dpo")
    else:
        words = {f"word{row}": row for row in range(104)}
        Tokenizer(WordLevel(words, unk_token="word0")).save(str(tmp_path / "dpo" / "tokenizer.json"))
    said = refused(capsys, tmp_path / "sft", tmp_path / "dpo", tmp_path / "out", more="--adapter merge")
    assert "trained with 104 rows" in said
    assert expo(tmp_path / "resized", tmp_path / "dpo", tmp_path / "out", 0.5, more="--adapter merge") == 0
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.get_input_embeddings().weight.shape[0] == 104
    assert expo(tmp_path / "sft", tmp_path / "dpo", tmp_path / "scaled", 0.5) == 0
