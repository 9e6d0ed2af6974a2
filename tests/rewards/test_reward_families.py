"""The reference back end against the definition of each family of models: eager attention, one text, no padding, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import torch
import transformers

from expo_ray.on_ray.rewards.backends import TransformersBackend

VOCABULARY, LONGEST = 320, 128
DECODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
BART: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

# What each family is here for: a kind of attention, position or head that is easily computed otherwise.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DECODER),
    "soft caps": ("Gemma2", DECODER | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "attn_logit_softcapping": 5.0}),
    "soft caps and local layers": ("Gemma3Text", DECODER | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "attn_logit_softcapping": 5.0}),
    "attention sinks and experts": ("GptOss", DECODER | {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "sliding window": ("Mistral", DECODER | {"sliding_window": 8}),
    "experts": ("Mixtral", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "norms of queries and keys": ("Qwen3", DECODER | {"head_dim": 8}),
    "biases of queries and keys": ("Qwen2", DECODER),
    "alibi": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "alibi, no biases": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    "parallel layers": ("Falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "partly rotary": ("GPTNeoX", ENCODER),
    "learned positions": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "positions from the mask": ("OPT", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "global and local, no scale": ("GPTNeo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "norms after": ("Olmo2", DECODER),
    "head that is no `score`": ("CTRL", {"n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4}),
    "decoder with a classifier": ("ModernBertDecoder", ENCODER | {"local_attention": 8}),
    "encoder": ("Bert", ENCODER),
    "positions from padding": ("Roberta", ENCODER),
    "disentangled": ("DebertaV2", ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "local and global encoder": ("ModernBert", ENCODER | {"local_attention": 8}),
    "mean over tokens": ("EuroBert", DECODER | {"classifier_pooling": "mean"}),
    "relative biases": ("T5", T5 | {"decoder_start_token_id": 0}),
    "number of </s>": ("Bart", BART | {"decoder_start_token_id": 0}),
    "convolutions": ("ConvBert", ENCODER),
    "Fourier transform": ("FNet", {key: value for key, value in ENCODER.items() if key != "num_attention_heads"}),
    "bottlenecks": ("MobileBert", ENCODER | {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
}  # fmt: skip


# These look for the last token that is not padding, which the text itself may hold.
POOLED_BY_PAD = {"CTRLForSequenceClassification", "ModernBertDecoderForSequenceClassification"}


def save(folder: Path, family: str, changes: dict[str, Any]) -> Any:
    """A model with large weights, so that caps, scales, windows and norms decide the score; padding is the end of a text."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        max_position_embeddings=LONGEST,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
        **changes,
    )
    config.num_labels = 1
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def definition(model: Any, ids: list[int]) -> float:
    """The head on the last token of a decoder, and the whole model otherwise; one text, nothing padded."""
    inputs = torch.tensor([ids])
    with torch.inference_mode():
        if hasattr(model, "score"):
            hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
            return float(model.score(hidden)[0, -1, 0])
        if type(model).__name__ in POOLED_BY_PAD:
            model.config.pad_token_id = VOCABULARY - 1  # in no text
        return float(model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0, 0])


@pytest.mark.parametrize("kind", FAMILIES)
def test_batches_score_as_the_family_is_defined(tmp_path: Path, kind: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = save(tmp_path, *FAMILIES[kind])
        made = torch.Generator().manual_seed(1)
        texts = [
            [*torch.randint(2, VOCABULARY - 1, (length,), generator=made).tolist(), 1]
            for length in (60, 33, 9, 17, 17, 3)
        ]
        texts[3][4] = 1  # an end in the middle, as between two turns
        expected = [definition(model, ids) for ids in texts]
        scores = TransformersBackend(tmp_path, "fp32", cuda=False, probe=texts[:4]).score(texts)
    finally:
        torch.set_num_threads(threads)
    assert max(expected) - min(expected) > 0.05  # it distinguishes the texts
    assert scores == pytest.approx(expected, rel=2e-4, abs=2e-4)
