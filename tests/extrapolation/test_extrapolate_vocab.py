"""Pairs whose vocabularies differ: rows are matched through real tokenizer files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel

from expo_ray.storage.local import LocalStore
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

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = [f"word{i}" for i in range(200)]


def word_tokenizer(words: Sequence[str], added: Sequence[str] = ()) -> Tokenizer:
    """Rows in the order of `words`, added tokens behind them."""
    tokenizer = Tokenizer(WordLevel({word: row for row, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    return tokenizer


def write_side(folder: Path, tensors: Tensors, tokenizer: Tokenizer | None, tied: bool = False) -> Path:
    rows = len(tensors[EMBEDDING])
    write_model(folder, tensors, {**LLAMA, "vocab_size": rows, "tie_word_embeddings": tied})
    if tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def resized(tensors: Tensors, rows: int, seed: int = 7) -> Tensors:
    """The same weights with `rows` rows in embedding and head, new ones at random."""
    generator = torch.Generator().manual_seed(seed)
    resized = dict(tensors)
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            old = tensors[name][:rows]
            new = torch.randn(rows - len(old), old.shape[1], generator=generator) * 0.05
            resized[name] = torch.cat([old, new.to(old.dtype)])
    return resized


def by_token(
    sft: Tensors, dpo: Tensors, sft_rows: dict[str, int], dpo_rows: dict[str, int], alpha: float
) -> Tensors:
    """Row by row, the long way."""
    expected = {
        name: nearest(sft[name], tensor, alpha)
        for name, tensor in dpo.items()
        if name not in (EMBEDDING, HEAD)
    }
    for name in (EMBEDDING, HEAD):
        expected[name] = dpo[name].clone()
        for token, row in dpo_rows.items():
            partner = sft_rows.get(token)
            if partner is not None and partner < len(sft[name]) and row < len(dpo[name]):
                expected[name][row] = nearest(sft[name][partner], dpo[name][row], alpha)
    return expected


def permuted(words: Sequence[str], seed: int = 3) -> list[str]:
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))
    return [words[i] for i in order]


Side = tuple[Sequence[str], Sequence[str], int]  # words, added tokens, rows


@pytest.mark.parametrize(
    ("sft_side", "dpo_side"),
    [
        ((WORDS, [], 200), (WORDS, ["<|im_start|>", "<|im_end|>"], 202)),
        ((WORDS, [], 200), (WORDS, ["<pad>"], 256)),
        ((WORDS, ["<a>", "<b>"], 208), (WORDS, ["<b>", "<c>", "<a>"], 203)),
        ((WORDS, [], 200), (permuted(WORDS), ["<x>"], 201)),
        ((WORDS, [], 200), (WORDS[50:150], [], 100)),
        ((permuted(WORDS, 1), ["<s>"], 256), ([*permuted(WORDS[::2], 2), "new"], ["</s>", "<s>"], 128)),
    ],
    ids=["added", "padded", "added in another order", "permuted", "fewer", "all at once"],
)
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1000])
def test_rows_are_matched_by_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sft_side: Side, dpo_side: Side, chunk_bytes: int
) -> None:
    monkeypatch.setattr(LocalStore, "chunk_bytes", chunk_bytes)
    sft = resized(llama_tensors(rows=64), sft_side[2])
    dpo = resized(moved(sft), dpo_side[2])
    tokenizers = word_tokenizer(*sft_side[:2]), word_tokenizer(*dpo_side[:2])
    folders = (
        write_side(tmp_path / "sft", sft, tokenizers[0]),
        write_side(tmp_path / "dpo", dpo, tokenizers[1]),
    )
    assert expo(*folders, tmp_path / "out", 0.5, -1, more="--vocab by-token --shard-size 20kB") == 0
    for alpha in (0.5, -1):
        expected = by_token(sft, dpo, tokenizers[0].get_vocab(), tokenizers[1].get_vocab(), alpha)
        assert same_bits(read_weights(tmp_path / "out" / f"alpha={alpha}"), expected)


def test_byte_pairs_and_unigram_vocabularies_are_read_as_well(tmp_path: Path) -> None:
    """Real models keep their vocabularies in either form."""
    letters = [chr(97 + i) for i in range(20)]
    pairs = [f"{a}{b}" for a in letters[:4] for b in letters[:4]]
    vocab = {token: row for row, token in enumerate([*letters, *pairs])}
    bpe = Tokenizer(BPE(vocab, [(pair[0], pair[1]) for pair in pairs]))
    unigram = Tokenizer(
        Unigram([(token, -float(row)) for row, token in enumerate(reversed([*letters, *pairs]))])
    )
    unigram.add_special_tokens([AddedToken("<extra>", special=True)])
    sft, dpo = llama_tensors(rows=36), llama_tensors(rows=37, seed=5)
    folders = write_side(tmp_path / "sft", sft, bpe), write_side(tmp_path / "dpo", dpo, unigram)
    assert expo(*folders, tmp_path / "out", 0.5, more="--vocab by-token") == 0
    expected = by_token(sft, dpo, bpe.get_vocab(), unigram.get_vocab(), 0.5)
    assert same_bits(read_weights(tmp_path / "out"), expected)
    assert not torch.equal(expected[EMBEDDING], dpo[EMBEDDING])


def test_by_token_with_a_tied_head_on_one_side(tmp_path: Path) -> None:
    sft = resized(llama_tensors(rows=64), 200)
    dpo = resized(moved(sft), 201)
    del sft[HEAD]
    folders = (
        write_side(tmp_path / "sft", sft, word_tokenizer(WORDS), tied=True),
        write_side(tmp_path / "dpo", dpo, word_tokenizer(WORDS, ["<x>"])),
    )
    assert expo(*folders, tmp_path / "out", 0.5, more="--vocab by-token") == 0
    head = read_weights(tmp_path / "out")[HEAD]
    assert torch.equal(head[:200], nearest(sft[EMBEDDING], dpo[HEAD][:200], 0.5))
    assert torch.equal(head[200:], dpo[HEAD][200:])


@pytest.mark.parametrize(("sft_rows", "dpo_rows"), [(64, 72), (72, 64)])
@pytest.mark.parametrize("dtype", ["keep", "fp32"])
def test_keep_dpo_matches_by_position_and_keeps_the_rest(
    tmp_path: Path, sft_rows: int, dpo_rows: int, dtype: str
) -> None:
    sft = llama_tensors(rows=sft_rows)
    dpo = resized(moved(sft), dpo_rows)
    folders = write_side(tmp_path / "sft", sft, None), write_side(tmp_path / "dpo", dpo, None)
    assert expo(*folders, tmp_path / "out", 0.5, more=f"--vocab keep-dpo --dtype {dtype}") == 0
    wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
    expected = {
        name: nearest(sft[name], tensor, 0.5, wanted)
        for name, tensor in dpo.items()
        if name not in (EMBEDDING, HEAD)
    }
    shared = min(sft_rows, dpo_rows)
    for name in (EMBEDDING, HEAD):
        head = nearest(sft[name][:shared], dpo[name][:shared], 0.5, wanted)
        expected[name] = torch.cat([head, dpo[name][shared:].to(wanted)])
    assert same_bits(read_weights(tmp_path / "out"), expected)


def test_tokenizers_that_are_missing_are_reported_for_both_sides_with_every_other_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = llama_tensors(rows=64)
    dpo = resized(moved(sft), 72)
    del sft["model.norm.weight"]
    folders = write_side(tmp_path / "sft", sft, None), write_side(tmp_path / "dpo", dpo, None)
    assert expo(*folders, tmp_path / "out", 0.5, more="--vocab by-token") == 2
    printed = capsys.readouterr().err
    assert "3 problem(s), nothing was written" in printed
    for folder in folders:
        assert f"{folder}: no tokenizer, and matching rows by token needs tokenizer.json" in printed
    assert "sft lacks 1 tensor(s) of dpo: model.norm.weight" in printed
    assert not (tmp_path / "out").exists()
