from __future__ import annotations

import pkgutil
import subprocess
import sys

import expo_ray

HEAVY = ("ray", "vllm", "transformers")


def test_only_on_ray_loads_ray_vllm_or_transformers() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(expo_ray.__path__, "expo_ray.")
        if not module.name.startswith("expo_ray.on_ray")
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
