"""Every way to score nonsense is refused or reported before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("transformers")
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from expo_ray.config import RewardModel
from expo_ray.errors import ExpoError, Problems
from expo_ray.evaluation.rewards.reward_file import parse_response
from expo_ray.evaluation.rewards.reward_inputs import check_tokenizer, model_inputs, token_ids
from expo_ray.evaluation.rewards.reward_model import Classifier, inspect_reward_model
from tests.support.tiny_models import causal_model, tiny_llama
from tests.support.tiny_reward_models import (
    MAX_TOKENS,
    TURNS,
    byte_tokenizer,
    rename_head,
    response,
    save_reward_model,
)


def problem(folder: Path) -> str:
    with pytest.raises(ExpoError) as caught:
        inspect_reward_model(RewardModel(model=str(folder)))
    return str(caught.value)


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )


def test_ids_are_the_template_s_own_with_its_last_newline_and_no_generation_prompt(tmp_path: Path) -> None:
    save_reward_model(tmp_path, template="{{ bos_token }}" + TURNS + r"{{ '\n' }}", adds_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "Why?"}]
    ids = token_ids(tokenizer, question, "Because.  ")
    chat = [*question, {"role": "assistant", "content": "Because.  "}]
    assert ids == tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert tokenizer.decode(ids) == "<s>[user] Why?</s>[assistant] Because.  </s>\n"


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ExpoError, match=r"rm: the tokenizer has no chat template.*chat_template\.jinja"):
        check_tokenizer(byte_tokenizer(None), "rm")


def test_a_template_that_hides_the_response_is_refused() -> None:
    with pytest.raises(ExpoError, match="leaves the assistant's turn out"):
        check_tokenizer(byte_tokenizer("{{ messages[0]['content'] }}"), "rm")


def test_a_second_bos_is_refused() -> None:
    with pytest.raises(ExpoError, match=r"BOS \(token 0\) twice"):
        check_tokenizer(byte_tokenizer("{{ bos_token }}{{ bos_token }}" + TURNS), "rm")
    # The BOS that the tokenizer would add itself is left out.
    assert check_tokenizer(byte_tokenizer("{{ bos_token }}" + TURNS, adds_bos=True), "rm") == []


def test_a_missing_bos_is_noted() -> None:
    (note,) = check_tokenizer(byte_tokenizer(TURNS, adds_bos=True), "rm")
    assert "the chat template writes none" in note
    assert check_tokenizer(byte_tokenizer(TURNS), "rm") == []


def test_a_response_that_doubles_bos_is_refused_by_its_prompt() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}{{ messages[0]['content'] }}{{ messages[1]['content'] }}")
    rows = [response("ok", "a"), response("<s> hi", "b")]
    with pytest.raises(Problems) as caught:
        model_inputs(rows, tokenizer, where="rm", max_tokens=99, truncate=False)
    assert rows[1].prompt_id in str(caught.value)
    assert rows[0].prompt_id not in str(caught.value)


def test_long_chats_are_refused_with_prompt_tokens_limit_and_remedy() -> None:
    rows = [response("short", "a"), response("long", "b" * 300), response("empty", "")]
    with pytest.raises(Problems) as caught:
        model_inputs(rows, byte_tokenizer(TURNS), where="rm", max_tokens=MAX_TOKENS, truncate=False)
    (text,) = map(str, caught.value.problems)
    tokens = len("[user] long") + 1 + len("[assistant] ") + 300 + 1
    assert f"{rows[1].prompt_id} with {tokens} tokens" in text
    assert "1 prompt(s) are longer than the 256 tokens" in text
    assert "`truncate: true`" in text


def test_long_chats_are_cut_at_their_end_and_marked_when_asked() -> None:
    rows = [response("short", "a"), response("long", "b" * 300), response("empty", "")]
    tokenizer = byte_tokenizer(TURNS)
    inputs = model_inputs(rows, tokenizer, where="rm", max_tokens=MAX_TOKENS, truncate=True)
    assert [row.truncated for row in inputs] == [False, True, False]
    assert list(inputs[1].ids) == token_ids(tokenizer, rows[1].messages, rows[1].text)[:MAX_TOKENS]
    assert tokenizer.decode(list(inputs[2].ids)) == "[user] empty</s>[assistant] </s>"


def test_a_chat_that_the_template_refuses_is_named() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
    row = response("a", "b", messages=({"role": "system", "content": "x"}, {"role": "user", "content": "a"}))
    with pytest.raises(Problems, match=f"no system.*{row.prompt_id}"):
        model_inputs([row], byte_tokenizer(template), where="rm", max_tokens=99, truncate=False)


def test_a_sound_model_is_described(tmp_path: Path) -> None:
    model = inspect_reward_model(RewardModel(model=str(save_reward_model(tmp_path))))
    assert isinstance(model, Classifier)
    weights = load_file(tmp_path / "model.safetensors")
    assert model.numel == sum(tensor.numel() for tensor in weights.values())
    assert (model.max_tokens, model.stored, model.kv_values) == (MAX_TOKENS, "fp32", 2 * 2 * 1 * 32)


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    rename_head(tmp_path, "v_head.weight")
    text = problem(tmp_path)
    assert "has no score head" in text
    assert "v_head.weight" in text


def test_a_causal_model_is_refused_for_architecture_and_head(tmp_path: Path) -> None:
    causal_model(tiny_llama()).save_pretrained(tmp_path)
    text = problem(tmp_path)
    assert "LlamaForCausalLM, no sequence classifier" in text
    assert "has no score head" in text


def test_more_labels_are_refused(tmp_path: Path) -> None:
    assert "3 by the score.weight of its weights and 3 by config.json label(s)" in problem(
        save_reward_model(tmp_path, num_labels=3)
    )


def test_a_configuration_without_labels_has_two_as_in_transformers(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    change(tmp_path, id2label=None)
    assert "1 by the score.weight of its weights and 2 by config.json" in problem(tmp_path)


def test_a_model_that_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    change(tmp_path, auto_map={"AutoModel": "modeling.Own"}, max_position_embeddings=None)
    text = problem(tmp_path)
    assert "needs the model's own code" in text
    assert "how long inputs may be" in text


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "absent") in problem(tmp_path / "absent")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_labels", "x"),
        ("num_labels", [1]),
        ("num_labels", float("inf")),
        ("num_labels", True),
        ("id2label", 5),
        ("architectures", 5),
        ("architectures", "LlamaForSequenceClassification"),
        ("architectures", [5]),
        ("hidden_size", "8"),
        ("hidden_size", -8),
        ("num_hidden_layers", [1]),
        ("num_key_value_heads", "x"),
        ("num_attention_heads", 0),
        ("head_dim", 1e300),
    ],
)
def test_a_configuration_of_other_types_is_refused_by_its_field(
    tmp_path: Path, field: str, value: object
) -> None:
    save_reward_model(tmp_path)
    change(tmp_path, **{field: value})
    assert field in problem(tmp_path)
    save_reward_model(tmp_path)
    if field not in {"num_labels", "id2label"}:  # as in a model whose language model is a part
        change(tmp_path, text_config={field: value})
        assert field in problem(tmp_path)


def test_a_head_without_rows_is_refused(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["score.weight"] = weights["score.weight"][0, 0]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "0 by the score.weight" in problem(tmp_path)


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["evil.Evil", None]}, "evil.Evil", 5])
def test_code_that_a_file_beside_the_model_names_is_refused(
    tmp_path: Path, file: str, auto_map: object
) -> None:
    save_reward_model(tmp_path)
    path = tmp_path / file
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | {"auto_map": auto_map}))
    text = problem(tmp_path)
    assert file in text
    assert "the model's own code" in text


def test_a_pickled_model_needs_permission_which_rewards_take(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert "`allow_pickle: true`" in problem(tmp_path)
    allowed = inspect_reward_model(RewardModel(model=str(tmp_path), allow_pickle=True))
    assert isinstance(allowed, Classifier)
    assert allowed.stored == "fp32"


def test_a_row_that_is_not_a_response_is_refused() -> None:
    good = {"prompt_id": "a", "sample": 0, "messages": [{"role": "user", "content": "q"}], "text": "t"}
    assert parse_response(good).text == "t"
    for wrong in (
        [1],
        "text",
        None,
        good | {"messages": []},
        good | {"messages": [{"role": "user", "content": 5}]},
        good | {"messages": [{"role": ["user"], "content": "q"}]},
        good | {"sample": True},
        good | {"sample": -1},
        good | {"num_tokens": "many"},
        good | {"model": [1]},
        good | {"origin": {}},
        good | {"finish_reason": 5},
    ):
        with pytest.raises(ValueError, match=r"`|object"):
            parse_response(cast(Any, wrong))
