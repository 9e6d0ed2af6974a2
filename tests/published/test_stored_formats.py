"""What expo-ray stored before today's code was written (`tests/data`, by version 0.1.0 of November 2026) is still read, and means the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from expo_ray.cli.process import main
from expo_ray.errors import CheckpointError, OutputError
from expo_ray.extrapolation.manifest import parse_manifest
from expo_ray.extrapolation.model_folder import read_claim
from expo_ray.extrapolation.receipt import read_receipt
from expo_ray.report.results_file import parse_results
from expo_ray.storage import open_store
from tests.support.paths import DATA
from tests.support.sample_results import sample_results

PUBLISHED = DATA / "published"


def test_a_published_model_verifies_against_its_parents(capsys: pytest.CaptureFixture[str]) -> None:
    parents = ["--sft", str(PUBLISHED / "sft"), "--dpo", str(PUBLISHED / "dpo")]
    assert main(["verify", str(PUBLISHED / "model"), *parents]) == 0
    assert "the same bytes" in capsys.readouterr().out


def test_claim_and_receipts_are_read(tmp_path: Path) -> None:
    folder = shutil.copytree(PUBLISHED / "model", tmp_path / "model")
    store = open_store(str(folder))
    plan = read_claim(store).plan
    assert plan == parse_manifest((folder / "expo.json").read_bytes(), "it")["plan"]
    key = f".expo/{plan}/model-00001-of-00002.json"
    # The stored file has another time of change than the receipt says, as after any copy; everything else fits.
    stored = store.stat("model-00001-of-00002.safetensors")
    text = (folder / key).read_text()
    etag = text.split('"etag": "')[1].split('"')[0]
    (folder / key).write_text(text.replace(etag, stored.etag))
    present = {info.key: info for info in store.list()}
    receipt = read_receipt(store, plan, "model-00001-of-00002.safetensors", present)
    assert receipt is not None
    assert receipt.statistics["model.embed_tokens.weight"].elements == 128


def test_results_are_read() -> None:
    assert parse_results((DATA / "results.json").read_bytes()) == sample_results()


_EDITS = [
    ('"format": 1', '"format": 2'),
    ('"format": 1', '"format": [[[[]]]]'),
    ('"alpha": 0.5', '"alpha": "0.5"'),
    ('"alpha": 0.5', '"alpha": NaN'),
    ('"alpha": 0.5', '"alpha": -7'),
    ('"alpha": 0.5', '"alpha": null'),
    ('"alpha": 0.5', '"alpha": [0.5]'),
    ('"alpha": 0.5', '"alpha": ' + "9" * 400),
    ('"pair": "dpo"', '"pair": "../x y"'),
    ('"pair": "dpo"', '"pair": 7'),
    ('"seed": 0', '"seed": -1'),
    ('"seed": 0', '"seed": true'),
    ('"rounding": "stochastic"', '"rounding": "evil"'),
    ('"shard_size": 600', '"shard_size": 1' + "0" * 30),
    ('"norm": 0.5', '"norm": -0.5'),
    ('"norm": 0.5', '"(": 0.5'),
    ('"norm": 0.5', '"a{99999999999}": 0.5'),
    ('"arithmetic": {', '"arithmetic": null, "x": {'),
    ('"shards": [', '"shards": 5, "x": ['),
    ('"shards": [', '"shards": [{}], "x": ['),
    ('"shards": [', '"shards": ["a"], "x": ['),
    ('"file": "model-00001', '"file": "../model-00001'),
    ('"file": "model-00001', '"file": "/model-00001'),
    ('"file": "model-00001', '"file": "a\\\\model-00001'),
    ('"warnings": [', '"warnings": [5], "x": ['),
    ('"effective_alpha": ', '"effective_alpha": "x", "y": '),
    ('"uri": ', '"uri": {}, "y": '),
    ('"etag": ', '"etag": 5, "y": '),
    ('"sha256": "', '"sha256": "x'),
    ('"plan": "', '"plan": "../'),
]


@pytest.mark.parametrize(("old", "new"), _EDITS, ids=[f"{i} {new[:24]}" for i, (_, new) in enumerate(_EDITS)])
@pytest.mark.parametrize("error", [CheckpointError, OutputError])
def test_a_manifest_that_is_wrong_in_one_field_is_one_error(
    old: str, new: str, error: type[CheckpointError | OutputError]
) -> None:
    text = (PUBLISHED / "model/expo.json").read_text()
    assert old in text
    with pytest.raises(error, match=r"expo\.json.*; run it again"):
        parse_manifest(text.replace(old, new, 1).encode(), "expo.json", error=error, remedy="run it again")


@pytest.mark.parametrize(
    "claim", [b"[" * 100_000, b"[]", b"{}", b'{"plan": {}, "files": []}', b'{"plan": "a", "files": [[1]]}']
)
def test_a_damaged_claim_is_one_error(claim: bytes) -> None:
    store = open_store("memory://stored-formats/claims")
    store.put(".expo/claim.json", claim)
    with pytest.raises(OutputError, match="delete the folder and run again"):
        read_claim(store)
