from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from expo_ray.config import check_alpha, format_alpha, job_schema, load_job, parse_bytes, parse_job
from expo_ray.errors import JobError, Problems
from expo_ray.extrapolation.plan_job import outputs_of
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def problems_of(data: dict[str, Any]) -> str:
    with pytest.raises(Problems) as caught:
        parse_job(data, "job.yaml")
    return str(caught.value)


@pytest.mark.parametrize("name", ["job.yaml", "smollm2.yaml"])
def test_the_example_job_files_are_valid_and_fit_the_schema(name: str) -> None:
    job = load_job(EXAMPLES / name)
    jsonschema.validate(yaml.safe_load((EXAMPLES / name).read_text()), job_schema())
    assert job.rewards or all(pair.alphas for pair in job.pairs)


def test_a_pair_overrides_the_defaults_and_inherits_the_rest(tmp_path: Path) -> None:
    job = load_job(
        write(
            tmp_path,
            """
            output: out
            defaults: {alphas: [0.5, 1], dtype: fp32, shard_size: 2GiB}
            pairs:
              - {sft: a, dpo: runs/b}
              - {name: second, sft: a, dpo: c, dtype: bf16, alphas: 2}
            """,
        )
    )
    first, second = job.pairs
    assert (first.name, first.alphas, first.dtype, first.shard_size) == ("b", (0.5, 1.0), "fp32", 2 * 2**30)
    assert (second.name, second.alphas, second.dtype, second.shard_size) == (
        "second",
        (2.0,),
        "bf16",
        2 * 2**30,
    )


def test_every_problem_is_reported_at_once_with_place_and_near_key() -> None:
    text = problems_of(
        {
            "output": "out",
            "default": {},
            "defaults": {"alphas": [float("nan"), -2]},
            "pairs": [
                {"sft": "a", "dpo": "b", "roundin": "nearest"},
                {"sft": "a", "name": "../up", "dpo": "c", "alphas": [0.5, 0.5], "shard_size": "5XB"},
                {"dpo": "d", "multipliers": {"(": 1, "ok": -1}, "vocab": "trim"},
            ],
        }
    )
    for expected in (
        "job.yaml: default is not a known key; did you mean `defaults`?",
        "defaults.alphas[0]: alpha is nan; it must be a finite number of at least -1",
        "defaults.alphas[1]: alpha is -2.0;",
        "pairs[0].roundin is not a known key; did you mean `rounding`?",
        "pairs[1].alphas: alpha 0.5 is listed twice",
        "pairs[1].shard_size: '5XB' is not a size; write it like 5GB or 512MiB",
        "pairs[1].name: String should match pattern",
        "pairs[2].sft is missing; Folder of the SFT model",
        "'(' is not a regular expression",
        "pairs[2].multipliers.ok: Input should be greater than or equal to 0 (found -1)",
        "pairs[2].vocab: Input should be 'refuse', 'by-token' or 'keep-dpo' (found 'trim')",
    ):
        assert expected in text, text
    assert text.count("alpha is nan") == 1  # once where it stands, not again in each pair that inherits it


def test_two_pairs_of_one_name_are_refused() -> None:
    assert "pairs: b is used twice; give each its own `name`" in problems_of(
        {"output": "o", "pairs": [{"sft": "a", "dpo": "x/b"}, {"sft": "a", "dpo": "y/b"}]}
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "a job file is a mapping"),
        ("a: [", "is not YAML"),
        ("output: o\npairs: []", "at least 1 item"),
    ],
)
def test_what_is_no_job_file_is_reported(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises((JobError, Problems), match=said):
        load_job(write(tmp_path, text))


def test_a_missing_job_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"cannot be read .* give the path of a YAML job file"):
        load_job(tmp_path / "none.yaml")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf"), -1.0000001])
def test_alphas_that_mean_nothing_are_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="finite number of at least -1"):
        check_alpha(alpha)


@pytest.mark.parametrize(
    ("alpha", "text"),
    [(0.5, "0.5"), (1, "1"), (-0.0, "0"), (-1, "-1"), (0.1 + 0.2, "0.30000000000000004"), (1e-7, "1e-07")],
)
def test_folder_names_read_back_as_their_alpha(alpha: float, text: str) -> None:
    assert format_alpha(check_alpha(alpha)) == text
    assert float(text) == alpha


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("512 MiB", 2**29), (7, 7), ("1.5k", 1500), ("2TiB", 2**41)]
)
def test_sizes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5XB", "0", True, "1e3"])
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(ValueError, match="write"):
        parse_bytes(text)


def test_models_land_below_their_pair(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, "output: s3://b/x/\npairs: [{sft: a, dpo: b, alphas: [0.5, 1]}]"))
    assert outputs_of(job, job.pairs[0]) == {
        0.5: "s3://b/x/pairs/b/alpha=0.5",
        1.0: "s3://b/x/pairs/b/alpha=1",
    }


def test_the_schema_is_json_and_tells_every_field() -> None:
    schema = json.loads(json.dumps(job_schema()))
    assert all(field.get("description") for field in schema["$defs"]["Pair"]["properties"].values())
