"""A channel between processes of one machine, through memory that both map: CUDA IPC on a GPU, else a memory file.

Nothing is left behind by a process that dies: a memory file is reached through the process that has it, and CUDA's
memory goes with its owner.
"""

from __future__ import annotations

import base64
import json
import os
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_dppo.weights.channels import TransferError, did_not_meet

Handle = dict[str, Any]  # JSON: how another process finds a buffer


class IpcChannel:
    """See `channels.Channel`; what is sent must lie in buffers of `allocate` that were registered.

    A message is a note in the store: where it lies. The receiver copies it and leaves a note that it has. Opening waits
    for all `size` processes; raises TransferError where somebody does not come in `timeout_s`.
    """

    def __init__(
        self, store: dist.Store, name: str, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        self.name, self.timeout = name, timedelta(seconds=timeout_s)
        self._rank, self._device = rank, device
        self._store = dist.PrefixStore(name, store)
        self._own: list[Tensor] = []
        self._mapped: dict[tuple[int, int], Tensor] = {}
        self._counts: Counter[tuple[int, int]] = Counter()  # messages so far, by sender and receiver
        self._store.set(f"here/{rank}", "")
        try:
            self._store.wait([f"here/{other}" for other in range(size)], self.timeout)
        except RuntimeError as error:
            raise did_not_meet(name, size, timeout_s, error) from None

    def allocate(self, nbytes: int) -> Tensor:
        """uint8 that other processes can map."""
        if self._device.type == "cuda":
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return _memory_file(nbytes)

    def register(self, buffers: Sequence[Tensor]) -> None:
        """Tells the others of this process's buffers."""
        for buffer in buffers:
            self._store.set(f"memory/{self._rank}/{len(self._own)}", json.dumps(_handle(buffer)))
            self._own.append(buffer)

    def send(self, data: Tensor, to: int, tag: int) -> Any:
        """Leaves a note where `data` lies, which must stay as it is until `finish`."""
        number, offset = next(
            (n, data.data_ptr() - buffer.data_ptr())
            for n, buffer in enumerate(self._own)
            if 0 <= data.data_ptr() - buffer.data_ptr() <= len(buffer) - len(data)
        )
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the bytes must be there before the note is
        key = self._key(self._rank, to)
        self._store.set(key, json.dumps([number, offset, len(data)]))
        return _Delivery(self, key)

    def receive(self, data: Tensor, source: int, tag: int) -> Any:
        """Copies a message into `data` when it is waited for."""
        return _Receipt(self, self._key(source, self._rank), source, data)

    def _key(self, source: int, to: int) -> str:
        self._counts[source, to] += 1
        return f"message/{source}/{to}/{self._counts[source, to]}"

    def buffer_of(self, source: int, number: int) -> Tensor:
        """Another process's buffer, mapped once."""
        if (source, number) not in self._mapped:
            handle = json.loads(self._store.get(f"memory/{source}/{number}"))
            self._mapped[source, number] = _mapped(handle)
        return self._mapped[source, number]


@dataclass(frozen=True)
class _Delivery:
    """A message that was left."""

    channel: IpcChannel
    key: str

    def wait(self, timeout: timedelta) -> None:
        self.channel._store.wait([f"{self.key}/taken"], timeout)
        for key in (self.key, f"{self.key}/taken"):
            self.channel._store.delete_key(key)


@dataclass(frozen=True)
class _Receipt:
    """A message that is expected."""

    channel: IpcChannel
    key: str
    source: int
    data: Tensor

    def wait(self, timeout: timedelta) -> None:
        self.channel._store.wait([self.key], timeout)
        number, offset, nbytes = json.loads(self.channel._store.get(self.key))
        if nbytes != len(self.data):
            raise RuntimeError(f"got a message of {nbytes} bytes, expected {len(self.data)}")
        self.data.copy_(self.channel.buffer_of(self.source, number)[offset : offset + nbytes])
        if self.data.is_cuda:
            torch.cuda.current_stream(self.data.device).synchronize()  # the sender will write there again
        self.channel._store.set(f"{self.key}/taken", "")


_PATHS: Any = WeakTensorKeyDictionary()  # of memory files, by the tensors that are their memory


def _memory_file(nbytes: int) -> Tensor:
    """The memory of an anonymous file; other processes of the same user reach it through this one."""
    descriptor = os.memfd_create("megatron_dppo")
    os.ftruncate(descriptor, max(nbytes, 1))
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    tensor = torch.from_file(path, shared=True, size=max(nbytes, 1), dtype=torch.uint8)[:nbytes]
    _PATHS[tensor] = path
    weakref.finalize(tensor, os.close, descriptor)
    return tensor


def _handle(buffer: Tensor) -> Handle:
    if not buffer.is_cuda:
        return {"path": _PATHS[buffer], "nbytes": len(buffer)}
    shared = buffer.untyped_storage()._share_cuda_()
    fields = [base64.b64encode(field).decode() if isinstance(field, bytes) else field for field in shared]
    uuid = str(torch.cuda.get_device_properties(buffer.device).uuid)
    return {"cuda": fields, "uuid": uuid, "offset": buffer.storage_offset(), "nbytes": len(buffer)}


def _mapped(handle: Handle) -> Tensor:
    """Raises TransferError for memory of a GPU that this process does not see."""
    if "path" in handle:
        return torch.from_file(handle["path"], shared=True, size=max(handle["nbytes"], 1), dtype=torch.uint8)
    seen = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if handle["uuid"] not in seen:
        raise TransferError(f"got memory of GPU {handle['uuid']}, expected one that this process sees: {seen}")
    _, *fields = [base64.b64decode(field) if isinstance(field, str) else field for field in handle["cuda"]]
    storage = torch.UntypedStorage._new_shared_cuda(seen.index(handle["uuid"]), *fields)
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return whole.set_(storage, handle["offset"], (handle["nbytes"],), (1,))
