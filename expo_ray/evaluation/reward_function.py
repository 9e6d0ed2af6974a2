"""Rewards that are computed: a Python function of prompt and response."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo_ray.errors import RewardError
from expo_ray.evaluation.records import Reward, digest
from expo_ray.evaluation.reward_inputs import RewardInput

_SCHEME = "python:"


@dataclass(frozen=True)
class Failed:
    """A response that got no score, and why."""

    prompt_id: str
    sample: int
    error: str

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt_id, self.sample


@dataclass(frozen=True)
class RewardFunction:
    """A function that scores; found anew by name in every process.

    Attributes:
        uri: `python:module:function`.
        folder: where its module is looked for besides the usual places.
        identity: digest of the module's text.
    """

    uri: str
    folder: str
    identity: str


def is_function(model: str) -> bool:
    """Whether a reward model is named as a function."""
    return model.startswith(_SCHEME)


def load_function(uri: str, folder: str | None = None) -> RewardFunction:
    """Find `python:module:function`.

    Args:
        folder: looked at first; the current one unless given.

    Raises:
        RewardError: if it cannot be imported.
    """
    folder = os.getcwd() if folder is None else folder
    function = _import(uri, folder)
    source = inspect.getsourcefile(inspect.unwrap(function))
    text = Path(source).read_text(encoding="utf-8") if source and Path(source).is_file() else ""
    return RewardFunction(uri, folder, digest([uri, text]))


def function_scorer(found: RewardFunction) -> Callable[[RewardInput], Reward | Failed]:
    """What scores one response with the function, whatever the function does.

    A function whose first parameter is called `messages` gets the turns before the response, any other the text of the last
    of them; the second argument is the response's text.

    Raises:
        RewardError: if it cannot be imported in this process.
    """
    function = _import(found.uri, found.folder)
    wants_messages = _parameters(function)[:1] == ["messages"]

    def score(one: RewardInput) -> Reward | Failed:
        asked: Any = [dict(turn) for turn in one.messages] if wants_messages else one.messages[-1]["content"]
        try:
            reward = float(function(asked, one.text))
        except Exception as error:
            return Failed(one.prompt_id, one.sample, f"{found.uri} raised {type(error).__name__}: {error}")
        return checked(one, reward, found.uri)

    return score


def checked(one: RewardInput, reward: float, source: str) -> Reward | Failed:
    """The score of `one`, unless it is no number."""
    if not math.isfinite(reward):
        return Failed(one.prompt_id, one.sample, f"{source} returned {reward}; a reward must be finite")
    return Reward(one.prompt_id, one.sample, reward, len(one.ids), one.truncated)


def _import(uri: str, folder: str) -> Callable[..., Any]:
    module_name, _, name = uri.removeprefix(_SCHEME).partition(":")
    if not module_name or not name:
        raise RewardError(
            f"{uri}: names no function; write python:module:function, such as python:my_rewards:length"
        )
    if folder not in sys.path and Path(folder).is_dir():
        sys.path.insert(0, folder)  # as `python -m` does; an installed command does not
    remedy = (
        f"put the module into the folder that the job runs in ({folder}), or install it; on a cluster, submit the job with "
        "`ray job submit --working-dir .`"
    )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RewardError(
            f"{uri}: {module_name} cannot be imported ({type(error).__name__}: {error}); {remedy}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = "is not callable" if function is not None else "does not exist"
        raise RewardError(f"{uri}: {name} {there} in {getattr(module, '__file__', module_name)}; {remedy}")
    found: Callable[..., Any] = function
    if len(names := _parameters(found)) < 2:
        raise RewardError(
            f"{uri}: takes {', '.join(names) or 'nothing'}; let it take prompt and response and return a float"
        )
    return found


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names of what the function takes by position, `*` for any number more."""
    kinds = inspect.Parameter
    names: list[str] = []
    for name, one in inspect.signature(function).parameters.items():
        if one.kind in {kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD}:
            names.append(name)
        elif one.kind is kinds.VAR_POSITIONAL:
            names += ["*", "*"]
    return names
