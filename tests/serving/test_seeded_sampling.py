"""Seeded requests on CPUs whose prompts take more than the tokens of one step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.chat_models import save_chat_pair

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def test_a_prompt_computed_in_parts_gets_the_answer_of_its_seed(tmp_path: Path) -> None:
    _, dpo = save_chat_pair(tmp_path, tied=False, dtype=torch.float32)
    command = [sys.executable, "-m", "tests.support.seeded_prompts", str(dpo), f"{tmp_path}/answers"]
    process = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads((tmp_path / "answers").read_text())
    assert "CPU Generator does not use offset" in result["not mended"]
    assert result["in parts"] == result["at once"]
