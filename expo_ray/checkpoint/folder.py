"""Read a checkpoint folder from its listing and the headers of its files; no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from expo_ray.checkpoint.constants import is_constant
from expo_ray.checkpoint.header import read_header
from expo_ray.checkpoint.side_files import find_side_files
from expo_ray.checkpoint.small_files import read_json, refuse_fault
from expo_ray.checkpoint.tensors import Tensor
from expo_ray.checkpoint.weight_files import (
    DIFFUSERS_STEM,
    WeightFiles,
    find_adapter_weights,
    find_weights,
)
from expo_ray.errors import CheckpointError, ExpoError, Problems, StorageError
from expo_ray.storage.missing import missing_folder
from expo_ray.storage.protocol import FileInfo, Store
from expo_ray.text import first_few

_HEADERS_AT_ONCE = 16


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights and side files, read from headers.

    Attributes:
        uri: the folder as the user named it.
        revision: commit of a Hub repository, else empty.
        config: `config.json`, parsed; empty for a bare adapter.
        tensors: by name, in the order they are stored: file by file, front to back.
        files: every weight file and side file, by key; pins what later reads must find.
        side_files: keys to copy byte for byte beside new weights.
        adapter: `adapter_config.json`, parsed, if the folder is a PEFT adapter, else empty.
        side_weights: those of `side_files` that hold weights, which are copied and not extrapolated.
        left_behind: keys of files that are neither weights nor side files, nor of a training run.
    """

    uri: str
    revision: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, FileInfo]
    side_files: tuple[str, ...] = ()
    adapter: Mapping[str, Any] = field(default_factory=dict)
    side_weights: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()


def read_checkpoint(store: Store, *, allow_pickle: bool = False) -> Checkpoint:
    """Read the listing, `config.json`, the index and the headers of the weight files; every fault is reported at once.

    Args:
        allow_pickle: read `pytorch_model*.bin` if there are no safetensors; code in them is refused, not run.

    Raises:
        CheckpointError: if one thing is wrong with the folder.
        Problems: if several are.
        StorageError: if the folder cannot be read.
    """
    listing = {info.key: info for info in store.list()}
    if not listing:
        raise CheckpointError(missing_folder(store))
    problems: list[ExpoError] = []
    config = _read_config(
        store, listing, "config.json", problems, required="adapter_config.json" not in listing
    )
    carried = _carried_adapter(listing, config)
    is_adapter = "adapter_config.json" in listing and not carried
    adapter = _read_config(store, listing, "adapter_config.json", problems) if is_adapter else {}
    weights = _find_weight_files(store, listing, is_adapter, allow_pickle, problems)
    tensors = _read_tensors(store, listing, weights, problems)
    own = {*weights.keys, *filter(None, [weights.index])} | ({"adapter_config.json"} if is_adapter else set())
    side, wrong = find_side_files(store, listing, own, config=config, carried=carried)
    problems += wrong
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)
    return Checkpoint(
        uri=store.uri,
        revision=getattr(store, "revision", ""),
        config=config,
        tensors=tensors,
        files={key: listing[key] for key in sorted({*own, *side.copied})},
        side_files=side.copied,
        adapter=adapter,
        side_weights=side.weights,
        left_behind=side.left,
    )


def _carried_adapter(listing: Mapping[str, FileInfo], config: Mapping[str, Any]) -> list[str]:
    """Keys of an adapter that is part of the model beside it: Granite Speech loads one for audio input."""
    implied = str(config.get("model_type", "")).startswith("granite_speech")
    if config.get("has_lora_adapter", implied) is not True:
        return []
    files = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    return [key for key in files if key in listing]


def _read_config(
    store: Store,
    listing: Mapping[str, FileInfo],
    key: str,
    problems: list[ExpoError],
    *,
    required: bool = False,
) -> dict[str, Any]:
    if key not in listing:
        if required:
            problems.append(
                CheckpointError(f"{store.uri}: no {key}; pass a folder as `save_pretrained` writes it")
            )
        return {}
    try:
        return read_json(store, listing[key], strict=key == "adapter_config.json")
    except (CheckpointError, StorageError) as error:
        problems.append(error)
        return {}


def _find_weight_files(
    store: Store,
    listing: Mapping[str, FileInfo],
    is_adapter: bool,
    allow_pickle: bool,
    problems: list[ExpoError],
) -> WeightFiles:
    find = find_adapter_weights if is_adapter else find_weights
    whole = [
        key
        for key in listing
        if key.startswith(("model", "pytorch_model", DIFFUSERS_STEM))
        and key.endswith((".safetensors", ".bin"))
    ]
    try:
        if is_adapter and whole:
            raise CheckpointError(
                f"{store.uri}: holds both a model ({first_few(sorted(whole))}) and adapter_config.json, and programs differ in which "
                "they load; move the adapter to its own folder. One that belongs to the model is carried over if config.json says "
                "`has_lora_adapter: true`"
            )
        return find(store, listing, allow_pickle=allow_pickle)
    except (CheckpointError, StorageError) as error:
        problems.append(error)
        return WeightFiles()


def _read_tensors(
    store: Store, listing: Mapping[str, FileInfo], weights: WeightFiles, problems: list[ExpoError]
) -> dict[str, Tensor]:
    headers = _read_headers(store, [listing[key] for key in weights.keys], weights.pickled, problems)
    tensors: dict[str, Tensor] = {}
    for header in headers.values():
        twice = [name for name in header if name in tensors]
        if twice:
            files = " and ".join(sorted({tensors[name].file for name in twice} | {header[twice[0]].file}))
            problems.append(
                CheckpointError(
                    f"{store.uri}: {first_few(twice)} stands in several files ({files}); remove the stale ones"
                )
            )
        tensors |= header
    if weights.missing:
        needed = len(weights.keys) + len(weights.missing)
        problems.append(
            CheckpointError(
                f"{store.uri}: {len(weights.missing)} of the {needed} weight files are missing: {first_few(weights.missing)}; "
                "download or copy them"
            )
        )
    elif len(headers) == len(weights.keys):
        problems += _check_index(store, weights, headers)
        if weights.keys and not tensors:
            problems.append(
                CheckpointError(
                    f"{store.uri}: {first_few(weights.keys)} holds no tensors; save the model again"
                )
            )
    return tensors


def _read_headers(
    store: Store, infos: Sequence[FileInfo], pickled: bool, problems: list[ExpoError]
) -> dict[str, dict[str, Tensor]]:
    """Read the headers of all files at once: tensors by name, by file. Faulty files are left out and added to `problems`."""
    read: Callable[[Store, FileInfo], dict[str, Tensor]] = read_header
    if pickled:
        from expo_ray.checkpoint.torch_zip import read_torch_zip as read  # imports torch

    def read_or_error(info: FileInfo) -> dict[str, Tensor] | ExpoError:
        try:
            refuse_fault(store, info)
            return read(store, info)
        except (CheckpointError, StorageError) as error:
            return error

    headers: dict[str, dict[str, Tensor]] = {}
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        for info, header in zip(infos, pool.map(read_or_error, infos), strict=True):
            if isinstance(header, ExpoError):
                problems.append(header)
            else:
                headers[info.key] = header
    return headers


def _is_constant(name: str) -> bool:
    """True if loaders compute the tensor of this name, so that an index may name it although no file holds it."""
    return is_constant(Tensor(name, "F32", (), "", 0))


def _check_index(
    store: Store, weights: WeightFiles, headers: Mapping[str, Mapping[str, Tensor]]
) -> list[CheckpointError]:
    """Compare the index with the headers: each tensor has to be in the file that the index names, and in no other."""
    if not weights.index:
        return []
    where = f"{store.uri}/{weights.index}"
    problems = []
    absent = [
        f"{name} ({file})"
        for name, file in weights.mapped.items()
        if name not in headers[file] and not _is_constant(name)
    ]
    if absent:
        problems.append(
            CheckpointError(
                f"{where}: {len(absent)} tensor(s) are not in the file it names: {first_few(absent)}; save the checkpoint again"
            )
        )
    extra = [
        f"{name} ({file})"
        for file, header in headers.items()
        for name in header
        if weights.mapped.get(name) != file
    ]
    if extra:
        problems.append(
            CheckpointError(
                f"{where}: does not name {len(extra)} tensor(s) where they are: {first_few(extra)}; save the checkpoint again, or "
                "remove the index if the files are right"
            )
        )
    return problems
