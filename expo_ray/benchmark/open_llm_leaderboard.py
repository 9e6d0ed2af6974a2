"""Read scores of the six tasks of the Open LLM Leaderboard v1 from result files of lm-eval, 0.4 and the older 0.3."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expo_ray.benchmark.row_files import is_number
from expo_ray.errors import BenchmarkError, ExpoError, Problems, problems_of
from expo_ray.storage import FileInfo, Store, open_store
from expo_ray.text import shown
from expo_ray.untrusted import parse_json

_MOST_BYTES = 64 * 2**20
_MMLU_SUBJECTS = 57
_MMLU_PREFIXES = ("hendrycksTest-", "mmlu_")
# Groups of 0.4 whose names begin like a subject's.
_MMLU_GROUPS = ("mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other")


@dataclass(frozen=True)
class Task:
    """A task of the leaderboard.

    Attributes:
        names: in lm-eval's files; the first is 0.4's.
        metrics: in the order of preference, without 0.4's filter.
        shots: examples in the prompt.
    """

    names: tuple[str, ...]
    metrics: tuple[str, ...]
    shots: int


TASKS: Mapping[str, Task] = {
    "arc": Task(("arc_challenge",), ("acc_norm",), 25),
    "hellaswag": Task(("hellaswag",), ("acc_norm",), 10),
    "mmlu": Task(("mmlu",), ("acc",), 5),
    "truthfulqa": Task(("truthfulqa_mc2", "truthfulqa_mc"), ("acc", "mc2"), 0),
    "winogrande": Task(("winogrande",), ("acc",), 5),
    "gsm8k": Task(("gsm8k",), ("exact_match", "acc"), 5),
}
_FILTERS = ("none", "strict-match", "")
_FLEXIBLE = "flexible-extract"


@dataclass
class ModelTasks:
    """A model's scores, in percent.

    Attributes:
        scores: by task, of those that were run.
        gsm8k_flexible: GSM8K where the last number in an answer counts as its result; lm-eval 0.4 only.
        notes: differences from the leaderboard's settings.
    """

    name: str
    scores: dict[str, float] = field(default_factory=dict)
    gsm8k_flexible: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def average(self) -> float | None:
        """Mean of the six tasks; None unless all were run."""
        missing = self.missing
        return None if missing else sum(self.scores[task] for task in TASKS) / len(TASKS)

    @property
    def missing(self) -> list[str]:
        """Tasks without a score."""
        return [task for task in TASKS if task not in self.scores]


def read_lm_eval_results(folders: Sequence[str]) -> dict[str, ModelTasks]:
    """Read the result files of each model.

    Args:
        folders: each holds one model's files at any depth, or a folder for each of several models.

    Raises:
        Problems: with every fault of every file.
        StorageError: if a folder cannot be read.
    """
    problems: list[ExpoError] = []
    models: dict[str, ModelTasks] = {}
    for folder in folders:
        store = open_store(folder)
        files = _by_model(folder, [info for info in store.list() if _is_result(info.key)])
        if not files:
            problems.append(
                BenchmarkError(f"{folder}: holds no result file of lm-eval (.json); give the folder it wrote")
            )
        for name, infos in files.items():
            if name in models:
                problems.append(
                    BenchmarkError(
                        f"{shown(name)}: two folders of this name; rename one, as the table has one row for each"
                    )
                )
                continue
            try:
                models[name] = _read_model(store, name, infos)
            except ExpoError as error:
                problems += problems_of(error)
    if problems:
        raise Problems(problems)
    return models


def _is_result(key: str) -> bool:
    name = key.rpartition("/")[2]
    return name.endswith(".json") and not name.startswith(("samples_", "."))


def _by_model(folder: str, infos: Sequence[FileInfo]) -> dict[str, list[FileInfo]]:
    """Group result files by model: files directly in the folder or below a single subfolder are one model's; else each subfolder is one."""
    own = folder.rstrip("/").rpartition("/")[2] or folder
    tops = {info.key.partition("/")[0] for info in infos if "/" in info.key}
    if len(tops) <= 1 or any("/" not in info.key for info in infos):
        return {own: list(infos)} if infos else {}
    return {top: [info for info in infos if info.key.startswith(f"{top}/")] for top in sorted(tops)}


def _read_model(store: Store, name: str, infos: Iterable[FileInfo]) -> ModelTasks:
    problems: list[ExpoError] = []
    model = ModelTasks(name)
    places: dict[str, str] = {}
    subjects: dict[str, float] = {}
    for info in infos:
        uri = f"{store.uri}/{info.key}"
        try:
            results, run = _read_results(store, info, uri)
            _take_tasks(model, results, run, uri, places)
            _take_subjects(subjects, results, uri)
        except ExpoError as error:
            problems += problems_of(error)
    if len(subjects) == _MMLU_SUBJECTS:
        # The leaderboard's figure is the mean over subjects; 0.4's group weights them by their size.
        model.scores["mmlu"] = sum(subjects.values()) / _MMLU_SUBJECTS
    elif subjects and "mmlu" not in model.scores:
        problems.append(
            BenchmarkError(
                f"{shown(name)}: {len(subjects)} of MMLU's {_MMLU_SUBJECTS} subjects; run all of them, or remove these"
            )
        )
    if not model.scores and not problems:
        problems.append(
            BenchmarkError(
                f"{store.uri}: none of the leaderboard's tasks ({', '.join(TASKS)}) in its result files; give others"
            )
        )
    if problems:
        raise Problems(problems)
    return model


def _read_results(store: Store, info: FileInfo, uri: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Read a result file; returns the results by task, and the whole file."""
    remedy = "give the file that lm-eval wrote"
    if info.size > _MOST_BYTES:
        raise BenchmarkError(
            f"{uri}: {info.size} bytes, more than the {_MOST_BYTES} of a result file; {remedy}"
        )
    run = parse_json(store.read(info.key), uri, most_bytes=_MOST_BYTES, error=BenchmarkError, remedy=remedy)
    results = run.get("results") if isinstance(run, Mapping) else None
    if not isinstance(results, Mapping) or not all(isinstance(value, Mapping) for value in results.values()):
        raise BenchmarkError(f"{uri}: has no `results` by task; {remedy}")
    return {_plain_name(name): values for name, values in results.items()}, run


def _plain_name(name: str) -> str:
    """lm-eval's name of a task: `arc_challenge` for `harness|arc:challenge|25` in the leaderboard's own result files."""
    parts = name.split("|")
    return (parts[1] if len(parts) == 3 else name).replace(":", "_")


def _take_tasks(
    model: ModelTasks, results: Mapping[str, Any], run: Mapping[str, Any], uri: str, places: dict[str, str]
) -> None:
    for task, spec in TASKS.items():
        present = [name for name in spec.names if name in results]
        if not present:
            continue
        values = results[present[0]]
        if task in places:
            raise BenchmarkError(f"{uri}: {task} is in {places[task]} as well; keep the one that counts")
        places[task] = uri
        model.scores[task] = _percent(values, spec.metrics, uri, present[0])
        if task == "gsm8k" and (flexible := _value(values, "exact_match", (_FLEXIBLE,))) is not None:
            model.gsm8k_flexible = 100 * flexible
        _note_settings(model, task, present[0], run)


def _percent(values: Mapping[str, Any], metrics: Sequence[str], uri: str, name: str) -> float:
    for metric in metrics:
        value = _value(values, metric, _FILTERS)
        if value is not None:
            return 100 * value
    raise BenchmarkError(
        f"{uri}: {name} has no {' or '.join(metrics)} from 0 to 1; give results with the leaderboard's metric"
    )


def _value(values: Mapping[str, Any], metric: str, filters: Sequence[str]) -> float | None:
    for name in filters:
        value = values.get(f"{metric},{name}" if name else metric)
        if is_number(value) and 0 <= value <= 1:
            return float(value)
    return None


def _take_subjects(subjects: dict[str, float], results: Mapping[str, Any], uri: str) -> None:
    more = _subjects_in(results)
    if again := subjects.keys() & more.keys():
        raise BenchmarkError(
            f"{uri}: {len(again)} of MMLU's subjects are in another file as well; keep the one that counts"
        )
    subjects |= more


def _subjects_in(results: Mapping[str, Any]) -> dict[str, float]:
    subjects = {}
    for name, values in results.items():
        prefix = next((each for each in _MMLU_PREFIXES if name.startswith(each)), None)
        value = _value(values, "acc", _FILTERS)
        if prefix and name not in _MMLU_GROUPS and value is not None:
            subjects[name.removeprefix(prefix)] = 100 * value
    return subjects


def _note_settings(model: ModelTasks, task: str, name: str, run: Mapping[str, Any]) -> None:
    shots = run.get("n-shot", {}).get(name) if isinstance(run.get("n-shot"), Mapping) else None
    config = run.get("config") if isinstance(run.get("config"), Mapping) else {}
    assert isinstance(config, Mapping)
    shots = config.get("num_fewshot") if shots is None else shots
    if type(shots) is int and shots != TASKS[task].shots:
        model.notes.append(f"{task} was run with {shots} examples, the leaderboard's has {TASKS[task].shots}")
    if is_number(config.get("limit")):
        model.notes.append(f"{task} was run on a part of its items (limit {config['limit']})")
