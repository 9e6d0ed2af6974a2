"""Digest of everything a reward function's scores depend on: its sources, its packages, and the values it holds."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from expo_ray import __version__
from expo_ray.evaluation.records import digest

# Limits of the description: a function may hold a whole data set, or a list in itself.
_MOST_VALUES = 100_000
_DEEPEST = 100
_SITES = {"site-packages", "dist-packages"}
# Attributes that Python adds to a class; some differ from process to process.
_MADE = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__", "_abc_impl",
    "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__",
}  # fmt: skip


@dataclass(frozen=True)
class Sources:
    """The code of a module and of what it imports.

    Attributes:
        files: digests of the text, by module name, of the module and of all that it imports from its own package or from outside the
            installed ones.
        packages: versions of the installed packages that they import.
    """

    files: Mapping[str, str]
    packages: Mapping[str, str]


def function_identity(uri: str, function: object, sources: Sources) -> str:
    """Digest of all that decides the scores of `function`, as far as Python shows it.

    It covers the sources, the versions of packages and Python, and the values held by closures, defaults, partial arguments,
    instances and the module variables that the code names. Not covered are files, services and environment variables that are
    read while a response is scored.
    """
    held = _Describer(frozenset(sources.files)).describe(function)
    python = ".".join(platform.python_version_tuple()[:2])
    return digest([uri, dict(sources.files), dict(sources.packages), python, held])


def sources_of(module: str) -> Sources:
    """Read a module and follow its imports, also those inside functions, through every file outside the installed packages."""
    files: dict[str, str] = {}
    packages: dict[str, str] = {}
    waiting, seen = [module], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        spec = _find_spec(name)
        if spec is None or not spec.origin or spec.origin in {"built-in", "frozen"}:
            continue
        path = Path(spec.origin)
        package = name.partition(".")[0]
        # An installed package is its version. Not the function's own: it may be reinstalled under one version while it is developed.
        if (_SITES & set(path.parts) and package != module.partition(".")[0]) or package == "expo_ray":
            packages[package] = ""
        elif not _is_standard(path) and path.is_file():
            data = path.read_bytes()
            files[name] = hashlib.sha256(data).hexdigest()
            waiting += [*_imported(data, name, is_package=path.stem == "__init__"), *_named_by_values(name)]
    return Sources(files, _versions(packages))


def _find_spec(name: str) -> ModuleSpec | None:
    """Find the spec of a module without importing it or its parents, whose code could have effects."""
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__spec__ is not None:
        return loaded.__spec__
    path: Iterable[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        try:
            spec = PathFinder.find_spec(".".join(parts[:end]), None if path is None else list(path))
        except (ImportError, ValueError, OSError):
            return None
        if spec is None:
            return None
        path = spec.submodule_search_locations or ()
    return spec


def _is_standard(path: Path) -> bool:
    return any(
        path.is_relative_to(sysconfig.get_path(kind))
        for kind in ("stdlib", "platstdlib")
        if sysconfig.get_path(kind)
    )


def _imported(data: bytes, module: str, *, is_package: bool) -> Iterator[str]:
    """Every module that the import statements of a text may mean; `from a import b` may mean `a` or `a.b`."""
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a compiled extension
        return
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from _with_parents(origin)
            for alias in node.names:
                yield f"{origin}.{alias.name}"


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1) if all(parts))


def _named_by_values(module: str) -> Iterator[str]:
    """Modules that define the values of a loaded module, even if it got them by `importlib`."""
    for value in list(vars(sys.modules[module]).values()) if module in sys.modules else ():
        name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str):
            yield name


def _versions(packages: Iterable[str]) -> dict[str, str]:
    distributions = importlib.metadata.packages_distributions() if set(packages) - {"expo_ray"} else {}
    versions = {}
    for package in packages:
        names = sorted(set(distributions.get(package, ())))
        versions[package] = " ".join(importlib.metadata.version(name) for name in names)
    return versions | ({"expo_ray": __version__} if "expo_ray" in versions else {})


class _Describer:
    """Describes values as plain data: equal for equal values, in every process. Each object is described once.

    Args:
        own: names of the modules whose text is part of the identity; for what others define, the name is enough.
    """

    def __init__(self, own: frozenset[str]) -> None:
        self._own = own
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # keeps objects alive: Python reuses the id of one that is gone
        self._depth = 0

    def describe(self, value: object) -> Any:
        """`value` as lists of texts."""
        if value is None or type(value) in (bool, int, str):
            return [type(value).__name__, repr(value)]
        if type(value) is float:
            return ["float", value.hex()]
        if isinstance(value, bytes | bytearray):
            return ["bytes", hashlib.sha256(value).hexdigest()]
        if id(value) in self._seen:
            return ["again", self._seen[id(value)]]
        if len(self._seen) >= _MOST_VALUES or self._depth >= _DEEPEST:
            return ["more"]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        self._depth += 1
        try:
            return self._parts(value)
        finally:
            self._depth -= 1

    def _parts(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return [type(value).__name__, *map(self.describe, value)]
        if type(value) in (set, frozenset):
            texts = [json.dumps(_Describer(self._own).describe(part)) for part in value]
            return [type(value).__name__, *sorted(texts)]
        if type(value) is dict:
            pairs = [[self.describe(key), self.describe(held)] for key, held in value.items()]
            return ["dict", *sorted(pairs, key=json.dumps)]
        return self._code(value) or _array(value) or self._instance(value)

    def _code(self, value: Any) -> Any:
        """Description of a function, class or module; None for other values."""
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        parts: list[Any] | None = None
        if isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
        elif isinstance(value, types.MethodType):
            parts = [value.__self__, value.__func__]
        elif isinstance(value, staticmethod | classmethod):
            parts = [value.__func__]
        elif isinstance(value, property):
            parts = [value.fget, value.fset]
        elif isinstance(value, types.ModuleType):
            parts = [value.__name__]
        return None if parts is None else [type(value).__name__, *map(self.describe, parts)]

    def _function(self, function: types.FunctionType) -> Any:
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self.describe(cell.cell_contents))
            except ValueError:  # not assigned yet
                cells.append(["empty"])
        held = [self.describe(function.__defaults__), self.describe(function.__kwdefaults__), cells]
        used: dict[str, Any] = {}
        if function.__module__ in self._own:
            for name in sorted(_names(function.__code__)):
                if name in function.__globals__:
                    used[name] = self.describe(function.__globals__[name])
        wrapped = getattr(function, "__wrapped__", None)
        return [
            "function",
            str(function.__module__),
            function.__qualname__,
            held,
            used,
            self.describe(wrapped),
        ]

    def _class(self, kind: type) -> Any:
        name = ["class", kind.__module__, kind.__qualname__]
        if kind.__module__ not in self._own:
            return name
        values = {key: self.describe(held) for key, held in sorted(vars(kind).items()) if key not in _MADE}
        return [*name, [self.describe(base) for base in kind.__bases__], values]

    def _instance(self, value: object) -> Any:
        name = ["object", self.describe(type(value))]
        try:
            reduced = value.__reduce_ex__(4)  # as pickle takes it apart
        except Exception:  # locks, sockets and weak references have no content
            return name
        if isinstance(reduced, str):  # a function in C, or one behind functools.cache
            owner = getattr(value, "__self__", None)
            held = None if isinstance(owner, types.ModuleType) else owner
            wrapped = getattr(value, "__wrapped__", None)
            return [
                *name,
                str(getattr(value, "__module__", "")),
                reduced,
                self.describe(held),
                self.describe(wrapped),
            ]
        parts = [list(part) if isinstance(part, Iterator) else part for part in reduced]
        return [*name, *map(self.describe, parts)]


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*inner)


def _array(value: Any) -> Any:
    """Description of a NumPy array or a torch tensor by its bytes; None for other values."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        raw = data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b""
        return ["tensor", str(data.dtype), list(data.shape), hashlib.sha256(raw).hexdigest()]
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype != object:
        raw = numpy.ascontiguousarray(value).tobytes()
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]
    return None
