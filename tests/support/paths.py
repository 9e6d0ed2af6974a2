"""Where the repository and the models, data and reference files beside it are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"  # may be missing: tests that read it are skipped, and say so
