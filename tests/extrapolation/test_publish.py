"""The protocol of a published model: claim, receipts, manifest last; with runs that race, are killed, or come back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expo_ray.config import Pair
from expo_ray.errors import OutputError
from expo_ray.extrapolation import in_threads, stream
from expo_ray.extrapolation.in_threads import InThreads
from expo_ray.extrapolation.model_folder import ModelFolder
from expo_ray.extrapolation.plan_job import JobPlan, plan_job
from expo_ray.extrapolation.publish import publish
from expo_ray.extrapolation.run_job import Outcome, run_job
from expo_ray.extrapolation.shard import extrapolate_shard
from expo_ray.progress import Progress
from expo_ray.published.verify import read_manifest, verify_files
from expo_ray.storage import open_store
from expo_ray.storage.local import LocalStore
from expo_ray.storage.local_writer import TEMP_PREFIX
from tests.support.pairs import expo, files_of, write_pair
from tests.support.paths import ROOT

SHARDS = "--shard-size 40kB"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path)


def planned(
    pair: tuple[Path, Path], out: Path, alpha: float = 0.5, name: str = "pair", *, overwrite: bool = False
) -> JobPlan:
    sft, dpo = map(str, pair)
    wanted = Pair(sft=sft, dpo=dpo, name=name, alphas=(alpha,), rounding="nearest", shard_size=40_000)
    return plan_job([wanted], [{alpha: str(out)}], overwrite=overwrite)


def run(job: JobPlan) -> Outcome:
    with Progress("extrapolate", quiet=True) as progress, InThreads(progress, device="cpu") as executor:
        return run_job(job, executor, progress)


def model_of(folder: Path) -> dict[str, bytes]:
    """Files that readers see: everything but the bookkeeping of runs, and what a killed one left behind."""
    files = files_of(folder)
    return {key: data for key, data in files.items() if not key.startswith((".expo/", TEMP_PREFIX))}


def is_whole(folder: Path) -> bool:
    store = open_store(str(folder))
    manifest = read_manifest(store)
    assert manifest is not None
    return not verify_files(store, manifest)


def at_once(*work: Callable[[], Outcome]) -> list[Outcome | Exception]:
    """Run all at the same moment; the result or error of each."""
    barrier = threading.Barrier(len(work))
    outcomes: list[Outcome | Exception] = [Outcome()] * len(work)

    def run(index: int) -> None:
        barrier.wait()
        try:
            outcomes[index] = work[index]()
        except Exception as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Number of times that this process has written each shard."""
    count: Counter[str] = Counter()
    real = extrapolate_shard

    def counting(plan, index, alphas, **options):  # type: ignore[no-untyped-def]
        count.update({f"{alpha} {plan.shards[index].file}": 1 for alpha in alphas})
        return real(plan, index, alphas, **options)

    monkeypatch.setattr(in_threads, "extrapolate_shard", counting)
    return count


# Resume


def shard_names(out: Path) -> list[str]:
    return sorted(file.name for file in out.glob("*.safetensors"))


def unpublish(out: Path) -> None:
    (out / "expo.json").unlink()


@pytest.mark.parametrize(
    "harm", ["shard gone", "receipt gone", "receipt damaged", "receipt of another shard", "shard cut"]
)
def test_only_what_is_missing_is_written_again(
    tmp_path: Path, pair: tuple[Path, Path], written: Counter[str], harm: str
) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert expo(*pair, fresh, 0.5, more=SHARDS) == 0
    assert expo(*pair, out, 0.5, more=SHARDS) == 0
    assert model_of(out) == model_of(fresh)
    unpublish(out)
    shard = out / shard_names(out)[1]
    receipts = sorted(out.glob(".expo/*/*.json"))
    match harm:
        case "shard gone":
            shard.unlink()
        case "shard cut":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "receipt gone":
            receipts[1].unlink()
        case "receipt damaged":
            receipts[1].write_text('{"size": 1}')
        case "receipt of another shard":
            receipts[1].write_bytes(receipts[0].read_bytes())
    written.clear()
    assert expo(*pair, out, 0.5, more=SHARDS) == 0
    assert written == {f"0.5 {shard.name}": 1}
    assert model_of(out) == model_of(fresh)


def test_one_alpha_of_several_is_made_up_for(
    tmp_path: Path, pair: tuple[Path, Path], written: Counter[str]
) -> None:
    out = tmp_path / "out"
    assert expo(*pair, out, 0.5, 1, more=SHARDS) == 0
    before = model_of(out / "alpha=1")
    lost = shard_names(out / "alpha=1")[2]
    unpublish(out / "alpha=1")
    (out / "alpha=1" / lost).unlink()
    written.clear()
    assert expo(*pair, out, 0.5, 1, 2, more=SHARDS) == 0
    count = len(shard_names(out / "alpha=1"))
    assert written[f"1.0 {lost}"] == 1
    assert Counter(key.split()[0] for key in written) == {"1.0": 1, "2.0": count}
    assert model_of(out / "alpha=1") == before
    assert is_whole(out / "alpha=2")


@pytest.mark.parametrize(
    "lost", ["model-00002-of-00006.safetensors", "config.json", "model.safetensors.index.json", "README.md"]
)
def test_a_published_model_that_lost_a_file_is_completed(
    tmp_path: Path, pair: tuple[Path, Path], written: Counter[str], lost: str
) -> None:
    out = tmp_path / "out"
    assert expo(*pair, out, 0.5, more=SHARDS) == 0
    before = model_of(out)
    assert lost in before
    (out / lost).unlink()
    written.clear()
    assert expo(*pair, out, 0.5, more=SHARDS) == 0
    assert model_of(out) == before
    assert set(written) == ({f"0.5 {lost}"} if lost.endswith(".safetensors") else set())


def test_a_published_model_may_be_moved_and_is_not_written_again(
    tmp_path: Path, pair: tuple[Path, Path], written: Counter[str]
) -> None:
    assert expo(*pair, tmp_path / "out", 0.5, more=SHARDS) == 0
    copied = tmp_path / "copied"
    subprocess.run(["cp", "-r", str(tmp_path / "out"), str(copied)], check=True)
    written.clear()
    assert expo(*pair, copied, 0.5, more=SHARDS) == 0
    assert not written


def test_a_manifest_that_cannot_be_read_is_reported(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert expo(*pair, out, 0.5) == 0
    (out / "expo.json").write_text("{")
    assert expo(*pair, out, 0.5) == 2
    assert f"{out}/expo.json: not valid JSON" in capsys.readouterr().err

    assert expo(*pair, out, 0.5, more="--overwrite") == 0
    assert is_whole(out)


# Races


def test_two_runs_of_one_plan_both_finish(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    fresh = tmp_path / "fresh"
    assert not run(planned(pair, fresh)).failures
    for attempt in range(8):
        out = tmp_path / f"out-{attempt}"
        jobs = [planned(pair, out) for _ in range(3)]
        outcomes = at_once(*(lambda job=job: run(job) for job in jobs))
        for outcome in outcomes:
            assert isinstance(outcome, Outcome), outcome
            assert not outcome.failures
            assert [model.uri for model in outcome.published] == [str(out)]
        assert model_of(out) == model_of(fresh)
        assert not list(out.glob(f"{TEMP_PREFIX}*"))


def test_twins_that_name_pair_and_parents_differently_publish_one_whole_model(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    links = []
    for parent in pair:
        links.append(tmp_path / f"link-to-{parent.name}")
        links[-1].symlink_to(parent)
    for attempt in range(8):
        out = tmp_path / f"out-{attempt}"
        jobs = planned(pair, out), planned((links[0], links[1]), out, name="twin")
        outcomes = at_once(*(lambda job=job: run(job) for job in jobs))
        assert all(isinstance(outcome, Outcome) and not outcome.failures for outcome in outcomes), outcomes
        assert is_whole(out)


def test_a_shard_that_a_twin_wrote_again_is_taken_if_its_bytes_are_the_same(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    job = planned(pair, out)
    assert not run(job).failures
    before = model_of(out)
    shard = out / shard_names(out)[0]
    unpublish(out)
    shard.write_bytes(shard.read_bytes())  # another time, so another ETag than in the receipt
    publish(ModelFolder(job.pairs[0], 0.5))
    assert model_of(out) == before
    unpublish(out)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        OutputError,
        match=r"1 shard\(s\) are missing or changed \(model-00001-of-00006.safetensors\); run the",
    ):
        publish(ModelFolder(job.pairs[0], 0.5))
    assert not (out / "expo.json").exists()


def test_of_two_plans_exactly_one_wins_and_the_other_names_both(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    for attempt in range(10):
        out = tmp_path / f"out-{attempt}"
        jobs = [planned(pair, out, alpha) for alpha in (0.5, 1)]
        outcomes = at_once(*(lambda job=job: run(job) for job in jobs))
        losers = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        winner = next(outcome for outcome in outcomes if isinstance(outcome, Outcome))
        assert len(losers) == 1
        assert isinstance(losers[0], OutputError)
        assert not winner.failures
        claimed = re.search(r"was claimed by another job \(plan (\w+), this one is (\w+)\)", str(losers[0]))
        assert claimed
        ids = [job.pairs[0].plan_id(alpha) for job, alpha in zip(jobs, (0.5, 1), strict=True)]
        assert claimed[1] == winner.published[0].plan_id
        assert set(claimed.groups()) == set(ids)
        assert is_whole(out)


def test_a_run_whose_output_was_overwritten_meanwhile_does_not_publish(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    slow = planned(pair, out)
    assert not run(slow).failures
    unpublish(out)
    assert expo(*pair, out, 1, more=f"{SHARDS} --overwrite") == 0
    with pytest.raises(OutputError, match="was claimed by another job"):
        publish(ModelFolder(slow.pairs[0], 0.5))
    assert is_whole(out)


def test_a_run_that_lives_on_does_not_write_into_the_model_that_replaces_its_own(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert not run(planned(pair, fresh, 1)).failures
    add = Progress.add
    begun = threading.Event()

    def replacing(self: Progress, **counts: int) -> None:
        add(self, **counts)
        if not begun.is_set() and shard_names(out):
            begun.set()
            assert not run(planned(pair, out, 1, overwrite=True)).failures

    monkeypatch.setattr(Progress, "add", replacing)
    outcome = run(planned(pair, out))
    assert "was claimed by another job" in str(outcome.failures["pair alpha=0.5"])
    assert model_of(out) == model_of(fresh)
    assert is_whole(out)


@pytest.mark.parametrize("rival", [None, 1.0])
def test_a_claim_that_a_failed_twin_takes_back_is_renewed_unless_another_plan_is_faster(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, rival: float | None
) -> None:
    out = tmp_path / "out"
    job = planned(pair, out)
    add = Progress.add
    begun = threading.Event()

    def losing(self: Progress, **counts: int) -> None:
        add(self, **counts)
        if not begun.is_set():
            begun.set()
            ModelFolder(job.pairs[0], 0.5).release()
            if rival:
                assert not run(planned(pair, out, rival)).failures

    monkeypatch.setattr(Progress, "add", losing)
    outcome = run(job)
    assert begun.is_set()
    if rival:
        assert "was claimed by another job" in str(outcome.failures["pair alpha=0.5"])
    else:
        assert not outcome.failures
    assert is_whole(out)
    assert json.loads((out / "expo.json").read_text())["alpha"] == (rival or 0.5)
    assert expo(*pair, out, rival or 0.5, more=SHARDS) == 0  # whose claim it is, is known


def test_what_was_stored_keeps_its_claim(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    mine, other = planned(pair, out).pairs[0], planned(pair, out, 1).pairs[0]
    ModelFolder(mine, 0.5).claim()
    ModelFolder(other, 1).release()
    assert list(files_of(out)) == [".expo/claim.json"]
    (out / "model-00001-of-00006.safetensors").touch()
    ModelFolder(mine, 0.5).release()
    assert len(files_of(out)) == 2


def test_a_job_that_loses_one_output_lets_go_of_the_others(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    sft, dpo = map(str, pair)
    wanted = Pair(sft=sft, dpo=dpo, name="pair", alphas=(0.5, 1))
    job = plan_job([wanted], [{alpha: str(tmp_path / f"out-{alpha}") for alpha in (0.5, 1)}])
    assert not run(planned(pair, tmp_path / "out-1", 0.3)).failures
    with pytest.raises(OutputError, match="was claimed by another job"):
        run(job)
    assert files_of(tmp_path / "out-0.5") == {}


def test_what_was_put_there_after_planning_survives_an_overwrite(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    assert expo(*pair, out, 0.5, more=SHARDS) == 0
    job = planned(pair, out, 1, overwrite=True)
    (out / "notes.txt").write_text("mine")
    assert not run(job).failures
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert is_whole(out)


def test_two_processes_race_for_one_output(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    sft, dpo = map(str, pair)

    def start(alpha: str, out: str) -> subprocess.Popen[str]:
        words = ["extrapolate", "--sft", sft, "--dpo", dpo, "--alpha", alpha, "--output", str(tmp_path / out)]
        return subprocess.Popen(
            [sys.executable, "-m", "expo_ray.cli", *words, *SHARDS.split()],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    runs = [start("0.5", "same"), start("0.5", "same"), start("0.5", "other"), start("1", "other")]
    said = [process.communicate()[1] for process in runs]
    codes = [process.returncode for process in runs]
    assert codes[:2] == [0, 0], said
    assert sorted(codes[2:]) == [0, 2], said
    loser = said[2 + codes[2:].index(2)]
    assert "was claimed by another job" in loser or "of another plan" in loser
    assert is_whole(tmp_path / "same")
    assert is_whole(tmp_path / "other")


def test_a_probe_that_a_killed_job_left_behind_is_no_foreign_file(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    out = tmp_path / "out"
    (out / ".expo").mkdir(parents=True)
    (out / ".expo" / "probe-0123").write_bytes(b"first")
    assert expo(*pair, out, 0.5) == 0
    assert is_whole(out)


# Killed at any moment


@pytest.fixture
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves half the time; what a machine without power loses is not tested here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


KILLED_EVERYWHERE = """
import os, pathlib, signal, sys

from expo_ray.arithmetic.cpu import kernel  # a child would load it anew each time
from expo_ray.cli import process
from expo_ray.extrapolation import in_threads

root, log, words = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
moment = 0


def fatal(owner, name):
    '''Kill the process before or after a call.'''
    real = getattr(owner, name)

    def dying(*arguments, **options):
        pass_moment()
        result = real(*arguments, **options)
        pass_moment()
        return result

    setattr(owner, name, dying)


def pass_moment():
    global moment
    moment += 1
    if moment == deadly:
        os.kill(os.getpid(), signal.SIGKILL)


def counting(plan, index, alphas, **options):
    with open(log, "a") as file:
        print(root.name, deadly, plan.shards[index].file, file=file)
    return real_shard(plan, index, alphas, **options)


real_shard = in_threads.extrapolate_shard
in_threads.extrapolate_shard = counting
fatal(pathlib.Path, "replace")
fatal(pathlib.Path, "unlink")
fatal(os, "link")
fatal(os, "write")
os.fsync = lambda fd: None  # a killed process loses nothing that it wrote
deadly = 1
while True:
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(process.main([word.replace("OUT", str(root / f"killed-{deadly}")) for word in words]))
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status), f"moment {deadly}: exit status {status}"
    deadly += STRIDE
print(deadly)
"""


def killed_everywhere(root: Path, words: list[str], stride: int) -> Iterator[Path]:
    """Outputs of runs that were killed at their first, second, third ... moment, until one was not."""
    code = KILLED_EVERYWHERE.replace("STRIDE", str(stride))
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), str(root / "log"), *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    assert last > 30
    for moment in range(1, last, stride):
        yield root / f"killed-{moment}"


@pytest.mark.usefixtures("_no_fsync")
def test_a_job_killed_at_any_moment_leaves_no_torn_model_and_is_finished_by_a_second_run(
    tmp_path: Path, pair: tuple[Path, Path], written: Counter[str]
) -> None:
    fresh = tmp_path / "fresh"
    assert expo(*pair, fresh, 0.5, more=SHARDS) == 0
    words = ["extrapolate", "--sft", str(pair[0]), "--dpo", str(pair[1]), "--alpha", "0.5", "--output", "OUT"]
    root = tmp_path / "killed"
    root.mkdir()
    shards = len(shard_names(fresh))
    published = 0
    for out in killed_everywhere(root, [*words, "--rounding", "nearest", *SHARDS.split()], stride=9):
        if (out / "expo.json").exists():
            published += 1
            assert model_of(out) == model_of(fresh)
        begun = (root / "log").read_text().count(f" {out.name.partition('-')[2]} model-")
        written.clear()
        assert expo(*pair, out, 0.5, more=SHARDS) == 0
        assert model_of(out) == model_of(fresh)
        twice = begun + written.total() - shards
        assert 0 <= twice <= InThreads(Progress("extrapolate", quiet=True), device="cpu").slots
    assert published <= 2  # the manifest comes last: only a kill right after it finds it there


@pytest.mark.usefixtures("_no_fsync")
def test_an_overwrite_killed_at_any_moment_leaves_the_old_model_the_new_one_or_none(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert expo(*pair, old, 0.5, more=SHARDS) == 0
    assert expo(*pair, new, 1, more="--shard-size 60kB") == 0
    root = tmp_path / "killed"
    root.mkdir()
    for moment in range(1, 400, 9):
        subprocess.run(["cp", "-r", str(old), str(root / f"killed-{moment}")], check=True)
    words = ["extrapolate", "--sft", str(pair[0]), "--dpo", str(pair[1]), "--alpha", "1", "--output", "OUT"]
    seen = Counter[str]()
    for out in killed_everywhere(
        root, [*words, "--rounding", "nearest", "--shard-size", "60kB", "--overwrite"], stride=9
    ):
        if (out / "expo.json").exists():
            which = "old" if json.loads((out / "expo.json").read_text())["alpha"] == 0.5 else "new"
            assert model_of(out) == model_of(old if which == "old" else new)
        else:
            which = "none"
        seen[which] += 1
        assert expo(*pair, out, 1, more="--shard-size 60kB --overwrite") == 0
        assert model_of(out) == model_of(new)
    assert seen["old"] >= 1
    assert seen["none"] > 7


def test_a_job_that_is_stopped_removes_what_it_had_begun(
    tmp_path: Path,
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    add = Progress.add
    stopped = threading.Event()

    def stopping(self: Progress, **counts: int) -> None:
        add(self, **counts)
        if not stopped.is_set() and list(out.glob(f"{TEMP_PREFIX}*")):
            stopped.set()
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Progress, "add", stopping)
            patch.setattr(LocalStore, "chunk_bytes", 256)
            patch.setattr(stream, "PAGE_BYTES", 256)
            assert expo(*pair, out, 0.5, more=SHARDS) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted; run the same command again to go on where it stopped" in capsys.readouterr().err
    assert not list(out.glob(f"{TEMP_PREFIX}*"))
    assert not (out / "expo.json").exists()
    assert expo(*pair, out, 0.5, more=SHARDS) == 0
    assert is_whole(out)


def test_readers_never_see_the_manifest_before_the_rest(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at after every change of the folder, as a reader in another process would."""
    out = tmp_path / "out"
    seen = []
    replace, link = Path.replace, os.link

    def look() -> None:
        if (out / "expo.json").exists():
            seen.append(is_whole(out))

    def replacing(self: Path, target: Path) -> Path:
        path = replace(self, target)
        look()
        return path

    def linking(source: Path, target: Path) -> None:
        link(source, target)
        look()

    monkeypatch.setattr(Path, "replace", replacing)
    monkeypatch.setattr(os, "link", linking)
    assert expo(*pair, out, 0.5, more=SHARDS) == 0
    assert seen == [True]
