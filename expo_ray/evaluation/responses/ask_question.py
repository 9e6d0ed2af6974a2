"""One prompt put to one model: what decides the response, how it is asked for, and why it may stay unanswered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expo_ray.config import Sampling
from expo_ray.errors import PromptError
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Message, Prompt, Response, digest, seed_of
from expo_ray.evaluation.responses.client import Answer, Client, GaveUp, Refused
from expo_ray.evaluation.responses.endpoint import Card
from expo_ray.text import first_few


@dataclass(frozen=True)
class Question:
    """One response that is wanted.

    Attributes:
        card: of the model.
        sampling: with the prompt's own temperature.
    """

    card: Card
    sampling: Sampling
    prompt: Prompt
    sample: int


@dataclass(frozen=True)
class Unanswered:
    """Why there is no response to a prompt.

    Attributes:
        kind: `too long`, `refused`, or `gave up`.
        reason: what the endpoint said.
    """

    prompt_id: str
    kind: str
    reason: str


def sampling_of(prompt: Prompt, sampling: Sampling) -> Sampling:
    """How responses to `prompt` are drawn."""
    own = prompt.temperature
    return sampling if own is None else sampling.model_copy(update={"temperature": own})


def origin_fields(card: Card, sampling: Sampling) -> dict[str, Any]:
    """All that decides a response beside prompt and sample; where an endpoint tells nothing of its weights, their name."""
    return {
        "weights": card.weights or f"of {card.name}",
        "engine": card.engine,
        "template": card.template,
        "files": card.files,
        "settings": card.settings,
        "dtype": card.dtype,
        "max_model_len": card.max_model_len,
        # Further samples only add rows.
        "sampling": sampling.model_dump(mode="json", exclude={"samples"}),
    }


def origin_of(card: Card, sampling: Sampling) -> str:
    """The responses id: digest of `origin_fields`."""
    return digest(origin_fields(card, sampling))


async def put(client: Client, question: Question) -> Response | Unanswered:
    """The response to a prompt, its follow-ups asked in turn.

    Raises:
        EndpointError: if the endpoint answers no more.
    """
    card, prompt = question.card, question.prompt
    seed = seed_of(question.sampling, prompt.id, question.sample)
    messages: list[Message] = list(prompt.messages)
    try:
        answer = await _ask(client, question, messages, seed)
        for turn in prompt.follow_ups:
            messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": turn}]
            answer = await _ask(client, question, messages, seed)
    except Refused as error:
        return Unanswered(prompt.id, "too long" if error.too_long else "refused", str(error))
    except GaveUp as error:
        return Unanswered(prompt.id, "gave up", str(error))
    return Response(
        prompt_id=prompt.id,
        sample=question.sample,
        model=card.name,
        messages=tuple(messages),
        text=answer.text,
        num_tokens=answer.num_tokens,
        num_prompt_tokens=answer.num_prompt_tokens,
        finish_reason=answer.finish_reason,
        seed=seed,
        engine=card.engine,
        template=card.template,
        origin=origin_of(card, question.sampling),
        num_special=_num_special(answer, card),
    )


def problems_of(
    unanswered: Sequence[Unanswered], card: Card, sets: Sequence[PromptSet]
) -> tuple[PromptError, ...]:
    """One error for each set and kind, naming the prompts."""
    problems = []
    for prompts in sets:
        by_id = {prompt.id: prompt for prompt in prompts.prompts}
        by_kind: dict[str, dict[str, str]] = defaultdict(dict)
        for one in unanswered:
            if one.prompt_id in by_id:
                by_kind[one.kind].setdefault(one.prompt_id, one.reason)
        for kind, reasons in by_kind.items():
            named = first_few([_named(by_id[prompt_id]) for prompt_id in reasons])
            count, reason = len(reasons), next(iter(reasons.values()))
            problems.append(PromptError(_told(kind, prompts.name, count, card, reason) + f": {named}"))
    return tuple(problems)


async def _ask(client: Client, question: Question, messages: Sequence[Message], seed: int) -> Answer:
    """Ask one turn.

    An engine refuses a prompt that would not fit together with `max_tokens` more; it then gets what is left of the context, as in
    offline generation. Asked without a limit, an engine may take one from the model's own generation_config.json.
    """
    card, wanted = question.card, question.sampling.max_tokens
    options = _options(card, question.sampling, seed)
    if not 0 < card.max_model_len <= wanted:
        try:
            return await client.chat(card.name, messages, options | {"max_tokens": wanted})
        except Refused as error:
            if not error.too_long:
                raise
    counted = await client.count(card.name, messages)
    if counted is None:
        return await client.chat(card.name, messages, options)
    count, context = counted
    if count >= context:
        raise Refused(f"{count} tokens", too_long=True)
    return await client.chat(card.name, messages, options | {"max_tokens": min(wanted, context - count)})


def _options(card: Card, sampling: Sampling, seed: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": seed,
        "n": 1,
        "stream": False,
    }
    if card.vllm:
        # Left out, they would be those of the model's generation_config.json.
        options |= {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
        # vLLM leaves special tokens out of a text; their ids still tell of them.
        return options | ({"return_token_ids": True} if card.special_ids else {})
    return options | ({"top_k": sampling.top_k} if sampling.top_k else {})


def _num_special(answer: Answer, card: Card) -> int:
    """Special tokens of an answer before the one that ends it."""
    ids = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
    return sum(one in card.special_ids for one in ids)


def _told(kind: str, name: str, count: int, card: Card, reason: str) -> str:
    if kind == "too long":
        limit = f"{card.max_model_len} tokens" if card.max_model_len else "its context"
        return (
            f"{name}: {count} prompt(s) do not fit into {limit} of {card.name} and are not answered ({reason}); remove them, or "
            "raise `max_model_len` under `serving` if the model can"
        )
    if kind == "refused":
        remedy = (
            "; set top_k to 0, it is no part of OpenAI's API"
            if "top_k" in reason
            else "; correct or remove them"
        )
        return f"{name}: {card.name} refuses {count} prompt(s) ({reason}){remedy}"
    return f"{name}: {card.name} failed on {count} prompt(s) ({reason}); run the same command again"


def _named(prompt: Prompt) -> str:
    start = " ".join(prompt.messages[-1]["content"][:80].split())
    return f"{prompt.label or prompt.id} {start[:40]!r}"
