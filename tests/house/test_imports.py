from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import expo_ray
from expo_ray.cli.extras import EXTRAS

HEAVY = ("ray", "vllm", "transformers")
ON_A_CLUSTER = tuple(f"expo_ray.cli.{command}" for command in ("run", "serve", "respond", "reward"))


def test_only_on_ray_loads_ray_vllm_or_transformers() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(expo_ray.__path__, "expo_ray.")
        if not module.name.startswith(("expo_ray.on_ray", *ON_A_CLUSTER))
        and not module.name.endswith("__main__")
    ]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert len(names) > 20


def test_the_command_line_starts_without_torch_or_a_store_client() -> None:
    code = "import sys, expo_ray.cli; print(sorted({'torch', 'numba', 'boto3', 'obstore', 'huggingface_hub'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Only the base dependencies can be imported.
BASE_INSTALL = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

from expo_ray.cli.extras import EXTRAS
MODULES = set(EXTRAS)
sys.meta_path.insert(0, Refuse())
from expo_ray.cli.process import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("run job.yaml", "evaluate"),
        ("serve job.yaml", "evaluate"),
        ("respond job.yaml", "evaluate"),
        ("respond --model http://127.0.0.1:9 --prompts p.txt --output o.jsonl", "evaluate"),
        ("respond --model model --prompts p.parquet --output o.jsonl", "evaluate"),
        ("reward job.yaml", "evaluate"),
        ("reward --responses r.jsonl --reward-model model --output o.jsonl", "evaluate"),
        ("push model org/name", "hub"),
        ("benchmark alpaca --annotations a.json", "benchmark"),
        ("verify s3://bucket/model", "s3"),
        ("verify hf://org/name", "hub"),
        ("extrapolate --sft a --dpo hf://org/name --alpha 1 --output o", "hub"),
    ],
)
def test_a_command_that_needs_an_extra_names_it(tmp_path: Path, words: str, extra: str) -> None:
    (tmp_path / "job.yaml").write_text(
        "output: o\npairs: [{name: p, sft: a, dpo: b, alphas: [1]}]\nprompts: [{source: p.txt}]\nrewards: [{model: r}]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", BASE_INSTALL, *words.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(expo_ray.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"pip install 'expo-ray[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_extras_that_are_named_exist() -> None:
    project = tomllib.loads((Path(expo_ray.__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) <= project["optional-dependencies"].keys()


def test_scores_of_benchmarks_load_neither_pandas_nor_scikit_learn() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(expo_ray.__path__, "expo_ray.")
        if ".benchmark." in module.name
    ]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(sorted({{'pandas', 'sklearn', 'alpaca_eval', 'scipy', 'matplotlib'}} & set(sys.modules)))
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
    assert "expo_ray.benchmark.alpaca_eval.package_fit" in names
