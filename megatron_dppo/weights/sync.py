"""New weights for the engines, in memory: every rank writes its boxes into one shared image under hub names.

The image is a file in shared memory that trainer and engine map. No rank gathers, no tensor is sent: a box that a
rank owns is copied straight to its place. Trainer and engines must share a machine.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_dppo.rollout.engine import Manifest
from megatron_dppo.weights.checkpoint import carry_description
from megatron_dppo.weights.hub_files import typed
from megatron_dppo.weights.image import crc32
from megatron_dppo.weights.layout import Piece
from megatron_dppo.weights.local import export_pieces

ALIGNMENT = 64  # bytes; any dtype's view is aligned and no two tensors share a cache line


@dataclass(frozen=True)
class ImageLayout:
    """Where each tensor lies in the image: (name, dtype, shape, offset in bytes), in order, and the whole size."""

    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]
    nbytes: int


def image_layout(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, float32: Collection[str] = ()
) -> ImageLayout:
    """Lays the tensors of a checkpoint one after the other, each at a multiple of 64 bytes; `float32` ones stay so."""
    tensors, offset = [], 0
    for name, shape in shapes.items():
        kind = torch.float32 if name in float32 else dtype
        tensors.append((name, str(kind).removeprefix("torch."), shape, offset))
        offset += -(-math.prod(shape) * kind.itemsize // ALIGNMENT) * ALIGNMENT
    return ImageLayout(tuple(tensors), offset)


class SharedImage:
    """All tensors of a checkpoint in one shared file; `tensors[name]` is a view that every process sees."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        float32: Collection[str] = (),
    ) -> None:
        """Maps `path`, making it where it is not there yet; the tensors in `float32` have that dtype.

        Raises OSError where shared memory is full.
        """
        self.path = path
        self.layout = image_layout(shapes, dtype, float32)
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, max(self.layout.nbytes, 1))
        self._bytes = torch.from_file(str(path), shared=True, size=self.layout.nbytes, dtype=torch.uint8)
        self.tensors: dict[str, Tensor] = {}
        for name, dtype_name, shape, offset in self.layout.tensors:
            self.tensors[name] = typed(self._bytes[offset:], getattr(torch, dtype_name), shape)

    def write(self, parameters: Mapping[str, Tensor], pieces: Iterable[Piece]) -> None:
        """Every rank calls this: copies the boxes it owns. The image is whole when it returns. One barrier."""
        export_pieces(parameters, pieces, self.tensors)
        dist.barrier()

    def manifest(self, version: int) -> Manifest:
        """What an engine needs to take version `version` from the image, with a checksum for each tensor.

        Every rank calls this; each checks its share of the tensors. One object all-gather of integers.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        mine = [crc32(tensor) for tensor in list(self.tensors.values())[rank::world]]
        shares: list[list[int]] = [[] for _ in range(world)]
        dist.all_gather_object(shares, mine)
        of_all = tuple(shares[i % world][i // world] for i in range(len(self.tensors)))
        return Manifest(version, str(self.path), self.layout.tensors, self.layout.nbytes, of_all)


def save_checkpoint(tensors: Mapping[str, Tensor], source: Path, destination: Path) -> None:
    """Writes a Hugging Face directory: `tensors`, and everything but weights from `source` (config, tokenizer).

    Written beside and renamed; an older `destination` is replaced.
    """
    beside = destination.with_name(destination.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    carry_description(source, beside, next(iter(tensors.values())).dtype)
    save_file(dict(tensors), beside / "model.safetensors", metadata={"format": "pt"})
    if destination.exists():
        shutil.rmtree(destination)
    os.replace(beside, destination)
