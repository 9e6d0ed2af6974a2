"""Runs that the code of an earlier commit stored (`tests/data/run_before`) are verified, reported, resumed and served by today's code."""

from __future__ import annotations

import contextlib
import html
import json
import os
import shutil
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

from expo_ray.cli.process import main
from expo_ray.config import Sampling, load_job
from expo_ray.evaluation.check_job import check_job, package_versions
from expo_ray.evaluation.job_report import write_report
from expo_ray.evaluation.placement import Node
from expo_ray.evaluation.records import Message, digest, seed_of
from expo_ray.evaluation.responses.client import Answer, Client
from expo_ray.extrapolation.step import parse_step
from expo_ray.on_ray import capacity, pipeline
from expo_ray.on_ray.serving import engine_groups
from expo_ray.report.report_folder import PAGE
from expo_ray.report.results_file import read_results
from expo_ray.storage import open_store
from tests.support.paths import DATA
from tests.support.ray_cluster import RayBox, wait_until
from tests.support.vllm_engine import serve

BEFORE = DATA / "run_before"
# The parents' time of change, which identifies a local file together with its size; see `run_before/make.py`.
CHANGED_NS = 1_700_000_000 * 10**9
RUN_S = 1200.0


def stored_versions() -> dict[str, str]:
    """Those that decide keys: a search's depends on vLLM, a reward function's on Python."""
    stored: dict[str, str] = json.loads((BEFORE / "finished" / "results.json").read_text())["versions"]
    return {"vllm": stored["vllm"], "python": ".".join(stored["python"].split(".")[:2])}


def current_versions() -> dict[str, str]:
    current = package_versions()
    return {"vllm": current.get("vllm", ""), "python": ".".join(current["python"].split(".")[:2])}


same_versions = pytest.mark.skipif(
    current_versions() != stored_versions(),
    reason=f"the keys of tests/data/run_before are of {stored_versions()}; make it again",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs and their parents in a folder that they were not made in, with a job file for each run."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(BEFORE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*folder.glob("sft/*"), *folder.glob("dpo/*")):
        os.utime(file, ns=(CHANGED_NS, CHANGED_NS))
    job = yaml.safe_load((folder / "job.yaml").read_text().replace("FOLDER", str(folder)))
    for run in ("finished", "cut"):
        (folder / f"{run}.yaml").write_text(yaml.safe_dump(job | {"output": str(folder / run)}))
    # Where this process and the actors look for the reward function.
    monkeypatch.syspath_prepend(str(BEFORE))
    monkeypatch.chdir(BEFORE)
    return folder


def published_model(folder: Path) -> Path:
    (manifest,) = folder.glob("finished/pairs/tiny/*/expo.json")
    return manifest.parent


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, `status.json` and what a run reports left out."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in {"status.json", "results.json", "index.html"}
    }


def rows(run: Path, kind: str) -> Counter[tuple[str, str, int]]:
    """How often each response or reward of a run is stored, by served model, prompt and sample."""
    return Counter(
        (file.relative_to(run).parts[1], row["prompt_id"], row["sample"])
        for file in run.glob(f"evaluation/*/*/{kind}/**/*.jsonl")
        for row in map(json.loads, file.read_text().splitlines())
    )


def without_times(results: Path, *folders: str) -> dict[str, Any]:
    """`results.json` but for the time of the run, and for the folders that it was made and done again in."""
    text = results.read_text()
    for folder in folders:
        text = text.replace(folder, "FOLDER")
    content = json.loads(text)
    kept = {key: value for key, value in content.items() if key not in {"created", "versions", "cost"}}
    return kept | {"generations": content["cost"]["generations"]}


@pytest.mark.parametrize("parents", [False, True], ids=["files alone", "against its parents"])
def test_a_published_model_verifies(folder: Path, parents: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sft", str(folder / "sft"), "--dpo", str(folder / "dpo")] if parents else []
    assert main(["verify", str(published_model(folder)), *words]) == 0
    assert ("the same bytes" in capsys.readouterr().out) == parents


def test_a_report_is_written_of_a_stored_run(folder: Path) -> None:
    page = folder / "finished" / PAGE
    assert not page.exists()
    assert main(["report", str(folder / "finished")]) == 0
    (pair,) = read_results(open_store(str(folder / "finished"))).pairs
    assert pair.decision > 0
    assert pair.reason in html.unescape(page.read_text())


@same_versions
def test_keys_are_those_of_the_stored_runs_wherever_they_lie(folder: Path) -> None:
    checked = check_job(load_job(folder / "finished.yaml"))
    (plan,) = checked.plans
    stored = json.loads((folder / "finished" / "results.json").read_text())
    assert checked.digests() == stored["digests"]

    (search,) = (folder / "finished" / "evaluation" / "searches").iterdir()
    assert search.name in {f"tiny-{search_id}.json" for search_id in checked.stored_search_ids(plan)}
    (prompts,) = (folder / "finished" / "evaluation" / "prompts").iterdir()
    assert prompts.name == f"letters-{checked.prompts.digest}.jsonl"
    (rewards,) = {path.name for path in folder.glob("finished/evaluation/*/*/rewards/*")}
    assert rewards == f"letter-{checked.reward_ids['letter']}"

    model = published_model(folder)
    plan_id = plan.plan_id(stored["pairs"][0]["decision"])
    assert json.loads((model / "expo.json").read_text())["plan"] == plan_id
    assert json.loads((model / ".expo" / "claim.json").read_text())["plan"] == plan_id
    assert (model / ".expo" / plan_id).is_dir()

    for about in folder.glob("finished/evaluation/tiny@*/*/about.json"):
        decided_by = json.loads(about.read_text())
        assert about.parent.name == digest(decided_by)
        alpha = parse_step(about.parents[1].name.partition("@")[2]).alpha
        assert decided_by["weights"] == plan.plan_id(alpha)
        for file in about.parent.glob("responses/*.jsonl"):
            for row in map(json.loads, file.read_text().splitlines()):
                assert row["origin"] == about.parent.name
                assert row["seed"] == seed_of(Sampling(), row["prompt_id"], row["sample"])
    for likelihoods in folder.glob("finished/evaluation/tiny@*/likelihoods-*"):
        alpha = parse_step(likelihoods.parent.name.partition("@")[2]).alpha
        assert likelihoods.name.split("-")[1] == plan.plan_id(alpha)


@same_versions
@pytest.mark.ray
def test_a_finished_run_is_done_again_from_what_is_stored(folder: Path) -> None:
    run = folder / "finished"
    made_in = str(Path(json.loads((run / "results.json").read_text())["output"]).parent)
    before, results = contents(run), without_times(run / "results.json", made_in)
    with RayBox() as box:
        path = f"{box.environment['PYTHONPATH']}:{BEFORE}"
        process = box.run("expo-ray", "run", str(folder / "finished.yaml"), PYTHONPATH=path)
        wait_until(lambda: not process.running, "the run has finished", RUN_S)
        assert process.wait() == 0, process.stderr
        assert "engine" not in process.stderr  # none is started: no prompt is asked
    assert contents(run) == before  # no response, reward or shard is added
    assert without_times(run / "results.json", made_in, str(folder)) == results


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of the pair and its published model, served as the pair was in the stored runs."""
    job = yaml.safe_load((folder / "cut.yaml").read_text())
    models = [{"name": "published", "uri": str(published_model(folder))}]
    kept = {key: job[key] for key in ("output", "pairs", "serving")}
    with RayBox() as box, serve(box, kept | {"models": models}) as (url, _):
        yield url


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each question is asked from now on, by served model and seed."""
    asked: Counter[tuple[str, int]] = Counter()
    chat = Client.chat

    async def counted(
        self: Client, name: str, messages: Sequence[Message], options: Mapping[str, Any]
    ) -> Answer:
        if "seed" in options:  # not a request for log-probabilities
            asked[name, options["seed"]] += 1
        return await chat(self, name, messages, options)

    monkeypatch.setattr(Client, "chat", counted)
    return asked


@same_versions
@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("ray_here")
def test_a_run_that_was_cut_short_goes_on_and_its_published_model_is_served(
    folder: Path, questions: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder / "cut"
    stored, answered = contents(run), rows(run, "responses")
    assert answered
    assert not (run / "results.json").exists()
    with served(folder) as url:
        # One endpoint for the whole test: the pipeline takes it for its own. The session's Ray has one CPU.
        monkeypatch.setattr(capacity, "read_nodes", lambda: [Node(0, cpus=2.0)])
        monkeypatch.setattr(pipeline, "http_proxy", lambda _: contextlib.nullcontext((url, "/")))
        monkeypatch.setattr(pipeline, "ingress", lambda *_: contextlib.nullcontext())
        running = SimpleNamespace(wait=lambda _: None)
        monkeypatch.setattr(engine_groups, "deploy_group", lambda _: contextlib.nullcontext(running))
        checked = check_job(load_job(folder / "cut.yaml"))
        searches = pipeline.search_pairs(checked)
        results = write_report(checked, searches, pipeline.publish_winners(checked, searches))
        assert len(answer_of(url, "published")) > 0

    assert not results.failures
    (pair,) = results.pairs
    assert pair.decision > 0, pair.reason
    assert results.digests == read_results(open_store(str(folder / "finished"))).digests
    assert stored.items() <= contents(run).items()
    for kind in ("responses", "rewards"):
        assert set(rows(run, kind).values()) == {1}
    assert rows(run, "rewards") == rows(run, "responses") > answered
    # What was answered before the cut is not asked again, all else once; at the end, dpo against itself.
    again = Counter(
        (file.relative_to(run).parts[1], row["seed"])
        for file in run.glob("evaluation/*/*/again-*/responses/*.jsonl")
        for row in map(json.loads, file.read_text().splitlines())
    )
    assert pair.asked_again
    assert (len(again), set(again.values())) == (pair.asked_again.responses, {1})
    asked = questions - again
    assert set(asked.values()) == {1}
    assert len(asked) == len(rows(run, "responses")) - len(answered)


def answer_of(url: str, model: str) -> str:
    """What a served model answers, greedily."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Spell."}],
        "temperature": 0,
        "max_tokens": 8,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=RUN_S) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    return text
