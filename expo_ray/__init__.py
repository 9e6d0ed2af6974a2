"""Extrapolate pairs of checkpoints: `W = W_dpo + alpha (W_dpo - W_sft)` (ExPO, arXiv 2404.16792)."""

__version__ = "0.1.0"
