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
from expo_ray.evaluation.rewards.reward_model import Classifier
from expo_ray.text import first_few

_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Largest allowed difference of the two back ends, times the largest score where that is above 1. Measured: 4e-6 in fp32. 16 bits
# keep two to three digits; a wrong position or head is off by whole units.
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
        # Their beginnings and the last token, which some models score: eager attention over whole texts may take all memory.
        texts = [
            [*ids[: _SETTLED_TOKENS - 1], ids[-1]] for ids in probe[:: max(1, len(probe) // _SETTLED_TEXTS)]
        ]
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
    """vLLM's pooling runner, in this very process, so that it cannot outlive an actor that is killed."""

    def __init__(self, model: Classifier, folder: Path, dtype: str, *, cuda: bool, gpu_share: float) -> None:
        for name, text in {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all engines of a machine share the first core
            "VLLM_NO_USAGE_STATS": "1",
        }.items():
            os.environ.setdefault(name, text)
        import vllm

        per_token = model.kv_values * _BYTES[dtype]
        place: dict[str, Any] = (
            {"gpu_memory_utilization": 0.9 * min(gpu_share, 1)}
            if cuda
            else {
                "enforce_eager": True,  # compiling for a CPU takes minutes
                "kv_cache_memory_bytes": per_token * max(2 * model.max_tokens, _CACHE_TOKENS),
            }
        )
        engine: Any = vllm.LLM
        self._engine = engine(
            model=str(folder),
            runner="pooling",
            dtype=_TORCH_NAMES[dtype],
            max_model_len=model.max_tokens,
            trust_remote_code=False,
            use_tqdm_on_load=False,
            disable_log_stats=True,
            **place,
        )
        # By default vLLM applies a sigmoid to a single label.
        self._raw = vllm.PoolingParams(use_activation=False)
        self.name = f"vllm {vllm.__version__}, {dtype}"

    def score(self, ids: Sequence[Sequence[int]]) -> list[float]:
        outputs = self._engine.classify(
            [{"prompt_token_ids": list(text)} for text in ids], pooling_params=self._raw, use_tqdm=False
        )
        return [float(output.outputs.probs[0]) for output in outputs]


def load_backend(
    model: Classifier,
    folder: Path,
    dtype: str,
    *,
    gpu_share: float,
    probe: Sequence[Sequence[int]] = (),
    compares: bool = True,
) -> Backend:
    """Load a reward model.

    Args:
        folder: its files on this machine.
        gpu_share: GPUs that it may use; 0 for a CPU.
        probe: texts on which it must agree with its definition.
        compares: whether vLLM is compared with the reference on them, which is loaded for that; else another actor has.

    Raises:
        RewardError: if the back ends disagree, or vLLM was asked for and is not there.
    """
    cuda = gpu_share > 0
    if not _takes_vllm(model.spec, folder):
        return TransformersBackend(
            folder, dtype, cuda=cuda, probe=probe, allow_pickle=model.spec.allow_pickle
        )
    compared = probe if compares else ()
    expected = _reference_scores(model, folder, dtype, compared, cuda=cuda) if compared else []
    backend = VllmBackend(model, folder, dtype, cuda=cuda, gpu_share=gpu_share)
    check_parity(model.uri, dtype, backend.score(compared) if compared else [], expected)
    return backend


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
