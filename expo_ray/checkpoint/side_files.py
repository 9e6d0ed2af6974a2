"""Find the files to copy beside new weights.

A loader may read any file that a configuration, a tokenizer or the model's own code names, so a file is copied for its name or
because a copied file mentions it. Weights, their indexes and the state of a training run are not copied. All other files are left
behind and reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from expo_ray.checkpoint.small_files import read_small, refuse_fault
from expo_ray.errors import CheckpointError, ExpoError, StorageError
from expo_ray.storage.protocol import FileInfo, Store
from expo_ray.text import shown
from expo_ray.untrusted import parse_json

# Far above the largest tokenizer, speaker embedding or adapter that lies beside a model.
MOST_BYTES = 2**30
# A table of speakers or voices; a larger one is somebody's data.
_ARRAYS_BYTES = 64 * 2**20
# Files of text that may name other files. The largest tokenizer_config.json in use has about 3 MB.
_TEXT_BYTES = 8 * 2**20

_WANTED = (
    "*.json", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.spm", "*.bpe", "*.codes", "*.tokenizer", "*.dict",
    "tokenizer*", "*vocab*", "merges*", "dict*.txt", "chat_template*", "spk_dict.pt", "*.npz",
    "*license*", "*licence*", "*notice*", "*use_policy*", "copying*",
)  # fmt: skip
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data",
    "*.ot", "*.pkl", "*.pickle", "*.npy", "*.nemo", "*.distcp", "*.tflite", "*.engine", "weights*.npz",
)  # fmt: skip
# Weights of the model itself, in any format; code that names such a file means the weights, which are written anew.
_OWN_WEIGHTS = (
    "model*.safetensors", "model*.bin", "model*.pt", "pytorch_model*", "diffusion_pytorch_model*", "consolidated*",
    "adapter_model*", "tf_model*", "flax_model*", "rust_model*", "weights*.npz", "*.gguf", "*.ggml", "*.ckpt", "*.nemo",
    "*.distcp", "*.index*.json",
)  # fmt: skip
_TRAINING = (
    "trainer_*", "*_results.json", "training_args*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*",
    "events.out.tfevents*", "latest", "latest_checkpointed_iteration.txt",
)  # fmt: skip
_TRAINING_FOLDERS = ("checkpoint-*", "global_step*", "runs", "logs", "wandb", "tensorboard")
# Written anew by this package, or true of the original folder only.
_OWN = ("adapter_config.json", "expo.json", "readme*", "zero_to_fp32.py")
_TEMPLATES = "additional_chat_templates/"

_PROBES_AT_ONCE = 16
_QUOTED = re.compile(r"(?<=[\"'])([^\"'\n]{1,255})(?=[\"'])")


@dataclass(frozen=True)
class SideFiles:
    """The files beside the weights, each sorted.

    Attributes:
        copied: keys to copy byte for byte beside new weights.
        weights: those of `copied` that hold weights: modules of sentence-transformers, an adapter that belongs to the model.
        left: keys of files that are left behind although they are neither weights nor of a training run.
    """

    copied: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def find_side_files(
    store: Store,
    listing: Mapping[str, FileInfo],
    own: Iterable[str],
    *,
    config: Mapping[str, Any],
    carried: Iterable[str] = (),
) -> tuple[SideFiles, list[ExpoError]]:
    """Choose the files to copy, and open each, so that a file that cannot be read is reported before any work begins.

    Args:
        listing: every file of the folder by key.
        own: keys of the weights, and of what is written anew.
        config: `config.json`, which has been opened before.
        carried: further keys to copy.

    Returns:
        The files, and a problem for each that cannot be copied.
    """
    candidates = [key for key in sorted(listing) if key not in set(own) and not _is_dropped(key)]
    wanted = {key for key in candidates if _is_wanted(listing[key])} | set(carried)
    names, problems = _Names(), []
    names.add("config.json", _json_strings(config))
    fresh = wanted - {"config.json"}
    while True:  # a configuration names the model's code, which may name a vocabulary: repeat until nothing new is named
        for key, data, problem in _open_all(store, [listing[key] for key in sorted(fresh)]):
            names.add(key, _strings(key, data) if data else ())
            problems += [problem] if problem else []
        fresh = {key for key in candidates if key not in wanted and names.mention(key)}
        if not fresh:
            break
        wanted |= fresh
    left = (key for key in candidates if key not in wanted)
    return (
        SideFiles(
            tuple(sorted(wanted)),
            tuple(sorted(key for key in wanted if _matches(key, _WEIGHTS) and key != "spk_dict.pt")),
            tuple(key for key in left if not _matches(key, _WEIGHTS) or names.mention_folder(key)),
        ),
        problems,
    )


def _is_dropped(key: str) -> bool:
    """True if a file is left behind without a report: hidden, of a training run, an index or another form of the weights."""
    *folders, name = key.lower().split("/")
    if any(part.startswith(".") for part in (*folders, name)):
        return True
    if any(fnmatchcase(folder, pattern) for folder in folders for pattern in _TRAINING_FOLDERS):
        return True
    if folders:
        return False
    is_training = _matches(name, _TRAINING) and not name.endswith(".py")
    return is_training or _matches(name, _OWN) or _matches(name, _OWN_WEIGHTS)


def _is_wanted(info: FileInfo) -> bool:
    """True if a file is copied for its name: at the top level, or an additional chat template."""
    name = info.key.removeprefix(_TEMPLATES).lower()
    if "/" in name or not _matches(name, _WANTED):
        return False
    if name.endswith(".npz"):
        return info.size <= _ARRAYS_BYTES
    return name == "spk_dict.pt" or not _matches(name, _WEIGHTS)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    name = key.rpartition("/")[2].lower()
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class _Names:
    """Names of files and folders that the files read so far mention."""

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._ends: set[str] = set()
        self._modules: set[str] = set()

    def add(self, key: str, strings: Iterable[str]) -> None:
        """Collect the names among the strings of a file."""
        texts = {text.removeprefix("./").rstrip("/") for text in strings}
        self._texts |= texts
        self._ends |= {text.rpartition("/")[2] for text in texts}
        if key == "modules.json":  # of sentence-transformers: folders of pooling, normalisation, dense layers
            self._modules |= texts

    def mention(self, key: str) -> bool:
        """True if the file or a folder that holds it has been mentioned.

        Weights below a mentioned folder count only if the folder is a module of sentence-transformers: the name of a folder is
        often an ordinary word.
        """
        if "/" not in key:
            return key in self._ends
        if any(end in self._texts for end in _ends_of(key)):
            return True
        return self.mention_folder(key) and (
            not _matches(key, _WEIGHTS) or any(folder in self._modules for folder in _folders_of(key))
        )

    def mention_folder(self, key: str) -> bool:
        """True if a folder that holds the file has been mentioned, or the key itself (a link to a folder)."""
        return any(folder in self._texts for folder in (*_folders_of(key), key))


def _ends_of(key: str) -> Iterator[str]:
    """The last two and more parts of a key."""
    parts = key.split("/")
    return ("/".join(parts[start:]) for start in range(len(parts) - 1))


def _folders_of(key: str) -> Iterator[str]:
    parts = key.split("/")
    return ("/".join(parts[:end]) for end in range(1, len(parts)))


def _strings(key: str, data: bytes) -> Iterable[str]:
    """Strings of a file of JSON, or the quoted texts of a file of code."""
    if key.endswith(".json"):
        try:
            return _json_strings(parse_json(data, key, most_bytes=_TEXT_BYTES))
        except ExpoError:
            pass  # broken JSON is copied as it is; its strings are found as in code
    return _QUOTED.findall(data.decode("utf-8", "replace"))


def _json_strings(value: Any) -> Iterator[str]:
    stack = [value]
    while stack:
        inner = stack.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, dict):
            stack += inner.values()
        elif isinstance(inner, list):
            stack += inner


def _open_all(
    store: Store, infos: Sequence[FileInfo]
) -> Iterator[tuple[str, bytes | None, ExpoError | None]]:
    """Open files in threads; yields key, content if the file may name others, and the problem if it cannot be opened."""

    def open_or_error(info: FileInfo) -> tuple[str, bytes | None, ExpoError | None]:
        try:
            return info.key, _open(store, info), None
        except (CheckpointError, StorageError) as error:
            return info.key, None, error

    with ThreadPoolExecutor(_PROBES_AT_ONCE, "side-files") as pool:
        yield from pool.map(open_or_error, infos)


def _open(store: Store, info: FileInfo) -> bytes | None:
    refuse_fault(store, info)
    if info.size > MOST_BYTES:
        raise CheckpointError(
            f"{store.uri}/{shown(info.key)}: {info.size} bytes, more than the {MOST_BYTES} allowed for a file beside the weights; "
            " move it out of the folder"
        )
    if _may_name_files(info):
        return read_small(store, info, most_bytes=_TEXT_BYTES)
    for place in sorted({0, info.size - 1}) if info.size else ():
        store.read_into(info.key, place, memoryview(bytearray(1)), etag=info.etag)
    return None


def _may_name_files(info: FileInfo) -> bool:
    name = info.key.rpartition("/")[2]
    is_table = name == "tokenizer.json" or name.startswith(("vocab", "merges", "added_tokens"))
    return name.endswith((".json", ".py")) and not is_table and info.size <= _TEXT_BYTES
