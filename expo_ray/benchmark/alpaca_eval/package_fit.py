"""Compute alpaca-eval's own length-controlled win rate, by the package itself in a separate process.

A separate process, because importing the package sets an option of scikit-learn for the whole process, reads `.env` files, takes
seconds, and by default writes weights into site-packages. Run as a script, this file reads a JSON object from standard input and
writes one to standard output; nothing else is written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSION = "0.6.6"
_TIMEOUT_S = 600


def package_win_rates(arms: Sequence[dict[str, Any]], gamed_csv: bytes) -> list[float]:
    """Fit alpaca-eval's regression to the annotations of each model, in one new process.

    Args:
        arms: columns `index`, `preference` (1 to 2, or None), `len_1` and `len_2` of each model, a value for each prompt.
        gamed_csv: bytes of df_gamed.csv.

    Returns:
        Length-controlled win rates in percent.

    Raises:
        BenchmarkError: if the package is not installed, or fails.
    """
    from expo_ray.errors import BenchmarkError
    from expo_ray.text import shown

    with tempfile.TemporaryDirectory(prefix="expo-ray-") as folder:
        gamed = Path(folder, "df_gamed.csv")
        gamed.write_bytes(gamed_csv)
        try:
            done = _run(json.dumps({"gamed": str(gamed), "arms": list(arms)}), folder)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(
                f"alpaca-eval's length control took more than {_TIMEOUT_S} s; run it on a machine with less to do"
            ) from error
    if done.returncode:
        last = (done.stderr.strip().split("\n") or [""])[-1]
        remedy = (
            "pip install 'expo-ray[benchmark]'"
            if "ModuleNotFoundError" in last or "PackageNotFoundError" in last
            else f"check that alpaca-eval is {VERSION} and scikit-learn older than 1.10"
        )
        raise BenchmarkError(f"alpaca-eval's length control failed ({shown(last)}); {remedy}")
    return [float(value) for value in json.loads(done.stdout.strip().split("\n")[-1])]


def _run(request: str, folder: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        # -P: a module beside this file must not stand in for one of the same name; -B: site-packages stays as it is.
        [sys.executable, "-P", "-B", __file__],
        input=request,
        capture_output=True,
        text=True,
        cwd=folder,
        env=_environment(folder),
        timeout=_TIMEOUT_S,
        check=False,
    )


def _environment(folder: str) -> dict[str, str]:
    """Variables of the new process: without keys, offline for the Hub, and with a home that is removed afterwards."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "OMP_NUM_THREADS", "TMPDIR")
    own = {
        "HOME": folder,
        "HF_HOME": folder,
        "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": folder,
        "XDG_CACHE_HOME": folder,
        "PYTHONDONTWRITEBYTECODE": "1",
        # Packages installed with `pip install --user` are in the home that is replaced.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("-packages")),
    }
    return {name: os.environ[name] for name in kept if name in os.environ} | own


def main() -> None:
    """Read the arms, fit, and print the win rates."""
    from importlib.metadata import version

    assert version("alpaca-eval") == VERSION, f"alpaca-eval is {version('alpaca-eval')}"
    request = json.load(sys.stdin)
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    # The package downloads this one file, and is given the path of a copy instead.
    glm_winrate.hf_hub_download = lambda **_: request["gamed"]
    json.dump([_win_rate(glm_winrate, pd, arm) for arm in request["arms"]], sys.stdout)


def _win_rate(glm_winrate: Any, pd: Any, arm: dict[str, Any]) -> float:
    # The fit takes of the texts their lengths alone, and finds the difficulty of a prompt by an index with this name:
    # without one, it counts the rows.
    frame = pd.DataFrame(
        {
            "preference": pd.array(arm["preference"], dtype="float64"),
            "output_1": ["x" * size for size in arm["len_1"]],
            "output_2": ["x" * size for size in arm["len_2"]],
            "generator_1": "baseline",
            "generator_2": "model",
            "annotator": "judge",
        },
        index=pd.Index(arm["index"], name="index"),
    )
    metrics = glm_winrate.get_length_controlled_winrate(
        frame, save_weights_dir=None, is_add_glm_preference_inplace=False, is_warn_extreme_changes=False
    )
    return float(metrics["length_controlled_winrate"])


if __name__ == "__main__":
    main()
