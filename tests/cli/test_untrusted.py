"""JSON, YAML and patterns from outside: the values of the standard readers, or one error of the class asked for, soon and in little memory."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import sys
import textwrap

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from expo_ray.errors import CheckpointError, JobError, PromptError
from expo_ray.untrusted import (
    Foreign,
    compile_pattern,
    is_ambiguous,
    parse_json,
    parse_json_object,
    parse_yaml,
    validated,
)

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(_VALUES, st.booleans())
def test_json_is_read_as_the_standard_library_reads_it(value: object, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    assert parse_json(text.encode(), "it", strict=True) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b"{} {}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"[" * 66 + b"1" + b"]" * 66,
        b"9" * 5000,
        b"9" * 400,
        b"-" + b"9" * 400,
        b"1e999",
        b"-1e999",
        b'"\\ud800"',
        b'{"\\uDfff": 1}',
        b'["\xed\xa0\x80"]',
        b'"\x00"',
        b"[" + b"{}," * 5_000_000 + b"1]",
    ],
    ids=lambda text: repr(text[:12]),
)
@pytest.mark.parametrize("strict", [False, True])
def test_each_malformed_json_is_one_error(text: bytes, strict: bool) -> None:
    with pytest.raises(PromptError, match=r"^x: "):
        parse_json(text, "x", most_bytes=2**25, strict=strict, error=PromptError)


def test_what_other_readers_take_differently_is_refused_when_strict() -> None:
    for text in (b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[Infinity]"):
        with pytest.raises(CheckpointError):
            parse_json(text, "x", strict=True)
    assert parse_json_object(b'{"a": 1, "a": 2}', "x") == {"a": 2}
    assert parse_json(b"[0.0, Infinity]", "x") == [0.0, math.inf]  # as a Mamba2 config.json has it


def test_an_emoji_in_escapes_is_no_half_pair() -> None:
    assert parse_json(b'"\\ud83d\\ude00"', "x") == "\U0001f600"
    assert parse_json(b'"\\\\ud800"', "x") == "\\ud800"


def test_a_longer_text_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(CheckpointError, match="1048577 bytes"):
        parse_json(b"x" * (2**20 + 1), "x")


def test_no_object_is_an_error_that_names_the_kind() -> None:
    with pytest.raises(CheckpointError, match="a JSON list instead of an object"):
        parse_json_object(b"[]", "x")


@given(st.dictionaries(st.text("abcdefgh", min_size=1), _VALUES))
def test_yaml_is_read_as_pyyaml_reads_it(value: dict[str, object]) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text, "it") == yaml.safe_load(text)


_ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
_MERGES = "a0: &a0 {x0: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9)
)
_WIDE_MERGE = (
    "a: &a {"
    + ",".join(f"k{i}: 1" for i in range(20_000))
    + "}\nb: {<<: ["
    + ",".join(["*a"] * 50_000)
    + "]}"
)


@pytest.mark.parametrize(
    "text",
    [
        "a: 2024-13-45",
        "a: !!int foo",
        "a: !!float foo",
        "a: !!bool foo",
        "a: !!timestamp foo",
        "a: !!binary '###'",
        "a: !!python/object/apply:os.getcwd []",
        "a: !evil x",
        "a: " + "9" * 5000,
        "a: 0x" + "f" * 5000,
        "a: 0b" + "1" * 500_000,
        "a: 1" + ":59" * 20_000,
        "a: " + "[" * 5000 + "]" * 5000,
        "a: " + "[" * 100 + "]" * 100,
        "a: 1\na: 2",
        'a: {b: 1, "b": 2}',
        "a: &a [*a]",
        "a: &a {<<: *a}",
        "{[a, b]: 1}",
        _ALIASES,
        _ALIASES + "? [*a11, *a11]\n: 1",
        _WIDE_MERGE,
        "a: \x00",
        "a: 'x",
        "- a\nb",
        "a: 1\n---\nb: 2",
        "x" * (2**20 + 1),
    ],
    ids=lambda text: ascii(text[:24]),
)
def test_each_malformed_yaml_is_one_error(text: str) -> None:
    with pytest.raises(JobError, match=r"^x: "):
        parse_yaml(text, "x")


def test_merge_keys_do_not_grow() -> None:
    with contextlib.suppress(JobError):  # PyYAML from 6.0.4 on merges each key once, which is right as well
        assert parse_yaml(_MERGES, "x")["a8"] == {"x0": 1}


def test_merge_keys_and_aliases_work_in_moderation() -> None:
    text = "base: &base {a: 1, b: 2}\npairs:\n  - {<<: *base, b: 3}\n  - {<<: [*base, {c: 4}]}\n"
    assert parse_yaml(text, "x") == yaml.safe_load(text)


_MEMORY = """
    import resource, sys
    resource.setrlimit(resource.RLIMIT_AS, (2**30,) * 2)
    from expo_ray.errors import ExpoError
    from expo_ray.untrusted import TOKENIZER_BYTES, parse_json, parse_yaml
    makes = {
        "objects": lambda: parse_json(b"[" + b'{"b":1},' * 12_500_000 + b"1]", "x", most_bytes=TOKENIZER_BYTES),
        "lists": lambda: parse_json(b"[" + b"[]," * 40_000_000 + b"1]", "x", most_bytes=TOKENIZER_BYTES),
        "depth": lambda: parse_json(b"[" * 100_000_000, "x", most_bytes=TOKENIZER_BYTES),
    }
    try:
        makes[sys.argv[1]]()
    except ExpoError as error:
        print(str(error)[:80])
        sys.exit(2)
"""


@pytest.mark.parametrize("bomb", ["objects", "lists", "depth"])
def test_bombs_are_refused_within_a_gibibyte(bomb: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEMORY), bomb], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2, ran.stderr[-2000:]


class _Point(Foreign):
    x: int
    y: float = 0.0


@pytest.mark.parametrize(
    "data", [{"x": "1"}, {"x": True}, {"x": 1.5}, {"x": 1, "y": math.nan}, {}, [], None, {"x": 10**400}]
)
def test_types_are_exact(data: object) -> None:
    if data == {"x": 10**400}:
        assert validated(_Point, data, "x", error=CheckpointError, remedy="r").x == 10**400
        return
    with pytest.raises(CheckpointError, match=r"^p: .*; correct it$"):
        validated(_Point, data, "p", error=CheckpointError, remedy="correct it")


def test_a_million_wrong_fields_make_one_line() -> None:
    class Points(Foreign):
        points: tuple[_Point, ...]

    data = {"points": [{"x": "\n" * 100}] * 10_000}
    with pytest.raises(CheckpointError) as raised:
        validated(Points, data, "p", error=CheckpointError, remedy="correct it")
    assert len(str(raised.value)) < 800
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "a{99999999999}",
        "(" * 3000 + ")" * 3000,
        "(" * 400 + "a" + ")" * 400,
        "x" * 2000,
        "[z-a]",
        "(?P<a>x)(?P<a>y)",
        r"\8",
        r"\p{L}",
        "(?<=a*)b",
    ],
    ids=lambda pattern: pattern[:12],
)
def test_what_re_refuses_is_one_error(pattern: str) -> None:
    with pytest.raises(JobError):
        compile_pattern(pattern).search("a")


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("(a+)+b", "a" * 50_000),
        ("(a?){500}a{500}", "a" * 499),
        ("(?:a{1,1000}){1,1000}b", "a" * 3000),
    ],
)
def test_a_pattern_that_backtracks_for_ever_ends(pattern: str, name: str) -> None:
    compiled = compile_pattern(pattern)
    with pytest.raises(JobError, match="takes too long"):
        [compiled.search(f"{number}{name}") for number in range(10_000)]


@given(
    st.sampled_from(
        [
            "embed_tokens|lm_head",
            "norm",
            r"layers\.(\d+)\.mlp",
            "^model",
            "weight$",
            "(?i)NORM",
            "a{0,3}b*",
            "[[:a]",
        ]
    ),
    st.text("abdelmnorst.0123_weight", max_size=40),
)
@settings(max_examples=50)
def test_patterns_mean_what_re_means_by_them(pattern: str, name: str) -> None:
    compiled = compile_pattern(pattern)
    assert compiled.search(name) == (re.search(pattern, name) is not None)
    assert compiled.fullmatch(name) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*c",
        "([a-z_.0-9]+)+!",
        "((a*)*)*b",
        "(?:a+)*",
        "(?P<x>.*)+",
        "x(b|(c+)+)y",
        "(a+|b)+",
        "([)]+)+",
        r"(\d*){2,}",
    ],
)
def test_a_repeated_repetition_is_ambiguous(pattern: str) -> None:
    assert is_ambiguous(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "embed_tokens|lm_head",
        r"layers\.(\d+\.)*mlp",
        "(a|b)+",
        "[(a+)+]",
        r"\(a+\)+",
        "(q|k|v)_proj",
        "(a+)",
        "(a+)?",
        "([0-9]|1[0-9])",
        "((",
        "))+",
        "(a",
    ],
)
def test_other_patterns_are_not(pattern: str) -> None:
    assert not is_ambiguous(pattern)
