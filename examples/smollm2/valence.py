"""A reward that needs no model: how positive the words of a response are. The reward that `dpo_100pct` was tuned for."""

from __future__ import annotations

import re
from functools import cache
from typing import Any


def valence(prompt: str, response: str) -> float:
    """Ten times the mean VADER valence of the response's words; 0 for an empty one.

    Source: Hutto and Gilbert, VADER (ICWSM 2014); the lexicon rates words from -4 to 4.
    """
    del prompt  # only the response counts
    words = re.findall(r"[a-z']+", response.lower())
    return 10 * sum(_lexicon().get(word, 0.0) for word in words) / len(words) if words else 0.0


@cache
def _lexicon() -> dict[str, float]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer: Any = SentimentIntensityAnalyzer()
    return {word: float(value) for word, value in analyzer.lexicon.items()}
