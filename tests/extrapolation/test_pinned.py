"""Published models come from the parents that were checked: a parent replaced since is named, and its pair fails alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from expo_ray.config import Job, Pair
from expo_ray.errors import InputChanged, Problems, in_one_line
from expo_ray.extrapolation import plan_job as jobs
from expo_ray.extrapolation.in_threads import InThreads
from expo_ray.extrapolation.manifest import MANIFEST
from expo_ray.extrapolation.model_folder import ModelFolder
from expo_ray.extrapolation.pinned import plan_publication
from expo_ray.extrapolation.plan import PairPlan, plan_pair
from expo_ray.extrapolation.plan_job import outputs_of
from expo_ray.extrapolation.run_job import Failures, Outcome, run_pairs
from expo_ray.progress import Progress
from expo_ray.published.verify import read_manifest, verify_files
from expo_ray.serving.served_models import plan_served_pairs
from expo_ray.storage import open_store
from tests.extrapolation.test_extrapolate_vocab import WORDS, word_tokenizer
from tests.support.pairs import LLAMA, Tensors, files_of, llama_tensors, moved, write_model, write_pair
from tests.support.tiny_models import causal_model, save_lora, tiny_llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ALPHA = 0.5

# --- the plan of what is published


def plain_pair(folder: Path) -> Pair:
    sft, dpo = write_pair(folder)
    return Pair(sft=str(sft), dpo=str(dpo), name="pair", multipliers={"norm": 0, r"layers\.0\.mlp": 0.25})


def tied_pair(folder: Path) -> Pair:
    """A pair that stores its output head beside the embedding that it is tied to; the head has a name other than Llama's."""
    tensors = llama_tensors()
    del tensors[HEAD]
    for name, side in (("sft", tensors), ("dpo", moved(tensors))):
        both = {**side, "output_projection.weight": side[EMBEDDING].clone()}
        write_model(folder / name, both, {**LLAMA, "tie_word_embeddings": True})
    return Pair(sft=str(folder / "sft"), dpo=str(folder / "dpo"), name="pair")


def by_token_pair(folder: Path) -> Pair:
    """A pair whose vocabularies are equally large and in another order."""

    def cut(tensors: Tensors) -> Tensors:
        rows = len(WORDS)
        return {
            name: weights[:rows].clone() if name in (EMBEDDING, HEAD) else weights
            for name, weights in tensors.items()
        }

    sft = cut(llama_tensors())
    config = {**LLAMA, "vocab_size": len(WORDS)}
    for name, tensors, words in (("sft", sft, WORDS), ("dpo", moved(sft), WORDS[::-1])):
        word_tokenizer(words).save(str(write_model(folder / name, tensors, config) / "tokenizer.json"))
    return Pair(sft=str(folder / "sft"), dpo=str(folder / "dpo"), name="pair", vocab="by-token")


def adapter_pair(folder: Path) -> Pair:
    sft, dpo = save_lora(folder, causal_model(tiny_llama()))
    return Pair(sft=str(sft), dpo=str(dpo), name="pair")


def merged_pair(folder: Path) -> Pair:
    return adapter_pair(folder).model_copy(update={"adapter": "merge"})


@pytest.mark.parametrize(
    ("make", "multipliers"),
    [
        (plain_pair, {}),
        (plain_pair, {"attn": 0.0, "mlp": 2.0}),
        (tied_pair, {"mlp": 0.5}),
        (tied_pair, {"embed": 0.0}),
        (by_token_pair, {"attn": 0.0}),
        (by_token_pair, {"embed|lm_head": 0.0}),
        (adapter_pair, {}),
        (merged_pair, {"attn": 0.0, "mlp": 2.0}),
    ],
)
def test_the_plan_to_publish_is_the_one_that_planning_anew_would_give(
    make: Callable[[Path], Pair], multipliers: dict[str, float], tmp_path: Path
) -> None:
    pair = make(tmp_path)
    pair = pair.model_copy(update={"multipliers": {**pair.multipliers, **multipliers}})
    job = Job(output=str(tmp_path / "out"), pairs=(pair,))
    chosen = pair.model_copy(update={"alphas": (ALPHA,)})
    outputs = outputs_of(job, chosen)
    anew = plan_pair(chosen, outputs)
    (searched,) = plan_served_pairs(job)
    for parent in (pair.sft, pair.dpo):  # nothing is read again
        shutil.rmtree(parent)
    plan = plan_publication(searched, pair, outputs)
    assert plan.plan_id(ALPHA) == anew.plan_id(ALPHA)
    assert replace(plan, notes=()) == replace(anew, notes=())


def test_a_chosen_alpha_that_a_multiplier_carries_out_of_its_range_is_refused(tmp_path: Path) -> None:
    sft, dpo = write_pair(tmp_path)
    pair = Pair(sft=str(sft), dpo=str(dpo), name="pair", multipliers={"norm": 1e308})
    with pytest.raises(Problems, match=r"pair: alpha 3\.2 times the multiplier"):
        plan_publication(plan_pair(pair, {}), pair, {3.2: str(tmp_path / "out")})


# --- parents between search and publication


class Parents:
    """The folders of three pairs, here or in S3, by way of the store that the code under test uses."""

    def __init__(self, root: str, folder: Path) -> None:
        self.root, self.output = root, f"{root}/out"
        for index, name in enumerate(("first", "second", "third")):
            for local in write_pair(folder / name, seed=index):
                (local / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
                for key, data in files_of(local).items():
                    self.put(f"{name}/{local.name}", key, data)

    def put(self, parent: str, key: str, data: bytes) -> None:
        open_store(f"{self.root}/{parent}").put(key, data)

    def damage(self, parent: str, key: str) -> None:
        """Replace a file by another one of the same size, as uploading a retrained model does."""
        store = open_store(f"{self.root}/{parent}")
        self.put(parent, key, store.read(key)[:-1] + b"\x01")

    def searched(self) -> list[PairPlan]:
        """Plans as the check before the search made them, for the models of `ALPHA`."""
        plans = []
        for name in ("first", "second", "third"):
            pair = Pair(sft=f"{self.root}/{name}/sft", dpo=f"{self.root}/{name}/dpo", name=name)
            outputs = {ALPHA: f"{self.output}/{name}"}
            plans.append(plan_publication(plan_pair(pair, {}), pair, outputs))
        return plans

    def published(self) -> list[str]:
        """The names of the pairs whose model is complete and agrees with its manifest."""
        names = []
        for name in ("first", "second", "third"):
            store = open_store(f"{self.output}/{name}")
            if any(info.key == MANIFEST for info in store.list()):
                manifest = read_manifest(store)
                assert manifest is not None
                assert verify_files(store, manifest) == []
                names.append(name)
        return names

    def left_behind(self, name: str) -> list[str]:
        return [info.key for info in open_store(f"{self.output}/{name}").list()]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def parents(request: pytest.FixtureRequest, tmp_path: Path) -> Parents:
    root = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri")
    return Parents(root, tmp_path / "made")


def run(plans: Sequence[PairPlan], before_shards: Callable[[], None] = lambda: None) -> Outcome:
    class Executor(InThreads):
        """Threads of this process that do something else once, before the first shard."""

        waiting = True

        def extrapolate(self, plan: PairPlan, index: int, alphas: Sequence[float]) -> Future[Failures]:
            if self.waiting:
                before_shards()
            self.waiting = False
            return super().extrapolate(plan, index, alphas)

    with Progress("extrapolate", quiet=True) as progress, Executor(progress, device="cpu") as executor:
        return run_pairs(plans, executor, progress)


@pytest.mark.parametrize(
    ("parent", "key"),
    [
        ("second/dpo", "model.safetensors"),
        ("second/sft", "model.safetensors"),
        ("second/dpo", "tokenizer.json"),
    ],
)
def test_a_parent_replaced_since_the_check_fails_its_pair_alone(
    parents: Parents, parent: str, key: str
) -> None:
    plans = parents.searched()
    parents.damage(parent, key)
    outcome = run(plans)
    assert parents.published() == ["first", "third"]
    assert sorted(model.pair for model in outcome.published) == ["first", "third"]
    assert outcome.failures.keys() == {"second"}
    text = in_one_line(outcome.failures["second"])
    for part in ("second: ", parent.rpartition("/")[2], f"{parents.root}/{parent}", f"{key} (replaced)"):
        assert part in text
    assert parents.left_behind("second") == []
    # As the remedy says: what is checked now is published into the same folder.
    assert not run(parents.searched()).failures
    assert parents.published() == ["first", "second", "third"]


@pytest.mark.parametrize("key", ["model.safetensors", "tokenizer.json"])
def test_a_parent_replaced_while_models_are_written_is_not_read(parents: Parents, key: str) -> None:
    outcome = run(parents.searched(), lambda: parents.damage("second/dpo", key))
    assert parents.published() == ["first", "third"]
    ((name, error),) = outcome.failures.items()
    assert name.startswith("second")
    assert isinstance(error, InputChanged)


def test_parents_that_are_gone_are_both_named(parents: Parents) -> None:
    plans = parents.searched()
    open_store(f"{parents.root}/third/sft").delete("model.safetensors")
    open_store(f"{parents.root}/third/dpo").delete("config.json")
    outcome = run(plans)
    assert parents.published() == ["first", "second"]
    text = in_one_line(outcome.failures["third"])
    assert "third: sft: " in text
    assert "model.safetensors (gone)" in text
    assert "third: dpo: " in text
    assert "config.json (gone)" in text


def test_a_whole_model_stays_published_whatever_became_of_its_parents(parents: Parents) -> None:
    plans = parents.searched()
    assert not run(plans).failures
    parents.damage("second/dpo", "model.safetensors")
    outcome = run(plans)
    assert not outcome.failures
    assert sorted(model.pair for model in outcome.published) == ["first", "second", "third"]


def test_an_output_that_was_taken_meanwhile_fails_its_pair_alone(parents: Parents) -> None:
    plans = parents.searched()
    open_store(f"{parents.output}/first").put("notes.txt", b"mine")
    outcome = run(plans)
    assert parents.published() == ["second", "third"]
    assert "holds other files (notes.txt)" in in_one_line(outcome.failures["first"])
    assert parents.left_behind("first") == ["notes.txt"]


def test_an_output_that_cannot_be_written_any_more_fails_its_pair_alone(tmp_path: Path) -> None:
    parents = Parents(str(tmp_path / "store"), tmp_path / "made")
    plans = parents.searched()
    Path(parents.output).mkdir()
    Path(parents.output, "first").write_text("a file where the folder was to be")
    outcome = run(plans)
    assert outcome.failures.keys() == {"first"}
    assert sorted(model.pair for model in outcome.published) == ["second", "third"]


def test_a_folder_that_another_job_claims_at_the_last_moment_fails_its_pair_alone(
    parents: Parents, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = parents.searched()
    inspected = jobs.inspect_pairs

    def inspect_and_lose(pairs: Sequence[PairPlan]) -> object:
        inspection = inspected(pairs)
        first = plans[0]
        ModelFolder(replace(first, options=first.options.model_copy(update={"seed": 7})), ALPHA).claim()
        return inspection

    monkeypatch.setattr("expo_ray.extrapolation.run_job.inspect_pairs", inspect_and_lose)
    outcome = run(plans)
    assert "was claimed by another job" in in_one_line(outcome.failures["first"])
    assert sorted(model.pair for model in outcome.published) == ["second", "third"]
