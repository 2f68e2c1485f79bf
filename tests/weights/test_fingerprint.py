"""The checksum that adds up from boxes: against its formula in whole numbers, and blind to nothing it should see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dppo.weights import fingerprint
from megatron_dppo.weights.fingerprint import MODULUS, box_fingerprint


def formula(tensor: torch.Tensor) -> int:
    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]).reshape(-1).tolist()
    return sum((2 * i + 1) * b for i, b in enumerate(bits)) % MODULUS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_boxes_add_up(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "BLOCK_ELEMENTS", block)
    tensor = torch.randn(13, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, columns = (0, 4, 5, 13), (0, 2, 9)
    parts = [
        box_fingerprint(tensor[a:b, c:d], (a, c), 9)
        for a, b in zip(rows, rows[1:], strict=False)
        for c, d in zip(columns, columns[1:], strict=False)
    ]
    assert sum(parts) % MODULUS == box_fingerprint(tensor, (0, 0), 9) == formula(tensor)
    vector = tensor[:, 0].contiguous()
    halves = box_fingerprint(vector[:5], (0,), 1) + box_fingerprint(vector[5:, None], (5, 0), 1)
    assert halves % MODULUS == formula(vector)


def test_a_bit_and_a_place_make_a_difference() -> None:
    tensor = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    known = {box_fingerprint(tensor, (0, 0), 8)}
    for bit in range(32):
        for place in (0, 17, 63):
            damaged = tensor.numpy().copy().view(np.int32).reshape(-1)
            damaged[place] ^= np.array(1 << bit, np.uint32).view(np.int32)
            known.add(box_fingerprint(torch.from_numpy(damaged).view(torch.float32).view(8, 8), (0, 0), 8))
    known.add(box_fingerprint(tensor.T.contiguous(), (0, 0), 8))
    known.add(box_fingerprint(tensor.roll(1, 0), (0, 0), 8))
    assert len(known) == 1 + 32 * 3 + 2
