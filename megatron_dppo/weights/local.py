"""Between a rank's parameters and Hugging Face files or a shared image: copies of the pieces of its layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_dppo.weights.checkpoint import block_buffer, read_values, row_blocks
from megatron_dppo.weights.hub_files import HubFiles, TensorInfo
from megatron_dppo.weights.layout import Piece


@torch.no_grad()
def load_pieces(parameters: Mapping[str, Tensor], pieces: Iterable[Piece], files: HubFiles) -> None:
    """Fills local parameters from Hugging Face files, block by block: only the rows that this rank holds are read.

    float8 tensors are dequantised. The files must hold the model's tensors (`checkpoint.check_tensors`); raises
    ValueError when a parameter is left unfilled or a file ends too early.
    """
    unfilled = set(parameters)
    buffer = block_buffer(files.tensors)

    def place(piece: Piece) -> tuple[Path, int]:
        stored = files.tensors[piece.tensor]
        return stored.file, stored.offset + piece.start[0] * stored.row_bytes

    for piece in sorted(pieces, key=place):  # in the order of the disk
        stored = files.tensors[piece.tensor]
        target = parameters[piece.param][piece.local_index]
        part = TensorInfo(stored.dtype, (len(target), *stored.shape[1:]))
        for row, rows in row_blocks(part):
            values = read_values(files, piece.tensor, piece.start[0] + row, rows, buffer)
            target[row : row + rows].copy_(values[(slice(None), *piece.hub_index[1:])])
        unfilled.discard(piece.param)
    if unfilled:
        raise ValueError(f"checkpoint: parameters without weights: {', '.join(sorted(unfilled))}")


@torch.no_grad()
def export_pieces(parameters: Mapping[str, Tensor], pieces: Iterable[Piece], image: Mapping[str, Tensor]) -> None:
    """Copies this rank's boxes into `image` (hub name -> whole tensor, typically in shared memory).

    Only pieces of replica 0 are written: over all ranks, each element is written once.
    """
    for piece in pieces:
        if piece.replica == 0:
            image[piece.tensor][piece.hub_index].copy_(parameters[piece.param][piece.local_index])
