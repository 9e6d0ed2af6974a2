from __future__ import annotations

from typing import Any

import pytest

from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.quantisation import quantisation_of
from expo_ray.checkpoint.tensors import Tensor


def checkpoint(config: dict[str, Any], **dtypes: str) -> Checkpoint:
    tensors = {
        name: Tensor(name, dtype, (4, 1) if "scale" in name else (4, 4), "model.safetensors", 0)
        for name, dtype in dtypes.items()
    }
    return Checkpoint("memory://x", "", config, tensors, {})


PLAIN = {"model.embed_tokens.weight": "BF16", "model.layers.0.mlp.up_proj.weight": "F32"}


@pytest.mark.parametrize(
    ("declared", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq (4 bit)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq (4 bit)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes (4 bit)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes (8 bit)"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": []}, "mxfp4"),
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"something": 1}, "an unnamed scheme"),
        ("int8", "int8"),
    ],
)  # fmt: skip
def test_the_declared_scheme(declared: Any, scheme: str) -> None:
    assert quantisation_of(checkpoint({"quantization_config": declared}, **PLAIN)) == scheme
    assert quantisation_of(checkpoint({"text_config": {"quantization_config": declared}}, **PLAIN)) == scheme


def test_older_configurations_declare_under_another_key() -> None:
    config = {"compression_config": {"format": "pack-quantized"}}
    assert quantisation_of(checkpoint(config, **PLAIN)) == "pack-quantized"


@pytest.mark.parametrize(
    ("names", "scheme"),
    [
        ({"l.qweight": "I32", "l.qzeros": "I32", "l.scales": "F16", "l.g_idx": "I32"}, "gptq"),
        ({"l.qweight": "I32", "l.qzeros": "I32", "l.scales": "F16"}, "awq or gptq"),
        ({"l.weight": "U8", "l.weight.absmax": "U8", "l.weight.quant_map": "F32"}, "bitsandbytes (4 bit)"),
        ({"l.weight": "U8", "l.weight.quant_state.bitsandbytes__nf4": "U8"}, "bitsandbytes (4 bit)"),
        ({"l.weight": "I8", "l.SCB": "F32", "l.weight_format": "U8"}, "bitsandbytes (8 bit)"),
        ({"l.weight": "F8_E4M3", "l.weight_scale_inv": "F32"}, "fp8 (block scales)"),
        ({"l.weight": "F8_E4M3", "l.weight_scale": "F32", "l.input_scale": "F32"}, "fp8 (with scales)"),
        ({"l.weight": "F8_E5M2"}, "fp8"),
        ({"l.weight_packed": "I32", "l.weight_scale": "BF16", "l.weight_shape": "I64"}, "compressed-tensors"),
        ({"e.gate_up_proj_blocks": "U8", "e.gate_up_proj_scales": "U8", "e.gate_up_proj_bias": "BF16"}, "mxfp4"),
        ({"l.weight._data": "I8", "l.weight._scale": "F16", "l.input_scale": "F16"}, "quanto"),
        ({"l.W_q": "U8", "l.scale": "F16", "l.zero": "F16"}, "hqq"),
        ({"l.q_weight": "I32", "l.q_scale": "I32", "l.q_scale_max": "F16"}, "exl2"),
        ({"l.trellis": "I16", "l.suh": "F16", "l.svh": "F16"}, "exl3"),
        ({"l.codes": "I16", "l.codebooks": "F16", "l.scales": "F16"}, "aqlm"),
        ({"l.indices": "I16", "l.centroids.weight": "F16"}, "vptq"),
        ({"l._weight_qdata": "I8", "l._weight_scale": "F32"}, "torchao"),
        ({"l.Qidxs": "I64", "l.SU": "F16", "l.SV": "F16"}, "quip#"),
        ({"l.weight": "U8", "l.weight_scale": "F8_E4M3", "l.weight_scale_2": "F32"}, "U8 weights"),
        ({"l.packed": "U8", "l.scale": "F16"}, "integer codes in l.packed, with factors in l.scale"),
        ({"experts.down_proj": "U8", "experts.down_proj_scales": "F32"},
         "integer codes in experts.down_proj, with factors in experts.down_proj_scales"),
        ({f"l.{i}": "U8" for i in range(40)}, "integer codes, such as l.0"),
        ({"l.weight": "I8"}, "I8 weights"),
        ({"l.weight": "U8"}, "U8 weights"),
    ],
)  # fmt: skip
def test_the_scheme_without_a_declaration(names: dict[str, str], scheme: str) -> None:
    assert quantisation_of(checkpoint({}, **PLAIN, **names)) == scheme


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": None}]
)
def test_plain_floats_and_buffers_are_not_quantised(config: dict[str, Any]) -> None:
    buffers = {
        "transformer.h.0.attn.bias": "U8", "transformer.h.0.attn.masked_bias": "BOOL", "position_ids": "I64",
        "model.layers.0.mlp.gate.e_score_correction_bias": "F32", "vision.blocks.0.scales": "F32",
        "bn.num_batches_tracked": "I64", "encoder.layers.0.attn.relative_position_index": "I64",
        "encoder.layers.0.attn.logit_scale": "F32", "gate.tid2eid": "I64", "gate.scale": "F32", "l.weight": "BF16",
        "l.k_scale": "F32", "l.trellis": "BF16", "table.indices": "I32", "table.scale": "F32", "table.weight": "F32",
    }  # fmt: skip
    assert quantisation_of(checkpoint(config, **PLAIN, **buffers)) is None
