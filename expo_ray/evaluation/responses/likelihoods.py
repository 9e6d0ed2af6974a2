"""How likely a model finds responses that are there already: what KL divergence between two models is estimated from."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expo_ray.errors import EndpointError
from expo_ray.evaluation.records import Response
from expo_ray.evaluation.responses.client import Client, GaveUp, Refused
from expo_ray.evaluation.responses.endpoint import KEY_VARIABLE
from expo_ray.evaluation.row_store import RowStore

# The prompt and response as they are, without a turn that begins after them; nothing is drawn but one token, which no engine leaves out.
_ONLY_READ = {
    "add_generation_prompt": False,
    "continue_final_message": True,
    "max_tokens": 1,
    "temperature": 0.0,
    "prompt_logprobs": 0,
}


@dataclass(frozen=True)
class Likelihood:
    """Of one response by one model.

    Attributes:
        logprobs: of the response's tokens, in nats; tokenized anew from its text, the same way for every model of a pair.
    """

    prompt_id: str
    sample: int
    logprobs: tuple[float, ...]

    @property
    def key(self) -> tuple[str, int]:
        """Names the response."""
        return self.prompt_id, self.sample


def likelihood_from_row(row: Mapping[str, Any]) -> Likelihood:
    """The inverse of `dataclasses.asdict`."""
    return Likelihood(**{**row, "logprobs": tuple(row["logprobs"])})


def measure_likelihoods(
    url: str,
    name: str,
    responses: Sequence[Response],
    row_store: RowStore[Likelihood],
    *,
    slots: int,
    key_variable: str = KEY_VARIABLE,
) -> dict[tuple[str, int], Sequence[float]]:
    """Log-probabilities of responses by a served model, by their key; those that are not stored are asked for and stored.

    Raises:
        EndpointError: if the endpoint does not tell them all.
    """
    found = row_store.read()
    missing = [one for one in responses if one.key not in found]
    if missing:
        made = asyncio.run(_ask_all(url, name, missing, slots, key_variable))
        row_store.write(made)
        found |= {one.key: one for one in made}
    return {one.key: found[one.key].logprobs for one in responses}


async def _ask_all(
    url: str, name: str, responses: Sequence[Response], slots: int, key_variable: str
) -> list[Likelihood]:
    async with Client(url, slots=slots, key_variable=key_variable) as client:
        at_once = asyncio.Semaphore(client.concurrency)

        async def ask(response: Response) -> Likelihood:
            messages = [*response.messages, {"role": "assistant", "content": response.text}]
            async with at_once:
                try:
                    answer = await client.chat(name, messages, _ONLY_READ)
                except (
                    Refused
                ):  # a template that changes what it is given cannot go on from it; for no model of the pair
                    return Likelihood(*response.key, ())
                except GaveUp as error:
                    raise EndpointError(
                        f"{name}: gives no log-probabilities of the response to prompt {response.prompt_id} ({error}); run again"
                    ) from error
            # The prompt's own tokens come before, all but its first.
            return Likelihood(
                *response.key, tuple(answer.prompt_logprobs[max(response.num_prompt_tokens - 1, 0) :])
            )

        return list(await asyncio.gather(*map(ask, responses)))
