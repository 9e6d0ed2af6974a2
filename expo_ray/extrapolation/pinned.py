"""Plans pinned to the parents that were checked: from the search, which may take hours, to publication."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from expo_ray.checkpoint.folder import Checkpoint
from expo_ray.config import Pair
from expo_ray.errors import ExpoError, InputChanged, Problems, problems_of
from expo_ray.extrapolation.plan import PairPlan, named, option_problems, plan_from_headers
from expo_ray.storage import open_store
from expo_ray.text import first_few, shown


def plan_publication(checked: PairPlan, pair: Pair, outputs: Mapping[float, str]) -> PairPlan:
    """Plan the models to publish from the parents that were checked, without looking at their URIs again.

    Args:
        checked: the pair as it was checked and searched. Engines always get it with `adapter: merge`, so it is laid out anew if
            `pair` scales an adapter.
        pair: as the job has it.
        outputs: folder of the model of each alpha.

    Raises:
        Problems: if the pair's options and these alphas exclude each other.
    """
    plan = checked
    if plan.options.adapter != pair.adapter:
        plan = plan_from_headers(pair, plan.sft, plan.dpo, outputs)
    options = pair.model_copy(update={"alphas": tuple(outputs)})
    if problems := option_problems(options):
        raise Problems([named(pair.name, problem) for problem in problems])
    return replace(plan, options=options, outputs=outputs)


def refuse_replaced_parents(plan: PairPlan) -> None:
    """Compare both parents with the files that were planned.

    Raises:
        Problems: with the parents that are other files now, or are gone.
    """
    problems: list[ExpoError] = []
    for side, parent in (("sft", plan.sft), ("dpo", plan.dpo)):
        try:
            _refuse_other_files(parent)
        except ExpoError as error:
            problems += (named(plan.name, named(side, problem)) for problem in problems_of(error))
    if problems:
        raise Problems(problems)


def _refuse_other_files(parent: Checkpoint) -> None:
    present = {info.key: info for info in open_store(parent.uri).list()}
    other = [
        f"{shown(key)} ({'replaced' if key in present else 'gone'})"
        for key, planned in parent.files.items()
        if key not in present or (present[key].size, present[key].etag) != (planned.size, planned.etag)
    ]
    if other:
        raise InputChanged(
            f"{parent.uri}: {len(other)} file(s) are no longer those that were checked: {first_few(other)}; run the job again, which "
            "checks and searches the pair with its present files"
        )
