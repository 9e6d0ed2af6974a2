"""Swap the weights of a running engine for those of another step."""

from __future__ import annotations

import logging
import pickle
from typing import TYPE_CHECKING, Any

import torch

from expo_ray.errors import ArithmeticFault
from expo_ray.extrapolation.pinned import refuse_replaced_parents
from expo_ray.extrapolation.step import DPO, SFT, Step, parse_step, stepped
from expo_ray.serving.host_memory import keep_freed_memory
from expo_ray.serving.slices import Slices, Work
from expo_ray.serving.weights import extrapolated
from expo_ray.text import first_few

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from expo_ray.extrapolation.plan import PairPlan
    from expo_ray.serving.ahead import MadeAhead
    from expo_ray.serving.index_map import IndexMap
    from expo_ray.serving.weight_check import Comparison
    from expo_ray.serving.weights import Bytes

log = logging.getLogger("expo_ray")


class PairWorker:
    """Methods that vLLM adds to each of its workers (`worker_extension_cls`), called through `collective_rpc`.

    Each worker computes the slices that it holds. Where the index map does not cover an engine, all workers compute whole tensors
    and take their slices through vLLM's own loader.
    """

    if TYPE_CHECKING:  # vLLM's worker has them
        model_config: ModelConfig
        parallel_config: Any
        vllm_config: Any
        reload_weights: Any
        get_model: Any

    expo_plan: PairPlan
    expo_comparison: Comparison
    expo_ahead: MadeAhead
    expo_slices: Slices | None = None
    expo_way: str
    expo_parents: str

    def expo_prepare(self) -> dict[str, Any]:
        """Mend vLLM where this engine needs it, and describe the engine as it has resolved its settings."""
        from expo_ray.on_ray.serving.seeded_sampling import keep_generators_on_cpus

        if self._expo_device.type == "cpu":
            keep_generators_on_cpus()
        dtype = str(self.model_config.dtype).removeprefix("torch.")
        return {"max_model_len": int(self.model_config.max_model_len), "dtype": dtype}

    def expo_open(self, plan: bytes, holds_dpo: bool, whole_gpu: bool = False) -> dict[str, str]:
        """Download the parents of the pair that this engine serves, and find out how to swap and what to compare afterwards.

        Args:
            plan: a pickled `PairPlan`; its parents are downloaded to this node if they are not on it.
            holds_dpo: whether the engine holds the weights of alpha 0, loaded from dpo's folder.
            whole_gpu: whether this engine has its GPUs for itself.

        Returns:
            For the model card; see `expo_describe_swap`.

        Raises:
            RuntimeError: if the engine holds other weights than a checkpoint's, or too little of them can be compared with the plan.
            StorageError: if a parent cannot be fetched.
        """
        if self.model_config.quantization:
            raise RuntimeError(
                f"the engine quantises ({self.model_config.quantization}) and so holds other weights than those published, which a swap "
                "could not be compared with; publish the model with `expo-ray extrapolate` and serve its folder under `models`"
            )
        from expo_ray.on_ray.serving.engine_adapter import restore_plain_logs
        from expo_ray.on_ray.serving.engine_weights import VllmWeights, pack_experts_again
        from expo_ray.on_ray.serving.load_slices import map_of
        from expo_ray.serving.ahead import MadeAhead
        from expo_ray.serving.node_cache import download_parents
        from expo_ray.serving.weight_check import Comparison

        restore_plain_logs()
        if self._expo_device.type == "cpu":
            keep_freed_memory()
        self.expo_plan = download_parents(pickle.loads(plan))
        self.expo_ahead = MadeAhead(self.expo_plan)
        model = self.get_model()
        index_map = map_of(self.expo_plan, model)
        self.expo_comparison = Comparison(self.expo_plan, VllmWeights(model, self._expo_dtype, index_map))
        pack_experts_again()
        if holds_dpo or self.expo_plan.dpo.adapter:  # an engine for an adapter starts with sft's folder
            self.expo_comparison.leave_out_rearranged(DPO if holds_dpo else SFT)
        self.expo_comparison.check_coverage()
        self._expo_choose_swap(index_map, whole_gpu=whole_gpu)
        return self.expo_describe_swap()

    def expo_describe_swap(self) -> dict[str, str]:
        """Describe, for the model card, how this worker loads other weights (`swap`), and where it keeps both parents (`parents`)."""
        return {"swap": self.expo_way, "parents": self.expo_parents}

    def _expo_choose_swap(self, index_map: IndexMap, *, whole_gpu: bool) -> None:
        """Choose slices, or whole tensors where the index map does not cover the engine, and where to keep the parents."""
        from expo_ray.on_ray.serving.load_slices import obstacle_to_slices, threads_of
        from expo_ray.serving.parent_tiers import FILES, hold_parents

        obstacle = obstacle_to_slices(self.expo_plan, index_map, self.get_model())
        if obstacle:
            self.expo_way, self.expo_parents = f"whole tensors: {obstacle}", FILES
            return
        workers = self.parallel_config.world_size
        self.expo_way = "slices"
        self.expo_slices = Slices(self.expo_plan, index_map, threads_of(workers))
        self.expo_parents = hold_parents(self.expo_slices, workers, self._expo_device, whole_gpu=whole_gpu)

    @property
    def _expo_device(self) -> torch.device:
        device: torch.device = next(self.get_model().parameters()).device
        return device

    @property
    def _expo_dtype(self) -> torch.dtype:
        assert isinstance(self.model_config.dtype, torch.dtype)
        return self.model_config.dtype

    def expo_make_ahead(self, text: str) -> None:
        """Begin to make the weights of a step, given as its text, beside the engine's work; a swap to it takes what there is.

        Not where the parents are in memory, as it would save less than such a process beside the engine costs.
        """
        if self.expo_slices is not None and self.expo_slices.in_memory:
            return
        try:
            self.expo_ahead.begin(parse_step(text))
        except (
            OSError
        ) as error:  # no process or memory to be had: the swap makes the weights, as it does without this
            log.warning("the weights of alpha %s are not made ahead: %s", text, error)

    def expo_swap(self, text: str) -> str:
        """Load the weights of a step, given as its text, and compare what the engine then holds with the plan's arithmetic.

        Returns:
            Empty if they are loaded. Else the reason why the weights of this step cannot be computed; the engine then holds a
            mixture, and the next swap makes it whole. Not raised, as errors that cross processes lose their class.

        Raises:
            RuntimeError: if the engine holds others than computed.
            ExpoError: if the parents cannot be read, or were replaced; what the engine holds then is unknown.
        """
        from expo_ray.on_ray.serving.engine_weights import repack_heads

        step = parse_step(text)
        self._expo_release_parents()
        made = self.expo_ahead.take(step)
        if len(made):  # computed from these files, which the swap may not need to read again
            refuse_replaced_parents(self.expo_plan)
        try:
            self._expo_load(step, made)
        except ArithmeticFault as fault:
            return str(fault)
        repack_heads(self.get_model())
        self.expo_compare(step)
        return ""

    def _expo_load(self, step: Step, made: Bytes) -> None:
        from vllm.config import set_current_vllm_config

        from expo_ray.on_ray.serving.engine_weights import abandon_reload
        from expo_ray.on_ray.serving.load_slices import load_step

        if self.expo_slices is not None:
            with set_current_vllm_config(self.vllm_config):
                load_step(self.get_model(), self.expo_slices.at(step, made), self._expo_dtype)
            return
        try:
            self.reload_weights(
                weights_iterator=extrapolated(stepped(self.expo_plan, step), step.alpha, made)
            )
        except ArithmeticFault:
            abandon_reload(self.get_model())
            raise

    def _expo_release_parents(self) -> None:
        from expo_ray.serving.parent_tiers import FILES, release_if_short

        if self.expo_slices is not None and release_if_short(self.expo_slices):
            self.expo_parents = f"{FILES}: memory became short"

    def expo_work(self) -> tuple[int, int]:
        """Return the bytes of both parents that this worker has computed with by slices so far, and the elements that it has computed."""
        work = Work() if self.expo_slices is None else self.expo_slices.work
        return work.bytes_read, work.elements

    def expo_compare(self, step: Step) -> None:
        """Compare sampled weights with those of `step`.

        Raises:
            RuntimeError: if they are not.
        """
        wrong = self.expo_comparison.find_differing(step)
        if wrong:
            raise RuntimeError(
                f"the engine does not hold the weights of alpha {step}: {first_few(wrong)} differ"
            )
