"""Which implementation works on a shard's logits: Triton on a GPU, else plain torch."""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType

from megatron_dppo.head import reference


@functools.cache
def shard_operations(device_type: str) -> ModuleType:
    """A module with `row_statistics_` and `row_gradient_`: `kernels` for "cuda" where Triton is installed, else
    `reference`; on a GPU without Triton that is said once."""
    if device_type != "cuda":
        return reference
    if importlib.util.find_spec("triton") is None:
        logging.getLogger(__name__).warning("policy head: Triton is not installed, plain torch is used on the GPU")
        return reference
    from megatron_dppo.head import kernels

    return kernels
