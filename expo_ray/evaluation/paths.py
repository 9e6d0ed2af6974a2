"""Every key below `evaluation/` in a job's output.

Stored runs are resumed by these keys. A changed key loses nothing, but all rows under the old one are made again.
"""

from __future__ import annotations

from dataclasses import dataclass

_ROOT = "evaluation"
_ABOUT = "about.json"
# Where searches are kept.
SEARCHES = f"{_ROOT}/searches/"


@dataclass(frozen=True)
class ResponsesFolder:
    """Folder of the responses that one served model gave under the same conditions, and of their rewards.

    Attributes:
        path: `evaluation/<model>/<origin>`; the origin is a digest of weights, sampling, engine and template.
    """

    path: str

    @classmethod
    def of(cls, model: str, origin: str) -> ResponsesFolder:
        """The folder of a served model and an origin."""
        return cls(f"{responses_root(model)}/{origin}")

    @property
    def about(self) -> str:
        """File with the values that the origin is a digest of."""
        return f"{self.path}/{_ABOUT}"

    def again(self, search_id: str) -> ResponsesFolder:
        """Folder of what the same model answered at the end of a search to questions that it had answered, and of the rewards."""
        return ResponsesFolder(f"{self.path}/again-{search_id}")

    @property
    def responses(self) -> str:
        """Folder of the parts that hold responses."""
        return f"{self.path}/responses"

    def rewards(self, reward_model: str, reward_id: str) -> str:
        """Folder of the parts that hold the rewards of one reward model."""
        return f"{self.path}/rewards/{reward_model}-{reward_id}"

    def rewards_about(self, reward_model: str, reward_id: str) -> str:
        """File that says what made the rewards. It stands beside their folder, where every file is read as a part."""
        return f"{self.rewards(reward_model, reward_id)}.{_ABOUT}"


def responses_root(model: str) -> str:
    """Folder of all that one served model, such as `zephyr-7b@0.3`, has answered under any conditions."""
    return f"{_ROOT}/{model}"


def responses_folder_at(key: str) -> ResponsesFolder | None:
    """The folder whose `about` file has this key; None for any other key."""
    folder, _, file = key.rpartition("/")
    return ResponsesFolder(folder) if file == _ABOUT else None


def likelihoods_folder(model: str, weights: str, origin: str) -> str:
    """Folder of the parts that hold how likely `weights`, served as `model`, find dpo's responses from `origin`."""
    return f"{responses_root(model)}/likelihoods-{weights}-{origin}"


def devices_key() -> str:
    """File that says whether the engines and reward models of a run compute on GPUs."""
    return f"{_ROOT}/devices.json"


def prompt_set_key(name: str, digest: str) -> str:
    """File of a set of prompts."""
    return f"{_ROOT}/prompts/{name}-{digest}.jsonl"


def search_key(pair: str, search_id: str) -> str:
    """File of a finished search."""
    return f"{SEARCHES}{pair}-{search_id}.json"


def rungs_key(pair: str, search_id: str) -> str:
    """File of what each rung of a search asked."""
    return f"{SEARCHES}{pair}-{search_id}.rungs.json"


def part_key(folder: str, digest: str) -> str:
    """File of one part of the rows in `folder`, named after its content."""
    return f"{folder}/{digest}.jsonl"
