"""Match tensor names of two checkpoints: libraries and trainers put the same modules under different parents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

# Modules that training programs wrap around a model; a proper save removes them from the names.
WRAPPERS = (
    "_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model", "pretrained_model",
    "_forward_module",
)  # fmt: skip
# Parents that `transformers` has moved into or out of the names of one model (4.52 did so for all vision-language models).
_MOVED = frozenset({"model", "language_model", "text_model", "backbone", "transformer", "vision_model"})
# Modules that `transformers` 5 names differently in memory than in files.
_SYNONYMS = {"block_sparse_moe": "mlp"}


def canonical(name: str) -> str:
    """`name` without the parents that may differ between two saves of one model."""
    return ".".join(
        _SYNONYMS.get(part, part) for part in name.split(".") if part not in _MOVED and part not in WRAPPERS
    )


def match_names(names: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """Map each of `names` that is missing in `wanted` to the name in `wanted` of the same tensor, if there is exactly one.

    Two names mean the same tensor if they differ only in moved parents, or in one leading part that all names of one side have
    (`bert.`, which the base class of a model leaves out).
    """
    ordered, there = list(names), set(wanted)
    here = set(ordered)
    left, free = here - there, there - here
    pairs = _by_canonical_name(left, free)
    pairs |= _by_root(left - pairs.keys(), free - set(pairs.values()))
    return {name: pairs[name] for name in ordered if name in pairs}


def _by_root(left: Collection[str], free: Collection[str]) -> dict[str, str]:
    """Pairs of names of which one is the other with a leading part in front."""
    root = _root(left, free)
    if root:
        return {
            name: name.removeprefix(root)
            for name in left
            if name.startswith(root) and name.removeprefix(root) in free
        }
    root = _root(free, left)
    return {name: root + name for name in left if root and root + name in free}


def wrappers_of(name: str, other: str) -> list[str]:
    """Wrappers in `name` that `other` lacks, outermost first."""
    return [part for part in name.split(".") if part in WRAPPERS and part not in other.split(".")]


def _by_canonical_name(left: Collection[str], free: Collection[str]) -> dict[str, str]:
    """Pairs of names with the same canonical form, where no other name of either side has it."""
    forms = {name: canonical(name) for name in (*left, *free)}
    here, there = Counter(forms[name] for name in left), Counter(forms[name] for name in free)
    goals = {forms[name]: name for name in free if there[forms[name]] == 1}
    return {name: goals[forms[name]] for name in left if here[forms[name]] == 1 and forms[name] in goals}


def _root(longer: Collection[str], shorter: Collection[str]) -> str:
    """Leading part that turns most names of `longer` into names of `shorter` when removed; empty if there is none."""
    roots = Counter(name.partition(".")[0] + "." for name in longer if name.partition(".")[2] in shorter)
    # With two such parts (a policy and its reference in one folder) it is unknown which is meant, so neither is used.
    most = [root for root, count in roots.items() if 2 * count > len(shorter)]
    return most[0] if len(most) == 1 else ""
