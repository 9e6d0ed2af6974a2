"""Pushing to the Hub, through the real huggingface_hub, against a stand-in that takes what the Hub's write API takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from expo_ray.cli.process import main
from expo_ray.config import parse_job
from expo_ray.errors import InputChanged, OutputError, Problems, StorageError, TransientStorageError
from expo_ray.published.push import PushedModels, plan_push, push_model, push_models
from expo_ray.storage import open_store, retry
from tests.support.hub_server import READ_TOKEN, TOKEN, HubServer, Repository
from tests.support.pairs import expo, files_of, write_pair

REPO = "org/model"
PUSHED_ALONE = {".gitattributes"}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("parents"))


@pytest.fixture(scope="module")
def made(parents: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published models `alpha=0.5` and `alpha=1`, and `whole` in one shard."""
    folder = tmp_path_factory.mktemp("made")
    assert expo(*parents, folder, 0.5, 1, more="--shard-size 100kB") == 0
    assert expo(*parents, folder / "whole", 1) == 0
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy of the model of alpha 0.5, in several shards."""
    shutil.copytree(made / "alpha=0.5", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def server(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    import huggingface_hub.constants

    # hf_xet speaks its own protocol to its own servers.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub_server


def pushed(server: HubServer, name: str = REPO) -> dict[str, bytes]:
    """What the newest commit shows, but for what the Hub made itself."""
    repository = server.repositories[name]
    files = repository.files[repository.branches["main"]]
    return {key: data for key, data in files.items() if key not in PUSHED_ALONE}


def published(folder: Path) -> dict[str, bytes]:
    return {key: data for key, data in files_of(folder).items() if not key.startswith(".expo/")}


def writes(server: HubServer) -> list[str]:
    return [seen.path for seen in server.seen if seen.method in {"POST", "PUT"}]


def commits(server: HubServer) -> int:
    return sum(path.endswith("/commit/main") for path in writes(server))


# --- what arrives


def test_a_folder_arrives_byte_for_byte_in_one_commit(
    server: HubServer, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "notes.txt").write_text("not of the model")
    assert main(["push", str(model), REPO, "--private"]) == 0
    wanted = published(model)
    del wanted["notes.txt"]
    assert len([key for key in wanted if key.endswith(".safetensors")]) == 2
    assert pushed(server) == wanted
    assert server.repositories[REPO].private
    assert commits(server) == 1
    assert f"pushed to {server.endpoint}/{REPO}" in capsys.readouterr().out

    server.seen.clear()
    assert main(["push", str(model), REPO]) == 0
    assert writes(server) == []
    assert "there is nothing to do" in capsys.readouterr().out


def test_large_side_files_are_sent_from_disk_like_shards(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expo_ray.published.push._WITHIN_COMMIT", 100)
    push_model(plan_push(str(model), REPO))
    assert pushed(server) == published(model)


def test_what_was_pushed_is_a_model_that_can_be_read_and_verified(server: HubServer, model: Path) -> None:
    push_model(plan_push(str(model), REPO))
    assert main(["verify", f"hf://{REPO}"]) == 0


@pytest.mark.s3
def test_a_model_in_a_bucket_is_pushed_by_way_of_one_shard_on_disk(
    server: HubServer, made: Path, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, data in files_of(made / "alpha=0.5").items():
        open_store(s3_uri).put(key, data)
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spool))
    seen: list[int] = []
    server.on_upload = lambda: seen.append(len(list(spool.iterdir())))
    assert main(["push", s3_uri, REPO]) == 0
    assert pushed(server) == published(made / "alpha=0.5")
    assert max(seen) == 1
    assert list(spool.iterdir()) == []


def test_a_shard_so_small_that_the_hub_takes_it_as_text(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.hub_server.LARGE_BYTES", 10_000_000)
    push_model(plan_push(str(model), REPO))
    assert pushed(server) == published(model)
    assert server.uploads == {}


def test_a_dry_run_shows_everything_and_writes_nothing(
    server: HubServer, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(model), REPO, "--private", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"{model} -> {server.endpoint}/{REPO} (would be created, private)" in printed
    assert all(key in printed for key in published(model))
    assert ".expo/" not in printed
    assert writes(server) == []
    assert server.repositories == {}


# --- what is there already


def test_an_earlier_version_gives_way_with_all_its_files(server: HubServer, made: Path) -> None:
    push_model(plan_push(str(made / "alpha=0.5"), REPO))
    push_model(plan_push(str(made / "whole"), REPO))
    assert pushed(server) == published(made / "whole")
    assert commits(server) == 2


def test_what_went_missing_there_is_sent_again_and_nothing_else(server: HubServer, model: Path) -> None:
    push_model(plan_push(str(model), REPO))
    repository = server.repositories[REPO]
    files = repository.files[repository.branches["main"]]
    lost = next(key for key in files if key.endswith(".safetensors"))
    del files[lost]
    files["README.md"] = b"edited on the Hub"
    plan = plan_push(str(model), REPO)
    assert list(plan.files) == [lost]
    push_model(plan)
    assert pushed(server) == published(model) | {"README.md": b"edited on the Hub"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": b"x", "README.md": b""}, r"files that expo-ray did not push \(model.safetensors"),
        ({"expo.json": b'{"plan": 1}'}, r"expo.json is not a manifest of this format"),
        ({".gitignore": b"*"}, r"has a .gitignore"),
    ],
)  # fmt: skip
def test_a_foreign_repository_is_refused(
    server: HubServer, model: Path, files: dict[str, bytes], message: str
) -> None:
    server.repositories[REPO] = Repository({"a" * 40: files}, {"main": "a" * 40})
    with pytest.raises(OutputError, match=message + r".*choose another repository"):
        plan_push(str(model), REPO)
    assert writes(server) == []


def edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "expo.json").read_text())
    (folder / "expo.json").write_text(json.dumps(manifest | changes))


def test_the_model_of_another_pair_is_refused(server: HubServer, model: Path, made: Path) -> None:
    push_model(plan_push(str(made / "alpha=1"), REPO))
    edit(model, pair="other")
    with pytest.raises(OutputError, match=r"another pair \(dpo at alpha 1 .*this one is other at alpha 0.5 "):
        plan_push(str(model), REPO)


def test_weights_beside_an_earlier_version_are_refused(server: HubServer, model: Path, made: Path) -> None:
    push_model(plan_push(str(made / "alpha=1"), REPO))
    repository = server.repositories[REPO]
    repository.files[repository.branches["main"]]["model.gguf"] = b"x"
    with pytest.raises(OutputError, match=r"weights beside the model \(model.gguf\)"):
        plan_push(str(model), REPO)


def test_a_repository_made_on_the_hubs_pages_is_taken(server: HubServer, model: Path) -> None:
    server.repositories[REPO] = Repository(
        {"a" * 40: {".gitattributes": b"", "README.md": b"---\n"}}, {"main": "a" * 40}
    )
    push_model(plan_push(str(model), REPO))
    assert pushed(server) == published(model)


# --- what is not a whole model


def test_only_whole_published_models_are_pushed(
    server: HubServer, model: Path, parents: tuple[Path, Path]
) -> None:
    with pytest.raises(OutputError, match=r"has no expo.json.*push a folder that expo-ray published"):
        plan_push(str(parents[1]), REPO)
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(OutputError, match=rf"1 file\(s\) are missing or not of the size .*{shard.name}"):
        plan_push(str(model), REPO)
    assert server.seen == []


@pytest.mark.parametrize("pattern", ["*.safetensors", "config.json"])
def test_bytes_that_are_not_those_of_the_manifest_are_not_committed(
    server: HubServer, model: Path, pattern: str
) -> None:
    file = next(model.glob(pattern))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputChanged, match=r"expo-ray verify"):
        push_model(plan_push(str(model), REPO))
    assert pushed(server) == {}


# --- faults


def test_a_push_that_breaks_off_shows_nothing_and_goes_on_where_it_was(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.upload_faults["verify"] = [422]
    with pytest.raises(StorageError, match=r"422"):
        push_model(plan_push(str(model), REPO))
    assert pushed(server) == {}
    assert len(server.uploads) == 1
    server.seen.clear()
    push_model(plan_push(str(model), REPO))
    assert pushed(server) == published(model)
    sent = [seen for seen in server.seen if seen.method == "PUT"]
    shards = list(model.glob("*.safetensors"))
    assert len({seen.path for seen in sent}) == len(sent) < len(shards) + len(published(model))
    assert not {seen.path for seen in sent} & {f"/lfs/{oid}" for oid in list(server.uploads)[:1]}


@pytest.mark.parametrize("fault", [503, "lost"])
def test_a_commit_whose_answer_fails_or_is_lost_is_made_once(
    server: HubServer, model: Path, fault: int | str
) -> None:
    server.upload_faults["commit"] = [fault]
    push_model(plan_push(str(model), REPO))
    assert pushed(server) == published(model)
    assert len(server.repositories[REPO].files) == 2
    assert commits(server) == 2


def test_a_commit_of_somebody_else_in_the_meantime_is_not_overwritten(server: HubServer, model: Path) -> None:
    server.repositories[REPO] = Repository({"a" * 40: {}}, {"main": "a" * 40})
    plan = plan_push(str(model), REPO)
    repository = server.repositories[REPO]
    repository.files["b" * 40] = {"README.md": b"mine"}
    repository.branches["main"] = "b" * 40
    with pytest.raises(InputChanged, match=r"hf://org/model has got another commit .*push again"):
        push_model(plan)
    assert pushed(server) == {"README.md": b"mine"}


def test_tokens_that_cannot_write_are_reported_before_anything_is_sent(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for token, message in (
        (None, f"no token for {server.endpoint}; set HF_TOKEN"),
        ("hf_wrong", "answered 401; set HF_TOKEN to a token that may write"),
        (READ_TOKEN, "the token of somebody for"),
    ):
        monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
        assert main(["push", str(model), REPO]) == 2
        assert message in capsys.readouterr().err
    assert writes(server) == []


def test_no_right_no_answer_and_no_network_are_reported(
    server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"answered 403; set HF_TOKEN to a token that may write to others"):
        push_model(plan_push(str(model), "others/model"))
    server.upload_faults["create"] = [500] * 100
    with pytest.raises(TransientStorageError, match=r"answered 500 \(asked 6 times in"):
        push_model(plan_push(str(model), REPO))
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(model), REPO]) == 2


@pytest.mark.parametrize("name", ["model", "datasets/org/model", "hf://org/model", "org/a--b", "org/a.git"])
def test_what_is_no_model_repository_is_refused(
    server: HubServer, model: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["push", str(model), name])
    assert "write ORG/NAME" in capsys.readouterr().err


# --- the job option


def job(**options: Any) -> Any:
    pairs = [{"name": name, "sft": "a", "dpo": "b"} for name in ("one", "two")]
    return parse_job({"output": "out", "pairs": pairs, **options}, "job.yaml")


def test_the_job_option_names_one_repository_for_each_pair() -> None:
    assert job(push_to="org/{pair}-expo").repo_of("two") == "org/two-expo"
    assert job().repo_of("one") is None
    for text, message in (
        ("org/model", r"one repository for 2 pairs; write `{pair}`"),
        ("{pair}", r"push_to: 'one' cannot be a model repository"),
        ("org/{pair}-{alpha}", r"push_to: 'org/one-{alpha}' cannot be"),
    ):
        with pytest.raises(Problems, match=message):
            job(push_to=text)


def test_a_winner_that_cannot_be_pushed_does_not_stop_the_others(server: HubServer, made: Path) -> None:
    server.repositories["org/one-expo"] = Repository({"a" * 40: {"x.bin": b""}}, {"main": "a" * 40})
    winners = {"one": str(made / "alpha=0.5"), "two": str(made / "alpha=1")}
    result = push_models(job(push_to="org/{pair}-expo"), winners)
    assert list(result.failures) == ["one"]
    assert f"published at {made / 'alpha=0.5'}, but not pushed to org/one-expo" in result.failures["one"]
    assert list(result.addresses) == ["two"]
    assert result.addresses["two"].endswith("org/two-expo")
    assert pushed(server, "org/two-expo") == published(made / "alpha=1")
    assert server.repositories["org/two-expo"].private
    server.seen.clear()
    assert list(push_models(job(push_to="org/{pair}-expo"), winners).failures) == ["one"]
    assert writes(server) == []
    assert push_models(job(), winners) == PushedModels()
