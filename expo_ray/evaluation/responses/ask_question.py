"""Ask one model one prompt: which settings decide the response, how it is requested, and why it may stay unanswered."""

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
    """A prompt to one model, and the number of the sample.

    Attributes:
        card: of the model.
        sampling: with the prompt's own temperature.
        sample: from 0.
    """

    card: Card
    sampling: Sampling
    prompt: Prompt
    sample: int


@dataclass(frozen=True)
class Unanswered:
    """A prompt without a response.

    Attributes:
        kind: `too long`, `refused`, or `gave up`.
        reason: message of the endpoint.
    """

    prompt_id: str
    kind: str
    reason: str


def sampling_for(prompt: Prompt, sampling: Sampling) -> Sampling:
    """`sampling` with the prompt's own temperature, if it has one."""
    own = prompt.temperature
    return sampling if own is None else sampling.model_copy(update={"temperature": own})


def origin_fields(card: Card, sampling: Sampling) -> dict[str, Any]:
    """All that decides a response beside prompt and sample. An endpoint that does not identify its weights has their name there."""
    return {
        "weights": card.weights or f"of {card.name}",
        "engine": card.engine,
        "template": card.template,
        "files": card.files,
        "settings": card.settings,
        "dtype": card.dtype,
        "max_model_len": card.max_model_len,
        # Without `samples`: more of them only add rows.
        "sampling": sampling.model_dump(mode="json", exclude={"samples"}),
    }


def origin_of(card: Card, sampling: Sampling) -> str:
    """The digest of `origin_fields`, which names the folder of the responses."""
    return digest(origin_fields(card, sampling))


async def ask(client: Client, question: Question) -> Response | Unanswered:
    """Ask a prompt and then its follow-ups, each with the answers before it.

    Raises:
        EndpointError: if the endpoint stops answering.
    """
    card, prompt = question.card, question.prompt
    seed = seed_of(question.sampling, prompt.id, question.sample)
    messages: list[Message] = list(prompt.messages)
    try:
        answer = await _ask_turn(client, question, messages, seed)
        for turn in prompt.follow_ups:
            messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": turn}]
            answer = await _ask_turn(client, question, messages, seed)
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


def unanswered_errors(
    unanswered: Sequence[Unanswered], card: Card, sets: Sequence[PromptSet]
) -> tuple[PromptError, ...]:
    """An error for each set and kind of failure, naming the prompts."""
    errors = []
    for prompts in sets:
        by_id = {prompt.id: prompt for prompt in prompts.prompts}
        by_kind: dict[str, dict[str, str]] = defaultdict(dict)
        for failure in unanswered:
            if failure.prompt_id in by_id:
                by_kind[failure.kind].setdefault(failure.prompt_id, failure.reason)
        for kind, reasons in by_kind.items():
            names = first_few([_label_and_start(by_id[prompt_id]) for prompt_id in reasons])
            count, reason = len(reasons), next(iter(reasons.values()))
            errors.append(PromptError(f"{_message(kind, prompts.name, count, card, reason)}: {names}"))
    return tuple(errors)


async def _ask_turn(client: Client, question: Question, messages: Sequence[Message], seed: int) -> Answer:
    """Ask one turn with the largest `max_tokens` that the engine takes.

    Engines refuse a prompt that does not fit together with `max_tokens` more. It is then asked with the rest of the context, as
    in offline generation. It is asked without a limit only where nothing counts its tokens, because an engine may then take the
    limit of the model's generation_config.json.
    """
    card, wanted = question.card, question.sampling.max_tokens
    options = _request_options(card, question.sampling, seed)
    if not 0 < card.max_model_len <= wanted:
        try:
            return await client.chat(card.name, messages, options | {"max_tokens": wanted})
        except Refused as error:
            if not error.too_long:
                raise
    token_count = await client.count(card.name, messages)
    if token_count is None:
        return await client.chat(card.name, messages, options)
    count, context = token_count
    if count >= context:
        raise Refused(f"{count} tokens", too_long=True)
    return await client.chat(card.name, messages, options | {"max_tokens": min(wanted, context - count)})


def _request_options(card: Card, sampling: Sampling, seed: int) -> dict[str, Any]:
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
        # vLLM takes what is left out here from the model's generation_config.json.
        options |= {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
        # vLLM leaves special tokens out of the text; their ids are needed to count them.
        return options | ({"return_token_ids": True} if card.special_ids else {})
    # No part of OpenAI's API: sent only if it is set.
    return options | ({"top_k": sampling.top_k} if sampling.top_k else {})


def _num_special(answer: Answer, card: Card) -> int:
    """Number of special tokens in an answer, without the one that ends it."""
    ids = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
    return sum(token_id in card.special_ids for token_id in ids)


def _message(kind: str, prompt_set: str, count: int, card: Card, reason: str) -> str:
    if kind == "too long":
        limit = f"{card.max_model_len} tokens" if card.max_model_len else "its context"
        return (
            f"{prompt_set}: {count} prompt(s) do not fit into {limit} of {card.name} and are not answered ({reason}); remove them, "
            "or raise `max_model_len` under `serving` if the model can"
        )
    if kind == "refused":
        remedy = (
            "; set top_k to 0, it is no part of OpenAI's API"
            if "top_k" in reason
            else "; correct or remove them"
        )
        return f"{prompt_set}: {card.name} refuses {count} prompt(s) ({reason}){remedy}"
    return f"{prompt_set}: {card.name} failed on {count} prompt(s) ({reason}); run the same command again"


def _label_and_start(prompt: Prompt) -> str:
    start = " ".join(prompt.messages[-1]["content"][:80].split())
    return f"{prompt.label or prompt.id} {start[:40]!r}"
