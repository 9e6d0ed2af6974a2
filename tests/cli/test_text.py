"""Text from outside, and secrets: what is left of them in messages and on a terminal."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expo_ray.cli.terminal import GuardedStream, printable
from expo_ray.errors import JobError, Problems, StorageError
from expo_ray.text import redact, remember_file_secrets, remember_secret, remember_url_secrets, shown, visible

SECRET = "Gf7/x+CANARY&of'a\"key=="


@pytest.mark.parametrize(
    "url",
    [
        "https://user:CANARYPASS@host/x",
        "s3://CANARYPASS@bucket/x",
        "https://user:aaa@CANARYPASS@bucket/x",
        "https://user:CANARYPASS/x@bucket/x",
        "HTTPS://user:CANARYPASS@[::1]:80/x",
        "https://b/x?X-Amz-Signature=CANARYSIG&a=b",
        "https://b/x#X-Amz-Signature=CANARYSIG",
        "https://b/x#a?sig=CANARYSIG",
        "memory://user:CANARYPASS@x",
        "user:CANARYPASS@bucket/x",
        "//user:CANARYPASS@bucket/x",
        "postgresql+psycopg://u:CANARYPASS@h/db",
        "https://h/x?y=https://u:CANARYPASS@h/",
        "https://user:CANARYPA",  # cut off by whoever quotes it
    ],
)
@pytest.mark.parametrize("around", ["{}", "'{}'", "({}).", "{}: no such folder", "<{}>", "a={},b"])
def test_urls_lose_users_and_queries_wherever_they_stand(url: str, around: str) -> None:
    left = redact(around.format(url))

    assert "CANARY" not in left
    assert redact(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/folder",
        "hf://org/name@main/folder",
        "http://127.0.0.1:8000/v1",
        "zephyr@0.5",
        "see https://docs.ray.io/en/latest/x.html#section",
        "model.layers.0.mlp.up_proj.weight: 2 rows",
        "set OPENAI_API_KEY: a key that the endpoint takes",
        "`vocab: by-token`, `multipliers: {embed_tokens|lm_head: 0}`",
        "sha256:0123456789abcdef0123456789abcdef",
        "tokens: 12345678901234567890",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "Illegal header value b'Bearer sk-CANARYAPIKEY\\n'",
        "Authorization: Basic dXNlckNBTkFSWTpwYXNz",
        "AWS4-HMAC-SHA256 Credential=AKIACANARY/20240101/us-east-1/s3, Signature=CANARY0123456789abcdef",
        "x-amz-security-token: CANARY0123456789abcdef",
        '{"api_key": "CANARY0123456789abcdef"}',
        "aws_secret_access_key = CANARY0123456789abcdef",
        "password=CANARY",
        "hf_CANARYabcdefghijklmnop",
        "key 'sk-proj-CANARYabcdefghijklmnop'",
    ],
)
def test_headers_parameters_and_known_formats_are_redacted(text: str) -> None:
    assert "CANARY" not in redact(text).replace("dXNlckNBTkFSWTpwYXNz", "CANARY")


@pytest.mark.parametrize(
    "variable", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_API_KEY_2", "PGPASSWORD", "apikey"]
)
def test_values_of_variables_named_like_a_secret_are_redacted_in_every_writing(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, SECRET + "\n")
    writings = [
        SECRET,
        quote(SECRET, safe=""),
        json.dumps(SECRET),
        repr(SECRET),
        repr(SECRET.encode()),
        html.escape(SECRET),
        *(base64.b64encode(b"u" * shift + b":" + SECRET.encode()).decode() for shift in range(3)),
    ]

    for writing in writings:
        left = redact(f"before {writing} after")
        assert "***" in left, writing
        assert "CANARY" not in left
        assert left.startswith("before ")
        assert left.endswith(" after")


def test_passwords_in_variables_are_redacted_outside_their_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:CANARY%40PASS@proxy:3128")

    assert redact("proxy said CANARY@PASS, CANARY%40PASS") == "proxy said ***, ***"


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "TOKENIZERS_PARALLELISM", "OLDPWD"])
def test_variables_that_hold_no_secret_are_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/somewhere/else")

    assert redact("in /somewhere/else") == "in /somewhere/else"


def test_a_path_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))

    assert redact(f"{tmp_path}/x") == f"{tmp_path}/x"


def test_secrets_of_files_urls_and_jobs_are_remembered() -> None:
    remember_secret("remembered-CANARY-1\n")
    remember_file_secrets(
        "[default]\naws_secret_access_key = remembered-CANARY-2\nbroken_token remembered-CANARY-3"
    )
    remember_url_secrets(
        {"pairs": [{"sft": "s3://u:remembered-CANARY-4@b"}], "hf_token": "remembered-CANARY-5"}
    )

    assert "CANARY" not in redact(" ".join(f"remembered-CANARY-{number}" for number in range(1, 6)))


def test_a_long_text_is_redacted_before_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "CANARY" * 20)

    assert "CANARY" not in shown("x" * 150 + "CANARY" * 20, most=200)
    assert "CANARY" not in str(JobError("x" * 1950 + "CANARY" * 20 + "y" * 5000))


@given(st.text(st.characters(exclude_categories=())))
def test_what_is_shown_is_one_visible_line(text: str) -> None:
    line = shown(text)

    assert len(line.splitlines()) <= 1
    assert all(character.isprintable() or character.isspace() for character in line)
    line.encode()


@given(st.text(st.characters(exclude_categories=())))
def test_errors_are_one_line_and_survive_a_second_passing(text: str) -> None:
    error = StorageError(text)

    assert len(str(error).splitlines()) <= 1
    assert str(StorageError(str(error))) == str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    str(error).encode()


def test_a_long_error_keeps_its_remedy() -> None:
    text = str(JobError("a: " + "x" * 10_000_000 + "; correct the URI"))

    assert len(text) < 5000
    assert text.startswith("a: x")
    assert text.endswith("; correct the URI")


def test_problems_keep_their_lines_and_travel() -> None:
    problems = Problems([JobError("a\nb"), JobError("c")])

    assert str(problems) == "- a\\nb\n- c"
    assert str(pickle.loads(pickle.dumps(problems))) == str(problems)


def test_visible_keeps_words_of_all_languages() -> None:
    text = "\u4f60\u597d\u3000\u0645\u0631\u062d\u0628\u0627 caf\u00e9\u00a0\U0001f600"

    assert visible(text) == text
    assert visible("a\u202eb\u2066c\u2028d\x9be\ufeff\ud800") == r"a\u202eb\u2066c\u2028d\x9be\ufeff\ud800"


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("\r 50%|##### | 1/2", "\r 50%|##### | 1/2"),
        ("\n\x1b[A", "\n\x1b[A"),
        ("\r      \r", "\r      \r"),
        ("\x1b[36m(worker pid=1)\x1b[0m hello\n", "\x1b[36m(worker pid=1)\x1b[0m hello\n"),
        ("a\rb\x1b[2J\x1b]0;own\x07\x1b[8mc\n", "a\\rb\\x1b[2J\\x1b]0;own\\x07\\x1b[8mc\n"),
        ("one\n\ttwo\n", "one\n\ttwo\n"),
        ("\u202egnp.exe\n", "\\u202egnp.exe\n"),
        ("\b\n", "\\x08\n"),
        ("", ""),
    ],
)
def test_a_terminal_gets_bars_and_colours_but_nothing_that_hides(text: str, printed: str) -> None:
    assert printable(text) == printed


def test_a_terminal_in_another_encoding_shows_escapes() -> None:
    buffer = io.BytesIO()
    stream = GuardedStream(io.TextIOWrapper(buffer, encoding="ascii"))

    print("caf\u00e9 \ud800", file=stream, flush=True)

    assert buffer.getvalue() == b"caf\\xe9 \\ud800\n"


def test_a_traceback_shows_no_secret() -> None:
    script = (
        "from expo_ray.cli.terminal import guard_terminal\n"
        "import logging, threading, warnings\n"
        "guard_terminal()\n"
        "logging.basicConfig()\n"
        "secret = 'CANARY' * 3\n"
        "def fail():\n"
        "    try:\n"
        "        raise ValueError('first ' + secret)\n"
        "    except ValueError as error:\n"
        "        raise RuntimeError('s3://u:' + secret + '@b') from error\n"
        "logging.error('log %s', secret)\n"
        "warnings.warn('warned of ' + secret)\n"
        "print('printed', secret)\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "fail()\n"
    )

    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_TOKEN": "CANARY" * 3},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 1
    assert ended.stdout == "printed ***\n"
    assert ended.stderr.count("ValueError: first ***") == 2
    assert ended.stderr.count("RuntimeError: s3://***@b") == 2
    assert "log ***" in ended.stderr
    assert "CANARYCANARY" not in ended.stderr
