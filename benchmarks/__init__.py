"""Measurement scripts, one per question; `python -m benchmarks` runs them. See README.md."""
