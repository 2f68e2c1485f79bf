"""A model's tensors in one safetensors file, in shared memory or on a disk: all ranks write it, engines read it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dppo.architecture import Architecture
from megatron_dppo.files import replacing
from megatron_dppo.weights.hub_files import TensorInfo, header_bytes, read_header, typed
from megatron_dppo.weights.layout import Piece
from megatron_dppo.weights.local import write_pieces
from megatron_dppo.weights.mapping import hub_dtypes, hub_shapes
from megatron_dppo.weights.update import FileUpdate

MAX_NAMES_SHOWN = 5


def image_tensors(arch: Architecture, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Every tensor of a model in `dtype`; wide ones first, so that in a file without gaps each is aligned."""
    shapes = hub_shapes(arch)
    dtypes = hub_dtypes(arch, str(dtype).removeprefix("torch."))
    found = {name: TensorInfo(getattr(torch, dtypes[name]), shape) for name, shape in shapes.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].dtype.itemsize))


def create_image(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """A file for the tensors, in the place of an older one. Raises OSError naming it where there is no room."""
    header = header_bytes(tensors)
    size = len(header) + sum(info.nbytes for info in tensors.values())
    with replacing(path) as beside, beside.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:  # which does not know its file
            raise OSError(error.errno, f"{error.strerror} for weights of {size} bytes", str(path)) from None
        file.write(header)


def write_image(path: Path, parameters: Mapping[str, Tensor], pieces: Iterable[Piece]) -> None:
    """Every rank calls this: writes the boxes it owns into a file of `create_image`. One barrier, at the end."""
    write_pieces(parameters, pieces, read_header(path))
    dist.barrier()


def file_update_of(path: Path, version: int) -> FileUpdate:
    """What an engine needs to take `version` from an image, with a checksum of each tensor, read back from the file.

    Every rank calls this; each checks its share of the tensors. One object all-gather of integers.
    """
    tensors = read_header(path)
    entries = tuple(
        (name, str(stored.dtype).removeprefix("torch."), stored.shape, stored.offset)
        for name, stored in tensors.items()
    )
    update = FileUpdate(version, str(path.absolute()), entries, path.stat().st_size)
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = checksums(dict(list(map_tensors(update))[rank::world]))
    shares: list[dict[str, int]] = [{} for _ in range(world)]
    dist.all_gather_object(shares, mine)
    crc32 = {name: crc for share in shares for name, crc in share.items()}
    return FileUpdate(version, update.path, entries, update.nbytes, tuple(crc32[name] for name in tensors))


def checked_tensors(
    update: FileUpdate, stored: Mapping[str, tuple[int, ...]], *, needed: set[str]
) -> dict[str, Tensor]:
    """An update's tensors, as `map_tensors`, once they are known to be complete (`stored`: the checkpoint's shapes) and
    undamaged. Raises ValueError."""
    _check_complete({name: tuple(shape) for name, _, shape, _ in update.tensors}, stored, needed)
    tensors = dict(map_tensors(update))
    if update.crc32 is not None:
        crc32, names = checksums(tensors), [name for name, *_ in update.tensors]
        if bad := [name for name, crc in zip(names, update.crc32, strict=True) if crc32[name] != crc]:
            raise ValueError(f"weight update: crc32 differs from the update's for {shown(bad)}")
    return tensors


def _check_complete(
    got: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], needed: set[str]
) -> None:
    """Raise ValueError unless an update holds every tensor that is needed, and none but the checkpoint's.

    A checkpoint may hold tensors that no worker reads (a tied head written out, layers of multi-token prediction), and
    lack a head that is tied: hub checkpoints differ in that.
    """
    missing = sorted(needed - got.keys())
    unknown = sorted(got.keys() - stored.keys() - {"lm_head.weight"})
    wrong = [
        f"{name} {got[name]} instead of {stored[name]}"
        for name in sorted(got.keys() & stored.keys())
        if got[name] != stored[name]
    ]
    faults = [
        f"{what} {shown(names)}"
        for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
        if names
    ]
    if faults:
        raise ValueError(
            f"weight update: got {len(got)} tensors, expected the checkpoint's {len(stored)}: " + "; ".join(faults)
        )


def map_tensors(update: FileUpdate) -> Iterator[tuple[str, Tensor]]:
    """Views of the update's file, one a tensor; raises ValueError if the file is absent or too short."""
    size = os.path.getsize(update.path) if os.path.isfile(update.path) else None
    if size is None or size < update.nbytes:
        raise ValueError(f"weight update: got {update.path} of {size} bytes, expected {update.nbytes}")
    buffer = torch.from_file(update.path, shared=False, size=update.nbytes, dtype=torch.uint8)
    for name, dtype_name, shape, offset in update.tensors:
        dtype = getattr(torch, dtype_name)  # one of those that an update admits
        if offset % dtype.itemsize:
            raise ValueError(f"weight update: {name} is at {offset}, expected a multiple of {dtype.itemsize}")
        yield name, typed(buffer[offset:], dtype, shape)


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """crc32 of each tensor's bytes; zlib releases the GIL, so large updates use all the process's threads."""
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(_crc32, tensors.values()), strict=True))


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def shown(names: list[str]) -> str:
    """The first few of `names` and how many more there are, for error messages."""
    rest = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + rest
