"""The swap against engines that were started on the published folders: the same texts and logprobs to the last bit."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from expo_ray.cli import main
from expo_ray.config import Pair
from expo_ray.errors import ExpoError
from expo_ray.extrapolation.plan import plan_pair
from tests.chat_models import save_chat_pair
from tests.ray_cluster import ROOT, RayBox

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

ALPHAS = (0.5, 2.0)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Path, Path]:
    """A real pair with tied embeddings."""
    from examples.smollm2.build import build

    folder = ROOT / ".cache" / "smollm2" / "models"
    try:
        build(folder, ["sft", "dpo_100pct"])
    except ExpoError as error:
        pytest.skip(str(error))
    return folder / "sft", folder / "dpo_100pct"


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_chat_pair(tmp_path_factory.mktemp("untied"), tied=False, dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "repeats"), [("smollm2", 20), ("untied", 6)])
def test_after_swaps_both_ways_an_engine_answers_as_one_started_on_the_published_folder(
    pair: str, repeats: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    found = swaps(*request.getfixturevalue(pair), tmp_path, repeats)
    first, second = found["started"]
    assert first != second != found["dpo"]
    assert found["first"] == first
    assert found["second"] == second
    assert found["first again"] == first
    # and each step is needed
    assert found["second, cache kept"] != second
    tied = pair == "smollm2"
    assert (found["first, head kept"] != first) == tied
    assert ("refused" in found) == tied
    if tied:
        assert (
            "does not hold the weights of alpha 2: model.embed_tokens.weight are others" in found["refused"]
        )
        assert "not to be trusted" in found["health"]


def swaps(sft: Path, dpo: Path, folder: Path, repeats: int) -> dict[str, Any]:
    words = [word for alpha in ALPHAS for word in ("--alpha", str(alpha))]
    assert main(["extrapolate", "--sft", str(sft), "--dpo", str(dpo), *words, "--output", str(folder)]) == 0
    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {})
    (folder / "plan").write_bytes(pickle.dumps(plan))
    published = [f"{alpha}={folder}/alpha={alpha:g}" for alpha in ALPHAS]
    with RayBox() as box:
        process = box.run(
            sys.executable,
            "-m",
            "tests.swap_script",
            f"{folder}/plan",
            str(repeats),
            *published,
            f"{folder}/out",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
        )
        assert process.wait(300) == 0, process.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "out").read_text())
    return found
