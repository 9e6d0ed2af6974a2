"""One script per question; `python -m benchmarks` asks them all. See README.md."""
