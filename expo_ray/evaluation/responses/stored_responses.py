"""The responses that a job has stored so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expo_ray.config import Job, Sampling
from expo_ray.errors import StorageError
from expo_ray.evaluation.paths import ResponsesFolder, responses_folder_at, responses_root
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Response, response_from_row
from expo_ray.evaluation.responses.ask_question import sampling_of
from expo_ray.evaluation.row_store import RowStore
from expo_ray.serving.served_models import served_names
from expo_ray.storage import Store
from expo_ray.untrusted import CONFIG_BYTES, parse_json_object


@dataclass(frozen=True)
class StoredResponses:
    """The responses of one served model that have the same origin.

    Attributes:
        model: name as served.
    """

    model: str
    folder: ResponsesFolder
    responses: Sequence[Response]


def read_stored_responses(store: Store, job: Job, sets: Sequence[PromptSet]) -> list[StoredResponses]:
    """All responses to the job's prompts, drawn as it says, in the order of its models.

    Raises:
        StorageError: if they cannot be read.
    """
    wanted = {
        (prompt.id, sample): _drawn(sampling_of(prompt, job.sampling))
        for prompts in sets
        for prompt in prompts.prompts
        for sample in range(job.sampling.samples)
    }
    found = []
    for name in served_names(job):
        for info in store.list(f"{responses_root(name)}/"):
            folder = responses_folder_at(info.key)
            if folder is None:
                continue
            drawn = _sampling(store, info.key)
            rows = RowStore(store, folder.responses, response_from_row).read()
            responses = [rows[key] for key, how in wanted.items() if how == drawn and key in rows]
            if responses:
                found.append(StoredResponses(name, folder, responses))
    return found


def _drawn(sampling: Sampling) -> object:
    return sampling.model_dump(mode="json", exclude={"samples"})


def _sampling(store: Store, key: str) -> object:
    remedy = "remove the folder, its responses are then asked anew"
    about = parse_json_object(
        store.read(key, most_bytes=CONFIG_BYTES), f"{store.uri}/{key}", error=StorageError, remedy=remedy
    )
    if "sampling" not in about:
        raise StorageError(f"{store.uri}/{key}: does not say how responses were drawn; {remedy}")
    return about["sampling"]
