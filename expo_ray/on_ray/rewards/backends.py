"""The two back ends of a reward model: vLLM, and `transformers`, the reference. Both take token ids and nothing else."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from expo_ray.config import RewardModel
from expo_ray.errors import RewardError
from expo_ray.evaluation.gpu_needs import SCORED_TOKENS
from expo_ray.evaluation.placement import UTILIZATION
from expo_ray.evaluation.rewards.reward_model import DTYPE_BYTES, Classifier
from expo_ray.text import first_few

_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Largest allowed difference of the two back ends, times the largest score where that is above 1. Measured (docs/rewards.md):
# 2.7e-6 in fp32, 0.0045 in fp16 and 0.042 in bf16. A wrong position or head is off by whole units.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.03}
PARITY_TEXTS = 16
# Texts, and tokens of each, on which the reference compares its ways to compute; differences up to here, relative to a score
# above 1, are rounding in fp32 (measured: 4e-6).
_SETTLED_TEXTS = 4
_SETTLED_TOKENS = 256
_SAME_SCORE = 1e-4
# Decoders whose head is not called `score`; they look for the last token that is not padding themselves.
_POOLED_BY_PAD = {"CTRLForSequenceClassification", "ModernBertDecoderForSequenceClassification"}
# A batch of `transformers`, padding included.
_BATCH_TOKENS = 8192
# float32 products of float32 factors. GPUs round these to TF32's ten bits otherwise, an error of a thousandth in each product.
_IEEE_PRODUCTS = {
    "TRITON_F32_DEFAULT": "ieee",  # Triton's `tl.dot`: vLLM's FlashAttention takes no fp32, its Triton attention does
    "VLLM_FLOAT32_MATMUL_PRECISION": "highest",
    "NVIDIA_TF32_OVERRIDE": "0",  # cuBLAS and cuDNN, whatever a container's environment says of torch
}
# Share of a GPU's memory that vLLM may fill, as it fills all it may with its cache: contexts and other programs need some, too.
GPU_MEMORY_SHARE = UTILIZATION
# What vLLM's attention cache on a CPU has room for at least; on a GPU it takes what is free.
_CACHE_TOKENS = 16384


class Backend(Protocol):
    """A loaded reward model. `name` holds the program that computes, its version and the data type."""

    name: str

    def score(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """Compute the raw scores of token sequences, in their order."""


class TransformersBackend:
    """`AutoModelForSequenceClassification`, held to its definition: eager attention, one text at a time, without padding.

    Batches of similar length and a faster attention are used where they give the same scores on `probe`. They do not where fused
    attention leaves out what a model defines, such as Gemma 2's soft cap, or where padding reaches the other tokens, as in
    FNet, ConvBERT, MobileBERT and Nystromformer.

    A decoder's own choice of the position to score, the last token that is not `pad`, is wrong where the chat ends with that
    token; so the position is taken from the lengths here.

    Args:
        probe: texts that decide between these; without any, batches and the model's default attention are used.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        *,
        cuda: bool,
        probe: Sequence[Sequence[int]] = (),
        allow_pickle: bool = False,
    ) -> None:
        self._model = _load_classifier(folder, dtype, allow_pickle=allow_pickle)
        self._device = "cuda" if cuda else "cpu"
        self._model.eval().to(self._device)
        self._config = self._model.config.get_text_config()
        if self._config.pad_token_id is None:
            self._config.pad_token_id = 0  # else it refuses batches; what is there does not matter
        self._pad = self._config.pad_token_id
        self._pads_by_batch = type(self._model).__name__ in _POOLED_BY_PAD
        self._heads: list[Any] = []
        if head := getattr(self._model, "score", None):  # of decoders, which apply it to every token
            head.register_forward_hook(lambda module, given, scores: self._heads.append(scores))
        self._padded = True
        self._settle(probe, TOLERANCE[dtype] if dtype != "fp32" else _SAME_SCORE)
        self.name = f"transformers {version('transformers')}, {dtype}, {self._attention} attention"

    @property
    def _attention(self) -> str:
        return str(self._config._attn_implementation)

    def _settle(self, probe: Sequence[Sequence[int]], tolerance: float) -> None:
        """Choose attention and batches: the fastest that score the probe as the definition does."""
        usual = "eager" if _has_soft_cap(self._config) else self._attention
        # No whole texts: eager attention over long ones may take all memory.
        texts = _beginnings(probe)
        expected = self._scores_as(texts, "eager", padded=False)
        ways = (
            [(usual, True), (usual, False), ("eager", True), ("eager", False)]
            if expected
            else [(usual, True)]
        )
        for attention, padded in dict.fromkeys(ways):
            scores = self._scores_as(texts, attention, padded=padded)
            if len(scores) == len(expected) and all(
                abs(score - other) <= tolerance * max(1.0, abs(other))
                for score, other in zip(scores, expected, strict=True)
            ):
                return

    def _scores_as(self, texts: Sequence[Sequence[int]], attention: str, *, padded: bool) -> list[float]:
        """Compute scores with these settings, which stay set; empty if the model cannot compute with them."""
        self._padded = padded
        if attention != self._attention:
            self._model.set_attn_implementation(attention)
        try:
            return self.score(texts)
        except (
            ValueError,
            RuntimeError,
            IndexError,
        ):  # BART takes no batch of texts with unlike numbers of </s>
            return []

    def score(self, ids: Sequence[Sequence[int]]) -> list[float]:
        import torch

        scores = [0.0] * len(ids)
        with torch.inference_mode():
            for batch in _batches(ids) if self._padded else ([index] for index in range(len(ids))):
                for index, score in zip(batch, self._batch([ids[index] for index in batch]), strict=True):
                    scores[index] = score
        return scores

    def _batch(self, ids: Sequence[Sequence[int]]) -> list[float]:
        import torch

        if self._pads_by_batch:
            self._pad = self._config.pad_token_id = _unused(ids)
        lengths = torch.tensor([len(text) for text in ids], device=self._device)
        longest = int(lengths.max())
        padded = torch.tensor([[*text, *[self._pad] * (longest - len(text))] for text in ids]).to(
            self._device
        )
        mask = torch.arange(longest, device=self._device)[None] < lengths[:, None]
        self._heads.clear()
        logits = self._model(input_ids=padded, attention_mask=mask.long()).logits
        if self._heads and self._heads[0].dim() == 3:
            logits = self._heads[0][torch.arange(len(ids), device=self._device), lengths - 1]
        scores: list[float] = logits[:, 0].float().tolist()
        return scores


def _beginnings(probe: Sequence[Sequence[int]]) -> list[list[int]]:
    """The beginnings of a few texts, each with the text's last token, which some models score."""
    few = probe[:: max(1, len(probe) // _SETTLED_TEXTS)]
    return [[*ids[: _SETTLED_TOKENS - 1], ids[-1]] for ids in few]


def _load_classifier(folder: Path, dtype: str, *, allow_pickle: bool) -> Any:
    """Load a classifier with `transformers`; no code of the model is run.

    Raises:
        RewardError: if weights are missing, which transformers would replace by random numbers.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    auto: Any = transformers.AutoModelForSequenceClassification
    model, loading = auto.from_pretrained(
        folder,
        dtype=getattr(torch, _TORCH_NAMES[dtype]),
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=None if allow_pickle else True,
    )
    if missing := sorted(loading["missing_keys"]):
        raise RewardError(
            f"{folder}: transformers misses {first_few(missing)} and would take random numbers; give the folder of the trained "
            "reward model"
        )
    return model


def _has_soft_cap(config: Any) -> bool:
    """True if the model defines a soft cap on attention scores, which fused attention leaves out."""
    names = ("attn_logit_softcapping", "attention_logit_softcapping", "attn_logit_softcap")
    return any(getattr(config, name, None) for name in names)


def _unused(ids: Sequence[Sequence[int]]) -> int:
    """A token that is in no text. As padding, it lets models that look for the last other token find the end of each text."""
    used = {token for text in ids for token in text}
    return next(token for token in range(len(used) + 1) if token not in used)


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Positions in `ids` by length, together at most `_BATCH_TOKENS` with padding, or a single one."""
    batch: list[int] = []
    for index in sorted(range(len(ids)), key=lambda position: len(ids[position])):
        if batch and (len(batch) + 1) * len(ids[index]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class VllmBackend:
    """vLLM's pooling runner, in this very process, so that it cannot outlive an actor that is killed.

    Where `parallel` is above 1, each slice of the model has a child process; these end with their parent.

    Args:
        gpu_share: share of the memory of each GPU that it may take.
        parallel: GPUs, or processes on a CPU, that the model is split over (tensor parallel).
    """

    def __init__(
        self,
        model: Classifier,
        folder: Path,
        dtype: str,
        *,
        cuda: bool,
        gpu_share: float = 1.0,
        parallel: int = 1,
    ) -> None:
        for name, text in {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all engines of a machine share the first core
            "VLLM_NO_USAGE_STATS": "1",
        }.items():
            os.environ.setdefault(name, text)
        import vllm

        per_token = model.kv_values * DTYPE_BYTES[dtype]
        place: dict[str, Any] = (
            {"gpu_memory_utilization": round(GPU_MEMORY_SHARE * gpu_share, 4)}
            if cuda
            else {
                "enforce_eager": True,  # compiling for a CPU takes minutes
                "kv_cache_memory_bytes": per_token * max(2 * model.max_tokens, _CACHE_TOKENS),
            }
        )
        if cuda and model.max_tokens > SCORED_TOKENS:
            # As long as the cache has room for: a model for 131,072 tokens wants 17 GB for a text that never comes.
            place["max_model_len"] = -1
        if parallel > 1:
            # Not Ray's, which vLLM takes inside an actor: the actor holds all GPUs itself.
            place |= {"tensor_parallel_size": parallel, "distributed_executor_backend": "mp"}
        engine: Any = vllm.LLM
        self._engine = engine(
            model=str(folder),
            runner="pooling",
            dtype=_TORCH_NAMES[dtype],
            trust_remote_code=False,
            use_tqdm_on_load=False,
            disable_log_stats=True,
            **{"max_model_len": model.max_tokens, **place},
        )
        self._uri = model.uri
        # By default vLLM applies a sigmoid to a single label.
        self._raw = vllm.PoolingParams(use_activation=False)
        self.name = f"vllm {vllm.__version__}, {dtype}"

    def score(self, ids: Sequence[Sequence[int]]) -> list[float]:
        longest, limit = max(map(len, ids), default=0), self._engine.model_config.max_model_len
        if longest > limit:
            raise RewardError(
                f"{self._uri}: a text of {longest} tokens, and the cache in its share of the GPU has room for {limit}; set `num_gpus: 1`, "
                "or more GPUs"
            )
        outputs = self._engine.classify(
            [{"prompt_token_ids": list(text)} for text in ids], pooling_params=self._raw, use_tqdm=False
        )
        return [float(output.outputs.probs[0]) for output in outputs]


def load_backend(
    model: Classifier,
    folder: Path,
    dtype: str,
    *,
    num_gpus: float,
    probe: Sequence[Sequence[int]] = (),
    compares: bool = True,
) -> Backend:
    """Load a reward model.

    Args:
        folder: its files on this machine.
        num_gpus: GPUs that it may use: a share of one, or a whole number that vLLM splits the model over; 0 for a CPU.
        probe: texts on which it must agree with its definition.
        compares: whether vLLM is compared with the reference on them, which is loaded for that; else another actor has.

    Raises:
        RewardError: if the back ends disagree, or vLLM is needed and not there, or does not know the model.
    """
    import torch

    _multiply_exactly()
    cuda, parallel = num_gpus > 0, max(1, int(num_gpus))
    if not _takes_vllm(model.spec, folder):
        if parallel > 1:
            raise RewardError(
                f"{model.uri}: `num_gpus: {num_gpus:g}`, but transformers scores it, on one GPU; set `num_gpus: 1`, and `dtype: bf16` "
                "if it does not fit"
            )
        return TransformersBackend(
            folder, dtype, cuda=cuda, probe=probe, allow_pickle=model.spec.allow_pickle
        )
    compared = probe if compares else ()
    if parallel > 1:
        # Too large for one GPU, perhaps: the reference computes on all cores of the node instead, a few short texts.
        compared = _beginnings(compared)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    on_gpu = cuda and parallel == 1
    expected = _reference_scores(model, folder, dtype, compared, cuda=on_gpu) if compared else []
    backend = VllmBackend(model, folder, dtype, cuda=cuda, gpu_share=min(num_gpus, 1.0), parallel=parallel)
    check_parity(model.uri, dtype, backend.score(compared) if compared else [], expected)
    return backend


def _multiply_exactly() -> None:
    """Keep float32 products in float32 everywhere in this process and its children; nothing may have computed before."""
    import torch

    os.environ.update(_IEEE_PRODUCTS)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # of convolutions, which are TF32 by default


def check_parity(where: str, dtype: str, vllm: Sequence[float], transformers: Sequence[float]) -> None:
    """Compare the two back ends on the same texts.

    Raises:
        RewardError: if a score is off by more than `TOLERANCE`.
    """
    allowed = TOLERANCE[dtype] * max([1.0, *map(abs, transformers)])
    pairs = list(zip(vllm, transformers, strict=True))
    # Not `>`: a NaN is wrong as well.
    wrong = [f"{ours:.4f} and {theirs:.4f}" for ours, theirs in pairs if not abs(ours - theirs) <= allowed]
    if wrong:
        raise RewardError(
            f"{where}: vLLM and transformers disagree on {len(wrong)} of {len(pairs)} texts by more than {allowed:.2g} in {dtype} "
            f"({first_few(wrong)}), and transformers was checked against the model's definition; set `backend: transformers`"
        )


def _reference_scores(
    model: Classifier, folder: Path, dtype: str, probe: Sequence[Sequence[int]], *, cuda: bool
) -> list[float]:
    """Compute the scores of the reference, and free its memory before vLLM asks for some."""
    import torch

    reference = TransformersBackend(
        folder, dtype, cuda=cuda, probe=probe, allow_pickle=model.spec.allow_pickle
    )
    scores = reference.score(probe)
    del reference
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return scores


def _takes_vllm(spec: RewardModel, folder: Path) -> bool:
    if spec.backend == "transformers":
        return False
    if find_spec("vllm") is None:
        if spec.backend == "vllm":
            raise RewardError(
                f"{spec.model}: `backend: vllm`, and vllm is not installed on this node; install the extra `gpu`, or set "
                "`backend: transformers`"
            )
        return False
    return spec.backend == "vllm" or _known_to_vllm(folder)


def _known_to_vllm(folder: Path) -> bool:
    """True if vLLM implements the architecture; it makes classifiers of the language models it knows."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    return any(
        name in known or name.replace("ForSequenceClassification", "ForCausalLM") in known
        for name in AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).architectures
        or ()
    )
