"""`expo-ray` as a process: signals, streams, users without a home, names that are not UTF-8."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import expo_ray
from expo_ray import interrupt
from expo_ray.cli.process import guarded
from expo_ray.errors import StorageError
from expo_ray.storage import open_store
from tests.support.pairs import files_of, write_pair
from tests.support.paths import ROOT

EXPO = [sys.executable, "-m", "expo_ray.cli"]
BAD_INPUT, FAILED, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141
Result = subprocess.CompletedProcess[bytes]


def run(*words: str | bytes | Path, env: Mapping[str, str | None] | None = None, **more: object) -> Result:
    """The finished command; a variable given as None is not set."""
    merged: dict[str, str | None] = {**os.environ, **(env or {})}
    environment = {name: text for name, text in merged.items() if text is not None}
    options: dict[str, object] = {"cwd": ROOT, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE} | more
    done: Result = subprocess.run([*EXPO, *words], env=environment, check=False, timeout=500, **options)  # type: ignore[call-overload]
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done


def extrapolation(folder: Path, *more: str | Path) -> list[str | Path]:
    sft, dpo = write_pair(folder)
    return ["extrapolate", "--sft", sft, "--dpo", dpo, "--alpha", "1", "--output", folder / "out", *more]


# Streams


@pytest.mark.parametrize("words", [["schema"], ["--help"], ["extrapolate", "--help"]], ids=" ".join)
def test_a_full_output_is_an_error(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*words, stdout=full)
    assert done.returncode == FAILED
    assert b"No space left" in done.stderr


def test_an_output_that_is_full_before_the_work_is_done_stops_it(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*extrapolation(tmp_path), stdout=full)
    assert done.returncode == FAILED
    assert b"No space left" in done.stderr


def test_an_output_that_nobody_reads_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run("schema", stdout=writer)
    finally:
        os.close(writer)
    assert done.returncode == BROKEN_PIPE
    assert done.stderr == b""


def test_a_closed_output_is_refused_before_any_work(tmp_path: Path) -> None:
    words = extrapolation(tmp_path)
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *EXPO, *words], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == BAD_INPUT
    assert b"standard output is closed" in done.stderr
    assert not files_of(tmp_path / "out")


def test_a_closed_error_stream_is_no_obstacle(tmp_path: Path) -> None:
    words = extrapolation(tmp_path)
    done = subprocess.run(
        ["sh", "-c", '"$@" 2>&- <&-', "sh", *EXPO, *words], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0
    assert run("verify", tmp_path / "out").returncode == 0


def test_a_locale_that_lacks_letters_of_a_name_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    words = extrapolation(tmp_path / "modèle")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(*words, env=ascii_only)
    assert done.returncode == BAD_INPUT
    assert b"set PYTHONUTF8=1" in done.stderr
    assert run(*words, env=ascii_only | {"PYTHONUTF8": "1"}).returncode == 0


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_modules_are_imported_ends_without_a_traceback(number: signal.Signals) -> None:
    # Imports of the commands begin once signals are handled; here they never end.
    code = (
        "import builtins, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from expo_ray.cli import process\n"
        "real = builtins.__import__\n"
        "def slow(name, *rest):\n"
        "    if name == 'expo_ray.cli.commands':\n"
        "        print('importing', flush=True)\n"
        "        time.sleep(60)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = slow\n"
        "sys.exit(process.main(['schema']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(number)
    process.send_signal(number)  # an impatient user's second
    _, said = process.communicate(timeout=500)
    assert process.returncode == INTERRUPTED
    assert said.startswith(b"interrupted")
    assert b"Traceback" not in said


def test_a_second_signal_does_not_disturb_the_cleaning_up(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned: list[str] = []

    def command() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            cleaned.append("all")
        return 0

    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        assert guarded(command) == INTERRUPTED
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert cleaned == ["all"]


def test_a_signal_that_a_library_drops_ends_the_work_at_its_next_count() -> None:
    code = (
        "import signal, sys\n"
        "from expo_ray.cli.process import guarded\n"
        "from expo_ray.progress import Counters\n"
        "def command():\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    except KeyboardInterrupt:\n"  # as a library does with the exceptions of its callbacks
        "        print('dropped')\n"
        "    Counters().add(rows=1)\n"
        "    print('went on')\n"
        "    return 0\n"
        "sys.exit(guarded(command))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.stdout == b"dropped\n"
    assert done.returncode == INTERRUPTED
    assert done.stderr.startswith(b"interrupted")


@pytest.mark.parametrize("cleaning", [True, False])
def test_a_second_signal_ends_a_command_unless_it_is_cleaning_up(
    monkeypatch: pytest.MonkeyPatch, cleaning: bool
) -> None:
    monkeypatch.setattr(interrupt, "SAME_SIGNAL_S", 0.0)
    reached: list[str] = []

    def command() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            if cleaning:
                interrupt.begin_clean_up()
            signal.raise_signal(signal.SIGTERM)
            reached.append("the end of the cleaning up")
        return 0

    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        assert guarded(command) == (0 if cleaning else INTERRUPTED)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert bool(reached) is cleaning


def test_nohup_is_respected() -> None:
    code = "import signal; from expo_ray.cli.process import guarded; guarded(lambda: 0); print(signal.getsignal(signal.SIGHUP))"
    done = subprocess.run(
        ["nohup", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "SIG_IGN" in done.stdout or "1" in done.stdout


# Users and their folders


@pytest.fixture
def for_nobody() -> Iterator[Path]:
    """A folder that a user without an entry in /etc/passwd can write."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def test_a_user_without_a_home_and_without_a_name(for_nobody: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root, to become another user")
    words = extrapolation(for_nobody)
    subprocess.run(["chmod", "-R", "a+rX", str(for_nobody)], check=True)
    # The package in a folder that this user can only read, and no compiled arithmetic beside it.
    package = for_nobody / "lib"
    package.mkdir()
    subprocess.run(["cp", "-r", str(Path(expo_ray.__file__).parent), str(package)], check=True)
    for cache in package.rglob("__pycache__"):
        subprocess.run(["rm", "-r", str(cache)], check=True)
    nobody = {
        "HOME": None,
        "USER": None,
        "LOGNAME": None,
        "XDG_CACHE_HOME": None,
        "PYTHONPATH": str(package),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment = {**os.environ, **nobody}
    done = subprocess.run(
        ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *EXPO, *words],
        env={name: text for name, text in environment.items() if text is not None},
        cwd=for_nobody,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (for_nobody / "out" / "expo.json").exists()


def test_a_home_that_cannot_be_named_is_no_folder_called_tilde(tmp_path: Path) -> None:
    words = extrapolation(tmp_path)
    words[words.index("--output") + 1] = "~/out"
    code = "import os, pwd, sys\npwd.getpwuid = lambda uid: {}[uid]\nfrom expo_ray.cli.process import main\nsys.exit(main(sys.argv[1:]))"
    environment = {name: text for name, text in os.environ.items() if name != "HOME"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == BAD_INPUT
    assert "set HOME" in done.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("TMPDIR", "/nowhere"), ("HOME", "/"), ("HOME", ""), ("XDG_CACHE_HOME", "relative")],
)
def test_odd_values_of_variables(tmp_path: Path, variable: str, value: str) -> None:
    assert run(*extrapolation(tmp_path), env={variable: value}).returncode == 0


# Names


def test_a_name_that_is_not_utf8_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/mod\xe8le"
    sft, dpo = write_pair(tmp_path)
    os.makedirs(odd)
    words: list[list[str | bytes | Path]] = [
        ["extrapolate", "--sft", odd, "--dpo", dpo, "--alpha", "1", "--output", tmp_path / "out"],
        ["extrapolate", "--sft", sft, "--dpo", dpo, "--alpha", "1", "--output", odd],
        ["extrapolate", "--sft", sft, "--dpo", dpo, "--alpha", b"\xff", "--output", tmp_path / "out"],
        ["verify", odd],
        ["plan", odd],
        ["report", odd],
        [b"\xff"],
    ]
    for each in words:
        done = run(*each)
        assert done.returncode == BAD_INPUT
        assert b"not UTF-8" in done.stderr
    assert not files_of(tmp_path / "out")


def test_a_relative_name_below_a_folder_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/mod\xe8le"
    os.makedirs(odd)
    done = run("verify", "model", cwd=odd, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == BAD_INPUT
    assert b"not UTF-8" in done.stderr


@pytest.mark.parametrize(
    "uri",
    ["s3:/b/out", "s3//b/out", "S3:b/out", "hf:/org/name", "hf//org/name", "s3;//b/out", "file:/tmp/out"],
)
def test_a_uri_with_a_slip_is_no_local_folder(uri: str) -> None:
    with pytest.raises(StorageError, match=r"write \w+://"):
        open_store(uri)


@pytest.mark.parametrize(
    "path", ["./s3:/b/out", "s3/out", "hf-models/out", "/s3//b", "s3.out/x", "files/out"]
)
def test_a_local_folder_may_resemble_a_uri(path: str) -> None:
    assert open_store(path).uri == os.path.abspath(path)
