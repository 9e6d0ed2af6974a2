"""Canaries in every place where people keep secrets: no command prints or writes one, whether it fails or succeeds."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

from examples.local_s3 import ACCESS_KEY, SECRET_KEY, SeaweedFS
from expo_ray.config.fields import named_after
from expo_ray.report.results_file import results_json
from tests.support.fake_endpoint import FakeEndpoint, fake_endpoint
from tests.support.hub_server import TOKEN, HubServer, Repository
from tests.support.pairs import files_of, write_pair
from tests.support.sample_results import sample_results

# Ten commands in one process import Ray and more, which takes its time on a busy machine.
pytestmark = pytest.mark.timeout(1200)

PASSWORD, SIGNATURE, API_KEY = "CANARY/pass&word", "CANARYsignature%2Bx%3D", "sk-CANARYapikey"
SESSION, PROXY, JOB_TOKEN = "CANARYsession+token/==", "CANARYproxy", "CANARYjobtoken"
BAD_KEY = "CANARYbad-secret-key"
CANARIES = (
    PASSWORD,
    SIGNATURE,
    API_KEY,
    SESSION,
    PROXY,
    JOB_TOKEN,
    BAD_KEY,
    SECRET_KEY,
    ACCESS_KEY,
    TOKEN,
    "CANARY",
)
USER = f"user:{quote(PASSWORD, safe='')}@"
BAD_URLS = (
    f"https://{USER}bucket/x.jsonl",
    f"s3://{USER}bucket/x.jsonl",
    f"https://bucket/x.jsonl?X-Amz-Credential=CANARYid&X-Amz-Signature={SIGNATURE}",
    f"s3://bucket/x.jsonl?X-Amz-Signature={SIGNATURE}",
    f"hf://{USER}org/x.jsonl",
    f"file://{USER}host/x.jsonl",
    f"user:{quote(PASSWORD, safe='')}@host/x.jsonl",
    f"https://b/x.jsonl#X-Amz-Signature={SIGNATURE}",
)


# Modules are imported once; a command that ends in an exception shows it as its own process would.
_RUN = """
import json, sys
from expo_ray.cli.process import main
from expo_ray.storage import forget_stores
commands, sys.argv[1:] = json.loads(sys.argv[1]), []
for words in commands:
    forget_stores()
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    print("\\nstatus:", status, flush=True)
"""


def forms(canary: str) -> Iterator[bytes]:
    """The canary as it is, percent-encoded, as Python and JSON write it, and in base64, alone and behind a user."""
    data = canary.encode()
    yield from (data, quote(canary).encode(), quote(canary, safe="").encode(), repr(canary)[1:-1].encode())
    yield json.dumps(canary)[1:-1].encode()
    yield from (base64.b64encode(data).rstrip(b"="), base64.b64encode(b"user:" + data).rstrip(b"="))


def canaries_in(data: bytes) -> set[str]:
    return {canary for canary in CANARIES if any(form in data for form in forms(canary))}


@dataclass
class World:
    """Servers, files and an environment full of secrets."""

    folder: Path
    s3: SeaweedFS
    hub: HubServer
    endpoint: FakeEndpoint
    sft: Path
    dpo: Path
    planted: set[Path] = field(default_factory=set)
    said: bytes = b""

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "HF_", "OPENAI"))
        }
        return kept | {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY + "\n",  # as mounted secrets end
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": self.s3.endpoint.replace("//", f"//{USER}"),
            "AWS_CONFIG_FILE": str(self.folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "none"),
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "EXPO_RAY_CACHE": str(self.folder / "cache"),
            "OPENAI_API_KEY": API_KEY + "\n",
        }

    def plant(self, name: str, text: str) -> str:
        """A file with secrets that the user wrote, which is not searched."""
        path = self.folder / name
        path.write_text(text)
        self.planted.add(path)
        return str(path)

    def run(self, *commands: tuple[object, ...], **environment: str) -> list[int]:
        """Exit statuses of commands, run in one process; canaries in what they printed and wrote are looked for."""
        words = json.dumps([list(map(str, command)) for command in commands])
        ended = subprocess.run(
            [sys.executable, "-c", _RUN, words],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=1100,
        )
        said = ended.stdout + ended.stderr
        assert canaries_in(said) == set(), said.decode()
        assert b"Traceback" not in said, said.decode()
        assert self.written() == {}
        statuses = [int(line[8:]) for line in ended.stdout.splitlines() if line.startswith(b"status: ")]
        assert len(statuses) == len(commands), said.decode()
        self.said = said
        return statuses

    def written(self) -> dict[str, set[str]]:
        """Canaries in names and contents of all files here, in the bucket and on the Hub."""
        files = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and path not in self.planted
        }
        bucket = self.s3.client()
        for entry in bucket.list_objects_v2(Bucket=self.s3.bucket, Prefix="secrets/").get("Contents", []):
            files[entry["Key"]] = bucket.get_object(Bucket=self.s3.bucket, Key=entry["Key"])["Body"].read()
        for name, repository in self.hub.repositories.items():
            files |= {
                f"{name}/{key}": data for commit in repository.files.values() for key, data in commit.items()
            }
        return {
            name: seen for name, data in files.items() if (seen := canaries_in(name.encode() + b"\n" + data))
        }


@pytest.fixture
def world(tmp_path: Path, s3_server: SeaweedFS) -> Iterator[World]:
    sft, dpo = write_pair(tmp_path / "pair")
    with ExitStack() as stack:
        hub = stack.enter_context(HubServer())
        hub.repositories["org/dpo"] = Repository({"a" * 40: files_of(dpo)}, {"main": "a" * 40}, private=True)
        endpoint = stack.enter_context(fake_endpoint("m"))
        endpoint.key = API_KEY
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
        yield World(tmp_path, s3_server, hub, endpoint, sft, dpo)
        bucket = s3_server.client()
        for entry in bucket.list_objects_v2(Bucket=s3_server.bucket, Prefix="secrets/").get("Contents", []):
            bucket.delete_object(Bucket=s3_server.bucket, Key=entry["Key"])


@pytest.mark.s3
@pytest.mark.slow
def test_commands_that_succeed_keep_every_secret(world: World) -> None:
    out = f"s3://{world.s3.bucket}/secrets/out"
    job = json.dumps(
        {"output": f"s3://{world.s3.bucket}/secrets/job",
         "pairs": [{"name": "p", "sft": str(world.sft), "dpo": "hf://org/dpo", "alphas": [0.5]}]}
    )  # fmt: skip
    (world.folder / "job.yaml").write_text(job)
    (world.folder / "run").mkdir()
    (world.folder / "run" / "results.json").write_bytes(results_json(sample_results()))
    model = f"{world.endpoint.url}/v1"
    statuses = world.run(
        ("extrapolate", "--sft", world.sft, "--dpo", "hf://org/dpo", "--alpha", "0.5", "--output", out),
        ("verify", out),
        ("verify", out, "--sft", world.sft, "--dpo", "hf://org/dpo"),
        ("plan", "job.yaml"),
        ("respond", "--model", model, "--prompts", "prompts.jsonl", "--output", f"s3://{world.s3.bucket}/secrets/r.jsonl"),
        ("report", "run"),
        ("push", out, "org/made"),
        ("schema",),
    )  # fmt: skip
    assert statuses == [0] * 8, world.said.decode()
    assert len(world.endpoint.chats) == 1
    assert "org/made" in world.hub.repositories


@pytest.mark.s3
def test_secrets_in_arguments_are_neither_printed_nor_written(world: World) -> None:
    commands = [
        command
        for url in BAD_URLS
        for command in (
            ("extrapolate", "--sft", url, "--dpo", url, "--alpha", "0.5", "--output", url),
            ("verify", url),
            ("push", url, "org/made"),
            ("respond", "--model", url, "--prompts", url, "--output", url),
            ("reward", "--responses", url, "--reward-model", url, "--output", url),
            ("report", url, url),
        )
    ]
    for command, status in zip(commands, world.run(*commands), strict=True):
        assert status == 2, command


@pytest.mark.s3
def test_secrets_in_job_files_are_neither_printed_nor_written(world: World) -> None:
    pair = {"name": "p", "sft": str(world.sft), "dpo": str(world.dpo), "alphas": [0.5]}
    jobs = [
        {"output": BAD_URLS[1], "pairs": [pair | {"name": f"u:{PASSWORD}@h"}]},
        {"output": "out", "pairs": [pair | {"sft": url, "dpo": url, "name": None} for url in BAD_URLS]},
        {"output": "out", "pairs": [pair], "prompts": [{"source": url} for url in BAD_URLS],
         "rewards": [{"model": url} for url in BAD_URLS], "models": [{"uri": url} for url in BAD_URLS]},
        {"output": "out", "pairs": [pair | {"hf_token": JOB_TOKEN}], "password": JOB_TOKEN, "seed": JOB_TOKEN},
        {"output": "out", "pairs": [pair | {"alphas": JOB_TOKEN, "rounding": BAD_URLS[0]}], "token": JOB_TOKEN},
    ]  # fmt: skip
    paths = [world.plant(f"job{number}.yaml", json.dumps(job)) for number, job in enumerate(jobs)]
    paths.append(world.plant("bad.yaml", f"output: [{BAD_URLS[0]}\n  x"))
    others: list[tuple[object, ...]] = [
        ("run", paths[2], "--dry-run"), ("serve", paths[2]), ("respond", paths[2]), ("reward", paths[2]),
    ]  # fmt: skip
    assert set(world.run(*(("plan", path) for path in paths), *others)) == {2}


@pytest.mark.s3
@pytest.mark.parametrize(
    "environment",
    [
        {"AWS_ENDPOINT_URL": f"http://{USER}127.0.0.1:9"},
        {"AWS_ENDPOINT_URL": f"{USER}127.0.0.1:9"},
        {"AWS_ENDPOINT_URL": f"http://127.0.0.1:9/?X-Amz-Signature={SIGNATURE}"},
        {"AWS_SECRET_ACCESS_KEY": BAD_KEY},
        {"AWS_ACCESS_KEY_ID": "CANARYunknown"},
        {"AWS_SESSION_TOKEN": f"{SESSION}\nX-Header: {SESSION}"},
        {"AWS_SESSION_TOKEN": f"{SESSION}\u2028\u00e9"},
        {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": "broken"},
        {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": "wrong"},
        {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_CONFIG_FILE": "process"},
        {"HTTP_PROXY": f"http://user:{PROXY}@127.0.0.1:9", "AWS_ENDPOINT_URL": "http://s3.example.invalid"},
    ],
    ids=str,
)
def test_a_store_that_fails_keeps_every_secret(world: World, environment: dict[str, str]) -> None:
    key = "aws_secret_access_key"
    files = {
        "broken": world.plant("broken", f"[default\n{key} = {BAD_KEY}\n"),
        "wrong": world.plant("wrong", f"[default]\naws_access_key_id = CANARYid\n{key} = {BAD_KEY}\n"),
        "process": world.plant("process", f"[default]\ncredential_process = echo {BAD_KEY}\n"),
    }
    environment = {name: files.get(value, value) for name, value in environment.items()}
    out = f"s3://{world.s3.bucket}/secrets/out"

    words = ("extrapolate", "--sft", world.sft, "--dpo", world.dpo, "--alpha", "0.5", "--output", out)
    assert world.run(("verify", out), words, **environment) == [2, 2]


@pytest.mark.s3
@pytest.mark.parametrize(
    "environment",
    [
        {"HF_ENDPOINT": f"http://{USER}127.0.0.1:9"},
        {"HF_TOKEN": "hf_CANARYunknowntoken"},
        {"HF_TOKEN": "hf_CANARY\u00e9unknowntoken"},
        {"HF_TOKEN": "", "HF_TOKEN_PATH": "token"},
        {"HTTP_PROXY": f"http://user:{PROXY}@127.0.0.1:9", "HF_ENDPOINT": "http://hub.example.invalid"},
    ],
    ids=str,
)
def test_a_hub_that_fails_keeps_every_secret(world: World, environment: dict[str, str]) -> None:
    token = world.plant("token", "hf_CANARYfromfile\n")
    environment = {name: token if value == "token" else value for name, value in environment.items()}
    words = ("extrapolate", "--sft", world.sft, "--dpo", "hf://org/dpo", "--alpha", "0.5", "--output", "o")

    assert world.run(words, ("push", world.dpo, "org/made"), **environment) == [2, 2]


@pytest.mark.s3
@pytest.mark.parametrize("key", ["sk-CANARYwrong", "sk-CANARY\u00e9", "sk-CANARY\nX-Header: y", API_KEY])
def test_an_endpoint_that_fails_keeps_every_secret(world: World, key: str) -> None:
    url = world.endpoint.url
    world.endpoint.failing = lambda body: (400, f"Bearer {API_KEY} was refused, so was {key}")
    models = (
        url,
        url.replace("//", f"//{USER}"),
        f"http://{USER}127.0.0.1:9",
        f"{url}/v1?api_key=CANARYquery",
        f"http://{USER}[::1",
    )

    statuses = world.run(
        *(
            ("respond", "--model", model, "--prompts", "prompts.jsonl", "--output", "r.jsonl")
            for model in models
        ),
        OPENAI_API_KEY=key,
    )

    assert set(statuses) <= {1, 2}
    assert (b"was refused" in world.said) == (key == API_KEY)


def test_the_search_for_canaries_finds_every_form(tmp_path: Path) -> None:
    for canary in CANARIES:
        for form in forms(canary):
            assert canary in canaries_in(b"before " + form + b" after")


@pytest.mark.parametrize("url", BAD_URLS)
def test_nothing_is_named_after_a_secret(url: str) -> None:
    assert canaries_in(named_after({"dpo": url}, "dpo")["name"].encode()) == set()
