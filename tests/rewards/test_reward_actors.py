"""`expo-ray reward` on its own Ray: whatever is killed, every response is scored exactly once."""

from __future__ import annotations

import contextlib
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from expo_ray.cli.process import main
from expo_ray.config import Sampling
from expo_ray.evaluation.records import (
    Response,
    Reward,
    digest,
    response_from_row,
    reward_from_row,
    scored_digest,
)
from expo_ray.evaluation.rewards.reward_file import RewardFile
from expo_ray.evaluation.rewards.reward_function import load_function
from expo_ray.evaluation.row_store import RowStore, rows_text
from expo_ray.storage import open_store
from tests.support.disks import disk, remount
from tests.support.ray_cluster import Process, RayBox, ended, wait_until
from tests.support.tiny_reward_models import (
    TURNS,
    byte_tokenizer,
    last_token_scores,
    rename_head,
    response,
    save_reward_model,
)

# Several Rays are started one after the other, which takes minutes on a busy machine.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

RESPONSES = 500
# Every call leaves a line: whose response, and which process scored it. Where a file `slow` is, it takes ten times as long.
SLOW = """
import os, time

def length(prompt, response):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(f"{prompt} {os.getpid()}\\n")
    time.sleep(0.1 if os.path.exists(os.environ["SLOW"]) else 0.01)
    if response == "raise":
        raise LookupError("not this one")
    return float("inf") if response == "infinite" else len(response)
"""


@pytest.fixture
def box() -> Iterator[RayBox]:
    with RayBox() as box:
        (box.folder / "slow_rewards.py").write_text(SLOW)
        box.environment |= {
            "CALLS": str(box.folder / "calls"),
            "SLOW": str(box.folder / "slow"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        yield box


def reward(box: RayBox, *words: object) -> Process:
    return box.run("expo-ray", "reward", *map(str, words))


def calls(box: RayBox) -> list[list[str]]:
    file = box.folder / "calls"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def prompts() -> dict[str, Response]:
    """Responses by prompt; the text of each has its own length."""
    return {f"q{number}": response(f"q{number}", "x" * number) for number in range(RESPONSES)}


def job(box: RayBox, rows: list[Response], rewards: list[dict[str, object]]) -> tuple[Path, Path]:
    """A job file whose responses are stored already, and the folder of their origin."""
    output = box.folder / "out"
    sampling = Sampling().model_dump(mode="json", exclude={"samples"})
    origin = output / "evaluation" / "m" / digest(sampling)
    RowStore(open_store(str(origin)), "responses", response_from_row).write(rows)
    (origin / "about.json").write_text(json.dumps({"sampling": sampling}))
    (box.folder / "prompts.txt").write_text("\n".join(str(row.messages[-1]["content"]) for row in rows))
    data = {
        "output": str(output),
        "models": [{"name": "m", "uri": "unused"}],
        "prompts": [{"source": "prompts.txt"}],
        "rewards": rewards,
    }
    file = box.folder / "job.yaml"
    file.write_text(yaml.safe_dump(data))
    return file, origin


def stored(origin: Path) -> list[tuple[str, float]]:
    """Every stored row, repeated ones too."""
    files = (origin / "rewards").glob("*/*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [(row["prompt_id"], row["reward"]) for row in rows]


def test_an_actor_that_dies_costs_no_response(box: RayBox) -> None:
    rows = prompts()
    file = box.folder / "responses.jsonl"
    file.write_text(rows_text(rows.values()))
    run = reward(
        box, "--responses", file, "--reward-model", "python:slow_rewards:length", "--output", "r.jsonl"
    )
    wait_until(lambda: len(calls(box)) > 100 or not run.running, "a fifth is scored")
    victim = int(calls(box)[-1][1])
    assert any(child.pid == victim for child in run.descendants())
    psutil.Process(victim).kill()
    assert run.wait() == 0, run.stderr
    assert "another takes over" in run.stderr
    written = [json.loads(line) for line in (box.folder / "r.jsonl").read_text().splitlines()]
    assert {row["prompt_id"]: row["reward"] for row in written} == {
        row.prompt_id: len(row.text) for row in rows.values()
    }
    assert len(written) == RESPONSES
    assert len({pid for _, pid in calls(box)}) == 2
    # At most the two batches that the dead actor had been given were scored twice.
    assert RESPONSES <= len(calls(box)) <= RESPONSES + 128


def test_a_killed_driver_scores_nothing_again_that_is_stored(box: RayBox) -> None:
    rows = prompts()
    file, origin = job(box, list(rows.values()), [{"model": "python:slow_rewards:length"}])
    (box.folder / "slow").touch()
    first = reward(box, file)
    wait_until(lambda: stored(origin) or not first.running, "some rewards are stored")
    its_ray = first.descendants()
    first.signal(signal.SIGKILL)
    first.wait()
    for process in its_ray:  # its actor would go on for a moment, and be counted
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait_until(lambda: all(map(ended, its_ray)), "its Ray has ended")
    kept = {prompt_id for prompt_id, _ in stored(origin)}
    assert 0 < len(kept) < RESPONSES
    (box.folder / "slow").unlink()
    before = len(calls(box))
    second = reward(box, file)
    assert second.wait() == 0, second.stderr
    by_id = {row.prompt_id: name for name, row in rows.items()}
    again = Counter(prompt for prompt, _ in calls(box)[before:])
    assert set(again) == set(rows) - {by_id[prompt_id] for prompt_id in kept}
    assert set(again.values()) == {1}
    assert sorted(stored(origin)) == sorted((row.prompt_id, float(len(row.text))) for row in rows.values())


def test_a_job_prints_the_mean_rewards_of_each_reward_model(box: RayBox) -> None:
    rows = [response(f"q{number}", "word " * number) for number in range(12)]
    model = save_reward_model(box.folder / "rm")
    file, origin = job(
        box,
        [*rows, response("of another set", "text")],
        [
            {"model": "rm", "backend": "transformers"},
            {"model": "python:slow_rewards:length", "name": "length", "replicas": 2},
        ],
    )
    (box.folder / "prompts.txt").write_text("\n".join(str(row.messages[-1]["content"]) for row in rows))
    run = reward(box, file)
    assert run.wait() == 0, run.stderr
    texts = [f"[user] q{number}</s>[assistant] {row.text}</s>" for number, row in enumerate(rows)]
    ids = [byte_tokenizer(TURNS)(text)["input_ids"] for text in texts]
    expected = sum(last_token_scores(model, ids)) / len(rows)
    by_model = {line.split()[0]: line.split() for line in run.stdout.splitlines()[1:]}
    assert by_model["rm"][1:3] == ["m", "12"]
    assert float(by_model["rm"][3]) == pytest.approx(expected, abs=1e-4)
    assert float(by_model["length"][3]) == pytest.approx(5 * 5.5)
    assert by_model["rm"][6] == "12"
    assert (origin / "rewards").is_dir()
    (folder,) = (origin / "rewards").glob("rm-*/")
    rewards = RowStore(open_store(str(folder.parent)), folder.name, reward_from_row).read()
    assert [rewards[row.key].num_tokens for row in rows] == [len(text_ids) for text_ids in ids]
    again = reward(box, file)
    assert again.wait() == 0, again.stderr
    assert [line.split()[6] for line in again.stdout.splitlines()[1:]] == ["0", "0"]


def test_responses_that_a_function_fails_on_are_named_and_the_others_kept(box: RayBox) -> None:
    rows = [response("good", "four"), response("bad", "raise"), response("huge", "infinite")]
    (box.folder / "responses.jsonl").write_text(rows_text(rows))
    words = (
        "--responses",
        "responses.jsonl",
        "--reward-model",
        "python:slow_rewards:length",
        "--output",
        "r.jsonl",
    )
    run = reward(box, *words)
    assert run.wait() == 1
    assert (
        f"prompt {rows[1].prompt_id}: python:slow_rewards:length raised LookupError: not this one"
        in run.stderr
    )
    assert f"prompt {rows[2].prompt_id}: python:slow_rewards:length returned inf" in run.stderr
    (kept,) = (json.loads(line) for line in (box.folder / "r.jsonl").read_text().splitlines())
    assert (kept["prompt_id"], kept["reward"]) == (rows[0].prompt_id, 4.0)


def test_a_function_that_ends_its_process_is_named_with_the_prompt(box: RayBox) -> None:
    (box.folder / "leaving.py").write_text(
        "import os, sys\n"
        "def leave(prompt, response):\n"
        "    if response == 'exit':\n        sys.exit(3)\n"
        "    if response == 'end':\n        os._exit(3)\n"
        "    return len(response)\n"
    )
    rows = [response("a", "four"), response("b", "exit"), response("c", "end"), response("d", "eleven word")]
    (box.folder / "responses.jsonl").write_text(rows_text(rows))
    words = (
        "--responses",
        "responses.jsonl",
        "--reward-model",
        "python:leaving:leave",
        "--output",
        "r.jsonl",
    )
    run = reward(box, *words)
    assert run.wait() == 1
    assert f"prompt {rows[2].prompt_id}" in run.stderr
    assert "look for what ends the process in python:leaving:leave" in run.stderr
    assert "Traceback" not in run.stderr
    kept = [json.loads(line) for line in (box.folder / "r.jsonl").read_text().splitlines()]
    assert {row["prompt_id"]: row["reward"] for row in kept} == {
        row.prompt_id: len(row.text) for row in (rows[0], rows[3])
    }
    (box.folder / "responses.jsonl").write_text(rows_text([rows[0], rows[1]]))
    (box.folder / "r.jsonl").unlink()
    again = reward(box, *words)
    assert again.wait() == 1
    assert f"prompt {rows[1].prompt_id}: python:leaving:leave called sys.exit(3)" in again.stderr


SHARED = """
import json, threading
from expo_ray.config import RewardModel
from expo_ray.errors import RewardError
from expo_ray.evaluation.rewards.reward_model import check_reward
from expo_ray.on_ray.cluster import cluster
from expo_ray.on_ray.rewards.pool import RewardPool
from tests.support.tiny_reward_models import response

ended, scored = [], {}

def score(name, texts):
    try:
        inputs = pool.inputs([response(f"{name}{number}", text) for number, text in enumerate(texts)])
        scored[name] = [reward.reward for batch in pool.score(inputs) for reward in batch]
    except RewardError as error:
        scored[name] = str(error)
    ended.append(name)

if __name__ == "__main__":
    with cluster(), RewardPool(check_reward(RewardModel(model="python:deadly:length", replicas=2))) as pool:
        score("first", ["x"])  # the actors are there
        threads = [
            threading.Thread(target=score, args=(name, texts))
            for name, texts in (("many", ["x" * 7] * 600), ("few", ["x" * 5] * 20), ("deadly", ["x", "end"]))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(json.dumps([ended, scored]))
"""


def test_pairs_share_the_actors_and_one_that_kills_them_fails_alone(box: RayBox) -> None:
    (box.folder / "deadly.py").write_text(
        SLOW.replace(
            'if response == "raise"',
            "if response == 'end':\n        os._exit(3)\n    if response == \"raise\"",
        )
    )
    (box.folder / "share.py").write_text(SHARED)
    run = box.run("python", str(box.folder / "share.py"))
    assert run.wait() == 0, run.stderr
    ended_in_order, scored = json.loads(run.stdout.splitlines()[-1])
    assert sorted(scored["many"]) == [7.0] * 600
    assert sorted(scored["few"]) == [5.0] * 20
    assert "actors died over the response to prompt" in scored["deadly"]
    # They do not wait for each other's rows.
    assert ended_in_order.index("few") < ended_in_order.index("many")


def test_a_full_disk_is_reported_once_and_what_is_stored_is_kept(box: RayBox) -> None:
    name = "python:slow_rewards:length"
    rows = list(prompts().values())[:200]
    (box.folder / "responses.jsonl").write_text(rows_text(rows))
    with disk(box.folder / "disk", "24k") as folder:
        output = folder / "r.jsonl"
        identity = load_function(name, str(box.folder)).identity
        about = {"model": name, "identity": identity, "backend": "auto", "dtype": "", "truncate": False}
        kept = [
            Reward(row.prompt_id, 0, -1.0, scored=scored_digest(row.messages, row.text)) for row in rows[:20]
        ]  # no length
        RewardFile(str(output), [], about | {"id": identity}).write(kept)
        before = output.read_bytes()
        words = ["--responses", "responses.jsonl", "--reward-model", name, "--output", output]
        run = reward(box, *words)
        assert run.wait() == 1
        assert run.stderr.count("failed: ") == 1
        assert f"{output}: No space left on device; free space there, or choose another output" in run.stderr
        assert "Traceback" not in run.stderr
        assert output.read_bytes() == before
        assert {path.name for path in folder.iterdir()} == {"r.jsonl", "r.jsonl.about.json"}
        remount(folder, "size=4m")
        number = len(calls(box))
        again = reward(box, *words)
        assert again.wait() == 0, again.stderr
        assert Counter(prompt for prompt, _ in calls(box)[number:]) == dict.fromkeys(
            list(prompts())[20:200], 1
        )
        written = [json.loads(line) for line in output.read_text().splitlines()]
    expected = [-1.0] * 20 + [float(len(row.text)) for row in rows[20:]]
    assert [(row["prompt_id"], row["reward"]) for row in written] == [
        (row.prompt_id, value) for row, value in zip(rows, expected, strict=True)
    ]


# --- what is wrong with the input, reported before a Ray is started


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run the command in this process; returns the problems that it reports."""
    assert main(["reward", *map(str, words)]) == 2
    errors = capsys.readouterr().err
    assert "nothing was written" in errors
    assert "started a local Ray" not in errors
    return errors


def test_everything_wrong_is_reported_at_once_before_anything_is_loaded(
    box: RayBox, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(box.folder)
    rows = [response("short", "a"), response("long", "b" * 300)]
    save_reward_model(box.folder / "rm")
    save_reward_model(box.folder / "three", num_labels=3)
    save_reward_model(box.folder / "headless")
    rename_head(box.folder / "headless", "v_head.weight")
    models = ["rm", "three", "headless", "absent", "python:slow_rewards:other"]
    file, _ = job(box, rows, [{"model": name} for name in models])
    errors = refused(capsys, file)
    for text in (
        "4 problem(s)",
        "3 by config.json label(s)",
        "absent: no such folder",
        "other does not exist",
    ):
        assert text in errors
    assert "headless: has no score head" in errors
    assert "random numbers. Give the folder of the trained reward model, with its head" in errors

    good = rows_text(rows)
    (box.folder / "good.jsonl").write_text(good)
    errors = refused(capsys, "--responses", "good.jsonl", "--reward-model", "rm", "--output", "r.jsonl")
    assert f"{rows[1].prompt_id} with" in errors
    assert "set `--truncate` to score their beginnings" in errors
    (box.folder / "bad.jsonl").write_bytes(good.encode() + b'{"prompt_id": "p"}\n\n{"prompt_id": "\xff"}\n{')
    errors = refused(capsys, "--responses", "bad.jsonl", "--reward-model", "headless", "--output", "d/")
    for text in (
        "3 problem(s)",
        "bad.jsonl: 3 bad row(s), fix or remove them",
        "headless: has no score head",
    ):
        assert text in errors
    for text in (
        "line 3: not a row that can be read (`messages`",
        "line 5: ",
        "line 6: ",
        "d/: names no file",
    ):
        assert text in errors
    assert not list(box.folder.glob("r.jsonl*"))
