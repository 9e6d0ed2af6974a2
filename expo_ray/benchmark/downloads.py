"""Download public benchmark files, each pinned to a commit and its sha256, and keep them in the cache."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from expo_ray.errors import BenchmarkError
from expo_ray.home import cache_folder
from expo_ray.text import shown

_TIMEOUT_S = 20.0
_MOST_BYTES = 16 * 2**20
_FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/fastchat/llm_judge/data"
_ALPACA_EVAL = (
    "https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20/results"
)


@dataclass(frozen=True)
class PublicFile:
    """A file of a public repository at one commit.

    Attributes:
        name: file name in a folder that the user gives instead of a download.
        option: command-line option that takes this folder or file.
    """

    name: str
    url: str
    sha256: str
    option: str


MT_BENCH_QUESTIONS = PublicFile(
    "question.jsonl",
    f"{_FASTCHAT}/mt_bench/question.jsonl",
    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "--data",
)
MT_BENCH_PROMPTS = PublicFile(
    "judge_prompts.jsonl",
    f"{_FASTCHAT}/judge_prompts.jsonl",
    "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    "--data",
)
MT_BENCH_REFERENCES = PublicFile(
    "reference_answer_gpt-4.jsonl",
    f"{_FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl",
    "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    "--data",
)
ALPACA_BASELINE = PublicFile(
    "baseline_gpt4_1106_preview.json",
    f"{_ALPACA_EVAL}/gpt4_1106_preview/model_outputs.json",
    "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
    "--baseline",
)
ALPACA_CONCISE = PublicFile(
    "gamed_gpt4_1106_preview_concise.json",
    f"{_ALPACA_EVAL}/gpt4_1106_preview_concise/model_outputs.json",
    "eff59f86f4da5bd23964af58ba2f7dd3341be2884e20958d21fca49456891627",
    "--covariates",
)
ALPACA_VERBOSE = PublicFile(
    "gamed_gpt4_1106_preview_verbose.json",
    f"{_ALPACA_EVAL}/gpt4_1106_preview_verbose/model_outputs.json",
    "b0f5a776fdeaf0a39db7f8f1b10ee5a4613468ff5c7b7a577645ea23f2995e38",
    "--covariates",
)
GPT4_VERDICTS = PublicFile(
    "annotations.json",
    f"{_ALPACA_EVAL}/vicuna-7b/weighted_alpaca_eval_gpt4_turbo/annotations.json",
    "86387fd674fc860d352750ff022c4d3b12daaf2fc51f0c70e62da81205f0a4f4",
    "--reference",
)


def fetch_public_file(file: PublicFile) -> bytes:
    """Read a public file from the cache; if it is not there, download it, check its digest and store it.

    Raises:
        BenchmarkError: if it cannot be downloaded or its digest differs; names the option that takes a copy.
    """
    cached = cache_folder() / "benchmarks" / f"{file.sha256[:16]}-{file.name}"
    if cached.is_file() and hashlib.sha256(data := cached.read_bytes()).hexdigest() == file.sha256:
        return data
    data = _download(file)
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise BenchmarkError(
            f"{file.url}: its sha256 is {digest}, {file.sha256} is expected: this is not the pinned file; "
            f"download {file.name} yourself and give it with {file.option}"
        )
    _store(cached, data)
    return data


def _download(file: PublicFile) -> bytes:
    import httpx

    try:
        with httpx.stream("GET", file.url, timeout=_TIMEOUT_S, follow_redirects=False) as response:
            if response.status_code != httpx.codes.OK:
                raise BenchmarkError(
                    f"{file.url}: status {response.status_code}; give a copy of {file.name} with {file.option}"
                )
            data = bytearray()
            for piece in response.iter_bytes():
                data += piece
                if len(data) > _MOST_BYTES:
                    raise BenchmarkError(
                        f"{file.url}: more than {_MOST_BYTES} bytes; give a copy of {file.name} with {file.option}"
                    )
            return bytes(data)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BenchmarkError(
            f"{file.url}: cannot be downloaded ({shown(f'{type(error).__name__} {error}')}); "
            f"give a copy of {file.name} with {file.option}"
        ) from error


def _store(path: Path, data: bytes) -> None:
    """Store a download in the cache, by rename as another process may do the same; a cache that cannot be written is ignored."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        return
