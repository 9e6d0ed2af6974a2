"""Rewards computed by a Python callable of prompt and response: import it, check it, call it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from expo_ray.errors import InputChanged, RewardError
from expo_ray.evaluation.records import Reward, digest
from expo_ray.evaluation.rewards.function_identity import Sources, function_identity, sources_of
from expo_ray.evaluation.rewards.reward_inputs import RewardInput, ScoreFailure
from expo_ray.text import shown

_SCHEME = "python:"
# Parameters by which reward functions of other tools are recognised: those are not called with one prompt and one response.
_FOREIGN_PARAMETERS = {
    "prompts": "lists, as TRL passes them", "completions": "lists, as TRL passes them",
    "ground_truth": "a known answer, as verl passes it", "solution_str": "a known answer beside it, as verl passes it",
    "data_source": "more about a row, as verl passes it", "reference": "a known answer", "label": "a known answer",
}  # fmt: skip
_PROMPT_NAMES = ("prompt", "messages", "question", "query", "instruction")
_RESPONSE_NAMES = ("response", "completion", "answer", "output", "text")
_WRAP = "write `def score(prompt, response): ...` that calls it, and name that"


@dataclass(frozen=True)
class RewardFunction:
    """A callable that scores responses; every process imports it by name.

    Attributes:
        uri: `python:module:name`.
        folder: searched for its module, before the usual places.
        identity: digest of all that decides its scores, see `function_identity`.
        sources: digest of its code alone, which must be the same in every process.
    """

    uri: str
    folder: str
    identity: str
    sources: str


def load_function(uri: str, folder: str | None = None) -> RewardFunction:
    """Import `python:module:name`: a function, class, method, object with `__call__`, or `functools.partial`.

    Args:
        folder: searched first; the current folder unless given.

    Raises:
        RewardError: if it cannot be imported, or cannot be called with a prompt and a response.
    """
    folder = os.getcwd() if folder is None else folder
    function = _import(uri, folder)
    _check_callable(uri, function)
    sources = sources_of(_split(uri)[0])
    return RewardFunction(uri, folder, function_identity(uri, function, sources), _digest(sources))


def function_scorer(described: RewardFunction) -> Callable[[RewardInput], Reward | ScoreFailure]:
    """Import the function in this process, and return a scorer that survives whatever the function does.

    A function whose first parameter is named `messages` gets the turns before the response, any other the text of the last
    one. The second argument is the text of the response.

    Raises:
        RewardError: if it cannot be imported in this process.
        InputChanged: if its code differs from that of `described`.
    """
    function = _import(described.uri, described.folder)
    if _digest(sources_of(_split(described.uri)[0])) != described.sources:
        raise InputChanged(
            f"{described.uri}: its code, or that of a module it imports, has changed since the job began, or differs on this "
            "node; run it again, on a cluster with `ray job submit --working-dir .`"
        )
    wants_messages = _first_parameter(function) == "messages"

    def score(asked: RewardInput) -> Reward | ScoreFailure:
        prompt: Any = (
            [dict(turn) for turn in asked.messages] if wants_messages else asked.messages[-1]["content"]
        )
        failed = partial(ScoreFailure, asked.prompt_id, asked.sample)
        try:
            reward = _number(function(prompt, asked.text))
        except KeyboardInterrupt:
            raise
        except SystemExit as error:
            return failed(
                f"{described.uri} called sys.exit({shown(error.code)}); let it return a number or raise an error"
            )
        except BaseException as error:
            return failed(f"{described.uri} raised {type(error).__name__}: {shown(error, 300)}")
        return asked.scored(reward, described.uri)

    return score


def _number(value: Any) -> float:
    """The reward that a function returned: a number, a boolean, or a single number of NumPy or torch.

    Raises:
        TypeError: if it returned something else.
    """
    if inspect.iscoroutine(value):
        value.close()
    if (
        value is None
        or isinstance(value, str | bytes | list | tuple | dict | set)
        or inspect.isawaitable(value)
    ):
        raise TypeError(f"it returned {type(value).__name__} ({shown(repr(value), 60)}), not one number")
    return float(value.item() if callable(getattr(value, "item", None)) else value)


def _digest(sources: Sources) -> str:
    return digest([dict(sources.files)])


def _split(uri: str) -> tuple[str, str]:
    """Module and name in `python:module:name`.

    Raises:
        RewardError: if either is missing.
    """
    module, _, name = uri.removeprefix(_SCHEME).partition(":")
    dotted = all(part.isidentifier() for part in [*module.split("."), *name.split(".")])
    if not dotted:
        raise RewardError(
            f"{shown(uri)}: names no function; write python:module:function, such as python:my_rewards:length"
        )
    if module == "builtins":
        raise RewardError(f"{shown(uri)}: is one of Python's own functions, which score no response; {_WRAP}")
    return module, name


def _import(uri: str, folder: str) -> Callable[..., Any]:
    module_name, name = _split(uri)
    if folder not in sys.path and Path(folder).is_dir():
        sys.path.insert(0, folder)  # as `python -m` does, and an installed command does not
    remedy = (
        f"put the module into the folder that the job runs in ({folder}), or install it; on a cluster, submit the job with "
        "`ray job submit --working-dir .`"
    )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and error.name != module_name.partition(".")[0]:
            remedy = f"install what it imports ({shown(error.name)})"
        raise RewardError(f"{uri}: {module_name} cannot be imported ({shown(error)}); {remedy}") from error
    except (Exception, SystemExit) as error:
        text = f"it ends with {type(error).__name__}: {shown(error, 300)}"
        raise RewardError(f"{uri}: {module_name} cannot be imported ({text}); correct the module") from error
    function: Any = module
    for part in name.split("."):
        try:
            function = getattr(function, part)
        except Exception as error:
            place = getattr(module, "__file__", None) or module_name
            raise RewardError(
                f"{uri}: {name} does not exist in {place}; write its name as it is there"
            ) from error
    if not callable(function):
        raise RewardError(
            f"{uri}: {name} is not callable, it is {type(function).__name__}; name a function or an object with `__call__`"
        )
    checked: Callable[..., Any] = function
    return checked


def _check_callable(uri: str, function: Callable[..., Any]) -> None:
    """Check that a call with a prompt and a response can give a number.

    Raises:
        RewardError: if it is certain not to.
    """
    if reason := _kind_refused(function):
        raise RewardError(f"{uri}: {reason}")
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError) as error:
        raise RewardError(f"{uri}: Python cannot say which arguments it takes; {_WRAP}") from error
    parameters = signature.parameters
    names = list(parameters)
    called = f"{uri}: takes {shown(signature)}, and is called with two arguments, the prompt and the response"
    required = [name for name in names if parameters[name].default is inspect.Parameter.empty]
    if foreign := [name for name in required if name in _FOREIGN_PARAMETERS]:
        raise RewardError(f"{called}; `{foreign[0]}` means {_FOREIGN_PARAMETERS[foreign[0]]}; {_WRAP}")
    try:
        signature.bind("prompt", "response")
    except TypeError as error:
        raise RewardError(f"{called} ({error}); {_WRAP}") from error
    if names[:1] and names[0] in _RESPONSE_NAMES and names[1:2] and names[1] in _PROMPT_NAMES:
        raise RewardError(f"{called}, in this order; {_WRAP}")
    if _returns_nothing(function):
        raise RewardError(f"{uri}: never returns a value; let it return a number")


def _kind_refused(function: Callable[..., Any]) -> str:
    """Reason why a callable of this kind never returns a number; empty if it may."""
    while isinstance(function, partial):
        function = function.func
    is_class = inspect.isclass(function)
    called = [function] if is_class or inspect.isroutine(function) else [function, type(function).__call__]
    if any(map(inspect.iscoroutinefunction, called)):
        return f"is asynchronous, and is called without an event loop; {_WRAP}, with asyncio.run"
    if any(map(inspect.isasyncgenfunction, called)) or any(map(inspect.isgeneratorfunction, called)):
        return "is a generator, which yields instead of returning; let it return a number"
    if is_class and not any(hasattr(function, name) for name in ("__float__", "__index__")):
        return f"is a class, and calling it gives no number; name an instance with `__call__`, or {_WRAP}"
    return ""


def _returns_nothing(function: Callable[..., Any]) -> bool:
    """True if this is a plain function whose text has no `return` with a value."""
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    defined = tree.body[0] if tree.body else None
    if not isinstance(defined, ast.FunctionDef):
        return False
    nested = {
        inner
        for node in ast.walk(defined)
        if node is not defined and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    ends = [
        node for node in ast.walk(defined) if isinstance(node, ast.Return | ast.Raise) and node not in nested
    ]
    return all(isinstance(node, ast.Return) and node.value is None for node in ends)


def _first_parameter(function: Callable[..., Any]) -> str:
    return next(iter(inspect.signature(function).parameters), "")
