"""Name the cause of tensors without a partner: a single sentence where it explains many names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from expo_ray.checkpoint.renaming import wrappers_of
from expo_ray.checkpoint.tied import VocabularyWeights
from expo_ray.errors import PairError
from expo_ray.text import first_few, shown, shown_names


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Tensors that matching by name has left over.

    Attributes:
        missing: names of dpo's tensors that sft lacks.
        extra: names of sft's tensors that dpo lacks.
        renamed: name in sft -> name in dpo of the tensors that the two call differently.
        total: the number of dpo's tensors.
    """

    missing: Sequence[str]
    extra: Sequence[str]
    renamed: Mapping[str, str]
    total: int


def explain(left: Unmatched, sft: VocabularyWeights, dpo: VocabularyWeights) -> list[PairError]:
    """Errors for tensors without a partner, one for each cause.

    A cause that explains many names comes first; names that no cause explains are listed.
    """
    problems = _wrapped(left)
    layout = _layout(left.missing, left.extra)
    if layout:
        return [*problems, PairError(layout)]
    without_head = _without_head(left, dpo)
    if without_head:
        return [*problems, PairError(without_head)]
    for names, has, lacks, vocabulary in (
        (left.missing, "dpo", "sft", sft),
        (left.extra, "sft", "dpo", dpo),
    ):
        heads = [name for name in names if vocabulary.is_vocabulary(name)]
        if heads:
            problems.append(_untied(heads, has, lacks))
        others = [name for name in names if name not in heads]
        if others:
            problems.append(_plain(others, has, 2 * len(others) > left.total))
    return problems


def _plain(names: Sequence[str], has: str, most: bool) -> PairError:
    listed = shown_names(names)
    message = (
        f"sft lacks {len(names)} tensor(s) of dpo: {listed}"
        if has == "dpo"
        else f"sft has {len(names)} tensor(s) that dpo lacks: {listed}"
    )
    way = "keep dpo's" if has == "dpo" else "leave them out"
    remedy = "" if most else f", or {way} with `multipliers: {{<pattern>: 0}}`"
    return PairError(f"{message}; give two whole checkpoints of one architecture{remedy}")


def _untied(names: Sequence[str], has: str, lacks: str) -> PairError:
    """Error for a head or an embedding without a partner, where no tie explains it."""
    return PairError(
        f"{has} stores {shown_names(names)}, and {lacks} neither stores it nor says in config.json that head "
        f"and embedding are one weight (`tie_word_embeddings`); save {lacks} again with it, or set `tie_word_embeddings` to "
        f"true in config.json of {lacks} if its model shares the two"
    )


def _wrapped(left: Unmatched) -> list[PairError]:
    """Error if dpo's names carry what a trainer has put around the model, so that no loader would know the output's."""
    wrappers = {part: None for old, new in left.renamed.items() for part in wrappers_of(new, old)}
    if not wrappers:
        return []
    name = "name.removeprefix('base_model.model.')" if "base_model" in wrappers else "name"
    parts = [part for part in wrappers if part != "base_model"]
    if parts:
        name = f"'.'.join(part for part in {name}.split('.') if part not in {parts})"
    listed = first_few([f"`{'base_model.model' if part == 'base_model' else part}.`" for part in wrappers])
    return [
        PairError(
            f"dpo's names have {listed}, which a trainer puts around a model and no loader expects (sft's have not); save the "
            f"unwrapped model, or rename the tensors in each file: `save_file({{{name}: tensor for name, tensor in "
            "load_file(file).items()}, file, metadata={'format': 'pt'})` with safetensors.torch"
        )
    ]


def _without_head(left: Unmatched, dpo: VocabularyWeights) -> str:
    """Message if dpo was saved through the class without a head, as `AutoModel` does; empty if not."""
    shorter = [old for old, new in left.renamed.items() if old.endswith(f".{new}")]
    root = shorter[0].removesuffix(left.renamed[shorter[0]]) if shorter else ""
    beside = not any(name.startswith(root) for name in left.extra)
    if not root or left.missing or not beside or not any(map(dpo.is_head, left.extra)):
        return ""
    return (
        f"dpo's names lack `{shown(root)}` and it has no {shown_names(left.extra)}: it was saved without its "
        "head, as `AutoModel` does; save it from the class that config.json of sft names under `architectures`"
    )


def _layout(missing: Sequence[str], extra: Sequence[str]) -> str:
    """Message if the two store the same layers in different forms; empty if not."""
    for description, pattern, remedy in _FOREIGN:
        for side, names in (("dpo", missing), ("sft", extra)):
            name = _first(pattern, names)
            if name:
                return f"{side} is {description} ({shown(name)}); {remedy}"
    for description, first, second in _LAYOUTS:
        for has, lacks, names, others in (("dpo", "sft", missing, extra), ("sft", "dpo", extra, missing)):
            a, b = _first(first, names), _first(second, others)
            if a and b:
                return (
                    f"{description}: {has} has {shown(a)}, {lacks} has {shown(b)} ({len(missing)} and {len(extra)} such names); "
                    "convert one of the two to the other's layout (load both with one version of the library that wrote them, and "
                    "save both)"
                )
    return ""


def _first(pattern: str, names: Sequence[str]) -> str:
    search: Callable[[str], re.Match[str] | None] = re.compile(pattern).search
    return next((name for name in names if search(name)), "")


# Patterns of names in one form and in the other, as `transformers`, vLLM and the models' authors store them.
_LAYOUTS = (
    (
        "the experts are stored one by one on one side and stacked on the other",
        r"experts\.\d+\.",
        r"experts\.(gate_up_proj|gate_proj|up_proj|down_proj|w\d+|mlp\.w\d|v1)(_bias|\.weight)?$",
    ),
    (
        "query, key and value are stored one by one on one side and fused on the other",
        r"(q_proj|query|q_lin|wq|to_q)\.(weight|bias)$",
        r"(qkv_proj|qkv|query_key_value|c_attn|Wqkv|W_pack|in_proj(_weight)?|attn_qkv|wqkv|to_qkv)(\.(weight|bias))?$",
    ),
    (
        "gate and up projection are stored one by one on one side and fused on the other",
        r"(gate_proj|w1|wi_0)\.(weight|bias)$",
        r"(gate_up_proj|gate_and_up|dense_h_to_4h|w12|wi)(\.(weight|bias))?$",
    ),
)  # fmt: skip
_FOREIGN = (
    (
        "a DeepSpeed or FSDP training state, not a model",
        r"(^|\.)(_?flat_param(_\d+)?|fp32_flat_groups|single_partition_of_fp32_groups|optimizer_state)",
        "convert it with `zero_to_fp32.py` (DeepSpeed), `accelerate merge-weights` (FSDP), or `python -m verl.model_merger "
        "merge` (verl), and pass the result",
    ),
    (
        "in Megatron's layout",
        r"(self_attention\.linear_(qkv|proj)\.|\.local_experts\.\d)",
        "convert it to Hugging Face's with the trainer's own tool (verl: `python -m verl.model_merger merge`, Megatron-Bridge: "
        "`export_ckpt`), and pass the result",
    ),
    (
        "in the layout of the first release (consolidated weights), not in Hugging Face's",
        r"(^|\.)layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.weight$",
        "convert it with `transformers`' `convert_*_weights_to_hf.py` of that model, and pass the result",
    ),
    (
        "in GGUF's naming, not in Hugging Face's",
        r"(^|\.)blk\.\d+\.(attn|ffn)_\w+\.weight$",
        "load it with `AutoModelForCausalLM.from_pretrained(..., gguf_file=...)`, save it, and pass the result",
    ),
)
