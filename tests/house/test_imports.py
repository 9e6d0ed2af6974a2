"""The arrows of the house: which room imports which, and what importing a module loads."""

from __future__ import annotations

import ast
import graphlib
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import expo_ray
from expo_ray.cli.extras import EXTRAS
from tests.support.paths import ROOT

HEAVY = ("ray", "vllm", "transformers")
# Rooms from the top of the house down: a room imports rooms of the same line and of those below.
FLOORS = (
    ("cli",),
    ("on_ray",),
    ("evaluation", "benchmark"),
    ("serving",),
    ("published",),
    ("extrapolation",),
    ("report",),
    ("arithmetic", "checkpoint"),
    ("progress", "status_file", "home"),
    ("storage",),
    ("config",),
    ("errors", "text", "untrusted", "time_limit", "interrupt"),
)
PACKAGE = Path(expo_ray.__file__).parent
ON_A_CLUSTER = tuple(f"expo_ray.cli.{command}" for command in ("run", "serve", "respond", "reward"))


def test_only_on_ray_loads_ray_vllm_or_transformers() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(expo_ray.__path__, "expo_ray.")
        # arithmetic.gpu needs Triton, which must not be installed here; its own tests import it with less than this.
        if not module.name.startswith(("expo_ray.on_ray", "expo_ray.arithmetic.gpu.", *ON_A_CLUSTER))
        and not module.name.endswith("__main__")
    ]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
    assert len(names) > 20


def test_the_command_line_starts_without_torch_or_a_store_client() -> None:
    code = "import sys, expo_ray.cli; print(sorted({'torch', 'numba', 'boto3', 'obstore', 'huggingface_hub'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


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


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports anywhere, in functions and for type checkers as well."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def imports_by_module() -> dict[str, set[str]]:
    """Modules of this package that each of its modules imports, itself excluded."""
    paths = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    return {module: (imports_of(path) & paths.keys()) - {module} for module, path in paths.items()}


def floor_of(module: str) -> int:
    """Number of floors above a module; the package itself is the ground."""
    room = module.split(".")[1] if "." in module else ""
    return next((floor for floor, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


def test_every_room_has_its_floor() -> None:
    rooms = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} == {room for rooms_of_floor in FLOORS for room in rooms_of_floor}


def test_no_import_leads_to_a_room_above() -> None:
    upward = [
        f"{module} imports {imported}"
        for module, imports in imports_by_module().items()
        for imported in imports
        if floor_of(imported) < floor_of(module)
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter(imports_by_module()).prepare()  # a CycleError names the modules of a circle


def test_files_that_need_ray_or_vllm_are_those_of_on_ray() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "__init__.py":
            continue
        imports = {*imports_of(path)}
        direct = {module.partition(".")[0] for module in imports} & {"ray", "vllm"}
        if "on_ray" in path.relative_to(PACKAGE).parts:
            # What imports neither of them, nor a file that does, has no reason to be there.
            assert direct or any(module.startswith("expo_ray.on_ray") for module in imports), path
        else:
            assert not direct, path


def test_the_command_line_runs_the_pipeline_as_the_job_file_does() -> None:
    # jobs/ is not installed with the package, so that the steps stand in both.
    steps = [steps_of(path) for path in (ROOT / "jobs" / "pipeline.py", PACKAGE / "cli" / "run.py")]
    assert steps[0] == steps[1]


def steps_of(path: Path) -> list[str]:
    """The statements of a file's function `run`, without its imports and docstring."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    (run,) = (function for function in functions if function.name == "run")
    return [
        ast.unparse(node)
        for node in run.body
        if not isinstance(node, ast.ImportFrom)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
