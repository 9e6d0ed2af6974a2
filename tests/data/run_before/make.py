"""Make the runs beside this file with the `expo_ray` that PYTHONPATH names, in a new folder: `python make.py FOLDER`.

`FOLDER/finished` is the output of a job that came to its end, `FOLDER/cut` that of the same job, killed as soon as some responses
were stored. The parents have a fixed time of change, which is part of what identifies a local file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
CHANGED_NS = 1_700_000_000 * 10**9
LETTER = "a"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip


def save_parents(folder: Path) -> None:
    """Save `sft` and `dpo`, which writes one letter more often."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *map(chr, range(33, 127)), "Ġ", "Ċ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(vocabulary), tie_word_embeddings=False, **SIZES)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        # What all hidden states have in common is what one row of the head can answer to.
        model.model.embed_tokens.weight.add_(1.0)
        for name in ("sft", "dpo"):
            model.save_pretrained(folder / name)
            fast.save_pretrained(folder / name)
            model.lm_head.weight[vocabulary[LETTER]].add_(10.0 / SIZES["hidden_size"])
    for file in [*folder.glob("sft/*"), *folder.glob("dpo/*")]:
        os.utime(file, ns=(CHANGED_NS, CHANGED_NS))


def start(folder: Path, name: str, temporary: str) -> subprocess.Popen[bytes]:
    """Start `expo-ray run` of the job beside this file with the output `FOLDER/NAME`."""
    job = yaml.safe_load((HERE / "job.yaml").read_text().replace("FOLDER", str(folder)))
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(job | {"output": str(folder / name)}))
    environment = os.environ | {
        "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{HERE}",
        "RAY_TMPDIR": temporary,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "EXPO_RAY_CACHE": f"{temporary}/cache",
    }
    command = [sys.executable, "-m", "expo_ray.cli", "run", str(file)]
    return subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    save_parents(folder)
    with tempfile.TemporaryDirectory(prefix="xr-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        assert start(folder, "finished", temporary).wait() == 0
    with tempfile.TemporaryDirectory(prefix="xr-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        process = start(folder, "cut", temporary)
        while not list((folder / "cut").glob("evaluation/tiny@0.5/*/responses/*.jsonl")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(15)  # Ray's processes end when their driver is gone


if __name__ == "__main__":
    main()
