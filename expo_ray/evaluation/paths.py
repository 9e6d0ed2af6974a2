"""Every key below `evaluation/` in a job's output. Stored runs are resumed by these keys: changing one asks everything again."""

from __future__ import annotations

from dataclasses import dataclass

_ROOT = "evaluation"
_ABOUT = "about.json"


@dataclass(frozen=True)
class ResponsesFolder:
    """The folder of the responses that one served model gave under the same conditions, and of the rewards of them.

    Attributes:
        path: `evaluation/<model>/<origin>`, where `origin` is the digest of weights, sampling, engine and template.
    """

    path: str

    @classmethod
    def of(cls, model: str, origin: str) -> ResponsesFolder:
        """Name the folder of a model, such as `zephyr-7b@0.3`, and an origin."""
        return cls(f"{responses_root(model)}/{origin}")

    @property
    def about(self) -> str:
        """File that spells out what the origin is the digest of."""
        return f"{self.path}/{_ABOUT}"

    @property
    def responses(self) -> str:
        """Folder of the parts that hold responses."""
        return f"{self.path}/responses"

    def rewards(self, reward_model: str, reward_id: str) -> str:
        """Folder of the parts that hold the rewards of one reward model."""
        return f"{self.path}/rewards/{reward_model}-{reward_id}"

    def rewards_about(self, reward_model: str, reward_id: str) -> str:
        """File that spells out what `reward_id` is the digest of; beside the folder, which holds parts alone."""
        return f"{self.rewards(reward_model, reward_id)}.{_ABOUT}"


def responses_root(model: str) -> str:
    """Folder of all that one served model has answered; `cli` names it as the place of the responses."""
    return f"{_ROOT}/{model}"


def responses_folder_at(key: str) -> ResponsesFolder | None:
    """The folder whose `about` file has this key; None for the key of another file."""
    folder, _, file = key.rpartition("/")
    return ResponsesFolder(folder) if file == _ABOUT else None


def likelihoods_folder(model: str, weights: str, origin: str) -> str:
    """Folder of the parts that hold log-probabilities, by the weights of `model`, of dpo's responses from `origin`."""
    return f"{responses_root(model)}/likelihoods-{weights}-{origin}"


def prompt_set_key(name: str, digest: str) -> str:
    """File of a set of prompts as it was asked."""
    return f"{_ROOT}/prompts/{name}-{digest}.jsonl"


def search_key(pair: str, search_id: str) -> str:
    """File of a finished search."""
    return f"{_ROOT}/searches/{pair}-{search_id}.json"


def part_key(folder: str, digest: str) -> str:
    """File of one part of a folder of rows, named after its content."""
    return f"{folder}/{digest}.jsonl"
