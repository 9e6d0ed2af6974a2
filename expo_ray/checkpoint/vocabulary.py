"""The vocabulary of a tokenizer (token -> row of the embedding), and the rows of two models that hold the same token.

Read from the files alone: JSON of the tokenizers library, sentencepiece, tiktoken and Mistral's tekken. Tokens of bytes are spelt
as the byte-level tokenizers of the tokenizers library spell them, so that every form of a tokenizer gives the same tokens.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.checkpoint.small_files import read_json, read_small
from expo_ray.errors import CheckpointError
from expo_ray.storage.protocol import FileInfo, Store

_MAX_ROW = 2**31
_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
# Without `sentencepiece.bpe.model`: models of fairseq's family shift the rows of their embedding against that file. So does Pegasus.
_OTHER_FILES = ("tokenizer.model", "spiece.model", "tekken.json")
_DOWNLOAD_AGAIN = "download the file again"
_SAVE_FAST = "save a fast tokenizer beside it (`AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes tokenizer.json)"


@dataclass(frozen=True, slots=True)
class RowRun:
    """Consecutive rows of dpo whose partners in sft are consecutive as well.

    Attributes:
        dpo_first: first row in dpo.
        sft_first: its row in sft, or None where sft does not know these tokens.
        count: number of rows, at least 1.
    """

    dpo_first: int
    sft_first: int | None
    count: int


def read_vocabulary(store: Store, checkpoint: Checkpoint) -> dict[str, int]:
    """Read token -> row from tokenizer.json, else from another file of a vocabulary and the files of added tokens.

    Raises:
        CheckpointError: if no file of the folder is of a readable form, or one breaks its form.
    """
    files = checkpoint.files
    if "tokenizer.json" in files:
        return _fast_tokenizer(read_json(store, files["tokenizer.json"]), f"{store.uri}/tokenizer.json")
    if "vocab.json" in files:
        where = f"{store.uri}/vocab.json"
        tokens = _checked(read_json(store, files["vocab.json"]).items(), where)
    elif "vocab.txt" in files:
        text = read_small(store, files["vocab.txt"]).decode("utf-8", errors="replace").replace("\r\n", "\n")
        tokens = {token: row for row, token in enumerate(text.removesuffix("\n").split("\n"))}
    elif key := _other_file(checkpoint):
        tokens = _read_other_file(store, files[key])
    else:
        raise _no_vocabulary(store, checkpoint)
    return tokens | _read_added_tokens(store, checkpoint)


def has_vocabulary(checkpoint: Checkpoint) -> bool:
    """True if the checkpoint has a file that `read_vocabulary` knows how to read."""
    return any(key in checkpoint.files for key in _FILES) or bool(_other_file(checkpoint))


def is_same_vocabulary_file(dpo_store: Store, dpo: Checkpoint, sft_store: Store, sft: Checkpoint) -> bool:
    """True if both checkpoints have the same file of a vocabulary; reads both where their ETags differ."""
    key = next((key for key in _FILES if key in dpo.files), None) or _other_file(dpo) or ""
    of_dpo, of_sft = dpo.files.get(key), sft.files.get(key)
    if of_dpo is None or of_sft is None or of_dpo.size != of_sft.size:
        return False
    return of_dpo.etag == of_sft.etag or read_small(dpo_store, of_dpo) == read_small(sft_store, of_sft)


def differing_rows(
    dpo_vocab: Mapping[str, int], sft_vocab: Mapping[str, int], rows: int
) -> list[tuple[int, str, str]]:
    """Rows below `rows` that hold different tokens: (row, token of dpo, token of sft), empty where a side has no token there."""
    of_dpo, of_sft = ({row: token for token, row in vocab.items()} for vocab in (dpo_vocab, sft_vocab))
    differing = {row for row in (*of_dpo, *of_sft) if row < rows and of_dpo.get(row) != of_sft.get(row)}
    return [(row, of_dpo.get(row, ""), of_sft.get(row, "")) for row in sorted(differing)]


def match_rows(
    dpo_vocab: Mapping[str, int], sft_vocab: Mapping[str, int], dpo_rows: int, sft_rows: int
) -> list[RowRun]:
    """Match every row of dpo with the row of sft that holds the same token, as maximal runs in the order of dpo.

    A row of dpo that no token names (padding), whose token sft lacks, or whose row lies past `sft_rows`, has no partner. Where
    two tokens name one row of dpo the later entry of `dpo_vocab` counts.
    """
    import numpy as np  # takes 0.1 s, which only pairs with rows to match should pay

    rows = np.fromiter(dpo_vocab.values(), np.int64, len(dpo_vocab))
    partners = np.fromiter((sft_vocab.get(token, -1) for token in dpo_vocab), np.int64, len(dpo_vocab))
    partners[partners >= sft_rows] = -1
    stored = rows < dpo_rows
    partner_of = np.full(dpo_rows, -1, np.int64)
    partner_of[rows[stored]] = partners[stored]
    before, after = partner_of[:-1], partner_of[1:]
    continues = np.where(before >= 0, after == before + 1, after < 0)
    starts = np.concatenate(([0], np.flatnonzero(~continues) + 1)) if dpo_rows else np.zeros(0, np.int64)
    counts = np.diff(np.append(starts, dpo_rows))
    return [
        RowRun(int(start), int(partner_of[start]) if partner_of[start] >= 0 else None, int(count))
        for start, count in zip(starts, counts, strict=True)
    ]


def _fast_tokenizer(tokenizer: Mapping[str, Any], where: str) -> dict[str, int]:
    """Token -> row of a tokenizer.json: BPE, WordPiece and WordLevel hold an object, Unigram a list of [token, score]."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, Mapping):
        tokens = _checked(vocab.items(), where)
    elif isinstance(vocab, list) and all(isinstance(piece, list) and piece for piece in vocab):
        tokens = _checked(((piece[0], row) for row, piece in enumerate(vocab)), where)
    else:
        raise CheckpointError(f"{where}: no vocabulary under model.vocab; {_SAVE_FAST}")
    return tokens | _fast_added_tokens(tokenizer.get("added_tokens") or [], where)


def _fast_added_tokens(entries: object, where: str) -> dict[str, int]:
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise CheckpointError(f"{where}: `added_tokens` is not a list of objects; {_SAVE_FAST}")
    return _checked(((entry.get("content"), entry.get("id")) for entry in entries), where)


def _read_added_tokens(store: Store, checkpoint: Checkpoint) -> dict[str, int]:
    """Read the added tokens of a slow tokenizer, which keeps them apart from its vocabulary."""
    tokens: dict[str, int] = {}
    if "tokenizer_config.json" in checkpoint.files:
        where = f"{store.uri}/tokenizer_config.json"
        decoder = (
            read_json(store, checkpoint.files["tokenizer_config.json"]).get("added_tokens_decoder") or {}
        )
        if not isinstance(decoder, Mapping):
            raise CheckpointError(f"{where}: `added_tokens_decoder` is not an object; {_SAVE_FAST}")
        for row, entry in decoder.items():
            token = entry.get("content") if isinstance(entry, Mapping) else entry
            tokens |= _checked([(token, int(row) if re.fullmatch("[0-9]{1,10}", row) else row)], where)
    if "added_tokens.json" in checkpoint.files:
        tokens |= _checked(
            read_json(store, checkpoint.files["added_tokens.json"]).items(), f"{store.uri}/added_tokens.json"
        )
    return tokens


def _checked(pairs: Iterable[tuple[object, object]], where: str) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for token, row in pairs:
        if not isinstance(token, str) or type(row) is not int or not 0 <= row < _MAX_ROW:
            raise CheckpointError(
                f"{where}: token {str(token)[:100]!r} has the row {str(row)[:100]}; {_SAVE_FAST}"
            )
        tokens[token] = row
    return tokens


def _other_file(checkpoint: Checkpoint) -> str | None:
    """Key of a vocabulary in sentencepiece, tiktoken or tekken form; None if there is none whose rows are the embedding's."""
    if "pegasus" in str(checkpoint.config.get("model_type")):
        return None
    named = [key for key in _OTHER_FILES if key in checkpoint.files]
    return next(iter(named + sorted(key for key in checkpoint.files if key.endswith(".tiktoken"))), None)


def _read_other_file(store: Store, info: FileInfo) -> dict[str, int]:
    where = f"{store.uri}/{info.key}"
    if info.key == "tekken.json":
        return _checked(_tekken_ranks(read_json(store, info), where), where)
    data = read_small(store, info)
    # `tokenizer.model` is a sentencepiece model for Llama 2 and a tiktoken file for Llama 3. A sentencepiece model begins with the
    # tag 0x0a of its first piece, a tiktoken file with base64.
    return _sentencepiece_pieces(data, where) if data[:1] == b"\n" else _tiktoken_ranks(data, where)


def _no_vocabulary(store: Store, checkpoint: Checkpoint) -> CheckpointError:
    models = [key for key in checkpoint.files if key.endswith((".model", ".txt")) or key.startswith("vocab")]
    present = f"only {', '.join(models)}" if models else "no tokenizer"
    return CheckpointError(
        f"{store.uri}: {present}, and matching rows by token needs tokenizer.json; {_SAVE_FAST}, or set "
        "`vocab: keep-dpo` to match rows by position"
    )


def _sentencepiece_pieces(data: bytes, where: str) -> dict[str, int]:
    """Piece -> row of a sentencepiece model.

    `ModelProto` lists the pieces in its field 1, in the order of their rows; field 1 of each is its text
    (https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).
    """
    pieces: dict[str, int] = {}
    try:
        for number, value in _fields(memoryview(data)):
            if number == 1 and isinstance(value, memoryview):
                piece = next(
                    text for key, text in _fields(value) if key == 1 and isinstance(text, memoryview)
                )
                pieces.setdefault(bytes(piece).decode("utf-8"), len(pieces))
    except (ValueError, StopIteration) as error:
        raise CheckpointError(f"{where}: not a sentencepiece model; {_DOWNLOAD_AGAIN}") from error
    if not pieces:
        raise CheckpointError(f"{where}: a sentencepiece model without pieces; {_DOWNLOAD_AGAIN}")
    return pieces


def _tiktoken_ranks(data: bytes, where: str) -> dict[str, int]:
    """Token -> row of a tiktoken file: a line for each token, with its bytes in base64 and its rank."""
    tokens: dict[str, int] = {}
    try:
        for line in data.decode("ascii").split("\n"):
            if line.strip():
                text, rank = line.split()
                tokens[_as_text(base64.b64decode(text, validate=True))] = int(rank[:10])
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{where}: not a tiktoken file; {_DOWNLOAD_AGAIN}") from error
    return tokens


def _tekken_ranks(tekken: Mapping[str, Any], where: str) -> Iterable[tuple[object, object]]:
    """(token, row) pairs of `tekken.json`: the special tokens in the first rows, then the others up to the vocabulary's size."""
    config, vocab, special = (tekken.get(key) for key in ("config", "vocab", "special_tokens"))
    first = config.get("default_num_special_tokens") if isinstance(config, Mapping) else None
    size = config.get("default_vocab_size") if isinstance(config, Mapping) else None
    if not isinstance(vocab, list) or type(first) is not int or type(size) is not int:
        raise CheckpointError(f"{where}: no vocabulary of Mistral's tekken; {_DOWNLOAD_AGAIN}")
    specials = special if isinstance(special, list) else []
    try:
        return [
            *((entry["token_str"], entry["rank"]) for entry in specials),
            *(
                (_as_text(base64.b64decode(entry["token_bytes"], validate=True)), entry["rank"] + first)
                for entry in vocab
                if entry["rank"] + first < size
            ),
        ]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{where}: a token without rank or bytes; {_DOWNLOAD_AGAIN}") from error


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a protobuf message (https://protobuf.dev/programming-guides/encoding)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7  # wire type: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in {1, 5}:
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("an unknown kind of field")
        if size > len(data) - at:
            raise ValueError("a field longer than the message")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("cut off")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _as_text(token: bytes) -> str:
    return "".join(_byte_letters()[byte] for byte in token)


@cache
def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
