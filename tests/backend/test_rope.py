from __future__ import annotations

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_dppo.architecture import Llama3Rope
from megatron_dppo.backend.rope import llama3_inverse_frequencies
from tests.tiny_models import llama3_config


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (128, 500000.0, Llama3Rope(32.0, 1.0, 4.0, 8192)),  # Llama-3.2-3B
        (128, 500000.0, Llama3Rope(8.0, 1.0, 4.0, 8192)),  # Llama-3.1-8B
        (16, 10000.0, Llama3Rope(4.0, 0.5, 3.0, 32)),
    ],
)
def test_frequencies_are_those_of_transformers(head_dim: int, theta: float, scaling: Llama3Rope) -> None:
    rope = {"rope_type": "llama3", "rope_theta": theta, **vars(scaling)}
    config = llama3_config(head_dim=head_dim, rope_parameters=rope)
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](config)
    assert factor == 1.0
    got = llama3_inverse_frequencies(head_dim, theta, scaling)
    torch.testing.assert_close(got, expected, rtol=2e-7, atol=0)  # one unit in the last place of fp32
    plain = 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    # all three regimes: kept, divided by the factor, in between
    ratio = plain / got
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(scaling.factor)
    assert ((ratio > 1.01) & (ratio < 0.99 * scaling.factor)).any()
