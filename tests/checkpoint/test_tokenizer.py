"""Special tokens and chat templates, read from the files of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from expo_ray.checkpoint.tokenizer import (
    TokenizerFiles,
    local_tokenizer_files,
    read_chat_template,
    read_special_tokens,
    tokenizer_files,
)
from expo_ray.errors import InputChanged
from tests.support.stored_files import stored

ADDED = [{"id": 3, "content": "<s>", "special": True}, {"id": 4, "content": "word", "special": False}]


def files_of(content: Mapping[str, bytes | Mapping[str, Any]]) -> TokenizerFiles:
    store = stored(dict(content))
    return tokenizer_files(store, store.list())


def test_special_tokens_are_the_added_tokens_that_are_marked() -> None:
    special = read_special_tokens(files_of({"tokenizer.json": {"model": {}, "added_tokens": ADDED}}))
    assert [(token.id, token.content) for token in special] == [(3, "<s>")]


@pytest.mark.parametrize(
    "content", [b"{", {"model": {}}, {"added_tokens": [{"id": "3"}]}, {"added_tokens": 1}]
)
def test_a_tokenizer_without_a_readable_list_has_no_special_tokens(content: Any) -> None:
    assert read_special_tokens(files_of({"tokenizer.json": content})) == []
    assert read_special_tokens({}) == []


def test_a_tokenizer_replaced_since_it_was_planned_is_refused() -> None:
    store = stored({"tokenizer.json": {"added_tokens": ADDED}})
    files = tokenizer_files(store, store.list())
    store.put("tokenizer.json", json.dumps({"added_tokens": ADDED[1:]}).encode())
    with pytest.raises(InputChanged):
        read_special_tokens(files)


def test_the_template_file_counts_before_the_configuration() -> None:
    config = {"chat_template": "from the configuration"}
    files = files_of({"chat_template.jinja": b"a\r\nb\rc", "tokenizer_config.json": config})
    assert read_chat_template(files) == "a\nb\nc"
    assert read_chat_template(files_of({"tokenizer_config.json": config})) == "from the configuration"
    named = [{"name": "default", "template": "x"}]
    assert read_chat_template(files_of({"tokenizer_config.json": {"chat_template": named}})) == named
    assert read_chat_template(files_of({"tokenizer_config.json": b"{"})) == ""
    assert read_chat_template({}) == ""


def test_links_out_of_an_engine_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "tokenizer.json").write_text(json.dumps({"added_tokens": ADDED}))
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(tmp_path / "parent" / "tokenizer.json")
    assert [token.id for token in read_special_tokens(local_tokenizer_files(folder))] == [3]
