"""Training state on disk, by Megatron's own `dist_checkpointing`: whole or not there, loadable at another layout.

A checkpoint is a directory `step-<n>`: a torch_dist checkpoint of weights and optimizer (which
`megatron-dppo convert megatron-to-hf` reads too), the model's Hugging Face directory without weights in `hf/`, the
batches that were sampled ahead in `queue/`, and `training.json`, which says what it is. It is written beside and
renamed when every rank is through.
"""

from __future__ import annotations

import json
import queue as queues
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_dppo.backend.model import Model
from megatron_dppo.backend.optimizer import Optimizer
from megatron_dppo.backend.optimizer_state import state_to_load, state_to_save
from megatron_dppo.checkpoints import DESCRIPTION, QUEUE, TrainingState, queue_path
from megatron_dppo.weights.global_tensors import content_metadata, default_scheme
from megatron_dppo.weights.hub_files import carry_description
from megatron_dppo.weights.megatron_files import CARRIED

# The one format in which a distributed optimizer's state can be read at any other layout.
RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,  # else every replica gathers all of it
    "chained_optim_avoid_prefix": True,
}
FILES = 1  # of a rank


def save_training(
    path: Path,
    model: Model,
    optimizer: Optimizer,
    state: TrainingState,
    source: Path,
    queue: Mapping[int, Path],
) -> None:
    """Every rank calls this. `source`: the Hugging Face directory that training began with. `queue`: files of batches
    to come, by step; copied.

    Collectives: two barriers; those of `state_to_save`; object gathers of Megatron's `dist_checkpointing` over the job,
    of what each rank writes (names, shapes, places; no numbers).
    """
    beside = path.with_name(path.name + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        carry_description(source, beside / CARRIED, None)
        for step, file in queue.items():
            (beside / QUEUE).mkdir(exist_ok=True)
            shutil.copyfile(file, queue_path(beside, step))
    dist.barrier()
    metadata = _metadata(model)
    _write_in_this_process()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=FILES)
    weights = _sharded_weights(optimizer, metadata)
    tensors = weights | state_to_save(optimizer, weights, metadata).tensors
    dist_checkpointing.save(tensors, str(beside), sharded_strategy=strategy, content_metadata=metadata)
    dist.barrier()
    if dist.get_rank() == 0:
        (beside / DESCRIPTION).write_text(json.dumps(asdict(state), indent=2) + "\n")
        if path.exists():  # of a run that went on from an older one
            path.rename(path.with_name(path.name + ".replaced.tmp"))
        beside.rename(path)


def load_training(path: Path, model: Model, optimizer: Optimizer) -> None:
    """Every rank calls this: weights, optimizer and the schedule's place as they were, at this job's layout.

    Each reads what it needs, of the optimizer's state all that its replicas share. Collectives: object gathers of
    Megatron's `dist_checkpointing` over the job, of what each rank reads (names, shapes, places; no numbers).
    """
    metadata = _metadata(model)
    weights = _sharded_weights(optimizer, metadata)
    state = state_to_load(optimizer, weights, metadata)
    loaded = dist_checkpointing.load(weights | state.tensors, str(path))
    for v, chunk in enumerate(optimizer.chunks):
        chunk.module.load_state_dict(loaded.get(f"model{v}", {}), strict=True)  # a chunk without layers has none
    state.load(loaded)


def _write_in_this_process() -> None:
    """Has Megatron write files without processes of its own.

    0.16 forks a rank, whose communication has threads, for each of its files: such a fork can wait for ever
    for a lock that a thread held. All versions start a process that imports everything again, for a queue of results.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queues.Queue()
    writer = filesystem_async.FileSystemWriterAsync
    if hasattr(writer, "write_preloaded_data_multiproc"):
        writer.write_preloaded_data_multiproc = staticmethod(_write_files)


def _write_files(
    transforms: Sequence[Any], use_msc: bool, rank: int, files: Sequence[Any], results: queues.Queue[Any]
) -> None:
    """Megatron 0.16's `write_preloaded_data_multiproc`, file by file; leaves what was written, or what went wrong."""
    written: dict[int, Any] = {}
    for number, file in enumerate(files):
        answers: queues.Queue[Any] = queues.Queue()
        to_do: queues.Queue[int] = queues.Queue()
        to_do.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, file, answers, to_do, use_fsync=True, use_msc=use_msc
        )
        _, written[number] = answers.get()
        if isinstance(written[number], Exception):
            results.put(written[number])
            return
    results.put(written)


def _metadata(model: Model) -> dict[str, Any]:
    return content_metadata(default_scheme(model.arch)) | RESHARDABLE


def _sharded_weights(optimizer: Optimizer, metadata: dict[str, Any]) -> dict[str, Any]:
    return {f"model{v}": chunk.module.sharded_state_dict(metadata=metadata) for v, chunk in enumerate(optimizer.chunks)}
