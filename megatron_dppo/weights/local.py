"""Between a rank's parameters and Hugging Face files: reads and writes of the pieces of its layout."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_dppo.weights.hub_files import (
    HubFiles,
    StoredTensor,
    TensorInfo,
    block_buffer,
    read_values,
    row_blocks,
    write_exactly,
)
from megatron_dppo.weights.layout import Piece


@torch.no_grad()
def load_pieces(parameters: Mapping[str, Tensor], pieces: Iterable[Piece], files: HubFiles) -> None:
    """Fills local parameters from Hugging Face files, block by block: only the rows that this rank holds are read.

    float8 tensors are dequantised. The files must hold the model's tensors (`hub_files.check_tensors`); raises
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
def write_pieces(
    parameters: Mapping[str, Tensor], pieces: Iterable[Piece], tensors: Mapping[str, StoredTensor]
) -> None:
    """Writes this rank's boxes to where `tensors` are stored, in their dtypes; the file must be there, in full size.

    Only pieces of replica 0 are written: over all ranks, each element is written once. Bytes are written, not mapped
    pages: ranks on several machines share pages of a file, and one would write its old copy of the other's part.
    Collectives: none; whoever reads what others wrote needs a barrier before.
    """
    descriptors = {file: os.open(file, os.O_WRONLY) for file in {stored.file for stored in tensors.values()}}
    try:
        for piece in pieces:
            if piece.replica == 0:
                stored = tensors[piece.tensor]
                values = parameters[piece.param][piece.local_index]
                _write_box(descriptors[stored.file], stored, piece, values)
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _write_box(descriptor: int, stored: StoredTensor, piece: Piece, values: Tensor) -> None:
    start = stored.offset + piece.start[0] * stored.row_bytes
    for row, rows in row_blocks(TensorInfo(stored.dtype, tuple(values.shape))):
        block = values[row : row + rows].to("cpu", stored.dtype).contiguous()
        if values.shape[1:] == stored.shape[1:]:
            write_exactly(descriptor, start + row * stored.row_bytes, block)
            continue
        assert values.dim() == 2, "only matrices are cut by columns"
        column_bytes = piece.start[1] * stored.dtype.itemsize
        for number, line in enumerate(block, row):
            write_exactly(descriptor, start + number * stored.row_bytes + column_bytes, line)
