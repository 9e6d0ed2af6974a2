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
from expo_ray.serving.weights import extrapolated
from expo_ray.text import first_few

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from expo_ray.serving.ahead import MadeAhead
    from expo_ray.serving.weight_check import Comparison


log = logging.getLogger("expo_ray")


class PairWorker:
    """Methods that vLLM adds to each of its workers (`worker_extension_cls`), called through `collective_rpc`.

    Tensor-parallel workers compute the same tensors and take their slices of them through vLLM's own loader.
    """

    if TYPE_CHECKING:  # vLLM's worker has them
        model_config: ModelConfig
        reload_weights: Any
        get_model: Any

    expo_comparison: Comparison
    expo_ahead: MadeAhead

    def expo_describe(self) -> dict[str, Any]:
        """Describe the engine, as it has resolved its settings."""
        dtype = str(self.model_config.dtype).removeprefix("torch.")
        return {"max_model_len": int(self.model_config.max_model_len), "dtype": dtype}

    def expo_open(self, plan: bytes, holds_dpo: bool) -> None:
        """Download the parents of the pair that this engine serves, and find out what can be compared after a swap.

        Args:
            plan: a pickled `PairPlan`; its parents are downloaded to this node if they are not on it.
            holds_dpo: whether the engine holds the weights of alpha 0, loaded from dpo's folder.

        Raises:
            RuntimeError: if too little of what the engine holds can be compared with the plan.
            StorageError: if a parent cannot be fetched.
        """
        from expo_ray.on_ray.serving.engine_adapter import restore_plain_logs
        from expo_ray.on_ray.serving.engine_weights import VllmWeights, pack_experts_again
        from expo_ray.serving.ahead import MadeAhead
        from expo_ray.serving.node_cache import download_parents
        from expo_ray.serving.weight_check import Comparison

        restore_plain_logs()
        if next(self.get_model().parameters()).device.type == "cpu":
            keep_freed_memory()
        self.expo_plan = download_parents(pickle.loads(plan))
        self.expo_ahead = MadeAhead(self.expo_plan)
        dtype = self.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        self.expo_comparison = Comparison(self.expo_plan, VllmWeights(self.get_model(), dtype))
        pack_experts_again()
        if holds_dpo or self.expo_plan.dpo.adapter:  # an engine for an adapter starts with sft's folder
            self.expo_comparison.leave_out_rearranged(DPO if holds_dpo else SFT)
        self.expo_comparison.check_coverage()

    def expo_make_ahead(self, text: str) -> None:
        """Begin to make the weights of a step, given as its text, beside the engine's work; a swap to it takes what there is."""
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
        from expo_ray.on_ray.serving.engine_weights import abandon_reload, repack_heads

        step = parse_step(text)
        made = self.expo_ahead.take(step)
        if len(made):  # computed from these files, which the swap may not need to read again
            refuse_replaced_parents(self.expo_plan)
        try:
            self.reload_weights(
                weights_iterator=extrapolated(stepped(self.expo_plan, step), step.alpha, made)
            )
        except ArithmeticFault as fault:
            abandon_reload(self.get_model())
            return str(fault)
        repack_heads(self.get_model())
        self.expo_compare(step)
        return ""

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
