"""Runs inside vLLM's worker processes: weights come in through shared memory, facts about the engine go out.

With `vllm_reload` and `vllm_cpu`, which it uses, the only module of the project that imports vLLM. The server loads it
as `worker_extension_cls` (`vllm_server.server_command`): importing it registers the weight-transfer backend, and
`WorkerExtension` is mixed into vLLM's worker, so that its methods can be called through the server's `/collective_rpc`.

An update has two phases. *Staging* (`/update_weights`) checks that the file is there, that it holds every
tensor of the checkpoint with the right shape, and its checksums: the model is not touched, so a refused or
abandoned update leaves a working engine. *Applying* (`/finish_weight_update`) copies the boxes that this worker keeps
into the model, layer by layer; should it fail half-way, the weights are marked unusable (version -1) until a full
update succeeds.
"""

from __future__ import annotations

import logging
import math
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_dppo.rollout import vllm_cpu
from megatron_dppo.rollout.vllm_reload import Reload
from megatron_dppo.rollout.vllm_server import TRANSFER_BACKEND
from megatron_dppo.weights.hub_files import HubFiles, TensorInfo

BACKEND = TRANSFER_BACKEND
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNUSABLE = -1  # the version of weights that a failed update left half-written
MAX_NAMES_SHOWN = 5


@dataclass
class ShmInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update names its file."""


@dataclass
class ShmUpdate(WeightTransferUpdateInfo):
    """One complete set of weights in one file; the fields of `engine.Manifest`, as JSON carries them."""

    version: int
    path: str
    tensors: list[list[Any]]  # [name, dtype, shape, offset in bytes]
    nbytes: int
    crc32: list[int] | None = None


@dataclass
class Staged:
    """A checked update that waits to be applied."""

    version: int
    tensors: dict[str, torch.Tensor]  # views of the mapped file
    crc32: dict[str, int]


class SharedMemoryEngine(WeightTransferEngine[ShmInit, ShmUpdate]):
    """vLLM weight-transfer backend `BACKEND`: all tensors of a Hugging Face checkpoint in one mapped file."""

    init_info_cls, update_info_cls = ShmInit, ShmUpdate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.version = 0  # the weights that the engine was started with
        self.crc32: dict[str, int] = {}  # of the tensors of the last applied update
        self.staged: Staged | None = None

    @cached_property
    def reload(self) -> Reload:
        """Where this worker's weights come from and go; found when first asked for (0.2 ms a tensor)."""
        reload = Reload(self.model, self.model_config, checkpoint_tensors(Path(self.model_config.model)))
        for name, why in reload.whole.items():
            logging.getLogger(__name__).warning("%s: this worker takes all of it at every update: %s", name, why)
        return reload

    def init_transfer_engine(self, init_info: ShmInit) -> None:
        pass

    def start_weight_update(self) -> None:
        # Deliberately does not touch the model: see the two phases in the module's docstring.
        self.staged = None

    def receive_weights(self, update_info: ShmUpdate) -> None:
        """Stage an update. Raises ValueError, with the model untouched, if it is incomplete or damaged."""
        if self.staged is not None:
            raise ValueError(f"weight update: got a second payload for version {self.staged.version}, expected one")
        check_complete(
            {name: tuple(shape) for name, _, shape, _ in update_info.tensors},
            checkpoint_tensors(Path(self.model_config.model)),
            needed={name for name, _, _ in self.reload.boxes},
        )
        tensors = dict(map_tensors(update_info))
        crc32 = checksums(tensors)
        if update_info.crc32 is not None:
            names = [name for name, *_ in update_info.tensors]
            bad = [name for name, crc in zip(names, update_info.crc32, strict=True) if crc32[name] != crc]
            if bad:
                raise ValueError(f"weight update: crc32 differs from the manifest's for {shown(bad)}")
        self.staged = Staged(update_info.version, tensors, crc32)

    def finish_weight_update(self) -> None:
        """Apply the staged update. Raises RuntimeError if none is staged."""
        if self.staged is None:
            raise RuntimeError("weight update: nothing is staged, send /update_weights first")
        staged, self.staged = self.staged, None
        self.version = UNUSABLE  # until the last layer is in place
        self.reload.begin()
        for name, start, stop in self.reload.boxes:
            box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            self.reload.place(name, start, stop, staged.tensors[name][box].contiguous())
        self.reload.finish()
        self.version, self.crc32 = staged.version, staged.crc32

    def shutdown(self) -> None:
        self.staged = None


vllm_cpu.mend_expert_parallel()
if BACKEND not in WeightTransferEngineFactory._registry:  # the module may be imported again in the same worker
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)


class WorkerExtension:
    """Methods added to vLLM's worker for `/collective_rpc`. They answer dicts, which HTTP leaves alone."""

    weight_transfer_engine: SharedMemoryEngine
    vllm_config: Any

    def mdppo_describe(self) -> dict[str, Any]:
        """Facts that the client needs: see `engine.Capabilities`."""
        config = self.vllm_config.model_config
        names = checkpoint_tensors(Path(config.model))
        moe_layers = {int(m[1]) for name in names if (m := re.search(r"layers\.(\d+)\..*experts\.\d", name))}
        return {
            "engine_version": vllm.__version__,
            "vocab_size": config.get_vocab_size(),
            "max_model_len": config.max_model_len,
            "max_logprobs": config.max_logprobs,
            "logprobs_mode": str(config.logprobs_mode),
            "routed_experts": bool(getattr(config, "enable_return_routed_experts", False)),
            "moe_layers": sorted(moe_layers),
            "dtype": str(config.dtype).removeprefix("torch."),
        }

    def mdppo_boxes(self) -> dict[str, Any]:
        """What this worker keeps: `worker` (its number), and its boxes as [tensor, start, stop]."""
        parallel = self.vllm_config.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        return {"worker": worker, "boxes": self.weight_transfer_engine.reload.boxes}

    def mdppo_version(self) -> dict[str, int]:
        """Version of the weights in use: 0 those of the start, -1 unusable after a failed update."""
        return {"version": self.weight_transfer_engine.version}

    def mdppo_checksum(self, names: list[str]) -> dict[str, int]:
        """crc32 of the named tensors (all, for none) as received in the last applied update."""
        known = self.weight_transfer_engine.crc32
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"checksum: {shown(missing)} not in the last update, which held {len(known)} tensors")
        return {name: known[name] for name in names or known}

    def mdppo_discard_update(self) -> dict[str, int]:
        """Forget a started or staged update; the model keeps its weights. Returns the version in use."""
        self.weight_transfer_engine.staged = None
        self._weight_update_active = False  # vLLM's own flag: without this it refuses the next start
        return self.mdppo_version()


def checkpoint_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """Every tensor in the directory's safetensors files: what the engine loaded at start.

    Raises ValueError for a directory that is not there or has none.
    """
    try:
        return dict(HubFiles(model_dir).tensors)
    except FileNotFoundError:
        raise ValueError(
            f"weight update: got {model_dir} without *.safetensors, expected the local checkpoint directory "
            "that the engine was started from (it says which tensors make a complete update)"
        ) from None


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


def map_tensors(update: ShmUpdate) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the update's file, one a tensor; raises ValueError if the file is absent or too short."""
    size = os.path.getsize(update.path) if os.path.isfile(update.path) else None
    if size is None or size < update.nbytes:
        raise ValueError(f"weight update: got {update.path} of {size} bytes, expected {update.nbytes}")
    buffer = torch.from_file(update.path, shared=False, size=update.nbytes, dtype=torch.uint8)
    for name, dtype_name, shape, offset in update.tensors:
        if dtype_name not in DTYPES:
            raise ValueError(f"weight update: got dtype {dtype_name} for {name}, expected one of {sorted(DTYPES)}")
        dtype = DTYPES[dtype_name]
        nbytes = math.prod(shape) * dtype.itemsize
        if offset % dtype.itemsize or offset + nbytes > update.nbytes:
            raise ValueError(f"weight update: {name} at {offset}+{nbytes} does not fit into {update.nbytes} bytes")
        yield name, buffer[offset : offset + nbytes].view(dtype).view(shape)


def checksums(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """crc32 of each tensor's bytes; zlib releases the GIL, so large updates use all the worker's threads."""
    arrays = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors.values()]
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(zlib.crc32, arrays), strict=True))


def shown(names: list[str]) -> str:
    """The first few of `names` and how many more there are, for error messages."""
    rest = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + rest
