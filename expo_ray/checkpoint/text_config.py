"""Multimodal configurations nest the language model's; both have a say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")


def text_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """`config` and the configurations of language models nested in it, outermost first."""
    yield config
    for key in _NESTED:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            yield from text_configs(nested)
