"""Run checks that need Triton, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Triton has a folder of its own: in the environment of the tests it would keep vLLM from being imported.
FOLDER = Path(sys.prefix) / "triton"


def run_check(
    cache: Path, *words: str, module: str = "tests.support.triton_checks", interpret: bool = True
) -> int:
    """Run a check of a module; returns the number that it prints."""
    if importlib.util.find_spec("triton") is None and not (FOLDER / "triton").is_dir():
        pytest.fail(f"{FOLDER} has no Triton, so the GPU kernel is not checked: run `make .venv/triton.txt`")
    environment = {
        **os.environ,
        "PYTHONPATH": str(FOLDER),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_INTERPRET": str(int(interpret)),
    }
    child = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return int(child.stdout)
