"""The reading side of weights in a file of shared memory: is the update complete, is the file whole, its tensors."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_dppo.rollout.engine import Manifest
from megatron_dppo.weights.hub_files import TensorInfo, typed

MAX_NAMES_SHOWN = 5


def check_complete(got: dict[str, tuple[int, ...]], stored: dict[str, TensorInfo], *, needed: set[str]) -> None:
    """Raise ValueError unless an update holds every tensor that is needed, and none but the checkpoint's.

    A checkpoint may hold tensors that no worker reads (a tied head written out, layers of multi-token prediction), and
    lack a head that is tied: hub checkpoints differ in that.
    """
    missing = sorted(needed - got.keys())
    unknown = sorted(got.keys() - stored.keys() - {"lm_head.weight"})
    wrong = [
        f"{name} {got[name]} instead of {stored[name].shape}"
        for name in sorted(got.keys() & stored.keys())
        if got[name] != stored[name].shape
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


def map_tensors(manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the manifest's file, one a tensor; raises ValueError if the file is absent or too short."""
    size = os.path.getsize(manifest.path) if os.path.isfile(manifest.path) else None
    if size is None or size < manifest.nbytes:
        raise ValueError(f"weight update: got {manifest.path} of {size} bytes, expected {manifest.nbytes}")
    buffer = torch.from_file(manifest.path, shared=False, size=manifest.nbytes, dtype=torch.uint8)
    for name, dtype_name, shape, offset in manifest.tensors:
        dtype = getattr(torch, dtype_name)  # one of those that a manifest admits
        nbytes = math.prod(shape) * dtype.itemsize
        if offset % dtype.itemsize or offset + nbytes > manifest.nbytes:
            raise ValueError(f"weight update: {name} at {offset}+{nbytes} does not fit into {manifest.nbytes} bytes")
        yield name, typed(buffer[offset:], dtype, shape)


def checksums(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """crc32 of each tensor's bytes; zlib releases the GIL, so large updates use all the worker's threads."""
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(crc32, tensors.values()), strict=True))


def crc32(tensor: torch.Tensor) -> int:
    """Of its bytes, on both sides of an update."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def shown(names: list[str]) -> str:
    """The first few of `names` and how many more there are, for error messages."""
    rest = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + rest
