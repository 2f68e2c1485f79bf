"""Bytes between the processes that open a channel of the same name, and a process group as one; `ipc` is the other."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class TransferError(RuntimeError):
    """Bytes did not arrive, or not as they were sent; what was to receive them is in no usable state."""


class Channel(Protocol):
    """What is started with `send` and `receive` ends with `finish`."""

    name: str
    timeout: timedelta

    def allocate(self, nbytes: int) -> Tensor:
        """uint8, a buffer that can be sent from."""
        ...

    def register(self, buffers: Sequence[Tensor]) -> None:
        """Before anything is sent from buffers of `allocate`, of this channel or another of the same process."""
        ...

    def send(self, data: Tensor, to: int, tag: int) -> Any:
        """Starts sending; `data` must stay as it is until `finish`. Raises TransferError."""
        ...

    def receive(self, data: Tensor, source: int, tag: int) -> Any:
        """Starts receiving into `data`. Raises TransferError."""
        ...


def finish(channel: Channel, works: Sequence[Any], what: str) -> None:
    """Waits for what was started; raises TransferError where the other end stays silent for the channel's timeout."""
    for work in works:
        try:
            work.wait(channel.timeout)
        except RuntimeError as error:
            seconds = channel.timeout.total_seconds()
            raise TransferError(f"channel {channel.name}: {what}, at most {seconds:.0f} s: {error}") from None


def did_not_meet(name: str, size: int, timeout_s: float, error: Exception) -> TransferError:
    """Of `size` processes that were to open a channel."""
    return TransferError(f"channel {name}: {size} processes did not meet in {timeout_s:.0f} s: {error}")


class GroupChannel:
    """A process group of `size` processes: NCCL on a GPU, gloo elsewhere.

    Opening waits for all of them (over NCCL the first message between two does). Raises TransferError where somebody
    does not come in `timeout_s`.
    """

    def __init__(
        self, store: dist.Store, name: str, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        self.name, self.timeout, self._device = name, timedelta(seconds=timeout_s), device
        prefixed = dist.PrefixStore(name, store)
        try:
            if device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = self.timeout
                self._group: Any = dist.ProcessGroupNCCL(prefixed, rank, size, options)
            else:
                self._group = dist.ProcessGroupGloo(prefixed, rank, size, self.timeout)
        except RuntimeError as error:
            raise did_not_meet(name, size, timeout_s, error) from None

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def register(self, buffers: Sequence[Tensor]) -> None:
        return

    def send(self, data: Tensor, to: int, tag: int) -> Any:
        try:
            return self._group.send([data], to, tag)
        except RuntimeError as error:  # at once, where the other end is known to be gone
            raise TransferError(f"channel {self.name}: sending to {to}: {error}") from None

    def receive(self, data: Tensor, source: int, tag: int) -> Any:
        try:
            return self._group.recv([data], source, tag)
        except RuntimeError as error:
            raise TransferError(f"channel {self.name}: receiving from {source}: {error}") from None
