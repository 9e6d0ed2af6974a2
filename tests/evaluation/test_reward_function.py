"""Reward functions: each kind of callable scores, or is refused before anything starts; the identity covers all that decides scores."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expo_ray.errors import ExpoError, InputChanged
from expo_ray.evaluation.records import Reward
from expo_ray.evaluation.rewards.reward_function import function_scorer, load_function
from expo_ray.evaluation.rewards.reward_inputs import RewardInput, ScoreFailure, function_inputs
from tests.support.paths import ROOT
from tests.support.tiny_reward_models import response

MODULE = """
import functools, math
from kept_weights import WEIGHT

class Judge:
    def __init__(self, weight): self.weight = weight
    def __call__(self, prompt, response): return self.weight * len(response)
    def score(self, prompt, response): return WEIGHT * len(response)
    @classmethod
    def of_class(cls, prompt, response): return len(response)
    @staticmethod
    def static(prompt, response): return len(response)

class Late:
    async def __call__(self, prompt, response): return 1.0

class Number:
    def __init__(self, prompt, response): self.text = response
    def __float__(self): return float(len(self.text))

judge, late_judge = Judge(2.0), Late()
partly = functools.partial(lambda weight, prompt, response: weight * len(response), 2.0)
of_partial = functools.partial(judge)
cached = functools.lru_cache(lambda prompt, response: len(response))
async def late(prompt, response): return 1.0
late_partial = functools.partial(late)
def length(prompt, response): return len(response) - len(prompt)
def turns(messages, response): return len(messages)
def defaults(prompt, response, weight=2, *more, **others): return weight
def many(*texts): return len(texts)
def root(prompt, response): return float("nan") if not response else 1 / (len(response) - 3)
def alone(prompt): return 1.0
def required(prompt, response, answer): return 1.0
def keyword(prompt, response, *, answer): return 1.0
def verl(data_source, solution_str, ground_truth, extra_info=None): return 1.0
def verl_by_set(solution_str, ground_truth, method="strict"): return 1.0
def trl(prompts, completions, **others): return [1.0]
def turned_round(response, prompt): return 1.0
def nothing(prompt, response): print(response)
def generator(prompt, response): yield 1.0
async def async_generator(prompt, response): yield 1.0
def leaves(prompt, response):
    import sys
    if response: sys.exit("no licence")
    return 1.0
def listed(prompt, response): return [1.0]
def named(prompt, response): return {"score": 1.0}
def absent(prompt, response): return None if response else 1.0
def text(prompt, response): return "3"
def awaited(prompt, response): return late(prompt, response)
def complex_number(prompt, response): return 1j
def boolean(prompt, response): return bool(response)
def of_numpy(prompt, response):
    import numpy
    return numpy.array([[2.5]], dtype="float32")
def of_torch(prompt, response):
    import torch
    return torch.tensor([2.5])
text_only = "no function"
"""
ASKED = RewardInput("p", 0, ({"role": "user", "content": "a"},), "1234")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "kept_rewards.py").write_text(MODULE)
    (tmp_path / "kept_weights.py").write_text("WEIGHT = 3\n")
    yield str(tmp_path)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]
    for name in ("kept_rewards", "kept_weights"):
        sys.modules.pop(name, None)


def scored(name: str, folder: str, asked: RewardInput = ASKED) -> Reward | ScoreFailure:
    return function_scorer(load_function(name, folder))(asked)


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        ("length", 3),
        ("turns", 1),
        ("defaults", 2),
        ("many", 2),
        ("judge", 8),
        ("judge.score", 12),
        ("Judge.of_class", 4),
        ("Judge.static", 4),
        ("Number", 4),
        ("partly", 8),
        ("of_partial", 8),
        ("cached", 4),
        ("boolean", 1),
        ("of_numpy", 2.5),
        ("of_torch", 2.5),
    ],
)
def test_every_kind_of_callable_scores(folder: str, name: str, reward: float) -> None:
    assert scored(f"python:kept_rewards:{name}", folder) == Reward("p", 0, reward, scored=ASKED.digest)


def test_a_function_in_c_scores(folder: str) -> None:
    contains = RewardInput("p", 0, ({"role": "user", "content": "a sky"},), "sky")
    assert scored("python:operator:contains", folder, contains) == Reward("p", 0, 1.0, scored=contains.digest)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("kept_rewards:gone", "does not exist"),
        ("kept_rewards:text_only", "not callable"),
        ("kept_rewards:late", "asynchronous"),
        ("kept_rewards:late_judge", "asynchronous"),
        ("kept_rewards:late_partial", "asynchronous"),
        ("kept_rewards:generator", "generator"),
        ("kept_rewards:async_generator", "generator"),
        ("kept_rewards:alone", r"takes \(prompt\)"),
        ("kept_rewards:required", "missing a required argument: 'answer'"),
        ("kept_rewards:keyword", "missing a required argument: 'answer'"),
        ("kept_rewards:verl", "`data_source`"),
        ("kept_rewards:verl_by_set", "`solution_str`"),
        ("kept_rewards:trl", "`prompts` means lists"),
        ("kept_rewards:turned_round", "in this order"),
        ("kept_rewards:nothing", "never returns a value"),
        ("kept_rewards:Judge", "is a class"),
        ("kept_rewards:Judge.score", r"takes \(self, prompt, response\)"),
        ("no_such_module_here:f", "cannot be imported"),
        ("kept_rewards", "names no function"),
        (":", "names no function"),
        ("../kept_rewards:length", "names no function"),
        ("kept\0rewards:length", "names no function"),
        ("builtins:max", "Python's own"),
        ("builtins:__import__", "Python's own"),
        ("math:hypot", "which arguments"),
        ("os:system", r"takes \(command\)"),
    ],
)
def test_callables_that_cannot_score_are_refused_when_they_are_loaded(
    folder: str, name: str, reason: str
) -> None:
    with pytest.raises(ExpoError, match=reason):
        load_function(f"python:{name}", folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import no_such_package_here", r"install what it imports \(no_such_package_here\)"),
        ("def f(:", "SyntaxError"),
        ("raise ValueError('x' * 10_000_000)", "ValueError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(ExpoError, match=reason) as caught:
        load_function(f"python:{name}:f", str(tmp_path))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("leaves", r"called sys\.exit\(no licence\)"),
        ("listed", r"list \(\[1\.0\]\)"),
        ("named", "dict"),
        ("absent", "NoneType"),
        ("text", "str"),
        ("awaited", "coroutine"),
        ("complex_number", "TypeError"),
    ],
)
def test_a_result_that_is_not_a_number_is_a_failure(folder: str, name: str, reason: str) -> None:
    failed = scored(f"python:kept_rewards:{name}", folder)
    assert isinstance(failed, ScoreFailure)
    assert reason.replace("\\", "") in failed.error


def test_failures_of_a_function_name_the_prompt(folder: str) -> None:
    score = function_scorer(load_function("python:kept_rewards:root", folder))
    rows = [response("a", "1234"), response("b", "123"), response("c", "")]
    inputs = function_inputs(rows)
    good, raised, nan = map(score, inputs)
    assert good == Reward(rows[0].prompt_id, 0, 1.0, scored=inputs[0].digest)
    assert isinstance(raised, ScoreFailure)
    assert isinstance(nan, ScoreFailure)
    assert (raised.prompt_id, "ZeroDivisionError" in raised.error) == (rows[1].prompt_id, True)
    assert (nan.prompt_id, "returned nan" in nan.error) == (rows[2].prompt_id, True)


def test_the_first_parameter_may_ask_for_all_turns(folder: str) -> None:
    turns = tuple({"role": role, "content": role} for role in ("user", "assistant", "user"))
    asked = RewardInput("p", 0, turns, "1234")
    assert scored("python:kept_rewards:turns", folder, asked) == Reward("p", 0, 3.0, scored=asked.digest)


# --- what identifies the scores

BASE = {
    "judged": """
        import functools, os
        import own_helper
        from own_package import inner
        SCALE = float(os.environ.get("SCALE", "1"))
        TABLE = {"a": 1}
        class Judge:
            bonus = 0
            def __init__(self, weights): self.weights = weights
            def __call__(self, prompt, response):
                import own_lazy
                return sum(self.weights) * SCALE + TABLE["a"] + self.bonus + own_lazy.VALUE
        judge = Judge([1.0, 2.0])
        def make(number):
            def inner_score(prompt, response, more=1): return number
            return inner_score
        made = make(1)
        bound = functools.partial(lambda weight, prompt, response: weight, 1.0)
    """,
    "own_helper": "import own_deep\n",
    "own_deep": "VALUE = 1\n",
    "own_lazy": "VALUE = 1\n",
    "own_package/__init__": "",
    "own_package/inner": "from . import sibling\n",
    "own_package/sibling": "VALUE = 1\n",
}


def identity(folder: Path, name: str = "judge", **variables: str) -> str:
    """The identity that a separate process computes."""
    code = f"from expo_ray.evaluation.rewards.reward_function import load_function; print(load_function('python:judged:{name}').identity)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        assert old in BASE[name]
        write(folder, {name: BASE[name].replace(old, new)})

    return apply


def test_all_that_decides_a_score_is_in_the_identity_and_nothing_else(tmp_path: Path) -> None:
    changes: dict[str, Callable[[Path], None]] = {
        "source": replaced("judged", "sum(", "1 + sum("),
        "state of the instance": replaced("judged", "[1.0, 2.0]", "[1.0, 2.5]"),
        "module that is imported": lambda folder: write(
            folder, {"own_helper": "import own_deep  # changed\n"}
        ),
        "module that it imports": lambda folder: write(folder, {"own_deep": "VALUE = 2\n"}),
        "module imported while scoring": lambda folder: write(folder, {"own_lazy": "VALUE = 2\n"}),
        "relative import": lambda folder: write(folder, {"own_package/sibling": "VALUE = 2\n"}),
    }
    write(tmp_path, BASE)
    first = identity(tmp_path)
    assert identity(tmp_path, PYTHONHASHSEED="5") == first
    (tmp_path / "unrelated.py").write_text("VALUE = 1\n")
    assert identity(tmp_path) == first
    others = {"module variable": identity(tmp_path, SCALE="2")}
    for name, apply in changes.items():
        apply(tmp_path)
        others[name] = identity(tmp_path)
        write(tmp_path, BASE)
    assert identity(tmp_path) == first
    assert len({first, *others.values()}) == 1 + len(others), others


def test_an_installed_module_is_known_by_its_text(tmp_path: Path) -> None:
    folder = tmp_path / "site-packages"
    write(folder, BASE)
    first = identity(folder)
    replaced("judged", "sum(", "1 + sum(")(folder)
    assert identity(folder) != first


def test_values_that_are_in_no_file_are_in_the_identity(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    load_function("python:judged:judge", str(tmp_path))
    module: Any = importlib.import_module("judged")

    def now(name: str) -> str:
        return load_function(f"python:judged:{name}", str(tmp_path)).identity

    names = ("judge", "made", "bound")
    before = {name: now(name) for name in names}
    assert {name: now(name) for name in names} == before
    module.judge.weights = (1.0, 2.0)
    module.made = module.make(2)
    module.bound = type(module.bound)(module.bound.func, 1.5)
    after = {name: now(name) for name in names}
    assert len({*before.values(), *after.values()}) == 6
    module.Judge.bonus = 1
    assert now("judge") not in {before["judge"], after["judge"]}
    module.TABLE["a"] = 2
    assert len({now("judge"), before["judge"], after["judge"]}) == 3
    module.made.__defaults__ = (3,)
    assert now("made") not in {before["made"], after["made"]}


def test_values_of_every_kind_are_described_alike_in_every_process(tmp_path: Path) -> None:
    text = """
        import collections, dataclasses, datetime, decimal, enum, logging, re, threading
        import numpy, torch
        class Kind(enum.Enum): A = 1
        @dataclasses.dataclass
        class Row: value: object
        class Judge:
            __slots__ = ("held",)
            def __init__(self, held): self.held = held
            def __call__(self, prompt, response): return 1.0
        held = [None, True, b"x", {"b", "a", "c"}, frozenset({1, "z"}), Kind.A, Row(2), re.compile("a+"), decimal.Decimal("1.5"),
            datetime.date(2020, 1, 1), threading.Lock(), logging.getLogger("x"), numpy.arange(3), torch.ones(2, dtype=torch.bfloat16),
            torch.nn.Linear(1, 1, bias=False).requires_grad_(False), collections.Counter("aab"), float("nan"), len, iter([1, 2])]
        held[14].weight.fill_(1)
        held.append(held)
        judge = Judge(held)
    """
    write(tmp_path, {"judged": text})
    first = identity(tmp_path)
    assert identity(tmp_path, PYTHONHASHSEED="7") == first
    for old, new in (
        ("arange(3)", "arange(4)"),
        ("fill_(1)", "fill_(2)"),
        ('"c"}', '"d"}'),
        ("Row(2)", "Row(3)"),
    ):
        write(tmp_path, {"judged": text.replace(old, new)})
        changed = identity(tmp_path)
        assert changed != first, old


def test_code_that_differs_in_another_process_is_refused(folder: str) -> None:
    described = load_function("python:kept_rewards:length", folder)
    Path(folder, "kept_weights.py").write_text("WEIGHT = 4\n")
    with pytest.raises(InputChanged, match="run it again"):
        function_scorer(described)
