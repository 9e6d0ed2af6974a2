"""Mutated inputs for every reader of data from outside: each returns or raises an `ExpoError`, within bounded time and memory.

`tests/cli/test_fuzz.py` runs some hundred of them; for longer: `python -m tests.fuzz [SECONDS] [TARGET ...]`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import faulthandler
import gzip
import itertools
import json
import os
import random
import resource
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from expo_ray.checkpoint.folder import read_checkpoint
from expo_ray.checkpoint.vocabulary import read_vocabulary
from expo_ray.cli.arguments import command_parser
from expo_ray.config import Pair, PromptSource, RewardModel, load_job
from expo_ray.errors import ExpoError
from expo_ray.evaluation.prompts.load_prompts import load_prompt_set
from expo_ray.evaluation.records import reward_from_row
from expo_ray.evaluation.responses.client import Client, GaveUp, Refused
from expo_ray.evaluation.rewards.reward_file import read_responses
from expo_ray.evaluation.rewards.reward_model import inspect_reward_model
from expo_ray.evaluation.row_store import read_rows
from expo_ray.extrapolation.model_folder import read_claim
from expo_ray.extrapolation.plan import plan_pair
from expo_ray.extrapolation.receipt import read_receipt
from expo_ray.published.verify import read_manifest, verify_files
from expo_ray.report.results_file import parse_results
from expo_ray.storage import open_store
from expo_ray.untrusted import compile_pattern
from tests.support.paths import DATA

_SLOW_S = 30.0
_MOST_BYTES_OF_MEMORY = 3 * 2**30
_NUMBERS = itertools.count()

_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**299, 0.5, -0.0, 1e308, "", "x", "8", "0", "-1", "NaN", "../..", "/etc/passwd",
    "a\x00b", "\n", "\x1b[2J", "\u202e", "\ud800", "é", "(", "(a+)+", "a{99999999999}", "*", "s3://", "hf://x", [], {}, [[]], [None], [1],
    ["x"], {"a": 1}, {"": None}, [[[[[[1]]]]]], "9" * 400, "x" * 10_000,
]  # fmt: skip
_TOKENS = [
    b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b"\\u", b"\\ud800", b"\x00", b"\xff", b"\xef\xbb\xbf", b"NaN", b"Infinity",
    b"1e999", b"-0", b"9" * 400, b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"&a ", b"*a", b"<<: *a", b"!!int ", b"!!binary ",
    b"? ", b"- ", b"\n", b"\r", b"\t", b"'", b"|", b"%", b"@", b"2024-13-45", b"1:2:3", b"0x", b".inf", b"\xe2\x80\xa8", b"\x1f\x8b",
]  # fmt: skip


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` with one to four things changed: values of its JSON or YAML, or its bytes."""
    if chance.random() < 0.6:
        lines = data.split(b"\n")
        place = chance.randrange(len(lines))
        whole = chance.random() < 0.7
        text = data if whole else lines[place]
        try:
            value = json.loads(text)
        except ValueError:
            try:
                value = yaml.safe_load(text) if whole and len(text) < 2000 else None
            except Exception:
                value = None
        if isinstance(value, dict | list):
            for _ in range(chance.choice([1, 1, 1, 2, 4])):
                value = _changed(value, chance)
            changed = json.dumps(value).encode()
            if whole:
                return changed
            lines[place] = changed
            return b"\n".join(lines)
    raw = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(len(raw) + 1)
        kind = chance.randrange(5)
        if kind == 0:
            raw[at:at] = chance.choice(_TOKENS)
        elif kind == 1:
            raw[at : at + chance.choice([1, 2, 8, 100])] = b""
        elif kind == 2:
            raw[at : at + 1] = chance.randbytes(1)
        elif kind == 3:
            raw[at:at] = raw[at : at + chance.choice([1, 10, 100])]
        else:
            raw[at : at + 3] = chance.choice(_TOKENS)
    return bytes(raw)


def _changed(value: Any, chance: random.Random) -> Any:
    """`value` with one value somewhere in it replaced, removed, or renamed."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return chance.choice(_VALUES)
    key: Any = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    fresh: Any = dict(value) if isinstance(value, dict) else list(value)
    kind = chance.randrange(10)
    if kind == 0:
        del fresh[key]
    elif kind == 1 and isinstance(fresh, dict):
        fresh[chance.choice(["", "x", "a\x00b", "../x", "\ud800", "(", "text_config"])] = fresh.pop(key)
    elif kind == 2:
        fresh[key] = [value[key]] if chance.random() < 0.5 else {"a": value[key]}
    else:
        fresh[key] = _changed(value[key], chance)
    return fresh


def _store(files: Mapping[str, bytes]) -> str:
    """The URI of a new folder in memory."""
    uri = f"memory://fuzz-{next(_NUMBERS)}/folder"
    store = open_store(uri)
    for key, data in files.items():
        store.put(key, data)
    return uri


def _forget(uri: str) -> None:
    store = open_store(uri)
    for info in store.list():
        store.delete(info.key)


def _files(folder: str) -> dict[str, bytes]:
    root = DATA / "published" / folder
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


_PREFIX = "base_model.model.model.layers.0.mlp.up_proj.lora_"
_ADAPTER_CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "task_type": "CAUSAL_LM", "use_rslora": False,
    "alpha_pattern": {"up_proj": 8}, "rank_pattern": {"(up|down)_proj": 2}, "fan_in_fan_out": False, "init_lora_weights": True,
}  # fmt: skip
_CONFIG = {
    "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 64, "num_labels": 1, "vocab_size": 16,
    "tie_word_embeddings": False, "id2label": {"0": "a"}, "auto_map": None, "torch_dtype": "bfloat16",
    "text_config": {"vocab_size": 16, "tie_word_embeddings": True}, "quantization_config": None,
}  # fmt: skip
_TOKENIZER_CONFIG = {"added_tokens_decoder": {"3": {"content": "x"}}, "chat_template": "{{ messages }}"}
_TOKENIZER = {
    "model": {"type": "BPE", "vocab": {f"t{number}": number for number in range(16)}, "merges": []},
    "added_tokens": [{"id": 3, "content": "t3", "special": True}],
}


def _weights(tensors: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> bytes:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        begin, count = end, 1
        for size in shape:
            count *= size
        end += count * (2 if dtype == "BF16" else 4)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


_ADAPTER = {
    "adapter_config.json": json.dumps(_ADAPTER_CONFIG).encode(),
    "adapter_model.safetensors": _weights({f"{_PREFIX}A.weight": (2, 8), f"{_PREFIX}B.weight": (8, 2)}),
}
_REWARD_MODEL = {
    "config.json": json.dumps(_CONFIG).encode(),
    "tokenizer_config.json": json.dumps(_TOKENIZER_CONFIG).encode(),
    "tokenizer.json": json.dumps(_TOKENIZER).encode(),
    "model.safetensors": _weights({"model.embed_tokens.weight": (16, 8), "score.weight": (1, 8)}, "F32"),
}
_PUBLISHED, _SFT, _DPO = _files("model"), _files("sft"), _files("dpo")
_SPLIT = {
    **{key: data for key, data in _PUBLISHED.items() if not key.startswith(".expo/") and key != "expo.json"},
    "tokenizer.json": json.dumps(_TOKENIZER).encode(),
    "tokenizer_config.json": json.dumps(_TOKENIZER_CONFIG).encode(),
}


def _one_mutated(files: Mapping[str, bytes], chance: random.Random) -> dict[str, bytes]:
    key = chance.choice(sorted(files))
    data = files[key]
    if key.endswith(".safetensors") and chance.random() < 0.7:
        size = int.from_bytes(data[:8], "little")
        header = mutated(data[8 : 8 + size], chance)
        return {**files, key: len(header).to_bytes(8, "little") + header + data[8 + size :]}
    return {**files, key: mutated(data, chance)}


def _pair(dpo: Mapping[str, bytes], chance: random.Random) -> None:
    sft_uri, dpo_uri = _store(_SFT), _store(_one_mutated(dpo, chance))
    options: dict[str, Any] = {
        "vocab": chance.choice(["refuse", "by-token", "keep-dpo"]),
        "adapter": chance.choice(["scale", "merge"]),
    }
    try:
        checkpoint = read_checkpoint(open_store(dpo_uri))
        if not checkpoint.adapter:
            read_vocabulary(open_store(dpo_uri), checkpoint)
    except ExpoError:
        pass
    try:
        plan_pair(Pair(sft=sft_uri, dpo=dpo_uri, name="p", alphas=(0.5,), **options), {0.5: ""})
    finally:
        _forget(sft_uri)
        _forget(dpo_uri)


def _published(chance: random.Random) -> None:
    uri = _store(_one_mutated(_PUBLISHED, chance))
    store = open_store(uri)
    try:
        read_claim(store)
        present = {info.key: info for info in store.list()}
        for key in present:
            read_receipt(
                store,
                key.split("/")[1] if key.startswith(".expo/") else "x",
                f"{Path(key).stem}.safetensors",
                present,
            )
        manifest = read_manifest(store)
        if manifest:
            verify_files(store, manifest)
    finally:
        _forget(uri)


_JOB = yaml.safe_dump({
    "output": "/nonexistent/out", "defaults": {"multipliers": {"embed|head": 0, "norm": 0.5}, "shard_size": "5GB", "seed": 3},
    "pairs": [{"name": "a", "sft": "/x/sft", "dpo": "hf://org/name@main", "alphas": [0.5, -1], "vocab": "by-token"}],
    "models": [{"name": "m", "uri": "s3://b/m"}], "prompts": [{"source": "p.jsonl", "limit": 5}],
    "sampling": {"temperature": 0.7, "max_tokens": 20}, "serving": {"engine": {"max_num_seqs": 4}, "port": 0},
    "rewards": [{"model": "/x/rm", "num_cpus": 1.5}], "search": {"method": "surface"}, "push_to": "org/{pair}",
}, sort_keys=False).encode()  # fmt: skip


def _job(chance: random.Random) -> None:
    path = Path(f"/tmp/expo-ray-fuzz-{os.getpid()}.yaml")
    path.write_bytes(mutated(_JOB, chance))
    try:
        load_job(path)
    finally:
        path.unlink()


_WORDS = shlex.split(
    "extrapolate --sft /x/s --dpo /x/d --alpha 0.5 --output /x/o --multiplier a|b=0.5 --shard-size 5GB --seed 3 --rounding nearest"
)


def _command_line(chance: random.Random) -> None:
    from expo_ray.cli.commands import _options_of
    from expo_ray.config import parse_pair

    words = list(_WORDS)
    for _ in range(chance.choice([1, 2])):
        place = chance.randrange(1, len(words))
        value = chance.choice(
            [str(each) for each in _VALUES if each != "\ud800"]
            + [
                mutated(words[place].encode("utf-8", "surrogateescape"), chance).decode(
                    "utf-8", "surrogateescape"
                )
            ]
        )
        words[place] = value
    devnull = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(2)
    try:
        os.dup2(devnull, 2)
        arguments = command_parser().parse_args(words)
    except SystemExit:
        return
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(devnull)
    if arguments.command == "extrapolate":
        parse_pair(_options_of(arguments), "command line")


_PROMPTS: dict[str, bytes] = {
    "p.jsonl": b'{"prompt": "hi", "category": "a"}\n{"messages": [{"role": "user", "content": "x"}], "question_id": 5}\n{"turns": ["a", "b"]}\n',
    "p.json": b'[{"instruction": "hi", "dataset": "x"}, {"prompt": "y"}]',
    "p.csv": b'prompt,category\nhi,a\n"x\ny",b\n',
    "p.txt": b"hi\nyou\n",
    "p.jsonl.gz": gzip.compress(b'{"prompt": "hi"}\n'),
}


def _prompts(chance: random.Random) -> None:
    name = chance.choice(sorted(_PROMPTS))
    uri = _store({name: mutated(_PROMPTS[name], chance)})
    try:
        load_prompt_set(PromptSource(source=f"{uri}/{name}"))
    finally:
        _forget(uri)


_RESPONSES = b'{"prompt_id": "a", "sample": 0, "messages": [{"role": "user", "content": "x"}], "text": "y", "num_tokens": 3, "seed": 1}\n'
_REWARDS = b'{"prompt_id": "a", "sample": 0, "reward": 0.5, "num_tokens": 3, "truncated": false}\n'


def _responses(chance: random.Random) -> None:
    uri = _store(
        {"r.jsonl": mutated(_RESPONSES + _RESPONSES.replace(b'"sample": 0', b'"sample": 1'), chance)}
    )
    try:
        read_responses(f"{uri}/r.jsonl")
    finally:
        _forget(uri)


def _rewards(chance: random.Random) -> None:
    uri = _store({"r.jsonl": mutated(_REWARDS * 2, chance)})
    try:
        read_rows(open_store(uri), "r.jsonl", reward_from_row)
    finally:
        _forget(uri)


class _Answering(httpx.AsyncBaseTransport):
    """The far end of a connection, without the connection."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=httpx.ByteStream(self._body))


_COMPLETION = json.dumps({
    "choices": [{"message": {"content": "x"}, "finish_reason": "stop", "token_ids": [1, 2],
                 "logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": -0.5}]}]}}],
    "usage": {"completion_tokens": 3, "prompt_tokens": 5}, "prompt_logprobs": [None, {"5": {"logprob": -1.5}}],
}).encode()  # fmt: skip
_MODEL_CARD = json.dumps({
    "id": "m", "root": "x", "owned_by": "vllm", "max_model_len": 64, "data": [{"id": "m", "max_model_len": 5}],
    "metadata": {"engine": "vllm 1", "template": "t", "weights": "w", "dtype": "bf16", "max_model_len": 64, "special_ids": [1, 2]},
}).encode()  # fmt: skip


def _endpoint(chance: random.Random) -> None:
    asks_card = chance.random() < 0.5
    body = mutated(_MODEL_CARD if asks_card else _COMPLETION, chance)

    async def ask() -> None:
        async with Client("http://127.0.0.1:9", attempts=1) as client:
            await client._http.aclose()
            client._http = httpx.AsyncClient(
                transport=_Answering(body), base_url="http://127.0.0.1:9", timeout=20
            )
            if asks_card:
                await client.card("m")
                await client.names()
            else:
                await client.chat("m", [{"role": "user", "content": "hi"}], {})

    with contextlib.suppress(GaveUp, Refused):
        asyncio.run(ask())


def _reward_model(chance: random.Random) -> None:
    uri = _store(_one_mutated(_REWARD_MODEL, chance))
    try:
        inspect_reward_model(RewardModel(model=uri))
    finally:
        _forget(uri)


def _results(chance: random.Random) -> None:
    parse_results(mutated(_RESULTS, chance))


_RESULTS = (DATA / "results.json").read_bytes()
_PARTS_OF_PATTERNS = [
    "a",
    "b",
    ".",
    "\\d",
    "[a-z]",
    "(",
    ")",
    "(?:",
    "(?P<x>",
    "|",
    "*",
    "+",
    "?",
    "{1,9}",
    "{,999}",
    "^",
    "$",
    "\\1",
    "[",
    "]",
    "(?i)",
    "(?<=a)",
    "a{99999}",
    "\\",
]


def _pattern(chance: random.Random) -> None:
    pattern = compile_pattern("".join(chance.choices(_PARTS_OF_PATTERNS, k=chance.randrange(1, 9))))
    for name in ("model.layers.0.mlp.up_proj.weight", "a" * 200, "ab" * 100, "aaaa.b"):
        pattern.search(name)
        pattern.fullmatch(name)


TARGETS: dict[str, Callable[[random.Random], None]] = {
    "checkpoint": lambda chance: _pair(chance.choice([_DPO, _SPLIT]), chance),
    "adapter": lambda chance: _pair(_ADAPTER, chance),
    "published": _published,
    "job": _job,
    "command line": _command_line,
    "prompts": _prompts,
    "responses": _responses,
    "rewards": _rewards,
    "endpoint": _endpoint,
    "reward model": _reward_model,
    "results": _results,
    "pattern": _pattern,
}


def attempt(target: str, seed: int) -> bool:
    """Give a target the input of `seed`; whether it was refused. Anything but an `ExpoError` is passed on."""
    try:
        TARGETS[target](random.Random(f"{target} {seed}"))
    except ExpoError:
        return True
    return False


def main(words: list[str]) -> int:
    """Run for some seconds; the exit status is 1 if anything but an `ExpoError` was raised."""
    seconds, chosen = float(words[0]) if words else 600.0, words[1:] or list(TARGETS)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES_OF_MEMORY * 3,) * 2)
    counts: collections.Counter[str] = collections.Counter()
    faults: dict[str, str] = {}
    end, first = time.monotonic() + seconds, random.SystemRandom().randrange(2**40)
    slowest: dict[str, tuple[float, int]] = {}
    for number in itertools.count(first):
        if time.monotonic() > end:
            break
        for target in chosen:
            faulthandler.dump_traceback_later(_SLOW_S, exit=True)  # names the hang
            began = time.monotonic()
            try:
                counts[f"{target}: {'refused' if attempt(target, number) else 'taken'}"] += 1
            except BaseException as error:
                counts[f"{target}: fault"] += 1
                frames = traceback.extract_tb(error.__traceback__)
                own = next((frame for frame in reversed(frames) if "expo_ray" in frame.filename), frames[-1])
                place = f"{target}: {type(error).__name__} at {Path(own.filename).name}:{own.lineno}"
                if place not in faults:
                    faults[place] = f"seed {number}: {str(error)[:300]!r}"
                    print(place, faults[place], flush=True)
                if isinstance(error, KeyboardInterrupt):
                    raise
            faulthandler.cancel_dump_traceback_later()
            slowest[target] = max(slowest.get(target, (0.0, 0)), (time.monotonic() - began, number))
    for name, count in sorted(counts.items()):
        print(f"{name} {count}")
    print("slowest:", {target: f"{took:.1f} s, seed {number}" for target, (took, number) in slowest.items()})
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB, {len(faults)} kind(s) of faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
