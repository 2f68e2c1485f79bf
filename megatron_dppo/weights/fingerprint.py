"""A checksum of a hub tensor that adds up from its boxes, so that no side needs the whole tensor.

fingerprint = sum over elements i (row-major, over the whole tensor) of (2 i + 1) * bits_i, modulo 2^64
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dppo.weights.hub_files import TensorInfo
from megatron_dppo.weights.layout import Piece

MODULUS = 1 << 64
BLOCK_ELEMENTS = 1 << 22  # that are widened to int64 at a time
_BITS = {2: torch.int16, 4: torch.int32}


def box_fingerprint(values: Tensor, start: tuple[int, ...], columns: int) -> int:
    """Of a box [rows, ...] that begins at `start` in a tensor with `columns` elements a row (1 if it has one axis)."""
    if not values.numel():  # of a rank whose share is padding
        return 0
    matrix = values.detach().reshape(len(values), -1).contiguous().view(_BITS[values.dtype.itemsize])
    rows = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    column = torch.arange(matrix.shape[1], device=matrix.device) + (start[1] if len(start) > 1 else 0)
    total = 0
    for first in range(0, len(matrix), rows):
        block = matrix[first : first + rows].long()
        row = torch.arange(len(block), device=matrix.device) + start[0] + first
        total += int(((2 * (row[:, None] * columns + column) + 1) * block).sum())
    return total % MODULUS


def fingerprints(
    parameters: Mapping[str, Tensor], pieces: Iterable[Piece], tensors: Mapping[str, TensorInfo]
) -> dict[str, int]:
    """Of all `tensors` of a model, which ranks hold together, in the dtypes they are sent in. One object all-gather."""
    mine: dict[str, int] = {}
    for piece in pieces:
        if piece.replica == 0:
            info = tensors[piece.tensor]
            values = parameters[piece.param][piece.local_index].to(info.dtype)
            columns = info.shape[1] if len(info.shape) > 1 else 1
            mine[piece.tensor] = mine.get(piece.tensor, 0) + box_fingerprint(values, piece.start, columns)
    of_ranks: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    return {name: sum(found.get(name, 0) for found in of_ranks) % MODULUS for name in tensors}
