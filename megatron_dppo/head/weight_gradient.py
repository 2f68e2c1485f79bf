"""Where the gradient of the LM head goes: Megatron's float32 `main_grad`, or a buffer of its own.

Megatron's data parallelism keeps gradients in `parameter.main_grad`. Its hook, which runs when autograd hands it a
gradient, adds that to `main_grad` unless `grad_added_to_main_grad` is set, and under overlapped reduction wants some
gradient to be there. So a product added to `main_grad` directly, in float32, is followed by a dummy. A weight tied to
the embedding on the same stage (`zero_out_wgrad`) gets the embedding's own gradient added to the dummy, which then
has to be zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(weight: Tensor) -> Tensor:
    """f32, of the weight's shape: its `main_grad`, or zeros where there is none in float32."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None and main_grad.dtype == torch.float32:
        return main_grad
    return torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)


def hand_over(weight: Tensor, accumulated: Tensor) -> Tensor:
    """What backward returns for `weight` once its gradient is in `accumulated`."""
    if accumulated is not getattr(weight, "main_grad", None):
        return accumulated.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)
