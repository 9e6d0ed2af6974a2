"""Extrapolate pairs of checkpoints: `W = W_dpo + alpha (W_dpo - W_sft)` (ExPO, arXiv 2404.16792)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("expo-ray")
except PackageNotFoundError:  # a source tree shipped as Ray's working_dir, not installed
    __version__ = "0+source"
