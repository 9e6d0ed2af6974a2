"""Log-probabilities that a model gives to stored responses; the KL divergence between two models is estimated from them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expo_ray.errors import EndpointError
from expo_ray.evaluation.records import Response
from expo_ray.evaluation.responses.ask_missing import run_all
from expo_ray.evaluation.responses.client import Client, GaveUp, Refused
from expo_ray.evaluation.responses.endpoint import KEY_VARIABLE
from expo_ray.evaluation.row_store import RowStore

# Scores the conversation as it stands: the response is the open last turn, and no further turn begins after it. `max_tokens` is 1
# because no engine accepts 0; that token is ignored.
_SCORE_ONLY = {
    "add_generation_prompt": False,
    "continue_final_message": True,
    "max_tokens": 1,
    "temperature": 0.0,
    "prompt_logprobs": 0,
}


@dataclass(frozen=True)
class Likelihood:
    """Log-probabilities of one response by one model.

    Attributes:
        logprobs: of the response's tokens, in nats. The text is tokenized anew, in the same way for every model of a pair. Empty if
            the chat template cannot continue the response.
    """

    prompt_id: str
    sample: int
    logprobs: tuple[float, ...]

    @property
    def key(self) -> tuple[str, int]:
        """Prompt id and sample of the response."""
        return self.prompt_id, self.sample


def likelihood_from_row(row: Mapping[str, Any]) -> Likelihood:
    """Make a `Likelihood` from its stored row; the inverse of `dataclasses.asdict`."""
    return Likelihood(**{**row, "logprobs": tuple(row["logprobs"])})


def measure_likelihoods(
    url: str,
    name: str,
    responses: Sequence[Response],
    row_store: RowStore[Likelihood],
    *,
    slots: int,
    key_variable: str = KEY_VARIABLE,
    next_name: str = "",
) -> dict[tuple[str, int], Sequence[float]]:
    """Ask a served model for the log-probabilities of responses that `row_store` lacks, store them, and return all by key.

    Args:
        next_name: the model that will probably be asked for next, if known.

    Raises:
        EndpointError: if the endpoint leaves out any of them.
    """
    by_key = row_store.read()
    missing = [response for response in responses if response.key not in by_key]
    if missing:
        measured = asyncio.run(_ask_all(url, name, missing, slots, key_variable, next_name=next_name))
        row_store.write(measured)
        by_key |= {likelihood.key: likelihood for likelihood in measured}
    return {response.key: by_key[response.key].logprobs for response in responses}


async def _ask_all(
    url: str, name: str, responses: Sequence[Response], slots: int, key_variable: str, *, next_name: str
) -> list[Likelihood]:
    async with Client(url, slots=slots, key_variable=key_variable) as client:
        client.next_models[name] = next_name
        at_once = asyncio.Semaphore(client.concurrency)

        async def ask(response: Response) -> Likelihood:
            messages = [*response.messages, {"role": "assistant", "content": response.text}]
            async with at_once:
                try:
                    answer = await client.chat(name, messages, _SCORE_ONLY)
                except Refused:
                    # The template rewrites the last turn, so vLLM cannot continue it. It does so for every model of the pair.
                    return Likelihood(*response.key, ())
                except GaveUp as error:
                    raise EndpointError(
                        f"{name}: gives no log-probabilities of the response to prompt {response.prompt_id} ({error}); run again"
                    ) from error
            # Before the response come the tokens of its prompt, without the first, which has no log-probability.
            return Likelihood(
                *response.key, tuple(answer.prompt_logprobs[max(response.num_prompt_tokens - 1, 0) :])
            )

        measured: dict[tuple[str, int], Likelihood] = {}

        async def work(response: Response) -> None:
            measured[response.key] = await ask(response)

        await run_all([work(response) for response in responses])
        return [measured[response.key] for response in responses]
