"""Failures that would come after engines have started are found from files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from expo_ray.config import PublishedModel, Serving
from expo_ray.errors import ExpoError, OutputError, Problems
from expo_ray.evaluation.prompts.prompt_set import PromptSet, prompt_of
from expo_ray.evaluation.responses.check_served import check_output_folder, check_served, longest_context
from tests.support.tiny_reward_models import TURNS, byte_tokenizer

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TURNS
)


def prompts(*texts: str, system: str = "") -> list[PromptSet]:
    before = [{"role": "system", "content": system}] if system else []
    return [PromptSet.of("p", [prompt_of([*before, {"role": "user", "content": text}]) for text in texts])]


def model(folder: Path, template: str | None = TURNS, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    byte_tokenizer(template).save_pretrained(folder)
    values: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 256} | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def problems(folder: Path, sets: Sequence[PromptSet] = (), *, needs_all: bool = True, **serving: Any) -> str:
    """The text of all problems; empty if there are none."""
    served = PublishedModel(name="m", uri=str(folder))
    try:
        check_served([], [served], Serving(**serving), sets, needs_all=needs_all)
    except Problems as error:
        return str(error)
    return ""


def test_a_model_without_faults_passes(tmp_path: Path) -> None:
    assert problems(model(tmp_path), prompts("a", "b" * 200, system="s"), max_model_len=256) == ""


def test_a_missing_template_fails_where_chats_are_asked(tmp_path: Path) -> None:
    model(tmp_path, None)
    assert "m: has no chat template" in problems(tmp_path, prompts("a"))
    assert problems(tmp_path) == ""  # completions need none
    assert problems(model(tmp_path, None, model_type="paligemma"), prompts("a")) == ""  # vLLM has one
    (tmp_path / "chat_template.jinja").write_text(TURNS)
    assert problems(tmp_path, prompts("a")) == ""


def test_prompts_that_the_template_refuses_are_named(tmp_path: Path) -> None:
    sets = [*prompts("a"), *prompts("b", "c", system="s")]
    text = problems(model(tmp_path, NO_SYSTEM), sets)
    assert "no system turns" in text
    assert all(prompt.id in text for prompt in sets[1].prompts)
    assert sets[0].prompts[0].id not in text


def test_prompts_that_fill_the_context_are_named_with_their_length(tmp_path: Path) -> None:
    sets = prompts("a", "b" * 300)
    tokens = len("[user] ") + 300 + 1 + len("[assistant]")
    text = problems(model(tmp_path), sets)
    assert f"{sets[0].prompts[1].id} with {tokens} tokens" in text
    assert sets[0].prompts[0].id not in text
    assert "within 100 tokens" in problems(tmp_path, sets, max_model_len=100)
    # As long as all of the context leaves no room for a response, one token less does.
    exact = prompts("b" * (256 - len("[user] [assistant]") - 1))
    assert "leave no room" in problems(tmp_path, exact)
    assert problems(tmp_path, prompts("b" * (255 - len("[user] [assistant]") - 1))) == ""


def test_where_others_are_answered_only_a_set_without_any_answer_is_refused(tmp_path: Path) -> None:
    model(tmp_path, NO_SYSTEM)
    refused = [*prompts("b", system="s"), *prompts("c" * 300)]
    assert problems(tmp_path, [*prompts("a"), *refused], needs_all=False) == ""
    assert len(problems(tmp_path, refused, needs_all=False).splitlines()) == 2


def test_a_length_above_the_models_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path)
    assert "is 257, and the model's context ends at 256" in problems(tmp_path, max_model_len=257)
    assert "is 257" in problems(tmp_path, engine={"max_model_len": 257})
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert problems(tmp_path, max_model_len=257) == ""


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 512, "seq_length": 256}, 256),
        ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 2}}, 1024),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 2048,
                },
            },
            8192,
        ),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 512,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            512,
        ),
        ({"text_config": {"max_position_embeddings": 128}, "max_position_embeddings": 64}, 128),
        ({}, float("inf")),
        ({"max_position_embeddings": "512"}, float("inf")),
    ],
)
def test_the_longest_context_is_vllms(config: dict[str, Any], tokens: float) -> None:
    assert longest_context(config) == tokens


@pytest.mark.vllm
def test_arguments_that_vllm_does_not_have_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model(tmp_path)
    assert (
        problems(tmp_path, engine={"max_num_seqs": 4, "enable_prefix_caching": False, "enforce_eager": True})
        == ""
    )
    text = problems(tmp_path, engine={"max_num_seq": 4})
    assert "no argument `max_num_seq`; write `max_num_seqs`" in text


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    check_output_folder(str(tmp_path / "a" / "b"))
    check_output_folder("s3://bucket/out")
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="is a file"):
            check_output_folder(str(output))
    with pytest.raises(ExpoError, match="cannot be written"):
        check_output_folder("/proc/1/out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
