"""A judge that `expo-ray serve` serves: a tiny model, which cannot judge, and whose card says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from expo_ray.cli.process import main
from tests.support.chat_models import save_chat_pair
from tests.support.ray_cluster import RayBox
from tests.support.vllm_engine import SMALL, serve

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]


def test_a_served_model_judges_and_its_card_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft, dpo = save_chat_pair(tmp_path / "tiny", tied=False, dtype=torch.float32)
    for folder in (sft, dpo):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    files = {}
    for name, text in (("baseline", "It is {}."), ("model", "That is number {}, I think.")):
        rows = [
            {"instruction": f"What is {n}?", "output": text.format(n), "generator": name} for n in range(40)
        ]
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(rows))
    verdicts = [
        {"instruction": f"What is {n}?", "output_1": f"It is {n}.", "output_2": f"I do not know {n}.", "preference": 1.1}
        for n in range(40)
    ]  # fmt: skip
    (tmp_path / "annotations.json").write_text(json.dumps(verdicts))
    job = {
        "pairs": [{"name": "tiny", "sft": str(sft), "dpo": str(dpo), "alphas": [0.5]}],
        "serving": {"dtype": "fp32", **SMALL, "max_model_len": 4096},
    }
    with RayBox() as box, serve(box, job) as (url, _):
        asked = ["--judge", f"{url}/v1", "--judge-model", "tiny@0.5", "--extra", '{"top_logprobs": 20}', "--output", str(tmp_path / "out"), "--json"]  # fmt: skip
        words = ["benchmark", "judge", "--reference", str(tmp_path / "annotations.json"), "--limit", "40"]
        assert main([*words, *asked]) == 0
        card = json.loads(capsys.readouterr().out)
        words = [
            "benchmark",
            "alpaca",
            "--outputs",
            str(files["model"]),
            "--baseline",
            str(files["baseline"]),
        ]
        # A judge that mostly names neither output leaves few verdicts, or none.
        status = main([*words, *asked, "--length-control", "none"])
    assert card["mass"] < 0.5
    assert any("probability" in warning for warning in card["warnings"])
    annotations = json.loads((tmp_path / "out/annotations/model-against-baseline.json").read_text())
    assert len(annotations) == 40
    assert status == (0 if sum(row["preference"] is not None for row in annotations) >= 2 else 2)
