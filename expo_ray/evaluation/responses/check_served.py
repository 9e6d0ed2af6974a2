"""Find what is certain to fail once engines have started, from the models' small files and the prompts alone."""

from __future__ import annotations

import ast
import difflib
import logging
import math
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from expo_ray.checkpoint.small_files import read_json, text_configs
from expo_ray.checkpoint.tokenizer import TokenizerFiles, load_tokenizer, tokenizer_files
from expo_ray.config import PublishedModel, Serving
from expo_ray.errors import JobError, OutputError, Problems, PromptError
from expo_ray.evaluation.prompts.prompt_set import PromptSet
from expo_ray.evaluation.records import Prompt
from expo_ray.extrapolation.plan import PairPlan
from expo_ray.extrapolation.plan_job import call_for_each
from expo_ray.storage import FileInfo, Store, local_path, open_store
from expo_ray.text import first_few, shown
from expo_ray.time_limit import RENDER_S, time_limit

log = logging.getLogger("expo_ray")

# The keys in which vLLM looks for the longest context of a model; it takes the smallest value.
_CONTEXTS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
# What the tokenizer's class follows from, in a configuration.
_OF_TOKENIZER = ("model_type", "tokenizer_class", "auto_map")
# Model types for which vLLM brings a chat template itself.
_WITH_TEMPLATE = {
    "blip-2", "clip", "colpali", "deepseek_ocr", "deepseek_ocr2", "unlimited-ocr", "deepseek_vl_v2", "minicpmv", "minicpmv4_6",
    "paligemma", "siglip", "siglip2",
}  # fmt: skip
# Arguments that replace the model's tokenizer, template or configuration, so that its files decide nothing here.
_OTHER_FILES = {
    "tokenizer",
    "tokenizer_mode",
    "chat_template",
    "hf_overrides",
    "trust_remote_code",
    "hf_config_path",
    "runner",
}

Refused = tuple[Mapping[str, Sequence[str]], Sequence[str]]
"""Names of the prompts on which a template fails, by its error, and of those that fill the context."""


def check_served(
    plans: Sequence[PairPlan],
    models: Sequence[PublishedModel],
    settings: Serving,
    sets: Sequence[PromptSet] = (),
    *,
    needs_all: bool = False,
) -> None:
    """Check that vLLM has the arguments of the engines, and that the models can answer the prompts.

    Args:
        sets: prompts that are to be asked as chats; none for models that are only served.
        needs_all: True if one prompt without an answer is a failure; else it is one only if no prompt at all can be answered.

    Raises:
        Problems: with everything that is certain to fail.
    """
    problems: list[JobError | PromptError] = [*_unknown_arguments(settings.engine)]
    prompts = {prompt.id: prompt for each in sets for prompt in each.prompts}
    rendered = _Rendered([*prompts.values()])

    def check(name: str, files: Callable[[], TokenizerFiles]) -> list[JobError | PromptError]:
        return _model_problems(name, files(), settings, rendered, needs_all)

    for of_model in call_for_each(
        lambda each: check(*each),
        [
            *((plan.name, partial(_files_of_plan, plan)) for plan in plans),
            *((model.name, partial(_files_of_model, model.uri)) for model in models),
        ],
    ):
        problems += of_model
    if problems:
        raise Problems(problems)


def check_output_folder(uri: str) -> None:
    """Check that a local output folder can be made and written, without making it.

    Raises:
        OutputError: if it cannot.
    """
    path = local_path(uri)
    if path is None:
        return
    nearest = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not nearest.is_dir():
        raise OutputError(f"{nearest}: is a file, and the output {path} is a folder; give another `output`")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(
            f"{nearest}: cannot be written, and the output {path} is below it; give another `output`"
        )


def longest_context(config: Mapping[str, Any]) -> float:
    """The longest context that vLLM allows for a configuration, in tokens; infinite if it names none.

    Follows `_get_and_verify_max_len` in vllm/config/model.py.
    """
    part = list(text_configs(config))[-1]
    limits = [part[key] for key in _CONTEXTS if type(part.get(key)) is int and part[key] > 0]
    if not limits:
        return math.inf
    longest = float(min(limits))
    rope = part.get("rope_parameters") or part.get("rope_scaling")
    if not isinstance(rope, Mapping) or "gemma3" in str(part.get("model_type")):
        return longest
    factor = 1.0
    for scaling in [rope, *(value for value in rope.values() if isinstance(value, Mapping))]:
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in {"su", "longrope", "llama3"} and type(scaling.get("factor")) in (int, float):
            factor = max(factor, scaling["factor"])
            if kind == "yarn" and type(scaling.get("original_max_position_embeddings")) is int:
                longest = scaling["original_max_position_embeddings"]
    return longest * factor


def _model_problems(
    name: str, files: TokenizerFiles, settings: Serving, rendered: _Rendered, needs_all: bool
) -> list[JobError | PromptError]:
    if _OTHER_FILES & settings.engine.keys():
        return []
    config = _read_json(files, "config.json")
    asked = settings.engine.get("max_model_len", settings.max_model_len)
    longest = longest_context(config)
    problems: list[JobError | PromptError] = []
    limit = asked if type(asked) is int and asked > 0 else longest
    declared = config.get("model_max_length")
    allowed = max(longest, declared if type(declared) is int else 0)
    if limit > allowed and not os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
        problems.append(
            JobError(
                f"{name}: `serving.max_model_len` is {limit}, and the model's context ends at {longest:.0f} tokens; set it to at most that"
            )
        )
    if not rendered.prompts:
        return problems
    if not _has_template(files, config):
        problems.append(
            PromptError(
                f"{name}: has no chat template, and prompts are asked as chats; put the one of its training beside the model, as "
                "chat_template.jinja"
            )
        )
        return problems
    limit = min(limit, allowed)
    refused = rendered.refused(name, files, config, limit)
    return problems + _prompt_problems(name, refused, len(rendered.prompts), limit, needs_all)


def _prompt_problems(
    name: str, refused: Refused, num_prompts: int, limit: float, needs_all: bool
) -> list[JobError | PromptError]:
    """Problems with prompts on which the template fails, or that leave no room for a response."""
    failed, too_long = refused
    if not needs_all and sum(map(len, failed.values())) + len(too_long) < num_prompts:
        return []  # the others are answered, and these are named then
    problems: list[JobError | PromptError] = [
        PromptError(
            f"{name}: the chat template fails on {len(ids)} prompt(s), {first_few(ids)} ({reason}); remove these prompts, or correct "
            "chat_template.jinja"
        )
        for reason, ids in failed.items()
    ]
    if too_long:
        problems.append(
            PromptError(
                f"{name}: {len(too_long)} prompt(s) leave no room for a response within {limit:.0f} tokens ({first_few(too_long)}); remove or "
                "shorten them, or raise `serving.max_model_len` where it is below the model's"
            )
        )
    return problems


class _Rendered:
    """Prompts in the templates of some models; those with the same tokenizer and template, as many pairs have, are rendered once."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self._lock = threading.Lock()
        self._refused: dict[Hashable, Refused] = {}

    def refused(self, name: str, files: TokenizerFiles, config: Mapping[str, Any], limit: float) -> Refused:
        """As `_refused_prompts`, with the tokenizer in `files`; nothing if it cannot be loaded here."""
        named = {
            (key, info.size, _content_of(store, info))
            for key, (store, info) in files.items()
            if key != "config.json"
        }
        same = (frozenset(named), *(str(config.get(key)) for key in _OF_TOKENIZER), limit)
        with self._lock:
            if same not in self._refused:
                tokenizer = _load_tokenizer(name, files)
                self._refused[same] = (
                    ({}, []) if tokenizer is None else _refused_prompts(tokenizer, self.prompts, limit)
                )
            return self._refused[same]


def _content_of(store: Store, info: FileInfo) -> str:
    """Names the bytes of a file; on S3 and the Hub, the same for a copy of it."""
    return info.etag if store.uri.startswith(("s3://", "hf://")) else f"{store.uri} {info.etag}"


def _refused_prompts(tokenizer: Any, prompts: Sequence[Prompt], limit: float) -> Refused:
    """Render prompts, and find those that cannot be asked."""
    failed: dict[str, list[str]] = {}
    too_long: list[str] = []
    for prompt in prompts:
        messages = [dict(turn) for turn in prompt.messages]
        try:
            with time_limit(RENDER_S):
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            failed.setdefault(f"{type(error).__name__}: {shown(error)}", []).append(prompt.label or prompt.id)
            if isinstance(error, TimeoutError):
                break  # the other prompts would take as long
            continue
        # Counting is slow, and no tokenizer makes more tokens than there are bytes.
        if len(text.encode()) >= limit:
            tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if tokens >= limit:
                too_long.append(f"{prompt.label or prompt.id} with {tokens} tokens")
    return failed, too_long


def _has_template(files: TokenizerFiles, config: Mapping[str, Any]) -> bool:
    names = {"chat_template.jinja", "chat_template.json", "tekken.json"}
    if names & files.keys() or any(key.startswith("additional_chat_templates/") for key in files):
        return True
    kinds = {part.get("model_type") for part in text_configs(config)}
    return bool(_read_json(files, "tokenizer_config.json").get("chat_template") or kinds & _WITH_TEMPLATE)


def _load_tokenizer(name: str, files: TokenizerFiles) -> Any:
    """Load the model's tokenizer; None if it cannot be loaded here, since the engine may still be able to."""
    if find_spec("transformers") is None:
        return None
    try:
        tokenizer = load_tokenizer(files)
    except Exception as error:
        log.debug("%s: its tokenizer cannot be loaded here (%s)", name, shown(error))
        return None
    return tokenizer if tokenizer.chat_template else None


def _read_json(files: TokenizerFiles, key: str) -> dict[str, Any]:
    return read_json(*files[key]) if key in files else {}


def _files_of_plan(plan: PairPlan) -> TokenizerFiles:
    files: dict[str, tuple[Store, FileInfo]] = {}
    for key, parent in plan.engine_side_files.items():
        files |= tokenizer_files(open_store(parent.uri), [parent.files[key]] if key in parent.files else [])
    return files


def _files_of_model(uri: str) -> TokenizerFiles:
    store = open_store(uri)
    return tokenizer_files(store, store.list())


def _unknown_arguments(engine: Mapping[str, Any]) -> list[JobError]:
    """Problems with arguments that the installed vLLM does not have. Its sources are parsed: importing it takes many seconds."""
    known = _engine_arguments() if engine else set()
    problems = []
    for name in sorted(engine.keys() - known) if known else ():
        near = difflib.get_close_matches(name, known, 1)
        hint = f"write `{near[0]}`" if near else "leave it out"
        problems.append(JobError(f"`serving.engine`: vLLM has no argument `{shown(name)}`; {hint}"))
    return problems


def _engine_arguments() -> set[str]:
    """Read the names of all engine arguments from the sources of the installed vLLM; empty without vLLM."""
    spec = find_spec("vllm")
    folders: Iterable[str] = (spec.submodule_search_locations or ()) if spec else ()
    names = set()
    for folder in folders:
        for file in ("engine/arg_utils.py", "entrypoints/openai/cli_args.py"):
            path = Path(folder, file)
            tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
            names |= {
                field.target.id
                for node in tree.body
                if isinstance(node, ast.ClassDef)
                for field in node.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            }
    return names
