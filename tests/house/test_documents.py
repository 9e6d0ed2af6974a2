"""What the documents name exists: paths, links, commands, keys of the job file, names in the code."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from benchmarks.__main__ import QUESTIONS
from expo_ray.cli.arguments import command_parser
from expo_ray.cli.flags import with_alphas_joined
from expo_ray.config import (
    Guardrails,
    Job,
    Pair,
    PromptSource,
    RewardModel,
    Sampling,
    Search,
    Serving,
    parse_job,
)
from tests.support.paths import ROOT

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "cluster" / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "smollm2" / "README.md",
]
LONGEST = {"README.md": 130, "docs/architecture.md": 80}
ROOMS = ("expo_ray", "jobs", "docs", "tests", "benchmarks", "cluster", "examples", "requirements")

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(rf"(?<![\w/.<@-])((?:{'|'.join(ROOMS)})/[\w./-]+)")
# `expo_ray/errors.py` (`ExpoError`, `Problems`)
_NAMED = re.compile(r"`(expo_ray/[\w/]+\.py|benchmarks/\w+\.py)`\s+\(((?:`\w+`(?:,\s+)?)+)\)")
_PLACEHOLDER = "NAME"


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def document(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_front_page_and_tour_are_short() -> None:
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in LONGEST}
    assert all(lines[name] <= most for name, most in LONGEST.items()), lines


def test_the_tour_has_a_line_for_each_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path.name for path in (ROOT / "expo_ray").iterdir() if (path / "__init__.py").is_file()]
    assert not [room for room in rooms if not re.search(rf"^ +{room}/ ", text, re.MULTILINE)]


def test_paths_that_a_document_names_exist(document: Path) -> None:
    named = {match.rstrip(".") for match in _PATH.findall(document.read_text())}
    missing = [path for path in named if _PLACEHOLDER not in path and not (ROOT / path).exists()]
    assert not missing


def test_scripts_that_are_named_without_a_folder_exist(document: Path) -> None:
    named = set(re.findall(r"`(\w+\.py)`", document.read_text()))
    known = {path.name for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert named <= known


def test_links_lead_to_a_file_and_a_heading(document: Path) -> None:
    for link in _LINK.findall(document.read_text()):
        if "://" in link:
            continue
        place, _, heading = link.partition("#")
        target = (document.parent / place).resolve() if place else document
        assert target.exists(), link
        assert not heading or heading in _headings(target), link


def test_names_of_code_are_found_in_the_file_beside_them(document: Path) -> None:
    for path, names in _NAMED.findall(document.read_text()):
        if _PLACEHOLDER not in path:
            code = (ROOT / path).read_text()
            missing = [name for name in re.findall(r"\w+", names) if not re.search(rf"\b{name}\b", code)]
            assert not missing, path


def test_commands_are_taken_by_the_command_line(document: Path) -> None:
    for command in _commands(document.read_text()):
        problem = _problem_of(_plain(command))
        abbreviated = command.endswith(" ...")
        assert not problem or (abbreviated and "are required" in problem), f"{command}: {problem}"


def test_commands_that_are_only_mentioned_exist(document: Path) -> None:
    known = set(_subcommands(command_parser()))
    mentioned = set(re.findall(r"`expo-ray ([a-z]+)", document.read_text()))
    assert mentioned <= known


def test_the_front_page_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [name for name in _subcommands(command_parser()) if f"expo-ray {name}" not in text]


def test_targets_of_make_and_questions_of_benchmarks_exist(document: Path) -> None:
    text = document.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = re.findall(r"(?:`|^ {4})make ([a-z]+(?: [a-z]+)*)", text, re.MULTILINE)
    assert {target for words in asked for target in words.split()} <= targets
    assert set(re.findall(r"python -m benchmarks ([a-z]\w*)", text)) <= QUESTIONS.keys()


def test_every_question_of_the_benchmarks_is_listed() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert not [name for name in QUESTIONS if f"| `{name}.py` |" not in text]


def test_yaml_in_a_document_is_a_job(document: Path) -> None:
    for indent, language, text in _FENCE.findall(document.read_text()):
        if language == "yaml":
            data = yaml.safe_load(re.sub(rf"^{indent}", "", text, flags=re.MULTILINE))
            if "output" not in data:
                data = {"output": "out", "pairs": [{"sft": "sft", "dpo": "dpo"}], **data}
            parse_job(data, str(document))


@pytest.mark.parametrize(
    "model", [Job, Pair, PromptSource, Sampling, Serving, RewardModel, Search, Guardrails]
)
def test_every_key_of_the_job_file_is_explained(model: type[BaseModel]) -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    assert not [name for name in model.model_fields if f"`{name}`" not in text]


def _headings(path: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _commands(text: str) -> Iterator[str]:
    """Command lines of `expo-ray` in blocks, and those between backticks that have arguments."""
    blocks = [code for _, language, code in _FENCE.findall(text) if language in {"", "bash", "console"}]
    blocks.append("\n".join(re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)))
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if line.removeprefix("$ ").startswith("expo-ray "):
            yield line.removeprefix("$ ")
    for line in re.findall(r"`(expo-ray [^`]+)`", text):
        if len(line.split()) > 2 and not re.fullmatch(r"expo-ray benchmark \w+", line):
            yield line


def _problem_of(command: str) -> str:
    """What the command line has to say against a command; empty if it takes it."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            command_parser().parse_args(with_alphas_joined(shlex.split(command)[1:]))
        except SystemExit:
            return errors.getvalue()
    return ""


def _plain(command: str) -> str:
    """The command without what a document writes around its words: comments, brackets, dots."""
    return re.sub(r"(?<=\w)\.\.\.|\s#.*|[\[\]]", "", command).removesuffix(" ...").replace("\\|", "_")


def _subcommands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices
