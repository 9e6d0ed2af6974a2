"""The checks of `expo-ray run` and `jobs/pipeline.py` before any engine starts; the rest is in `tests/cluster/test_pipeline.py`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")
pytest.importorskip("peft")

from expo_ray.cli.process import main
from expo_ray.config import load_job
from expo_ray.serving.served_models import plan_served_pairs
from tests.support.paths import ROOT
from tests.support.tiny_models import causal_model, save_lora, tiny_llama

BAD_INPUT = 2


@pytest.fixture(autouse=True)
def logs_of_its_own() -> Iterator[None]:
    """Importing Ray's LLM library sends all logs to the stderr of that moment, which here ends with the test."""
    before = logging.root.handlers[:]
    yield
    for handler in [handler for handler in logging.root.handlers if handler not in before]:
        logging.root.removeHandler(handler)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A pair whose dpo is a LoRA adapter, which is scaled by default."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "brief.py").write_text("def reward(prompt, response):\n    return -len(response)\n")
    sft, dpo = save_lora(tmp_path, causal_model(tiny_llama()))
    (sft / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (tmp_path / "prompts.txt").write_text("".join(f"Spell the number {number}.\n" for number in range(64)))
    return {
        "output": str(tmp_path / "out"),
        "pairs": [{"name": "lora", "sft": str(sft), "dpo": str(dpo)}],
        "prompts": [{"source": str(tmp_path / "prompts.txt")}],
        "rewards": [{"model": "python:brief:reward"}],
    }


def written(job: dict[str, Any], folder: Path) -> Path:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(job, tmp_path)
    assert main(["run", str(file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "1 pair(s): lora" in printed
    assert "64 prompts (prompts.txt): 22 to choose alpha on, 42 to confirm it on" in printed
    script = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), str(file), "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    assert subprocess.check_output(script, text=True, env=environment) == printed
    assert not (tmp_path / "out").exists()


def test_everything_wrong_with_a_job_is_reported_before_anything_starts(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("Only one.\n")
    job["pairs"].append({"name": "absent", "sft": "/nowhere/sft", "dpo": job["pairs"][0]["dpo"]})
    job["models"] = [{"name": "none", "uri": "/nowhere/model"}]
    job["rewards"].append({"model": "python:nowhere:function"})
    assert main(["run", str(written(job, tmp_path))]) == BAD_INPUT
    errors = capsys.readouterr().err
    for text in (
        "absent: sft: ",
        "/nowhere/model: no such folder",
        "nowhere",
        "problem(s), nothing was written",
    ):
        assert text in errors
    del job["pairs"][1], job["models"], job["rewards"][1]
    Path(job["pairs"][0]["sft"], "chat_template.jinja").unlink()
    job["serving"] = {"max_model_len": 1 << 20}
    assert main(["run", str(written(job, tmp_path))]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert "lora: has no chat template" in errors
    assert "lora: `serving.max_model_len` is 1048576" in errors
    assert "there are 0 prompts to choose alpha on, half of the set; a search needs at least 16" in errors
    assert not (tmp_path / "out").exists()


def test_a_job_that_asks_for_the_search_of_groups_is_told_what_to_write_instead(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(written(job | {"search": {"groups": ["mlp"]}}, tmp_path))]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert "`groups` is no longer searched" in errors
    assert "set `multipliers` of the pair" in errors
    # The remedy, and a job that asked for none.
    job["pairs"][0] |= {"multipliers": {"mlp": 0.5}, "adapter": "merge"}
    assert main(["run", str(written(job | {"search": {"groups": []}}, tmp_path)), "--dry-run"]) == 0


def test_a_model_of_other_options_in_the_output_is_reported_before_the_search(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, (pair,) = written(job, tmp_path), job["pairs"]
    words = ["extrapolate", "--sft", pair["sft"], "--dpo", pair["dpo"], "--alpha", "0.5", "--output"]
    out = tmp_path / "out" / "pairs" / "lora" / "alpha=0.5"
    assert main([*words, str(out)]) == 0
    assert main(["run", str(file), "--dry-run"]) == 0
    assert main([*words, str(out), "--seed", "7", "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["run", str(file)]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert f"lora: output {out} holds the model of another plan" in errors
    assert "choose another output folder, or remove this one" in errors


def test_an_engine_argument_that_is_not_the_users_to_set_is_refused(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job["serving"] = {"engine": {"worker_extension_cls": "mine", "max_num_seqs": 8}}
    assert main(["run", str(written(job, tmp_path))]) == BAD_INPUT
    assert "serving.engine: worker_extension_cls: expo-ray sets this itself" in capsys.readouterr().err


def test_engines_hold_a_scaled_adapter_as_the_model_that_merging_writes(
    job: dict[str, Any], tmp_path: Path
) -> None:
    job["serving"] = {"engine": {"enable_lora": False}}
    (served,) = plan_served_pairs(load_job(str(written(job, tmp_path))))
    job["pairs"][0]["adapter"] = "merge"
    (merged,) = plan_served_pairs(load_job(str(written(job, tmp_path))))
    assert served.shards == merged.shards
    assert served.plan_id(0.5) == merged.plan_id(0.5)
    assert {tensor.dtype for shard in served.shards for tensor in shard.tensors} == {"BF16"}
