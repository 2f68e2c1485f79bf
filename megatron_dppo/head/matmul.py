"""The three matrix products of the LM head, with float32 accumulation and results on every device.

On a GPU the operands stay in bf16 and torch keeps the product in float32 (`out_dtype`), which has no CPU kernel;
elsewhere they are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def operands(hidden_TH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and weight as the products take them: as they are on a GPU, float32 copies of bf16 elsewhere."""
    if weight_VH.is_cuda:
        return hidden_TH.to(weight_VH.dtype), weight_VH
    return hidden_TH.float(), weight_VH.float()


def logits(hidden_TH: Tensor, weight_VH: Tensor, out: Tensor) -> Tensor:
    """hidden @ weight^T into `out` f32[T, V].

    A bf16 logit of size 16..32 has a step of 0.125: rounded there, a log-prob would be off by 0.06.
    """
    if weight_VH.dtype == torch.float32:
        return torch.mm(hidden_TH, weight_VH.t(), out=out)
    return torch.mm(hidden_TH, weight_VH.t(), out_dtype=torch.float32, out=out)


def hidden_gradient(gradient_TV: Tensor, weight_VH: Tensor, out: Tensor) -> Tensor:
    """gradient @ weight into `out` [T, H], of the hidden states' dtype."""
    if out.dtype == weight_VH.dtype:
        return torch.mm(gradient_TV, weight_VH, out=out)
    return out.copy_(gradient_TV @ weight_VH)


def add_weight_gradient(total_VH: Tensor, gradient_TV: Tensor, hidden_TH: Tensor) -> None:
    """total += gradient^T @ hidden, `total_VH` in f32."""
    if gradient_TV.dtype == torch.float32:
        total_VH.addmm_(gradient_TV.t(), hidden_TH)
    else:
        torch.addmm(total_VH, gradient_TV.t(), hidden_TH, out_dtype=torch.float32, out=total_VH)
