"""Recognise checkpoints in the formats of training programs, and name the command that converts them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from expo_ray.text import shown

_BESIDE = "copy config.json and the tokenizer into OUTPUT, and pass it"

# Pattern of a key that only one format has -> name of the format and the next step. `{folder}` is the folder of that key. The first
# match counts, in this order, because shards of Megatron and FSDP end alike.
_FORMATS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(mark), text)
    for mark, text in (
        (
            r"(?P<folder>.*\.incomplete|.*\.aria2|.*\.crdownload|.*\.part)",
            "a download that was cut off ({folder}); download the model again",
        ),
        (
            r"(?P<folder>(?:.*/)?[^/]+\.(?:bin|safetensors))/.+",
            "a folder named {folder}, as DeepSpeed's zero_to_fp32.py makes one where it is given the name of a file; rename that "
            "folder, and move the files in it beside config.json",
        ),
        (
            r"(?:(?P<folder>.*)/)?model_world_size_\d+_rank_\d+\.pt",
            "one file for each rank of a run of verl; merge them with `python -m verl.model_merger merge --backend fsdp "
            f"--local_dir {{folder}} --target_dir OUTPUT`, {_BESIDE}",
        ),
        (
            r"(?:(?P<folder>.*)/)?(?:mp_rank_\d+(?:_\d+)*/(?:model_optim_rng|model_rng)\.pt|latest_checkpointed_iteration\.txt"
            r"|iter_\d{7}/.+)",
            "a checkpoint of Megatron-LM ({folder}); export it to Hugging Face's format with Megatron-Bridge "
            "(`AutoBridge.export_ckpt`) or the converter of your training program, and pass the export",
        ),
        (
            r"(?:(?P<folder>.*)/)?(?:zero_to_fp32\.py|(?:global_step\d+/)?(?:[^/]*zero_pp_rank_\d+[^/]*|mp_rank_\d+_model_states"
            r"|[^/]*_optim_states)\.pt)",
            "a DeepSpeed checkpoint ({folder}) whose ranks have not been put together; run `python zero_to_fp32.py . OUTPUT "
            f"--safe_serialization` in it, {_BESIDE}",
        ),
        (
            r"(?:(?P<folder>.*)/)?[^/]*\.distcp",
            "a sharded checkpoint of FSDP (torch.distributed.checkpoint); put it together with `accelerate merge-weights {folder} "
            f"OUTPUT`, {_BESIDE}",
        ),
        (
            r"(?:(?P<folder>.*)/)?[^/]*pp-rank-\d+-of-\d+_tp-rank-\d+-of-\d+[^/]*\.safetensors",
            "one file for each rank of a run of nanotron ({folder}); convert it with nanotron's "
            "examples/llama/convert_nanotron_to_hf.py, and pass the result",
        ),
        (
            r"(?P<folder>[^/]+\.nemo)|(?:(?P<inner>.*)/)?weights/(?:common\.pt|\.metadata|metadata\.json)",
            'a checkpoint of NeMo; export it to Hugging Face\'s format (`llm.export_ckpt(..., target="hf")`, or for .nemo files '
            "NeMo's scripts/checkpoint_converters), and pass the export",
        ),
        (
            r"(?P<folder>[^/]+\.(?:gguf|ggml))",
            "{folder}, made for llama.cpp and mostly quantised; pass the checkpoint that it was made from",
        ),
        (
            r"(?P<folder>(?:.*/)?consolidated[^/]*\.pth)",
            "Meta's own format ({folder}); convert it with transformers' convert_llama_weights_to_hf.py, or pass the repository in "
            "Hugging Face's format",
        ),
        (
            r"(?P<folder>(?:.*/)?lit_model\.pth)",
            "LitGPT's format ({folder}); convert it with `litgpt convert_from_litgpt`, and pass the result",
        ),
        (
            r"(?:(?P<folder>.*)/)?(?:_CHECKPOINT_METADATA|manifest\.ocdbt|ocdbt\.process_\d+/.+)",
            "a checkpoint of Orbax, from JAX ({folder}); export it to Hugging Face's format with the program that trained it, and "
            "pass the export",
        ),
    )
)


def unconverted_checkpoint(uri: str, keys: Iterable[str]) -> str:
    """Description of a training program's format and the command that converts it; empty if the folder has no such format."""
    listed = sorted(keys)
    for pattern, text in _FORMATS:
        for key in listed:
            match = pattern.fullmatch(key)
            if match:
                folder = next((part for part in match.groups() if part), "")
                return text.format(folder=shown(f"{uri}/{folder}" if folder else uri))
    return ""
