from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from expo_ray.checkpoint.folder import read_checkpoint
from expo_ray.checkpoint.vocabulary import RowRun, match_rows, read_vocabulary
from expo_ray.errors import CheckpointError
from tests.support.paths import SHARED
from tests.support.stored_files import stored, weights

STORIES = SHARED / "data" / "stories" / "sft"
Files = dict[str, bytes | Mapping[str, Any]]


def read(**files: bytes | Mapping[str, Any]) -> dict[str, int]:
    """The vocabulary of a checkpoint with these files; `__` stands for a dot in their names."""
    named = {name.replace("__", "."): content for name, content in files.items()}
    store = stored({"config.json": {}, "model.safetensors": weights("w"), **named})
    return read_vocabulary(store, read_checkpoint(store))


def trained(kind: str) -> Tokenizer:
    text = ["the cat sat on the mat", "a \u2028 line", "naïve café", "the dog"] * 3
    model: Any = getattr(models, kind)
    trainer: Any = getattr(trainers, f"{kind.replace('BPE', 'Bpe')}Trainer")
    tokenizer = Tokenizer(model() if kind in ("BPE", "Unigram") else model(unk_token="[UNK]"))
    tokenizer.train_from_iterator(text, trainer(special_tokens=["[UNK]", "<s>"], vocab_size=60))
    tokenizer.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("[UNK]", special=True)]
    )
    tokenizer.add_tokens(["hyper café"])
    return tokenizer


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_fast_tokenizers_as_their_library_reads_them(kind: str) -> None:
    tokenizer = trained(kind)
    tokens = read(tokenizer__json=tokenizer.to_str().encode())
    assert tokens == tokenizer.get_vocab(with_added_tokens=True)
    assert tokens["<|im_start|>"] == tokenizer.token_to_id("<|im_start|>")
    assert len(tokens) >= 8


def test_the_tokenizer_of_a_real_model() -> None:
    if not STORIES.exists():
        pytest.skip(f"{STORIES} is missing")
    data = (STORIES / "tokenizer.json").read_bytes()
    expected = Tokenizer.from_file(str(STORIES / "tokenizer.json")).get_vocab(with_added_tokens=True)
    assert read(tokenizer__json=data) == expected


def test_slow_tokenizers_of_bpe() -> None:
    tokens = read(
        vocab__json={"a": 0, "\u0120b": 1},
        added_tokens__json={"<pad>": 2},
        tokenizer_config__json={"added_tokens_decoder": {"3": {"content": "<s>", "special": True}}},
    )
    assert tokens == {"a": 0, "\u0120b": 1, "<pad>": 2, "<s>": 3}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_slow_tokenizers_of_wordpiece(newline: str) -> None:
    """Rows are line numbers; only newlines end a line."""
    text = newline.join(["[PAD]", "the", "\u2028", "##s"]) + newline
    assert read(vocab__txt=text.encode()) == {"[PAD]": 0, "the": 1, "\u2028": 2, "##s": 3}


def test_the_fast_tokenizer_comes_first() -> None:
    tokens = read(
        tokenizer__json={"model": {"vocab": {"x": 0}}}, vocab__json={"y": 0}, added_tokens__json={"z": 1}
    )
    assert tokens == {"x": 0}


def test_sentencepiece_models_as_their_library_reads_them(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text(
        "\n".join(f"the {word} of a {word}er" for word in ("cat", "house", "tree", "river", "stone") * 20)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        hard_vocab_limit=False,
        byte_fallback=False,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    expected = {library.id_to_piece(row): row for row in range(library.get_piece_size())}
    assert read(tokenizer__model=(tmp_path / "m.model").read_bytes()) == expected
    assert read(spiece__model=(tmp_path / "m.model").read_bytes()) == expected


def test_tiktoken_and_tekken_as_byte_level_tokenizers_write_them() -> None:
    letters = {bytes([byte]): byte for byte in range(256)} | {
        b" the": 256,
        "\u00e9".encode(): 257,
        b"\n\n": 258,
    }
    lines = "\n".join(f"{base64.b64encode(token).decode()} {rank}" for token, rank in letters.items())
    rows = read(qwen__tiktoken=lines.encode())
    assert rows == read(tokenizer__model=lines.encode())
    assert {"\u0120the", "\u00c3\u00a9", "\u010a\u010a"} <= rows.keys()
    assert set(ByteLevel.alphabet()) <= rows.keys()
    tekken = {
        "config": {"default_num_special_tokens": 3, "default_vocab_size": 261},
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for token, rank in letters.items()
        ],
        "special_tokens": [
            {"rank": rank, "token_str": text} for rank, text in enumerate(("<unk>", "<s>", "</s>"))
        ],
    }
    tokens = read(tekken__json=tekken)
    assert tokens["<s>"] == 1
    assert tokens["\u0120the"] == 259
    assert "\u010a\u010a" not in tokens  # past the vocabulary's size
    assert {token: row - 3 for token, row in tokens.items() if row >= 3} == {
        t: r for t, r in rows.items() if r < 258
    }


REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"sentencepiece__bpe__model": b"\n\x0e\n\x05<unk>"},
        "only sentencepiece.bpe.model, and matching rows by token needs tokenizer.json; save a fast tokenizer beside it "
        "(`AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes tokenizer.json), or set `vocab: keep-dpo` to match "
        "rows by position",
    ),
    ({"tokenizer__model": b"\n\x7f\n\x05<unk>"}, "/tokenizer.model: not a sentencepiece model"),
    ({"tokenizer__model": b"\n\x02\x10\x01"}, "/tokenizer.model: not a sentencepiece model"),
    ({"qwen__tiktoken": b"IQ= 0"}, "/qwen.tiktoken: not a tiktoken file"),
    ({"qwen__tiktoken": b"IQ== x"}, "/qwen.tiktoken: not a tiktoken file"),
    ({"tekken__json": b"{}"}, "/tekken.json: no vocabulary of Mistral's tekken"),
    ({}, "no tokenizer, and matching rows by token needs"),
    ({"tokenizer__json": b"{"}, "/tokenizer.json: not valid JSON"),
    ({"tokenizer__json": {}}, "/tokenizer.json: no vocabulary under model.vocab; save a fast tokenizer"),
    ({"tokenizer__json": {"model": {"vocab": [1]}}}, "no vocabulary under model.vocab"),
    ({"tokenizer__json": {"model": {"vocab": {"a": "0"}}}}, "/tokenizer.json: token 'a' has the row 0; save a fast"),
    ({"tokenizer__json": {"model": {"vocab": {"a": -1}}}}, "token 'a' has the row -1"),
    ({"tokenizer__json": {"model": {"vocab": {"a": True}}}}, "token 'a' has the row True"),
    ({"tokenizer__json": {"model": {"vocab": {"a": 2**31}}}}, "token 'a' has the row 2147483648"),
    ({"tokenizer__json": {"model": {"vocab": [[3, 0.5]]}}}, "token '3' has the row 0"),
    ({"tokenizer__json": {"model": {"vocab": {}}, "added_tokens": {"a": 1}}}, "`added_tokens` is not a list of objects"),
    ({"tokenizer__json": {"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}}, "token 'None' has the row 1"),
    ({"vocab__json": {"a": 1.5}}, "/vocab.json: token 'a' has the row 1.5"),
    ({"vocab__json": {}, "added_tokens__json": {"a": None}}, "/added_tokens.json: token 'a' has the row None"),
    ({"vocab__json": {}, "tokenizer_config__json": {"added_tokens_decoder": [1]}}, "`added_tokens_decoder` is not an object"),
    ({"vocab__json": {}, "tokenizer_config__json": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "has the row x"),
    ({"vocab__json": {}, "tokenizer_config__json": {"added_tokens_decoder": {"1": 7}}}, "token '7' has the row 1"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), REFUSALS)
def test_refusals(files: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(**files)
    assert message in str(caught.value)
    assert "save" in str(caught.value) or "download" in str(caught.value)


def by_hand(dpo: Mapping[str, int], sft: Mapping[str, int], dpo_rows: int, sft_rows: int) -> list[int | None]:
    """The partner of each row, row by row."""
    token_of = {row: token for token, row in dpo.items()}
    partners: list[int | None] = []
    for row in range(dpo_rows):
        partner = sft.get(token_of[row]) if row in token_of else None
        partners.append(partner if partner is not None and partner < sft_rows else None)
    return partners


def expanded(runs: list[RowRun]) -> list[int | None]:
    return [None if run.sft_first is None else run.sft_first + i for run in runs for i in range(run.count)]


VOCABS = st.dictionaries(st.sampled_from("abcdefghijkl"), st.integers(0, 11))


@given(VOCABS, VOCABS, st.integers(0, 14), st.integers(0, 14))
@settings(max_examples=400, deadline=None)
def test_row_map_is_what_one_finds_row_by_row(
    dpo: dict[str, int], sft: dict[str, int], dpo_rows: int, sft_rows: int
) -> None:
    runs = match_rows(dpo, sft, dpo_rows, sft_rows)
    assert expanded(runs) == by_hand(dpo, sft, dpo_rows, sft_rows)
    assert [run.dpo_first for run in runs] == [sum(run.count for run in runs[:i]) for i in range(len(runs))]
    for run, following in pairwise(runs):  # maximal: no two runs could be joined
        if run.sft_first is None or following.sft_first is None:
            assert run.sft_first is not following.sft_first
        else:
            assert run.sft_first + run.count != following.sft_first
    assert all(type(value) is int for run in runs for value in (run.dpo_first, run.count))


def test_row_map_of_what_is_met_in_practice() -> None:
    """An added pad token in dpo, a moved one, and rows padded to a multiple of 64 on either side."""
    base = {f"t{i}": i for i in range(100)}
    dpo, sft = base | {"<pad>": 100, "<s>": 101}, base | {"<s>": 100}
    assert match_rows(dpo, sft, 128, 104) == [
        RowRun(0, 0, 100), RowRun(100, None, 1), RowRun(101, 100, 1), RowRun(102, None, 26),
    ]  # fmt: skip
    assert match_rows(base, base, 100, 100) == [RowRun(0, 0, 100)]
    assert match_rows(base, base, 100, 60) == [RowRun(0, 0, 60), RowRun(60, None, 40)]
    assert match_rows(base, base, 60, 100) == [RowRun(0, 0, 60)]
    assert match_rows({}, {}, 3, 3) == [RowRun(0, None, 3)]


def test_a_large_vocabulary_in_another_order() -> None:
    count = 300_000
    dpo = {f"t{i}": i for i in range(count)}
    sft = {f"t{i}": count - 1 - i for i in range(count)}
    runs = match_rows(dpo, sft, count, count)
    assert len(runs) == count
    assert runs[7] == RowRun(7, count - 8, 1)


def test_json_round_trip_of_escapes() -> None:
    """GPT-2's vocab.json escapes what is not ASCII."""
    vocab = {"\u0120the": 0, "\U0001f600": 1, "é": 2}
    assert read(vocab__json=json.dumps(vocab, ensure_ascii=True).encode()) == vocab
