"""A model's own tokenizer, from the small files beside its weights; no code of the model is run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from expo_ray.checkpoint.json_file import read_small
from expo_ray.storage import FileInfo, Store

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

Files = Mapping[str, tuple[Store, FileInfo]]


def tokenizer_files(store: Store, infos: Iterable[FileInfo]) -> Files:
    """The files that a configuration, a tokenizer or a chat template is read from, by key."""
    return {info.key: (store, info) for info in infos if _is_read(info.key)}


def load_tokenizer(files: Files) -> Any:
    """Load the tokenizer of `transformers` from copies of these files.

    Raises:
        Exception: whatever `transformers` raises.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for key, (store, info) in files.items():
            path = Path(folder, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_small(store, info))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _is_read(key: str) -> bool:
    folder, _, name = key.lower().rpartition("/")
    if folder not in {"", "additional_chat_templates"}:
        return False
    return any(fnmatchcase(name, pattern) for pattern in _READ) and not any(
        fnmatchcase(name, pattern) for pattern in _UNREAD
    )
