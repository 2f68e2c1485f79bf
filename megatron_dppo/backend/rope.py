"""Rotary frequencies that Megatron-core cannot be told by its configuration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_dppo.architecture import Llama3Rope


def llama3_inverse_frequencies(head_dim: int, theta: float, scaling: Llama3Rope) -> Tensor:
    """Inverse frequencies [head_dim / 2] in fp32, as transformers computes them.

    Megatron's own rope scaling fixes the two frequency factors and the original length. Wavelengths above
    original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor are kept, and
    between the two the share that is kept grows linearly with the number of turns in the original length.
    """
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / (2 * math.pi / plain)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain
