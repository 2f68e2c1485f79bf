"""The trainer's side of a weight sync, once an order to send has come: over a file, or to workers over a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dppo.architecture import Architecture
from megatron_dppo.control import Control, connect_store, engine_layout_key, meeting_key
from megatron_dppo.weights.channels import TransferError
from megatron_dppo.weights.image import create_image, file_update_of, image_tensors, write_image
from megatron_dppo.weights.layout import Box, Piece
from megatron_dppo.weights.mapping import hub_dtypes
from megatron_dppo.weights.plan import sync_plan
from megatron_dppo.weights.transfer import Sender, join_as_rank, publish
from megatron_dppo.weights.update import GroupUpdate


@dataclass(frozen=True)
class Held:
    """What one trainer rank holds of a model: `parameters` by name, and which boxes they are.

    `pieces_of`: the layout of any of the `ranks`. `dtype`: in which engines get the numbers (but for buffers that stay
    in float32).
    """

    arch: Architecture
    rank: int
    ranks: int
    parameters: Mapping[str, Tensor]
    pieces_of: Callable[[int], Iterable[Piece]]
    dtype: torch.dtype
    device: torch.device

    def write(self, path: Path) -> None:
        """Its part of an image, as `write_image`."""
        write_image(path, self.parameters, self.pieces_of(self.rank))


class WeightSender(Protocol):
    """One way to the engines."""

    def send(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Every rank calls this with the client's order; returns the reply to it."""
        ...

    def close(self) -> None:
        """Nothing more is sent; what was left on the way is removed."""
        ...


class FileSender:
    """Every rank writes its boxes into one file; the reply has the `FileUpdate`, as `file`.

    In shared memory one file serves all versions. On a disk, which several machines may read, each has a file of its
    own, and the one before is removed: engines have it in memory by then.
    """

    def __init__(self, held: Held, directory: Path, *, on_disk: bool) -> None:
        self._held, self._directory, self._on_disk = held, directory, on_disk
        self._path: Path | None = None

    def send(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """One or two barriers and one object all-gather of checksums."""
        version, before = int(order["version"]), self._path
        path = self._directory / (f"weights-{version}.safetensors" if self._on_disk else "weights.safetensors")
        if path != before:
            if self._held.rank == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._remove()
                create_image(path, image_tensors(self._held.arch, self._held.dtype))
            dist.barrier()
        self._path = path
        self._held.write(path)
        return {"file": file_update_of(path, version).as_json()}

    def close(self) -> None:
        if self._held.rank == 0:
            self._remove()

    def _remove(self) -> None:
        """What was sent is gone, also by an earlier run."""
        for file in self._directory.glob("weights*.safetensors"):
            file.unlink(missing_ok=True)


class GroupSender:
    """Ranks send each worker what it keeps; the reply has the `errors` of ranks that could not.

    A new generation begins with a plan, which every rank makes, and a meeting of all ranks and workers.
    """

    def __init__(self, held: Held, control: Control, *, bucket_bytes: int, timeout_s: float, one_machine: bool) -> None:
        """`timeout_s`: how long a rank waits for a worker to come, or to take what was sent. `one_machine`: through
        memory that both have, not a process group."""
        self._held, self._control = held, control
        self._bucket_bytes, self._timeout_s, self._one_machine = bucket_bytes, timeout_s, one_machine
        self._generation: int | None = None
        self._sender: Sender | None = None

    def send(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """One object all-gather of the ranks' errors, beside what goes to workers; another for a new plan's digest.

        Raises ValueError where a plan cannot be made: the trainer does not hold what a worker keeps.
        """
        error = ""
        try:
            if order["generation"] != self._generation:
                self._sender, self._generation = None, order["generation"]
                self._sender = self._meet(order)
            if self._sender is None:
                raise TransferError("its group has failed before, and another was not asked for")
            self._sender.send(self._held.parameters)
        except TransferError as failure:
            self._sender, error = None, f"rank {self._held.rank}: {failure}"
        errors = [""] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        return {"errors": [error for error in errors if error]}

    def close(self) -> None:
        self._sender = None

    def _meet(self, order: Mapping[str, Any]) -> Sender:
        """Plans, tells the workers their shares and the client that they may come, and waits for them.

        Collectives: one object all-gather over the job, of a digest (under 100 bytes); then the opening of a channel to
        each instance, for which all ranks and its workers wait. Rank 0 puts the workers' shares into the store.
        """
        held, ranks = self._held, self._held.ranks
        workers = self._control.wait(engine_layout_key(order["layout"]), self._timeout_s)["workers"]
        plan = sync_plan(
            [held.pieces_of(rank) for rank in range(ranks)],
            [[*map(Box.from_json, boxes)] for boxes in workers],
            hub_dtypes(held.arch, str(held.dtype).removeprefix("torch.")),
            bucket_bytes=self._bucket_bytes,
            instances=order["instances"],
        )
        digest = plan.digest()
        digests = [""] * ranks
        dist.all_gather_object(digests, digest)
        assert set(digests) == {digest}, f"plans differ between ranks: {digests}"
        store = connect_store(self._control.address, self._timeout_s)
        update = GroupUpdate(
            version=order["version"],
            store=self._control.address,
            digest=digest,
            generation=order["generation"],
            ranks=ranks,
            instances=order["instances"],
            timeout_s=self._timeout_s,
            one_machine=self._one_machine,
        )
        if held.rank == 0:
            publish(store, plan)
            self._control.post(meeting_key(order["generation"]), update.as_json())
        channels = join_as_rank(store, update, held.rank, len(workers), held.device)
        return Sender(plan, held.rank, channels, ranks)
