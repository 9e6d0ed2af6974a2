"""Make chats to measure a model on: prompts from templates with replies that dpo samples, the same in every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED_AT_ONCE, SCORED_AT_ONCE = 104, 26
SEED = 42

OPENINGS = (
    "I went in expecting little",
    "From the very first scene",
    "Nobody in the cast seems",
    "The director clearly loves",
    "After two hours I felt",
    "There is a moment when",
    "What a strange, quiet film",
    "My children laughed, but I",
    "It looks beautiful, and yet",
    "The script tries to be",
    "If you enjoyed the book",
    "Halfway through, the story suddenly",
    "The music alone makes this",
)
FILMS = (
    "a western", "a low-budget thriller", "a musical", "a war drama",
    "a silent comedy", "an animated film", "a heist movie", "a documentary",
)  # fmt: skip
QUESTIONS = (
    "Explain {} to a ten-year-old.",
    "What should a beginner know about {}?",
    "Write two sentences about the history of {}.",
    "Give me three tips about {}.",
    "Why do people care about {}?",
    "Write a short poem about {}.",
    "What is the most common mistake people make with {}?",
    "Name one advantage and one drawback of {}.",
    "How has {} changed in the last fifty years?",
    "Ask me a quiz question about {} and give the answer.",
    "Describe {} without using the letter z.",
    "My friend hates {}. What could I tell her?",
    "Summarise what is known about {} in one paragraph.",
)
SUBJECTS = (
    "baking bread", "public libraries", "the water cycle", "chess",
    "electric cars", "learning a language", "volcanoes", "saving money",
)  # fmt: skip


def prompts() -> list[str]:
    """208 of them: half openings of film reviews to go on with, half general questions."""
    reviews = [
        f'Continue this review of {film} in one sentence: "{opening}"'
        for opening, film in product(OPENINGS, FILMS)
    ]
    questions = [template.format(subject) for template, subject in product(QUESTIONS, SUBJECTS)]
    return [prompt for both in zip(reviews, questions, strict=True) for prompt in both]


@dataclass(frozen=True)
class Batch:
    """Chats of similar length, padded on the right.

    Attributes:
        ids: token ids, (chats, longest).
        mask: 1 where `ids` holds a chat, 0 where it is padding.
        counted: True at the tokens of the user's turn and the reply; the system prompt is the same in every chat.
    """

    ids: Tensor
    mask: Tensor
    counted: Tensor


def batches(folder: Path, num_chats: int, new_tokens: int) -> Iterator[Batch]:
    """Chats of the model in `folder`: replies at temperature 0.7 and top-k 50, at most `new_tokens` long."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    torch.manual_seed(SEED)
    asked_texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts()[:num_chats]
    ]
    sequences = []
    for first in range(0, num_chats, SAMPLED_AT_ONCE):
        asked = tokenizer(
            asked_texts[first : first + SAMPLED_AT_ONCE],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        answered = model.generate(
            **asked, do_sample=True, temperature=0.7, top_k=50, max_new_tokens=new_tokens
        )
        sequences += [
            _chat(*each, tokenizer.eos_token_id)
            for each in zip(asked["attention_mask"], answered, strict=True)
        ]
    sequences.sort(key=len)
    system = _common_start(sequences)
    for first in range(0, num_chats, SCORED_AT_ONCE):
        yield _pad(sequences[first : first + SCORED_AT_ONCE], system)


def _chat(mask: Tensor, answered: Tensor, eos: int) -> list[int]:
    """Prompt and reply without padding, the reply up to the token that ends it."""
    prompt = answered[: len(mask)][mask.bool()].tolist()
    reply = answered[len(mask) :].tolist()
    return prompt + (reply[: reply.index(eos) + 1] if eos in reply else reply)


def _common_start(sequences: Sequence[Sequence[int]]) -> int:
    return next(i for i, column in enumerate(zip(*sequences, strict=False)) if len(set(column)) > 1)


def _pad(sequences: Sequence[Sequence[int]], system: int) -> Batch:
    import torch

    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    counted = mask.bool()
    counted[:, :system] = False
    return Batch(ids, mask, counted)
