"""Text from outside in a model card, judged by a Markdown parser that has nothing to do with this project."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from expo_ray.report.markdown import code, plain, table
from expo_ray.report.model_card import model_card

EVIL = [
    "x`\n\n# EVIL heading\n\n[EVIL click](http://evil)",
    "x` <img src=x onerror=alert(1)> `",
    "``x`` `<script>alert(1)</script>",
    "a|b|c",
    "a\\|b\\",
    "x`\n---\nlicense: evil\n---\n",
    "[EVIL](http://evil) ![EVIL](http://evil/x.png) [EVIL][1]\n\n[1]: http://evil",
    "<http://evil> http://evil www.evil.example mailto:evil@evil.example",
    "a\u2028# EVIL\u2029\x0b\x0c\x85b",
    "\u202egnp.exe\u2066",
    "\0\x1b[2J\ud800",
    "&lt;b&gt; &#60;b&#62; &amp;",
    "**EVIL** __EVIL__ ~~EVIL~~ _EVIL_ *EVIL*",
    "$$x$$ \\(x\\) <!-- EVIL",
    " ",
    "",
    "`",
    "- a\n- b\n> c\n1. d\n| x |\n| --- |",
    "n" * 100_000,
]
ACTIVE = {
    "heading_open",
    "link_open",
    "image",
    "html_block",
    "hr",
    "fence",
    "list_item_open",
    "em_open",
    "strong_open",
}


def tokens(text: str) -> list[Token]:
    flat = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        flat += [token, *(token.children or ())]
    return flat


def active(text: str) -> list[str]:
    """What of `text` is more than words and code: kinds of tokens, and HTML but for our own `<code>`."""
    return [
        token.type + token.content
        for token in tokens(text)
        if token.type in ACTIVE
        or (token.type == "html_inline" and token.content not in {"<code>", "</code>"})
    ]


def manifest(text: str) -> dict[str, Any]:
    row = {"rms_weight": 1.0, "rms_delta": 0.1, "changed_share": 0.5, "effective_alpha": 0.5}
    return {
        "pair": text, "alpha": 0.5, "plan": text, "expo_ray": text, "warnings": [text],
        "arithmetic": {"formula": text, "adapter": None, "multipliers": {text: 0}, text: text},
        "parents": {side: {"uri": f"hf://org/{side}{text}", "revision": text} for side in ("sft", "dpo")},
        "shards": [{"file": text, "size": 1, "sha256": text}],
        "statistics": row | {"elements": 1, "tensors": {text: row}},
    }  # fmt: skip


@pytest.mark.parametrize("text", EVIL)
def test_a_card_has_the_same_parts_whatever_the_texts_are(text: str) -> None:
    card, plain_card = model_card(manifest(text)), model_card(manifest("harmless"))
    (front, body), (_, plain_body) = (each[4:].split("\n---\n", 1) for each in (card, plain_card))

    assert active(body) == active(plain_body)
    assert len(body.splitlines()) == len(plain_body.splitlines())
    kinds = [token.type for token in tokens(body) if token.type in {"td_open", "tr_open", "table_open"}]
    assert kinds == [
        token.type for token in tokens(plain_body) if token.type in {"td_open", "tr_open", "table_open"}
    ]
    assert set(yaml.safe_load(front)) <= {"library_name", "base_model", "base_model_relation", "tags"}
    assert len(card) < 40_000
    card.encode()


@settings(max_examples=300)
@given(
    st.text(
        st.sampled_from("`|\\<>[]()!*_~&#;:@/ \n\t.-wabhtp0") | st.characters(exclude_categories=()),
        max_size=40,
    )
)
def test_any_text_is_words_or_code_and_reads_back(text: str) -> None:
    cells = table(("head",), [(f"x {plain(text)} x",), (code(text),)])

    assert active(cells) == []
    assert sum(token.type == "tr_open" for token in tokens(cells)) == 3
    assert not re.search(r"(?i)https?:/|www\.|\w@\w", plain(text))  # what GitHub makes links of
    words = "".join(token.content for token in tokens(f"x {plain(text)}") if token.type == "text")
    kept = "".join(re.findall(r"[a-z]{2,}", text))
    assert "".join(re.findall(r"[a-z]{2,}", words)).startswith(kept[:5]) or not text.isprintable()


def test_what_stands_in_the_readme_keeps_its_table() -> None:
    row = table(("option", "value"), [("`multipliers`", code({"embed_tokens|lm_head": 0.0}))]).splitlines()[
        -1
    ]

    inline = [token for token in tokens(f"| a | b |\n| --- | --- |\n{row}") if token.type == "inline"]
    assert len(inline) == 4
    assert "embed_tokens|lm_head" in "".join(child.content for child in inline[-1].children or ())
