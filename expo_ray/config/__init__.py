"""The job file: frozen, typed, refusing what it does not know.

The text under each field is what `--help`, the JSON schema and the README show.
"""

from expo_ray.config.evaluation import PromptSource, PublishedModel, RewardModel, Sampling, Serving
from expo_ray.config.fields import (
    Device,
    OutputDtype,
    RoundingName,
    VocabPolicy,
    check_alpha,
    check_repo_id,
    format_alpha,
    parse_bytes,
)
from expo_ray.config.guardrails import Guardrails, Limit
from expo_ray.config.job import Job
from expo_ray.config.load import job_schema, load_job, parse_job, parse_pair
from expo_ray.config.pairs import Pair, PairOptions
from expo_ray.config.search import Group, Search

__all__ = [
    "Device",
    "Group",
    "Guardrails",
    "Job",
    "Limit",
    "OutputDtype",
    "Pair",
    "PairOptions",
    "PromptSource",
    "PublishedModel",
    "RewardModel",
    "RoundingName",
    "Sampling",
    "Search",
    "Serving",
    "VocabPolicy",
    "check_alpha",
    "check_repo_id",
    "format_alpha",
    "job_schema",
    "load_job",
    "parse_bytes",
    "parse_job",
    "parse_pair",
]
