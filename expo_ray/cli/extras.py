"""The extra of this package that brings a module which is not installed."""

from __future__ import annotations

from importlib.util import find_spec

from expo_ray.errors import JobError

# By the module that is imported.
EXTRAS = {
    "alpaca_eval": "benchmark",
    "boto3": "s3",
    "botocore": "s3",
    "datasets": "evaluate",
    "fastapi": "evaluate",
    "httpx": "evaluate",
    "huggingface_hub": "hub",
    "jinja2": "evaluate",
    "matplotlib": "evaluate",
    "obstore": "s3",
    "pyarrow": "evaluate",
    "ray": "evaluate",
    "scipy": "evaluate",
    "sklearn": "benchmark",
    "starlette": "evaluate",
    "torch": "torch",
    "transformers": "evaluate",
    "uvicorn": "evaluate",
    "vllm": "gpu",
}


def missing_extra(error: ImportError, of_command: str = "") -> str:
    """The sentence that says what to install; empty for a module that no extra brings.

    Args:
        of_command: the extra that brings all that the command needs, if there is one.
    """
    module = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(module) and (of_command or EXTRAS[module])
    return (
        f"{module} is not installed, and this command needs it; pip install 'expo-ray[{extra}]'"
        if extra
        else ""
    )


def require(module: str) -> None:
    """Check, before any work, that a package which the command will import is installed.

    Raises:
        JobError: if it is not.
    """
    if find_spec(module) is None:
        raise JobError(missing_extra(ModuleNotFoundError(name=module)))
