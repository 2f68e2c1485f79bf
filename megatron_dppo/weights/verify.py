"""Two checkpoints, of either kind, compared bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_dppo.weights.hub_files import row_blocks
from megatron_dppo.weights.megatron_files import Checkpoint


def differences(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """One line for each hub tensor that is not the same in both: missing, of another dtype or shape, or its first
    differing element. Memory: a block of either."""
    for name in a.tensors.keys() - b.tensors.keys():
        yield f"{name}: only in the first"
    for name in b.tensors.keys() - a.tensors.keys():
        yield f"{name}: only in the second"
    for name, first in a.tensors.items():
        if name not in b.tensors:
            continue
        second = b.tensors[name]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            yield f"{name}: {first.dtype} {first.shape} in the first, {second.dtype} {second.shape} in the second"
        elif line := _first_difference(name, a, b):
            yield line


def _first_difference(name: str, a: Checkpoint, b: Checkpoint) -> str | None:
    tensor = a.tensors[name]
    for row, rows in row_blocks(tensor):
        buffers = (torch.empty(rows * tensor.row_bytes, dtype=torch.uint8) for _ in range(2))
        left, right = (c.read_rows(name, row, rows, buffer) for c, buffer in zip((a, b), buffers, strict=True))
        unequal = left.flatten().view(torch.uint8) != right.flatten().view(torch.uint8)
        if unequal.any():
            element = int(unequal.int().argmax()) // tensor.dtype.itemsize
            index = torch.unravel_index(torch.tensor(element), left.shape)
            place = [int(i) for i in index]
            place[0] += row
            values = left.flatten()[element].item(), right.flatten()[element].item()
            return f"{name}: first differs at {place}: {values[0]!r} and {values[1]!r}"
    return None
