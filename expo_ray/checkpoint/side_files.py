"""Which files of a checkpoint travel with the weights: configuration, tokenizer, template, remote code, licence."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

_WANTED = (
    "*.json", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.spm", "*.bpe",
    "tokenizer*", "vocab*", "merges*", "chat_template*",
    "*license*", "*licence*", "*notice*", "*use_policy*", "copying*",
)  # fmt: skip

# Weights and their indexes are written anew; the rest tells of training runs or belongs to one folder only.
_UNWANTED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.ot",
    "*.npz", "*.npy", "*.pkl", "*.pickle", "*.index.json", "adapter_config.json", "expo.json", "readme*", ".*",
    "trainer_state.json", "*_results.json", "trainer_log*", "training_args*", "optimizer*", "scheduler*", "rng_state*",
)  # fmt: skip

_TEMPLATES = "additional_chat_templates/"


def side_files(keys: Iterable[str]) -> tuple[str, ...]:
    """The keys to copy byte for byte beside new weights, sorted: top-level files and `additional_chat_templates/`."""
    return tuple(sorted(key for key in keys if _is_side_file(key)))


def _is_side_file(key: str) -> bool:
    name = key.removeprefix(_TEMPLATES).lower()
    if "/" in name or any(fnmatchcase(name, pattern) for pattern in _UNWANTED):
        return False
    return any(fnmatchcase(name, pattern) for pattern in _WANTED)
