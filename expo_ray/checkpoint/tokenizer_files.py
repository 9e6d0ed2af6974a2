"""Vocabularies of tokenizers that are no JSON of the tokenizers library: sentencepiece, tiktoken and Mistral's tekken.

Tokens of bytes are written as byte-level tokenizers of the tokenizers library write them, so that both forms of one tokenizer
give the same tokens.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from expo_ray.errors import CheckpointError

_AGAIN = "download the file again"


def sentencepiece_pieces(data: bytes, where: str) -> dict[str, int]:
    """Piece -> row of a sentencepiece model: field 1 of `ModelProto`, whose field 1 is the piece (sentencepiece_model.proto).

    Raises:
        CheckpointError: if it is none.
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
        raise CheckpointError(f"{where}: not a sentencepiece model; {_AGAIN}") from error
    if not pieces:
        raise CheckpointError(f"{where}: a sentencepiece model without pieces; {_AGAIN}")
    return pieces


def tiktoken_ranks(data: bytes, where: str) -> dict[str, int]:
    """Token -> row of a tiktoken file: a line for each, its bytes in base64 and its rank.

    Raises:
        CheckpointError: if it is none.
    """
    tokens: dict[str, int] = {}
    try:
        for line in data.decode("ascii").split("\n"):
            if line.strip():
                text, rank = line.split()
                tokens[_as_text(base64.b64decode(text, validate=True))] = int(rank[:10])
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{where}: not a tiktoken file; {_AGAIN}") from error
    return tokens


def tekken_ranks(tekken: Mapping[str, Any], where: str) -> Iterable[tuple[object, object]]:
    """(token, row) pairs of `tekken.json`: the special tokens, and behind them the others up to the vocabulary's size.

    Raises:
        CheckpointError: if it is none.
    """
    config, vocab, special = (tekken.get(key) for key in ("config", "vocab", "special_tokens"))
    first = config.get("default_num_special_tokens") if isinstance(config, Mapping) else None
    size = config.get("default_vocab_size") if isinstance(config, Mapping) else None
    if not isinstance(vocab, list) or type(first) is not int or type(size) is not int:
        raise CheckpointError(f"{where}: no vocabulary of Mistral's tekken; {_AGAIN}")
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
        raise CheckpointError(f"{where}: a token without rank or bytes; {_AGAIN}") from error


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a protobuf message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
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
