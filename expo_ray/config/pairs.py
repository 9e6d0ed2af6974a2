"""Sections of a job file about pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from expo_ray.config.fields import (
    NAME,
    AdapterPolicy,
    Alphas,
    ByteSize,
    Frozen,
    Multiplier,
    OutputDtype,
    Pattern,
    RoundingName,
    VocabPolicy,
    named_after,
)


class PairOptions(Frozen):
    """Options of the extrapolation of a pair. Set under `defaults` for all pairs, or in one pair."""

    alphas: Alphas = ()
    """Steps past dpo, each a finite number of at least -1; every alpha gives one model."""

    rounding: RoundingName = "stochastic"
    """Rounding of weights to 16 bits. `stochastic` keeps small alphas alive, `nearest` loses them, `reference` repeats
    the paper's script bit for bit. fp32 outputs are rounded to nearest."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of stochastic rounding."""

    dtype: OutputDtype = "keep"
    """Data type of the written weights; `keep` is dpo's, tensor by tensor."""

    vocab: VocabPolicy = "refuse"
    """Matching of the rows of embeddings: `refuse` by position, if both parents have the same number of rows; `by-token`
    through both tokenizers, whatever the numbers; `keep-dpo` by position, with dpo's rows kept past sft's last."""

    adapter: AdapterPolicy = "scale"
    """When dpo is a LoRA adapter on sft: `scale` writes the adapter with its scale times (1 + alpha), `merge` writes a
    whole model."""

    multipliers: Mapping[Pattern, Multiplier] = Field(default_factory=dict)
    """Regular expressions on tensor names and what alpha is multiplied by there; the first that is found in the name
    counts. 0 freezes a tensor at dpo."""

    shard_size: ByteSize = 5_000_000_000
    """Largest file of a written model, such as 5GB."""

    allow_pickle: bool = False
    """Read `pytorch_model*.bin` where a parent has no safetensors (restricted unpickling, no code is run; checksums in
    the file are not compared)."""


class Pair(PairOptions):
    """An SFT model and the DPO/RLHF model trained from it."""

    sft: Annotated[str, Field(min_length=1)]
    """Folder of the SFT model: a path, `s3://bucket/prefix`, `gs://...`, `az://...` or `hf://org/name@revision`."""

    dpo: Annotated[str, Field(min_length=1)]
    """Folder of the DPO/RLHF model, or of a LoRA adapter trained on sft."""

    name: Annotated[str, Field(pattern=NAME)] = ""
    """Name of the pair in paths and reports; the last part of `dpo` unless given."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_dpo(cls, data: Any) -> Any:
        return named_after(data, "dpo")
