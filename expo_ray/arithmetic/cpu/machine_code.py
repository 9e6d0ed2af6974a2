"""The machine code of `loop`: compiled once for each kind of processor, then loaded without numba.

Importing numba and its own cache take half a second, loading an object file a hundredth.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
from llvmlite import binding as llvm

NUM_ARGUMENTS = 17
# Every file that decides the machine code; their digest is part of its name in the cache.
_SOURCES = ("blocks.py", "loop.py", "machine_code.py", "words.py")
_SYMBOL = "extrapolate"
_NUMBA_DESTRUCTOR = "NRT_MemInfo_call_dtor"
_DIGEST_BYTES = 32

_loading = threading.Lock()


def load_machine_code(compute: str) -> Callable[..., int]:
    """Load `loop.extrapolate_in` for one type to compute in, `F32` or `F64`, compiling it first if it is not cached.

    The function that is returned runs without the GIL.
    """
    with _loading:  # or each thread that meets the first chunks would compile it
        return _load(compute)


@functools.cache
def _load(compute: str) -> Callable[..., int]:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(_load_object_code(compute)))
    engine.finalize_object()
    # Numba's calling convention: addresses for the result (None) and for an exception (never raised), then the arguments.
    words = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * NUM_ARGUMENTS
    function = ctypes.CFUNCTYPE(ctypes.c_int, *words)(engine.get_function_address(_SYMBOL))
    _engines.append(engine)
    return functools.partial(function, ctypes.addressof(_NOTHING), ctypes.addressof(_NOTHING))


_NOTHING = ctypes.c_void_p()
_engines: list[Any] = []  # machine code is freed with its engine


def _target_machine() -> Any:
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )


def _load_object_code(compute: str) -> bytes:
    name = f"extrapolate-{compute}-{_identity()}.o"
    for folder in _cache_folders():
        with contextlib.suppress(OSError):
            digest, code = _split((folder / name).read_bytes())
            if hashlib.sha256(code).digest() == digest:
                return code
    code = _compile(compute)
    for folder in _cache_folders():
        with contextlib.suppress(OSError):
            _write(folder / name, hashlib.sha256(code).digest() + code)
            break
    return code


def _split(stored: bytes) -> tuple[bytes, bytes]:
    return stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]


def _identity() -> str:
    """Digest of all that the machine code depends on: its sources, the processor and the compiler."""
    sources = [(Path(__file__).parent / name).read_bytes() for name in _SOURCES]
    host = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    versions = [
        text.encode() for text in (*host, llvmlite.__version__)
    ]  # every numba requires one version of llvmlite
    return hashlib.sha256(b"\0".join([*sources, *versions])).hexdigest()[:16]


def _cache_folders() -> Iterator[Path]:
    """Folders that may keep machine code: beside the source, as Python does with its own, then the user's cache.

    If neither can be written, nothing is kept.
    """
    yield Path(__file__).parent / "__pycache__"
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(caches):  # else there is no home folder
        yield Path(caches) / "expo-ray"


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; several processes may write the same one."""
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _compile(compute: str) -> bytes:
    return _target_machine().emit_object(llvm.parse_assembly(optimised(compute)))  # type: ignore[no-any-return]


def optimised(compute: str) -> str:
    """Optimised LLVM code, its entry named `extrapolate`."""
    import numpy as np
    from numba import int64, njit, void

    from expo_ray.arithmetic.cpu.loop import extrapolate_in
    from expo_ray.arithmetic.cpu.words import OPTIONS

    signature = void(*[int64] * NUM_ARGUMENTS)
    function = extrapolate_in(np.float32 if compute == "F32" else np.float64)
    decorated = njit(signature, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)
    (compiled,) = decorated.overloads.values()
    code: str = compiled.library.get_llvm_str().replace(compiled.fndesc.llvm_func_name, _SYMBOL)
    # Numba's runtime is not loaded, so its destructor is defined here; nothing is allocated, and nothing calls it.
    stub = rf"define internal void @{_NUMBA_DESTRUCTOR}(\1 %0) {{ ret void }}"
    return re.sub(rf"declare void @{_NUMBA_DESTRUCTOR}\((\S+)\).*", stub, code)
