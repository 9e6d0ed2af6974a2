"""Read the responses that a job has stored so far, to score them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expo_ray.config import Job, Sampling
from expo_ray.errors import StorageError
from expo_ray.evaluation.paths import ResponsesFolder, responses_folder_at, responses_root
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Response, response_from_row
from expo_ray.evaluation.responses.ask_question import sampling_for
from expo_ray.evaluation.row_store import RowStore
from expo_ray.serving.served_models import served_names
from expo_ray.storage import Store
from expo_ray.untrusted import CONFIG_BYTES, parse_json_object


@dataclass(frozen=True)
class StoredResponses:
    """Responses of one served model with the same origin.

    Attributes:
        model: name as served.
    """

    model: str
    folder: ResponsesFolder
    responses: Sequence[Response]


def read_stored_responses(store: Store, job: Job, sets: Sequence[PromptSet]) -> list[StoredResponses]:
    """Read all responses to the job's prompts that were drawn with its sampling, in the order of its models.

    Raises:
        StorageError: if they cannot be read.
    """
    wanted = {
        (prompt.id, sample): _without_samples(sampling_for(prompt, job.sampling))
        for prompts in sets
        for prompt in prompts.prompts
        for sample in range(job.sampling.samples)
    }
    groups = []
    for name in served_names(job):
        for info in store.list(f"{responses_root(name)}/"):
            folder = responses_folder_at(info.key)
            if folder is None:
                continue
            stored_sampling = _read_sampling(store, info.key)
            rows = RowStore(store, folder.responses, response_from_row).read()
            responses = [
                rows[key] for key, sampling in wanted.items() if sampling == stored_sampling and key in rows
            ]
            if responses:
                groups.append(StoredResponses(name, folder, responses))
    return groups


def _without_samples(sampling: Sampling) -> object:
    return sampling.model_dump(mode="json", exclude={"samples"})


def _read_sampling(store: Store, key: str) -> object:
    remedy = "remove the folder, its responses are then asked anew"
    about = parse_json_object(
        store.read(key, most_bytes=CONFIG_BYTES), f"{store.uri}/{key}", error=StorageError, remedy=remedy
    )
    if "sampling" not in about:
        raise StorageError(
            f"{store.uri}/{key}: does not say with which sampling responses were drawn; {remedy}"
        )
    return about["sampling"]
