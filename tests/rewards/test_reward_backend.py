"""The reference back end against the head applied by hand."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import ray
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoConfig,
    GPTNeoForSequenceClassification,
)

from expo_ray.config import RewardModel
from expo_ray.errors import RewardError
from expo_ray.evaluation.rewards.reward_inputs import model_inputs
from expo_ray.evaluation.rewards.reward_model import (
    FP32_WEIGHTS,
    Classifier,
    check_reward,
    inspect_reward_model,
)
from expo_ray.on_ray.rewards import backends as reward_models
from expo_ray.on_ray.rewards.backends import TransformersBackend, check_parity, load_backend
from expo_ray.on_ray.rewards.pool import RewardPool
from expo_ray.storage import open_store
from tests.support.tiny_reward_models import MAX_TOKENS, english, last_token_scores, save_reward_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("rm"))


@pytest.fixture(scope="module")
def ids(folder: Path) -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = model_inputs(english(40), tokenizer, where="rm", max_tokens=MAX_TOKENS, truncate=True)
    return [asked.ids for asked in inputs]


def test_batches_score_the_last_token_though_it_is_the_padding_s(
    folder: Path, ids: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(text[-1] == 1 for text in ids if len(text) < MAX_TOKENS)  # eos, which is pad
    expected = last_token_scores(folder, ids)
    monkeypatch.setattr(reward_models, "_BATCH_TOKENS", 2000)
    scores = TransformersBackend(folder, "fp32", cuda=False).score(ids)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert min(scores) < -1  # no sigmoid
    # What transformers makes of the same ids: another token's score, even in a batch of one.
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(torch.tensor([ids[5]])).logits[0, 0].item()
    assert abs(theirs - expected[5]) > 0.01


def test_a_model_without_a_padding_token_is_scored_in_batches(
    tmp_path: Path, ids: list[tuple[int, ...]]
) -> None:
    save_reward_model(tmp_path, pad_token_id=None)
    scores = TransformersBackend(tmp_path, "fp32", cuda=False).score(ids)
    assert scores == pytest.approx(last_token_scores(tmp_path, ids), abs=1e-5)


def test_back_ends_that_disagree_are_refused_with_both_values() -> None:
    check_parity("rm", "fp32", [1.0, 20.0], [1.0004, 20.01])
    with pytest.raises(
        RewardError, match=r"disagree on 1 of 2 texts by more than 0.001 in fp32 \(1.0100 and 1.0000\)"
    ):
        check_parity("rm", "fp32", [1.01, 0.5], [1.0, 0.5])
    with pytest.raises(RewardError, match=r"nan and 1\.0000"):
        check_parity("rm", "fp32", [float("nan")], [1.0])


class _OffByOne:
    """In the place of vLLM: the reference's scores, and one more."""

    name = "off by one"

    def __init__(self, model: Classifier, folder: Path, dtype: str, *, cuda: bool, **_: float) -> None:
        self._reference = TransformersBackend(folder, dtype, cuda=cuda)

    def score(self, ids: Sequence[Sequence[int]]) -> list[float]:
        return [score + 1 for score in self._reference.score(ids)]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_an_engine_that_scores_otherwise_does_not_get_to_work(
    folder: Path, ids: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_models, "VllmBackend", _OffByOne)
    model = inspect_reward_model(RewardModel(model=str(folder), backend="vllm"))
    assert isinstance(model, Classifier)
    with pytest.raises(RewardError, match="disagree on 16 of 16 texts"):
        load_backend(model, folder, "fp32", num_gpus=0, probe=ids[:16])


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_auto_takes_the_reference_for_what_vllm_does_not_know(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_reward_model(tmp_path)
    torch.manual_seed(3)
    config = GPTNeoConfig(
        vocab_size=320, hidden_size=64, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=2,
        max_position_embeddings=MAX_TOKENS, pad_token_id=1,
    )  # fmt: skip
    config.num_labels = 1
    network = GPTNeoForSequenceClassification(config)
    network.save_pretrained(tmp_path)
    monkeypatch.setattr(reward_models, "VllmBackend", _OffByOne)
    unknown, known = (
        inspect_reward_model(RewardModel(model=str(model_folder))) for model_folder in (tmp_path, folder)
    )
    assert isinstance(unknown, Classifier)
    assert isinstance(known, Classifier)
    assert load_backend(known, folder, "fp32", num_gpus=0).name == "off by one"  # in the place of vLLM
    backend = load_backend(unknown, tmp_path, "fp32", num_gpus=0)
    assert backend.name.startswith("transformers ")
    with torch.inference_mode():
        expected = network.eval()(torch.tensor([[5, 6, 7]])).logits[0, 0].item()
    assert backend.score([(5, 6, 7)]) == pytest.approx([expected], abs=1e-5)


def pool_of(spec: dict[str, Any]) -> RewardPool:
    """The pool of a reward model of a job file; its actors are not started."""
    return RewardPool(check_reward(RewardModel.model_validate(spec)))


def test_rewards_of_different_back_ends_do_not_mix(folder: Path) -> None:
    pools = [
        pool_of({"model": str(folder), "backend": backend, "dtype": "fp32"})
        for backend in ("auto", "vllm", "transformers")
    ]
    assert len({pool.id for pool in pools}) == 3  # the folder of a job's rewards is named after it
    again = pool_of({"model": str(folder), "name": "another", "dtype": "fp32", "replicas": 2})
    assert again.id == pools[0].id


def _rewrite(name: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return apply


def _change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


FILE_CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": _change_weights,
    "template": _rewrite("chat_template.jinja", "[{{", "({{"),
    "tokens": _rewrite("tokenizer.json", '"a"', '"#a"'),
    "tokenizer's settings": _rewrite("tokenizer_config.json", '"</s>"', '"<s>"'),
    "configuration": _rewrite("config.json", "1e-06", "1e-05"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bf16"},
    "back end": {"backend": "transformers"},
    "truncation": {"truncate": True},
}


def _id(folder: Path, **changes: Any) -> str:
    return pool_of({"model": str(folder), "dtype": "fp32"} | changes).id


def test_all_that_decides_a_score_names_the_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {}
    save_reward_model(tmp_path)
    first = _id(tmp_path)
    for name, changes in SETTINGS.items():
        ids[name] = _id(tmp_path, **changes)
    assert _id(tmp_path, name="another", replicas=3, num_cpus=2) == first
    for name, apply in FILE_CHANGES.items():
        kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        apply(tmp_path)
        ids[name] = _id(tmp_path)
        for file, data in kept.items():
            (tmp_path / file).write_bytes(data)
    (tmp_path / "vocab.txt").write_text("another file that a tokenizer may read")
    ids["another file"] = _id(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    version = importlib.metadata.version
    for package in ("transformers", "torch", "tokenizers"):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name, other=package: "0" if name == other else version(name)
        )
        ids[package] = _id(tmp_path)
    assert len({first, *ids.values()}) == 1 + len(ids), ids


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what asks a cluster; other tests of this process may have one."""
    for question in ("init", "nodes", "cluster_resources", "available_resources", "remote", "get"):
        monkeypatch.delattr(ray, question)


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(
    ("stored", "numel", "asked", "dtype"),
    [
        ("bf16", FP32_WEIGHTS, "auto", "fp32"),
        ("bf16", FP32_WEIGHTS + 1, "auto", "bf16"),
        ("fp16", FP32_WEIGHTS + 1, "auto", "fp16"),
        ("fp32", FP32_WEIGHTS + 1, "auto", "bf16"),
        ("bf16", FP32_WEIGHTS + 1, "fp32", "fp32"),
        ("bf16", 1, "fp16", "fp16"),
    ],
)
def test_the_data_type_and_the_id_follow_from_model_and_job_alone(
    folder: Path, stored: str, numel: int, asked: str, dtype: str
) -> None:
    checked = check_reward(RewardModel.model_validate({"model": str(folder), "dtype": asked}))
    assert isinstance(checked.model, Classifier)
    model = replace(checked.model, stored=stored, numel=numel)
    assert replace(checked, model=model).dtype == dtype
    resolved = replace(model, spec=checked.spec.model_copy(update={"dtype": dtype}))
    assert replace(checked, model=resolved).id == replace(checked, model=model).id


def test_a_model_in_a_bucket_is_looked_at_through_its_small_files(
    folder: Path,
) -> None:
    store = open_store("memory://rewards/rm")
    for file in folder.iterdir():
        store.put(file.name, file.read_bytes())
    there, here = (pool_of({"model": uri}) for uri in (store.uri, str(folder)))
    rows = english(5)
    assert there.inputs(rows) == here.inputs(rows)
    assert len(there.inputs(rows)[3].ids) > 20
