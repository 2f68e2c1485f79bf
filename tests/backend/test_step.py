"""What a stage is told of padding, without Megatron's schedule; that experts' loads leave it out: tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dppo.backend.step import _padding

PADDING = np.array([[False, False, False, True], [False, True, True, True]])


@pytest.mark.parametrize(
    ("is_first", "sequence_parallel", "rank", "expected"),
    [
        (True, True, 1, PADDING),  # Megatron's first chunk divides it itself
        (False, True, 0, PADDING[:, :2]),
        (False, True, 1, PADDING[:, 2:]),
        (False, False, 1, PADDING),
    ],
)
def test_a_later_stage_has_the_padding_of_its_own_tokens(
    is_first: bool, sequence_parallel: bool, rank: int, expected: np.ndarray
) -> None:
    """Of two tensor ranks, which have half of the positions each under sequence parallelism."""
    model: Any = SimpleNamespace(
        device=torch.device("cpu"),
        config=SimpleNamespace(sequence_parallel=sequence_parallel),
        rank=SimpleNamespace(parallel=SimpleNamespace(tensor=2), at=SimpleNamespace(tensor=rank)),
    )
    batch: Any = SimpleNamespace(padding=PADDING)
    chunk: Any = SimpleNamespace(pre_process=is_first)
    np.testing.assert_array_equal(_padding(batch, model, chunk).numpy(), expected)
