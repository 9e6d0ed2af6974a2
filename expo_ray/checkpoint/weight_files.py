"""Find the files of a folder that hold its weights, and the index that names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from expo_ray.checkpoint.small_files import read_json
from expo_ray.checkpoint.unconverted import unconverted_checkpoint
from expo_ray.errors import CheckpointError
from expo_ray.storage.protocol import FileInfo, Store
from expo_ray.text import first_few

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<total>\d{1,6})\.\w+")
_OTHER_FORMATS = {
    ".gguf": "GGUF", ".ggml": "GGML", ".bin": "PyTorch pickle", ".pt": "PyTorch pickle", ".pth": "PyTorch pickle",
    ".ckpt": "PyTorch pickle", ".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".npz": "NumPy",
    ".nemo": "NeMo",
}  # fmt: skip
STEM = "model"
# Stem of the weight files of models of the library `diffusers`.
DIFFUSERS_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights.

    Attributes:
        keys: those that exist, sorted.
        missing: keys of absent files, which the index names or the numbering of the others requires.
        index: key of the index that names them, or empty.
        mapped: tensor name -> key, from the index.
        pickled: whether they are PyTorch pickles.
    """

    keys: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    index: str = ""
    mapped: Mapping[str, str] = field(default_factory=dict)
    pickled: bool = False


def find_weights(store: Store, listing: Mapping[str, FileInfo], *, allow_pickle: bool) -> WeightFiles:
    """Find the weight files of a model folder: safetensors if there are any, else `pytorch_model*.bin` if allowed.

    Args:
        listing: every file of the folder by key.

    Raises:
        CheckpointError: if there are none, or several sets of them.
    """
    top = [key for key in sorted(listing) if "/" not in key and not key.startswith("adapter_model.")]
    safe = [key for key in top if key.endswith((".safetensors", ".safetensors.index.json"))]
    if safe:
        of_diffusers = not any(key.startswith("model.") for key in safe) and any(map(_is_of_diffusers, safe))
        return _choose(store, listing, safe, f"{DIFFUSERS_STEM if of_diffusers else STEM}.safetensors")
    pickles = [
        key for key in top if key.startswith("pytorch_model") and key.endswith((".bin", ".bin.index.json"))
    ]
    if pickles and not allow_pickle:
        raise _pickle_refused(store, pickles)
    if pickles:
        return _choose(store, listing, pickles, "pytorch_model.bin")
    raise _no_weights(store, listing)


def stem_of(keys: Iterable[str]) -> str:
    """Stem for the weight files of a model whose parent has files `keys`: the name that the library that loads it looks for."""
    return DIFFUSERS_STEM if any(map(_is_of_diffusers, keys)) else STEM


def _is_of_diffusers(key: str) -> bool:
    return key.startswith(DIFFUSERS_STEM)


def find_adapter_weights(store: Store, listing: Mapping[str, FileInfo], *, allow_pickle: bool) -> WeightFiles:
    """Find the weight file of a PEFT adapter folder; errors as of `find_weights`."""
    if "adapter_model.safetensors" in listing:
        return WeightFiles(("adapter_model.safetensors",))
    if "adapter_model.bin" not in listing:
        raise CheckpointError(
            f"{store.uri}: adapter_config.json without adapter_model.safetensors; save the adapter again, or remove "
            "adapter_config.json if this is a whole model"
        )
    if not allow_pickle:
        raise _pickle_refused(store, ["adapter_model.bin"])
    return WeightFiles(("adapter_model.bin",), pickled=True)


def _choose(store: Store, listing: Mapping[str, FileInfo], keys: Sequence[str], single: str) -> WeightFiles:
    """Choose among the weight files and indexes of one format; `single` is the name of a model's only file."""
    suffix = f".{single.partition('.')[2]}"
    files = [key for key in keys if key.endswith(suffix)]
    pickled = suffix == ".bin"
    index = _index_key(store, [key for key in keys if key.endswith(".index.json")], f"{single}.index.json")
    shards = [match for match in map(_SHARD.fullmatch, files) if match]
    stem = single.removesuffix(suffix)
    if single in files or any(shard["stem"] == stem for shard in shards):
        shards = [
            shard for shard in shards if not shard["stem"].startswith(f"{stem}.")
        ]  # variants: model.fp16
    if index:
        mapped = _read_index(store, listing[index], suffix)
        named = sorted(set(mapped.values()))
        if single in files and single not in named:
            raise _two_models(store, single, index)
        present = tuple(key for key in named if key in listing)
        return WeightFiles(present, tuple(key for key in named if key not in listing), index, mapped, pickled)
    if single in files:
        if shards:
            raise _two_models(store, single, first_few([shard[0] for shard in shards]))
        return WeightFiles((single,), pickled=pickled)
    if shards:
        return WeightFiles(
            tuple(shard[0] for shard in shards), _missing_shards(store, shards, suffix), pickled=pickled
        )
    return WeightFiles(tuple(files), pickled=pickled)


def _pickle_refused(store: Store, keys: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{store.uri}: no safetensors, only PyTorch pickles ({first_few(keys)}); convert them (load and `save_pretrained` with "
        "transformers), or allow restricted unpickling with `allow_pickle: true`"
    )


def _two_models(store: Store, single: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{store.uri}: holds both {single} and {other}, and programs differ in which they read; remove one of the two"
    )


def _index_key(store: Store, indexes: list[str], usual: str) -> str:
    if usual in indexes or not indexes:
        return usual if indexes else ""
    if len(indexes) > 1:
        raise CheckpointError(
            f"{store.uri}: {len(indexes)} indexes ({first_few(indexes)}) and no {usual}; keep one of them"
        )
    return indexes[0]


def _read_index(store: Store, info: FileInfo, suffix: str) -> dict[str, str]:
    where = f"{store.uri}/{info.key}"
    mapped = read_json(store, info, strict=True).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise CheckpointError(
            f"{where}: no `weight_map` from tensor names to files; save the checkpoint again"
        )
    for name, file in mapped.items():
        # Slashes of either kind, `..` and drive letters would leave the folder on one system or another.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]+", file) or not file.endswith(suffix):
            raise CheckpointError(
                f"{where}: {name!r} is mapped to {str(file)[:100]!r}, which is not the plain name of a {suffix} file in the "
                "same folder; save the checkpoint again"
            )
    return mapped


def _missing_shards(store: Store, shards: Sequence[re.Match[str]], suffix: str) -> tuple[str, ...]:
    """Names of shards that the numbers in the other names require; used where no index says which files there should be."""
    sets = sorted({(shard["stem"], shard["total"]) for shard in shards})
    if len(sets) > 1:
        names = first_few([f"{stem}-*-of-{total}{suffix}" for stem, total in sets])
        raise CheckpointError(f"{store.uri}: several sets of weights and no index: {names}; keep one of them")
    stem, total = sets[0]
    present = {int(shard["number"]) for shard in shards}
    if not 1 <= min(present) <= max(present) <= int(total):
        raise CheckpointError(
            f"{store.uri}: {first_few([shard[0] for shard in shards])}: numbers that are not from 1 to {int(total)}; name the files as "
            "`save_pretrained` does"
        )
    width = len(total)
    numbers = (number for number in range(1, int(total) + 1) if number not in present)
    return tuple(f"{stem}-{number:0{width}d}-of-{total}{suffix}" for number in numbers)


def _no_weights(store: Store, listing: Mapping[str, FileInfo]) -> CheckpointError:
    unconverted = unconverted_checkpoint(store.uri, listing)
    if unconverted:
        return CheckpointError(f"{store.uri}: no weights as `save_pretrained` writes them, but {unconverted}")
    nested = sorted(
        {key.rpartition("/")[0] for key in listing if "/" in key and key.endswith(".safetensors")}
    )
    top = sorted(key for key in listing if "/" not in key)
    formats: dict[str, list[str]] = {}
    for key in top:
        for ending, kind in _OTHER_FORMATS.items():
            if key.endswith(ending):
                formats.setdefault(kind, []).append(key)
    if nested and not formats:
        return CheckpointError(
            f"{store.uri}: no weights at its top level; there are some in {first_few(nested)}: pass the one you mean, such as "
            f"{store.uri}/{nested[0]}"
        )
    if formats:
        present = "; ".join(f"{kind}: {first_few(keys)}" for kind, keys in formats.items())
        remedy = "pass the original checkpoint in safetensors, or convert this one"
        return CheckpointError(f"{store.uri}: no safetensors, only other formats ({present}); {remedy}")
    return CheckpointError(
        f"{store.uri}: no weights; there are {first_few(top) or 'only subfolders'}; pass the folder that holds the *.safetensors"
    )
