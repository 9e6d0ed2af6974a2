"""Every architecture of the installed transformers, built on the meta device: are its vocabulary weights recognised?"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# What is not recognised: ties of weights that are no vocabulary's, or of a second vocabulary.
OTHER_TIES = {
    "LukeForMaskedLM", "NeoMMEForMaskedLM", "SeamlessM4TForTextToSpeech", "SeamlessM4Tv2ForTextToSpeech",
    "T5Gemma2ForConditionalGeneration", "UdopForConditionalGeneration", "BarkModel", "T5GemmaForConditionalGeneration",
    "ZambaForCausalLM", "Zamba2ForCausalLM",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_embeddings_heads_ties_and_buffers_of_all_architectures() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.architectures"],
        capture_output=True,
        text=True,
        timeout=590,
        check=True,
    )
    results = [json.loads(line) for line in run.stdout.splitlines()]
    built = [result for result in results if "error" not in result and result["has_embedding"]]
    assert len(built) > 300, [result["error"] for result in results if "error" in result]
    assert [result["name"] for result in built if not result["embedding"]] == []
    assert [result["name"] for result in built if not result["head"]] == []
    assert {result["name"] for result in built if result["ties"] or result["reversed"]} <= OTHER_TIES
    assert {result["name"]: result["buffers"] for result in built if result["buffers"]} == {}
