"""Stored searches are published and reported by `expo-ray run`, also where inputs changed since they were checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("ray")
pytest.importorskip("peft")

from expo_ray.cli.run import print_results
from expo_ray.config import Job, Pair, Search, load_job
from expo_ray.errors import InputChanged
from expo_ray.evaluation.check_job import CheckedJob, check_job
from expo_ray.evaluation.job_report import push_winners, write_report
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.plan_job import JobPlan, inspect_pairs
from expo_ray.extrapolation.run_job import run_pairs
from expo_ray.on_ray.extrapolation import OnRay
from expo_ray.on_ray.pipeline import publish_winners, search_pairs
from expo_ray.progress import Progress
from expo_ray.published.verify import read_manifest, verify_files
from expo_ray.report.results import PairResult, Results
from expo_ray.report.results_file import results_json
from expo_ray.storage import open_store
from tests.support.chat_models import save_chat_lora, save_chat_pair
from tests.support.pairs import files_of

pytestmark = [pytest.mark.ray, pytest.mark.s3]

FAILED = 1
ALPHA = 0.8
# No product of an alpha above 1.8 and this multiplier is finite.
LARGE = 1e308
NAMES = ("adapter", "plain", "replaced", "unplannable", "unsearched")


def save_pairs(root: str, folder: Path) -> list[dict[str, Any]]:
    """The pairs of a job, below `root`."""
    pairs: list[dict[str, Any]] = []
    for name in NAMES:
        folders = (
            save_chat_lora(folder / name)
            if name == "adapter"
            else save_chat_pair(folder / name, tied=False, dtype=torch.bfloat16)
        )
        sft, dpo = (copied(parent, f"{root}/{name}/{parent.name}") for parent in folders)
        pairs.append({"name": name, "sft": sft, "dpo": dpo})
    pairs[NAMES.index("unplannable")]["multipliers"] = {"norm": LARGE}
    return pairs


def store_searches(checked: CheckedJob) -> None:
    """Store a decision for every pair but the last, as a finished search does."""
    store = open_store(checked.job.output)
    for plan in checked.plans[:-1]:
        decision = 3.2 if plan.name == "unplannable" else ALPHA
        result = PairResult(plan.name, plan.sft.uri, plan.dpo.uri, decision, f"alpha {decision:g} is best")
        key = f"evaluation/searches/{plan.name}-{checked.search_id(plan)}.json"
        store.put(key, results_json(Results(store.uri, "", (result,))))


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("place", ["local", "s3"])
def test_pairs_that_cannot_be_published_any_more_fail_alone_and_the_report_is_written(
    place: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # The session's Ray is connected already. It has one CPU, too few for the engine of a search beside a reward model.
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "brief.py").write_text("def reward(prompt, response):\n    return -len(response)\n")
    (tmp_path / "prompts.txt").write_text("".join(f"Spell the number {number}.\n" for number in range(64)))
    root = str(tmp_path / "store") if place == "local" else request.getfixturevalue("s3_uri")
    job = {
        "output": f"{root}/out",
        "pairs": save_pairs(root, tmp_path / "made"),
        "prompts": [{"source": str(tmp_path / "prompts.txt")}],
        "rewards": [{"model": "python:brief:reward"}],
        "serving": {"max_model_len": 128},
        "sampling": {"max_tokens": 12},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    checked = check_job(load_job(str(tmp_path / "job.yaml")))
    store_searches(checked)
    damage(f"{root}/replaced/dpo")

    searches = search_pairs(checked)
    results = write_report(checked, searches, publish_winners(checked, searches))
    assert print_results(push_winners(results, checked.job), checked.job) == FAILED
    printed = capsys.readouterr()

    output = open_store(f"{root}/out")
    stored = json.loads(output.read("results.json"))
    assert {pair["name"]: len(pair["published"]) for pair in stored["pairs"]} == {
        "adapter": 1, "plain": 1, "replaced": 0, "unplannable": 0,
    }  # fmt: skip
    assert stored["failures"].keys() == {"replaced", "unplannable", "unsearched"}
    assert f"{root}/replaced/dpo" in stored["failures"]["replaced"]
    assert "model.safetensors (replaced)" in stored["failures"]["replaced"]
    assert "times the multiplier" in stored["failures"]["unplannable"]
    assert "add nodes" in stored["failures"]["unsearched"]
    page = output.read("report/index.html").decode()
    for name in stored["failures"]:
        assert f"failed: {name}: " in printed.err
        assert name in page

    for name in ("adapter", "plain"):
        model = open_store(f"{root}/out/pairs/{name}/alpha={ALPHA}")
        manifest = read_manifest(model)
        assert manifest is not None
        assert verify_files(model, manifest) == []
        assert manifest["arithmetic"]["adapter"] == ("scale" if name == "adapter" else None)
        for side, checkpoint in zip(("sft", "dpo"), parents_of(checked, name), strict=True):
            etags = {key: info.etag for key, info in checkpoint.files.items()}
            assert {key: file["etag"] for key, file in manifest["parents"][side]["files"].items()} == etags
    assert "pairs/replaced" not in " ".join(info.key for info in output.list())

    # The stored search is that of the old parent: the new one is another search's.
    again = check_job(load_job(str(tmp_path / "job.yaml")))
    changed = [
        new.name
        for old, new in zip(checked.plans, again.plans, strict=True)
        if checked.search_id(old) != again.search_id(new)
    ]
    assert changed == ["replaced"]


@pytest.mark.usefixtures("ray_here")
def test_workers_do_not_read_a_parent_that_is_replaced_while_models_are_written(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    for name in ("first", "second"):
        folders = save_chat_pair(tmp_path / name, tied=False, dtype=torch.bfloat16)
        sft, dpo = (copied(parent, f"{s3_uri}/{name}/{parent.name}") for parent in folders)
        plans.append(plan_pair(Pair(name=name, sft=sft, dpo=dpo), {ALPHA: f"{s3_uri}/out/{name}"}))

    def inspect_and_replace(pairs: Sequence[PairPlan]) -> tuple[JobPlan, dict[str, Exception]]:
        inspected = inspect_pairs(pairs)
        damage(f"{s3_uri}/first/sft")
        return inspected

    monkeypatch.setattr("expo_ray.extrapolation.run_job.inspect_pairs", inspect_and_replace)
    with Progress("extrapolate", quiet=True) as progress, OnRay(progress, device="cpu") as executor:
        outcome = run_pairs(plans, executor, progress)
    assert [model.pair for model in outcome.published] == ["second"]
    assert isinstance(outcome.failures["first"], InputChanged)


def copied(folder: Path, uri: str) -> str:
    """Copy a folder to `uri`; returns it."""
    for key, data in files_of(folder).items():
        open_store(uri).put(key, data)
    return uri


def damage(uri: str) -> None:
    """Replace a parent's weights by others of the same size."""
    store = open_store(uri)
    store.put("model.safetensors", store.read("model.safetensors")[:-1] + b"\x01")


def parents_of(checked: CheckedJob, name: str) -> tuple[Any, Any]:
    """Both checkpoints of a pair as they were checked."""
    (plan,) = (plan for plan in checked.plans if plan.name == name)
    return plan.sft, plan.dpo


@pytest.mark.parametrize(
    ("engine", "is_another"),
    [
        ({"max_num_seqs": 4, "gpu_memory_utilization": 0.5}, False),
        ({"enable_prefix_caching": False}, True),
        ({"hf_overrides": {"rope_theta": 500000.0}}, True),
    ],
)
def test_an_engine_that_answers_otherwise_is_another_search(
    tmp_path: Path, engine: dict[str, Any], is_another: bool
) -> None:
    sft, dpo = save_chat_pair(tmp_path / "pair", tied=False, dtype=torch.bfloat16)
    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {ALPHA: str(tmp_path / "out")})
    pairs = [{"name": "pair", "sft": str(sft), "dpo": str(dpo)}]
    plain = Job.model_validate({"output": str(tmp_path), "pairs": pairs})
    other = Job.model_validate({"output": str(tmp_path), "pairs": pairs, "serving": {"engine": engine}})
    ids = [CheckedJob(job, [plan], []).search_id(plan) for job in (plain, other)]
    assert (ids[0] != ids[1]) == is_another


def test_a_search_of_a_job_that_named_no_method_is_found_after_the_default_has_changed(
    tmp_path: Path,
) -> None:
    sft, dpo = save_chat_pair(tmp_path / "pair", tied=False, dtype=torch.bfloat16)
    plan = plan_pair(Pair(name="pair", sft=str(sft), dpo=str(dpo)), {ALPHA: str(tmp_path / "out")})
    pairs = [{"name": "pair", "sft": str(sft), "dpo": str(dpo)}]

    def checked(**search: Any) -> CheckedJob:
        job = Job.model_validate({"output": str(tmp_path), "pairs": pairs, "search": search})
        return CheckedJob(job, [plan], [])

    for settings in (
        {},
        {"prompts": [32, 64]},
        {"confidence": 0.9, "guardrails": {"kl": {"warn": 1, "reject": 3}}},
    ):
        before = checked(method="ladder", **settings).search_id(plan)
        assert before in checked(**settings).stored_search_ids(plan)
        assert before not in checked(method="surface", **settings).stored_search_ids(plan)
    # As it was before there was a third method: the same key for the same settings.
    guardrails = Search().guardrails.model_dump(mode="json")
    del guardrails["bought"]
    assert checked(method="ladder").job.search.identity() == {
        "method": "ladder", "alphas": [0.1, 0.2, 0.3, 0.4, 0.5], "prompts": [128, 256, 512, 1000], "confirm_prompts": 512,
        "largest_alpha": 51.2, "confidence": 0.95, "groups": [], "guardrails": guardrails,
    }  # fmt: skip
    for changed in (
        {"objective": "length_controlled"},
        {"guardrails": {"bought": {"warn": 0.1, "reject": 0.9}}},
    ):
        assert checked(method="ladder", **changed).search_id(plan) != checked(method="ladder").search_id(plan)
