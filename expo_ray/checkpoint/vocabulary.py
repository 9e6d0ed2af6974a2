"""The rows of an embedding by token string, from tokenizer files alone, and how rows of two models correspond."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expo_ray.checkpoint.json_file import read_json, read_small
from expo_ray.checkpoint.tensors import Checkpoint
from expo_ray.checkpoint.tokenizer_files import sentencepiece_pieces, tekken_ranks, tiktoken_ranks
from expo_ray.errors import CheckpointError
from expo_ray.storage.protocol import FileInfo, Store

_MAX_ROW = 2**31
_READ = ("tokenizer.json", "vocab.json", "vocab.txt")
# Models of fairseq's family shift the rows of their sentencepiece model, and call it `sentencepiece.bpe.model`; Pegasus does as well.
_OTHERS = ("tokenizer.model", "spiece.model", "tekken.json")
_REMEDY = "save a fast tokenizer beside it (`AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes tokenizer.json)"


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


def vocabulary(store: Store, checkpoint: Checkpoint) -> dict[str, int]:
    """Token string -> row, from tokenizer.json, else another file that holds a vocabulary, with the added tokens.

    Raises:
        CheckpointError: if the folder has none that can be read, or it is not what it should be.
    """
    files = checkpoint.files
    if "tokenizer.json" in files:
        return _fast_tokenizer(read_json(store, files["tokenizer.json"]), f"{store.uri}/tokenizer.json")
    if "vocab.json" in files:
        where = f"{store.uri}/vocab.json"
        found = _checked(read_json(store, files["vocab.json"]).items(), where)
    elif "vocab.txt" in files:
        text = read_small(store, files["vocab.txt"]).decode("utf-8", errors="replace").replace("\r\n", "\n")
        found = {token: row for row, token in enumerate(text.removesuffix("\n").split("\n"))}
    elif key := _other_file(checkpoint):
        found = _other_vocabulary(store, files[key])
    else:
        raise _no_vocabulary(store, checkpoint)
    return found | _added(store, checkpoint)


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """True if `vocabulary` can read a file of this checkpoint."""
    return any(key in checkpoint.files for key in _READ) or bool(_other_file(checkpoint))


def same_tokenizer(store: Store, checkpoint: Checkpoint, other_store: Store, other: Checkpoint) -> bool:
    """True if both checkpoints have the same file of a vocabulary, byte for byte."""
    key = next((key for key in _READ if key in checkpoint.files), None) or _other_file(checkpoint) or ""
    mine, theirs = checkpoint.files.get(key), other.files.get(key)
    if mine is None or theirs is None or mine.size != theirs.size:
        return False
    return mine.etag == theirs.etag or read_small(store, mine) == read_small(other_store, theirs)


def other_rows(
    dpo_vocab: Mapping[str, int], sft_vocab: Mapping[str, int], rows: int
) -> list[tuple[int, str, str]]:
    """Rows below `rows` that the two name differently, with the names in dpo and sft; the empty name is that of none."""
    mine, theirs = ({row: token for token, row in vocab.items()} for vocab in (dpo_vocab, sft_vocab))
    named = {row for row in (*mine, *theirs) if row < rows and mine.get(row) != theirs.get(row)}
    return [(row, mine.get(row, ""), theirs.get(row, "")) for row in sorted(named)]


def row_map(
    dpo_vocab: Mapping[str, int], sft_vocab: Mapping[str, int], dpo_rows: int, sft_rows: int
) -> list[RowRun]:
    """Partners in sft of all `dpo_rows` rows, as maximal runs in the order of dpo.

    A row of dpo that no token names (padding), whose token sft lacks, or whose row lies past `sft_rows`, has no partner. Where
    two tokens name one row of dpo the later entry of `dpo_vocab` counts.
    """
    import numpy as np  # a tenth of a second, which a start without vocabularies to match need not take

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
    """`tokenizer.json` of the tokenizers library: BPE, WordPiece and WordLevel hold a dict, Unigram a list of (token, score)."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, Mapping):
        found = _checked(vocab.items(), where)
    elif isinstance(vocab, list) and all(isinstance(piece, list) and piece for piece in vocab):
        found = _checked(((piece[0], row) for row, piece in enumerate(vocab)), where)
    else:
        raise CheckpointError(f"{where}: no vocabulary under model.vocab; {_REMEDY}")
    return found | _added_tokens(tokenizer.get("added_tokens") or [], where)


def _added_tokens(entries: object, where: str) -> dict[str, int]:
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise CheckpointError(f"{where}: `added_tokens` is not a list of objects; {_REMEDY}")
    return _checked(((entry.get("content"), entry.get("id")) for entry in entries), where)


def _added(store: Store, checkpoint: Checkpoint) -> dict[str, int]:
    """Added tokens of tokenizers that keep them in files of their own."""
    found: dict[str, int] = {}
    if "tokenizer_config.json" in checkpoint.files:
        where = f"{store.uri}/tokenizer_config.json"
        decoder = (
            read_json(store, checkpoint.files["tokenizer_config.json"]).get("added_tokens_decoder") or {}
        )
        if not isinstance(decoder, Mapping):
            raise CheckpointError(f"{where}: `added_tokens_decoder` is not an object; {_REMEDY}")
        for row, entry in decoder.items():
            token = entry.get("content") if isinstance(entry, Mapping) else entry
            found |= _checked([(token, int(row) if re.fullmatch("[0-9]{1,10}", row) else row)], where)
    if "added_tokens.json" in checkpoint.files:
        found |= _checked(
            read_json(store, checkpoint.files["added_tokens.json"]).items(), f"{store.uri}/added_tokens.json"
        )
    return found


def _checked(pairs: Iterable[tuple[object, object]], where: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for token, row in pairs:
        if not isinstance(token, str) or type(row) is not int or not 0 <= row < _MAX_ROW:
            raise CheckpointError(
                f"{where}: token {str(token)[:100]!r} has the row {str(row)[:100]}; {_REMEDY}"
            )
        found[token] = row
    return found


def _other_file(checkpoint: Checkpoint) -> str | None:
    """The file of a vocabulary in another form than the tokenizers library's."""
    if "pegasus" in str(checkpoint.config.get("model_type")):
        return None
    named = [key for key in _OTHERS if key in checkpoint.files]
    return next(iter(named + sorted(key for key in checkpoint.files if key.endswith(".tiktoken"))), None)


def _other_vocabulary(store: Store, info: FileInfo) -> dict[str, int]:
    where = f"{store.uri}/{info.key}"
    if info.key == "tekken.json":
        return _checked(tekken_ranks(read_json(store, info), where), where)
    data = read_small(store, info)
    # Llama 3 calls its tiktoken file as Llama 2 its sentencepiece model, whose first field has the tag 0x0a.
    return sentencepiece_pieces(data, where) if data[:1] == b"\n" else tiktoken_ranks(data, where)


def _no_vocabulary(store: Store, checkpoint: Checkpoint) -> CheckpointError:
    models = [key for key in checkpoint.files if key.endswith((".model", ".txt")) or key.startswith("vocab")]
    found = f"only {', '.join(models)}" if models else "no tokenizer"
    return CheckpointError(
        f"{store.uri}: {found}, and matching rows by token needs tokenizer.json; {_REMEDY}, or set "
        "`vocab: keep-dpo` to match rows by position"
    )
