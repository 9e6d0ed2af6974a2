"""What a job's models are called where they are served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expo_ray.config import Job, format_alpha


def served_names(job: Job) -> list[str]:
    """All models that a job evaluates: `<pair>@<alpha>`, and the published ones by name."""
    return [name for names in served_by_engine(job).values() for name in names]


def served_by_engine(job: Job) -> Mapping[str, Sequence[str]]:
    """The same, by the pair or model whose engines answer for them; dpo itself, at alpha 0, is always among a pair's."""
    pairs = {
        pair.name: [f"{pair.name}@{format_alpha(alpha)}" for alpha in sorted({0.0, *pair.alphas})]
        for pair in job.pairs
    }
    return pairs | {model.name: [model.name] for model in job.models}
