"""Tiny chat models with a tokenizer and a template, made on the spot, in pairs whose alphas answer differently."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character of ASCII that can be printed, and the special ones."""
    alphabet = [chr(code) for code in range(33, 127)] + [
        "Ġ",
        "Ċ",
    ]  # space and line feed, as this kind of tokenizer has them
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def save_chat_pair(folder: Path, *, tied: bool, dtype: torch.dtype, seed: int = 0) -> tuple[Path, Path]:
    """`(sft, dpo)` of a Llama of 0.1 M parameters; its step from one to the other is large, embeddings included."""
    model = _model(tied, dtype, seed)
    _save(model, folder / "sft")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    _save(model, folder / "dpo")
    return folder / "sft", folder / "dpo"


def save_chat_lora(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """`(sft, adapter)`: a model in float32, and a LoRA adapter on it that changes what it says."""
    from tests.support.tiny_models import save_lora

    model = _model(tied=False, dtype=torch.float32, seed=seed)
    ascii_tokenizer().save_pretrained(folder / "sft")
    return save_lora(folder, model, lora_alpha=80, target_modules="all-linear")


def save_pair_that_learned(letter: str, folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """`(sft, dpo)` whose only difference is that dpo writes a letter more often; a larger alpha does so even more."""
    model = _model(tied=False, dtype=torch.float32, seed=seed)
    with torch.no_grad():
        # What all hidden states have in common is what one row of the head can answer to.
        model.model.embed_tokens.weight.add_(1.0)
        _save(model, folder / "sft")
        row = ascii_tokenizer().convert_tokens_to_ids(letter)
        model.lm_head.weight[row].add_(10.0 / model.config.hidden_size)
        _save(model, folder / "dpo")
    return folder / "sft", folder / "dpo"


def _model(tied: bool, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(ascii_tokenizer()), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    ascii_tokenizer().save_pretrained(folder)
