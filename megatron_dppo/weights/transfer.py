"""A plan carried out: buckets of bytes from trainer ranks to engine workers, and on from instance to instance.

Both sides have the plan, so that nothing but numbers travels. In a bucket a rank sends each worker one message: its
parts in the order of the plan, packed without a gap, and a checksum. Two buckets are in flight on every side: one is
sent while the next is packed, one received while the last is unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dppo.control import get_bytes, put_bytes
from megatron_dppo.weights.channels import Channel, GroupChannel, TransferError, finish
from megatron_dppo.weights.ipc import IpcChannel
from megatron_dppo.weights.layout import Box, Index
from megatron_dppo.weights.plan import BUCKETS_IN_FLIGHT, Plan
from megatron_dppo.weights.update import GroupUpdate

CHECKSUM_BYTES = 8
MOST_OVERHEAD_BYTES = 2 * CHECKSUM_BYTES  # of a message: padding and checksum
# (tensor, start, stop of the part, its numbers)
Place = Callable[[str, Index, Index, Tensor], None]


@dataclass(frozen=True)
class Part:
    """A box of a hub tensor, `position` bytes into its message, and where the sender has it."""

    tensor: str
    dtype: torch.dtype
    start: Index  # of two dimensions; a tensor of one is a column
    stop: Index
    position: int
    param: str
    param_offset: Index

    @property
    def shape(self) -> Index:
        """Rows and columns."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    def of(self, message: Tensor) -> Tensor:
        """Its numbers, in the message's bytes."""
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        return message[self.position : self.position + nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Message:
    """What trainer rank `src` sends to worker `dst` in one bucket; `nbytes` with padding and checksum."""

    src: int
    dst: int
    parts: tuple[Part, ...]
    nbytes: int


def messages(plan: Plan) -> list[list[Message]]:
    """Of every bucket, by worker and rank; of a part of a plan (`Plan.select`) those that are in it."""
    dtypes = [getattr(torch, dtype) for dtype in plan.dtypes]
    found: list[list[Message]] = []
    nbytes = plan.nbytes
    for bucket in range(plan.num_buckets):
        rows = plan.rows(bucket)
        order = np.lexsort((plan.src_rank[rows], plan.dst[rows])) + rows.start  # stable: parts stay in order
        ends = np.stack([plan.dst[order], plan.src_rank[order]])
        cuts = np.flatnonzero(np.any(np.diff(ends) != 0, axis=0)) + 1
        found.append([_message(plan, dtypes, nbytes, group) for group in np.split(order, cuts) if len(group)])
    return found


def _message(plan: Plan, dtypes: Sequence[torch.dtype], nbytes: Any, rows: Any) -> Message:
    positions = np.cumsum(nbytes[rows]) - nbytes[rows]
    parts = tuple(
        Part(
            tensor=plan.tensors[plan.tensor[row]],
            dtype=dtypes[plan.tensor[row]],
            start=tuple(plan.start[row].tolist()),
            stop=tuple(plan.stop[row].tolist()),
            position=int(position),
            param=plan.params[plan.src_param[row]],
            param_offset=tuple(plan.src_offset[row].tolist()),
        )
        for row, position in zip(rows.tolist(), positions, strict=True)
    )
    payload = -(-int(nbytes[rows].sum()) // CHECKSUM_BYTES) * CHECKSUM_BYTES
    return Message(int(plan.src_rank[rows[0]]), int(plan.dst[rows[0]]), parts, payload + CHECKSUM_BYTES)


def join_as_rank(
    store: dist.Store, update: GroupUpdate, rank: int, workers: int, device: torch.device
) -> list[Channel]:
    """A trainer rank's channels, one to each instance; waits for all ranks and all workers of every instance."""
    kind = _kind(update)
    return [
        kind(store, _engine(update, i), rank, update.ranks + workers, device, update.timeout_s)
        for i in range(update.instances)
    ]


def join_as_worker(
    store: dist.Store, update: GroupUpdate, worker: int, workers: int, device: torch.device
) -> tuple[Channel, Channel | None, Channel | None]:
    """A worker's channels: to the trainer, from the instance before and to the one behind (None: there is but one)."""
    size, timeout_s, kind = update.ranks + workers, update.timeout_s, _kind(update)
    own = kind(store, _engine(update, update.instance), update.ranks + worker, size, device, timeout_s)
    before: dict[int, Channel] = {}
    if update.instances > 1:
        # Opening waits for the other end: every instance opens its links in the order of their numbers.
        for link in sorted({update.instance, (update.instance - 1) % update.instances}):
            end = int(link != update.instance)
            before[end] = kind(store, f"{update.generation}/link{link}/{worker}", end, 2, device, timeout_s)
    return own, before.get(1), before.get(0)


def _kind(update: GroupUpdate) -> type[GroupChannel] | type[IpcChannel]:
    return IpcChannel if update.one_machine else GroupChannel


def _engine(update: GroupUpdate, instance: int) -> str:
    return f"{update.generation}/engine{instance}"


def publish(store: dist.Store, plan: Plan) -> None:
    """Leaves each worker's share of a plan in the store that the workers will join."""
    digest = plan.digest()
    for worker in range(len(plan.kept_bytes)):
        put_bytes(store, _share_key(digest, worker), plan.select(dst=worker).to_bytes())


def published_share(store: dist.Store, digest: str, worker: int) -> Plan:
    """What `publish` left for a worker; waits for it."""
    return Plan.from_bytes(get_bytes(store, _share_key(digest, worker)))


def _share_key(digest: str, worker: int) -> str:
    return f"plan/{digest}/{worker}"


def check_share(plan: Plan, boxes: Iterable[Box]) -> None:
    """Raises ValueError unless a worker's share of a plan is what the worker keeps, every element of it once."""
    kept: dict[str, list[Box]] = {}
    for box in boxes:
        kept.setdefault(box.tensor, []).append(Box(box.tensor, (*box.start, 0)[:2], (*box.stop, 1)[:2]))
    sent = dict.fromkeys(kept, 0)
    for tensor, start, stop in zip(plan.tensor.tolist(), plan.start.tolist(), plan.stop.tolist(), strict=True):
        name = plan.tensors[tensor]
        if not any(_inside(start, stop, box) for box in kept.get(name, ())):
            raise ValueError(f"weight update: the plan sends {name} {start} to {stop}, which this worker does not keep")
        sent[name] += math.prod(b - a for a, b in zip(start, stop, strict=True))
    for name, found in kept.items():
        expected = sum(box.numel for box in found)
        if sent[name] != expected:
            raise ValueError(f"weight update: the plan sends {sent[name]} elements of {name}, expected {expected}")


def _inside(start: Sequence[int], stop: Sequence[int], box: Box) -> bool:
    low, high = box.start, box.stop
    return low[0] <= start[0] and low[1] <= start[1] and stop[0] <= high[0] and stop[1] <= high[1]


class Sender:
    """The trainer rank's side: `parameters` are read anew at every `send`."""

    def __init__(self, plan: Plan, rank: int, channels: Sequence[Channel], ranks: int) -> None:
        """`channels`: to each instance; worker w of it is number `ranks` + w there."""
        sent = messages(plan.select(src_rank=rank))
        # What a rank packs at a time is bounded as what a worker receives is; it may have messages to many.
        self._waves = _waves(sent, plan.bucket_bytes + ranks * MOST_OVERHEAD_BYTES)
        self._channels, self._ranks = channels, ranks
        sizes = _staging_sizes([[message for _, message in wave] for wave in self._waves])
        self._staging = [channels[0].allocate(size) for size in sizes]
        for channel in channels:
            channel.register(self._staging)

    @property
    def staging_bytes(self) -> int:
        """Memory that it keeps for packing."""
        return sum(len(buffer) for buffer in self._staging)

    @torch.no_grad()
    def send(self, parameters: Mapping[str, Tensor]) -> None:
        """Sends this rank's part of every bucket, each to the first instance on its way.

        No collectives: one message to each worker that a bucket has something for, of the bytes in the plan, padded to
        8, and a checksum of 8. Raises TransferError for one that is not taken in time.
        """
        in_flight: list[list[tuple[Channel, Any, int]]] = []
        for number, wave in enumerate(self._waves):
            if len(in_flight) == BUCKETS_IN_FLIGHT:
                _finish_wave(in_flight.pop(0))
            staging = self._staging[number % BUCKETS_IN_FLIGHT]
            started = []
            for (bucket, message), (_, buffer) in zip(wave, _laid_out([m for _, m in wave], staging), strict=True):
                _pack(message, buffer, parameters)
                channel = self._channels[bucket % len(self._channels)]
                started.append((channel, channel.send(buffer, self._ranks + message.dst, bucket), bucket))
            in_flight.append(started)
        for wave_in_flight in in_flight:
            _finish_wave(wave_in_flight)


class Receiver:
    """A worker's side, of instance `instance`."""

    def __init__(
        self,
        plan: Plan,
        worker: int,
        instance: int,
        channel: Channel,
        previous: Channel | None = None,
        following: Channel | None = None,
    ) -> None:
        """`channel`: from the trainer, whose ranks have their own numbers; `previous`, `following`: from and to worker
        `worker` of the instances before and behind in the ring, which are number 0 and 1 there."""
        self._plan, self._instance = plan, instance
        self._buckets = messages(plan.select(dst=worker))
        self._channel, self._previous, self._following = channel, previous, following
        self._staging = [channel.allocate(size) for size in _staging_sizes(self._buckets)]
        if following is not None:
            following.register(self._staging)

    @property
    def staging_bytes(self) -> int:
        """Memory that it keeps for receiving."""
        return sum(len(buffer) for buffer in self._staging)

    @torch.no_grad()
    def receive(self, place: Place) -> None:
        """Calls `place` with every part of every bucket. Raises TransferError naming what is damaged or late.

        No collectives: of each bucket either one message from every rank that has something for this worker, or one of
        them all from the instance before; and one, of the same bytes, to the instance behind, unless it is the last.
        """
        started = [self._start(bucket) for bucket in range(min(BUCKETS_IN_FLIGHT, len(self._buckets)))]
        for bucket, sent in enumerate(self._buckets):
            channel, works = started[bucket]
            finish(channel, works, f"receiving bucket {bucket}")
            passed_on = self._pass_on(bucket)
            for message, buffer in _laid_out(sent, self._staging[bucket % BUCKETS_IN_FLIGHT]):
                _check(message, buffer, bucket)
                for part in message.parts:
                    place(part.tensor, part.start, part.stop, part.of(buffer))
            if passed_on and self._following:
                finish(self._following, passed_on, f"passing on bucket {bucket}")
            if bucket + BUCKETS_IN_FLIGHT < len(self._buckets):
                started.append(self._start(bucket + BUCKETS_IN_FLIGHT))

    def _start(self, bucket: int) -> tuple[Channel, list[Any]]:
        sent, staging = self._buckets[bucket], self._staging[bucket % BUCKETS_IN_FLIGHT]
        if self._plan.relay(bucket)[0] == self._instance or self._previous is None:
            laid_out = _laid_out(sent, staging)
            return self._channel, [self._channel.receive(buffer, m.src, bucket) for m, buffer in laid_out]
        used = staging[: sum(message.nbytes for message in sent)]
        return self._previous, [self._previous.receive(used, 0, bucket)] if len(used) else []

    def _pass_on(self, bucket: int) -> list[Any]:
        """The whole buffer, checksums and all, to the next instance; nothing from the last one on its way."""
        used = sum(message.nbytes for message in self._buckets[bucket])
        if self._following is None or self._plan.relay(bucket)[-1] == self._instance or not used:
            return []
        return [self._following.send(self._staging[bucket % BUCKETS_IN_FLIGHT][:used], 1, bucket)]


def _finish_wave(started: Sequence[tuple[Channel, Any, int]]) -> None:
    for channel, work, bucket in started:
        finish(channel, [work], f"sending bucket {bucket}")


def _waves(buckets: Sequence[Sequence[Message]], most: int) -> list[list[tuple[int, Message]]]:
    """The messages of all buckets in their order, in groups of at most `most` bytes."""
    waves: list[list[tuple[int, Message]]] = []
    size = 0
    for bucket, sent in enumerate(buckets):
        for message in sent:
            if not waves or size + message.nbytes > most:
                waves.append([])
                size = 0
            waves[-1].append((bucket, message))
            size += message.nbytes
    return waves


def _staging_sizes(buckets: Sequence[Sequence[Message]]) -> list[int]:
    """Of the buffers that take turns."""
    sizes = [sum(message.nbytes for message in sent) for sent in buckets]
    return [max(sizes[turn::BUCKETS_IN_FLIGHT], default=0) for turn in range(BUCKETS_IN_FLIGHT)]


def _laid_out(sent: Sequence[Message], staging: Tensor) -> Iterator[tuple[Message, Tensor]]:
    """The messages of a bucket, one after the other in its buffer."""
    start = 0
    for message in sent:
        yield message, staging[start : start + message.nbytes]
        start += message.nbytes


def _pack(message: Message, buffer: Tensor, parameters: Mapping[str, Tensor]) -> None:
    buffer[-2 * CHECKSUM_BYTES :].zero_()  # what is beyond the last part
    for part in message.parts:
        parameter = parameters[part.param]
        if parameter.dim() == 1:
            parameter = parameter[:, None]
        (row, column), (rows, columns) = part.param_offset, part.shape
        part.of(buffer).copy_(parameter[row : row + rows, column : column + columns])
    buffer[-CHECKSUM_BYTES:].view(torch.int64).copy_(_checksum(buffer))


def _check(message: Message, buffer: Tensor, bucket: int) -> None:
    got, sent = (int(sum_) % 2**64 for sum_ in (_checksum(buffer), buffer[-CHECKSUM_BYTES:].view(torch.int64)))
    if got != sent:
        first, last = message.parts[0].tensor, message.parts[-1].tensor
        raise TransferError(
            f"bucket {bucket} from trainer rank {message.src} ({first} to {last}): got checksum {got:#x}, expected "
            f"{sent:#x}"
        )


def _checksum(buffer: Tensor) -> Tensor:
    """Of all but the last 8 bytes: their sum as whole numbers of 64 bits. Places are the plan's, not checked here."""
    return buffer[:-CHECKSUM_BYTES].view(torch.int64).sum()
