"""Cures for faults of vLLM's CPU build (0.30 to 0.33); nothing here does anything on a GPU. Runs inside the workers."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from vllm.platforms import current_platform


def before_reload(model: nn.Module) -> None:
    """Make the reload repack MoE weights.

    It skips the prepack when a kernel exists already, and would leave the experts in checkpoint layout: wrong results
    without an error, or a dead engine. Dropping the kernel makes the reload build it anew.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if type(method).__name__ == "UnquantizedFusedMoEMethod" and hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def after_reload(model: nn.Module) -> None:
    """Repack a tied head: only the embedding is loaded, and the head would keep the packed form of the old one."""
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            method: Any = module.quant_method
            method.process_weights_after_loading(module)


def mend_expert_parallel() -> None:
    """Experts of other ranks: the CPU kernel ignores the expert map and reads beyond its own. Give them weight 0."""
    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply
    if hasattr(original, "__wrapped__"):  # the module may be imported again in the same worker
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def apply(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("expert_map") is not None:
            ids = given["topk_ids"]
            local = given["expert_map"][ids.long()]
            given["topk_weights"] = torch.where(local >= 0, given["topk_weights"], 0.0)
            given["topk_ids"] = local.clamp(min=0).to(ids.dtype)
        return original(**given)

    CPUUnquantizedExperts.apply = apply
