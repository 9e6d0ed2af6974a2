"""A model's tokenizer: the `transformers` object, its special tokens and its chat template. No code of the model is run.

The vocabulary, token by token, is in `vocabulary.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from expo_ray.checkpoint.small_files import read_json, read_small
from expo_ray.errors import CheckpointError, NotFound
from expo_ray.storage import FileInfo, Store, open_store
from expo_ray.untrusted import Foreign, validated

_READ = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.spm",
    "*.bpe",
    "tokenizer*",
    "vocab*",
    "merges*",
)
_UNREAD = ("*.py", "*.safetensors", "*.bin", "*.pt", "*.index.json")

TokenizerFiles = Mapping[str, tuple[Store, FileInfo]]
"""Store and version of each file by key. The files of a pair may lie in two stores: an adapter's base has what it lacks."""


class AddedToken(Foreign):
    """An entry of `added_tokens` in tokenizer.json, the file of the tokenizers library."""

    id: int
    content: str
    special: bool


class _AddedTokens(Foreign):
    added_tokens: list[AddedToken]


def tokenizer_files(store: Store, infos: Iterable[FileInfo]) -> TokenizerFiles:
    """The files that `transformers` may read a configuration, a tokenizer or a chat template from."""
    return {info.key: (store, info) for info in infos if _is_read(info.key)}


def local_tokenizer_files(folder: Path) -> TokenizerFiles:
    """The files of a folder on this node from which special tokens and template are read.

    Links are followed wherever they lead, as an engine follows them: the folder of an adapter's engine consists of links.
    """
    store = open_store(str(folder))
    keys = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return {key: (store, store.stat(key)) for key in keys if (folder / key).is_file()}


def load_tokenizer(files: TokenizerFiles) -> Any:
    """Load the tokenizer of `transformers` from copies of these files.

    Raises:
        Exception: any that `transformers` raises.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for key, (store, info) in files.items():
            path = Path(folder, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_small(store, info))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def read_special_tokens(files: TokenizerFiles) -> list[AddedToken]:
    """Read the tokens that tokenizer.json marks as special; empty if there is no such file, or it lists none that can be read.

    Raises:
        InputChanged: if the file is no longer the version in `files`.
    """
    try:
        return [token for token in _read_added_tokens(files) if token.special]
    except (NotFound, CheckpointError):
        return []


def read_chat_template(files: TokenizerFiles) -> Any:
    """Read the chat template: its text, a list of named templates as tokenizer_config.json may hold, or an empty text.

    Raises:
        UnicodeDecodeError: if chat_template.jinja is not UTF-8.
    """
    if "chat_template.jinja" in files:
        text = read_small(*files["chat_template.jinja"]).decode("utf-8")
        return text.replace("\r\n", "\n").replace(
            "\r", "\n"
        )  # as Jinja does, so that line ends change no digest
    try:
        config = read_json(*files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    except (NotFound, CheckpointError):
        return ""
    return config.get("chat_template") or ""


def _read_added_tokens(files: TokenizerFiles) -> list[AddedToken]:
    if "tokenizer.json" not in files:
        return []
    tokenizer = read_json(*files["tokenizer.json"])
    return validated(_AddedTokens, tokenizer, "tokenizer.json", error=CheckpointError, remedy="").added_tokens


def _is_read(key: str) -> bool:
    folder, _, name = key.lower().rpartition("/")
    if folder not in {"", "additional_chat_templates"}:
        return False
    return any(fnmatchcase(name, pattern) for pattern in _READ) and not any(
        fnmatchcase(name, pattern) for pattern in _UNREAD
    )
