"""Runs inside vLLM's worker processes: weights come in through shared memory, facts about the engine go out.

The only module of the project that imports vLLM. The server loads it as `worker_extension_cls`
(`vllm_server.server_command`): importing it registers the weight-transfer backend, and `WorkerExtension` is
mixed into vLLM's worker, so that its methods can be called through the server's `/collective_rpc`.

An update has two phases. *Staging* (`/update_weights`) checks that the file is there, that it holds every
tensor of the checkpoint with the right shape, and its checksums: the model is not touched, so a refused or
abandoned update leaves a working engine. *Applying* (`/finish_weight_update`) reloads the model layer by
layer; should it fail half-way, the weights are marked unusable (version -1) until a full update succeeds.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from megatron_dppo.rollout.vllm_server import TRANSFER_BACKEND

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
            checkpoint_shapes(Path(self.model_config.model)),
            tied=bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False)),
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
        drop_partial_reload(self.model)
        force_moe_repack(self.model)
        initialize_layerwise_reload(self.model)
        self.model.load_weights(iter(staged.tensors.items()))
        finalize_layerwise_reload(self.model, self.model_config)
        self.version, self.crc32 = staged.version, staged.crc32

    def shutdown(self) -> None:
        self.staged = None


if BACKEND not in WeightTransferEngineFactory._registry:  # the module may be imported again in the same worker
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)


class WorkerExtension:
    """Methods added to vLLM's worker for `/collective_rpc`. They answer dicts, which HTTP leaves alone."""

    weight_transfer_engine: SharedMemoryEngine
    vllm_config: Any

    def mdppo_describe(self) -> dict[str, Any]:
        """Facts that the client needs: see `engine.Capabilities`."""
        config = self.vllm_config.model_config
        names = checkpoint_shapes(Path(config.model))
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


def checkpoint_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the directory's safetensors files, from their headers alone.

    This is what the engine loaded at start, and so what a complete update must hold.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"weight update: got {model_dir} without *.safetensors, expected the local checkpoint directory "
            "that the engine was started from (it says which tensors make a complete update)"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def check_complete(got: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Raise ValueError unless an update holds exactly the checkpoint's tensors with their shapes.

    A tied head may be present or absent on either side: hub checkpoints differ in that.
    """
    optional = {"lm_head.weight"} if tied else set()
    missing = sorted(expected.keys() - got.keys() - optional)
    unknown = sorted(got.keys() - expected.keys() - optional)
    wrong = [
        f"{name} {got[name]} instead of {expected[name]}"
        for name in sorted(got.keys() & expected.keys())
        if got[name] != expected[name]
    ]
    faults = [
        f"{what} {shown(names)}"
        for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
        if names
    ]
    if faults:
        raise ValueError(
            f"weight update: got {len(got)} tensors, expected the checkpoint's {len(expected)}: " + "; ".join(faults)
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


def drop_partial_reload(model: torch.nn.Module) -> None:
    """Forget what a reload that failed half-way had buffered.

    vLLM counts loaded elements per layer; with the old ones left in, a layer would be finished too early and
    keep stale or missing parts without a word.
    """
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0


def force_moe_repack(model: torch.nn.Module) -> None:
    """Make the reload repack MoE weights on CPU.

    vLLM 0.30 to 0.33 skip the CPU prepack when a kernel exists already, and would leave the experts in
    checkpoint layout: wrong results without an error, or a dead engine. Dropping the kernel makes the reload
    build it anew.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if type(method).__name__ == "UnquantizedFusedMoEMethod" and hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def shown(names: list[str]) -> str:
    """The first few of `names` and how many more there are, for error messages."""
    rest = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + rest
