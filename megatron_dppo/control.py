"""Messages between the processes of a job: JSON under a key, posted once, waited for with a deadline.

Built on torch's TCPStore, which the launcher serves. Large things (samples, weights) travel through shared memory;
a message says where they lie. No collective of the trainer ever waits for a rollout: ranks wait here.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

# In the environment of every process of a job:
CONTROL_VARIABLE = "MEGATRON_DPPO_CONTROL"  # host:port of the store
SHARED_VARIABLE = "MEGATRON_DPPO_SHARED"  # a directory in shared memory, the job's own
ENGINE_URLS_VARIABLE = "MEGATRON_DPPO_ENGINE_URLS"  # comma-separated; the client's

BACKEND_KEY = "backend"  # trainer to launcher: what it computes with, in words
READY_KEY = "ready"  # client to launcher: what the engines say about themselves, and which prompts were taken
STOP_KEY = "stop"  # launcher to client: save after the step under way, and end
STOPPED_KEY = "stopped"  # client to launcher: that it did, after how many steps
CONNECT_TIMEOUT_S = 60.0
PART_BYTES = 4 << 20


def order_key(number: int) -> str:
    """Client to trainer: what to do next (`Orders`)."""
    return f"order/{number}"


def reply_key(number: int) -> str:
    """Rank 0 to client: how order `number` went."""
    return f"reply/{number}"


def engine_url_key(number: int) -> str:
    """Node of engine `number` to launcher: where it will answer."""
    return f"engine_url/{number}"


def engine_layout_key(digest: str) -> str:
    """Client to trainer: the boxes that each worker of an engine keeps."""
    return f"engine_layout/{digest}"


def meeting_key(generation: int) -> str:
    """Rank 0 to client: how engines meet the ranks of `generation` (a `weights.update.GroupUpdate`)."""
    return f"meeting/{generation}"


def connect_store(address: str, timeout_s: float) -> dist.TCPStore:
    """Joins the store that another process serves at `host:port`."""
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, int(port), is_master=False, timeout=timeout, wait_for_workers=False)


def put_bytes(store: dist.Store, key: str, data: bytes) -> None:
    """Leaves bytes of any number under `key`, which is there when all of them are; a store refuses more than 8 MiB."""
    parts = [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]
    for number, part in enumerate(parts):
        value: Any = part  # bytes are taken, though the annotation says str
        store.set(f"{key}/part{number}", value)
    store.set(key, str(len(parts)))


def get_bytes(store: dist.Store, key: str) -> bytes:
    """What `put_bytes` left; waits for it."""
    return b"".join(store.get(f"{key}/part{number}") for number in range(int(store.get(key))))


def delete_bytes(store: dist.Store, key: str) -> None:
    """What `put_bytes` left is gone."""
    for number in range(int(store.get(key))):
        store.delete_key(f"{key}/part{number}")
    store.delete_key(key)


class ControlTimeout(RuntimeError):
    """A message did not come in time."""


@dataclass(frozen=True)
class Control:
    """One process's connection. Use `serve` in the launcher and `connect` elsewhere."""

    address: str
    _store: dist.TCPStore

    @classmethod
    def serve(cls, host: str = "127.0.0.1") -> Control:
        """Starts the store in this process, on a free port. Raises RuntimeError where `host` is another machine."""
        timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
        try:
            store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        except dist.DistError as error:
            reason = str(error).partition("\n")[0]
            raise RuntimeError(
                f"the launcher cannot be reached as {host}, expected a name or address of this machine ({reason})"
            ) from None
        return cls(f"{host}:{store.port}", store)

    @classmethod
    def connect(cls, address: str) -> Control:
        """Joins the store at `host:port`."""
        return cls(address, connect_store(address, CONNECT_TIMEOUT_S))

    def post(self, key: str, message: Mapping[str, Any]) -> None:
        """Leaves `message` (anything JSON can say) for everybody who waits for `key`."""
        put_bytes(self._store, key, zlib.compress(json.dumps(message).encode(), level=1))

    def peek(self, key: str) -> dict[str, Any] | None:
        """The message posted under `key`, or None if there is none yet."""
        return self._read(key) if self._store.check([key]) else None

    def wait(self, key: str, timeout_s: float) -> dict[str, Any]:
        """The message posted under `key`; raises ControlTimeout after `timeout_s` seconds."""
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
        except dist.DistStoreError as error:
            raise ControlTimeout(f"waited {timeout_s:.0f} s for {key!r}, got nothing: {error}") from None
        return self._read(key)

    def take(self, key: str, timeout_s: float) -> dict[str, Any]:
        """As `wait`, and the message is gone."""
        message = self.wait(key, timeout_s)
        delete_bytes(self._store, key)
        return message

    def _read(self, key: str) -> dict[str, Any]:
        return dict(json.loads(zlib.decompress(get_bytes(self._store, key))))


class Inbox:
    """Orders as a rank sees them: iterate, and `answer` each before the next; "stop" is the last."""

    def __init__(self, control: Control, *, answers: bool, patience_s: float, start_s: float = 0.0) -> None:
        """`answers`: on the one rank that replies. `patience_s`: how long the next order may take; `start_s` longer the
        first one, before which engines start."""
        self._control, self._answers = control, answers
        self._patience_s, self._start_s = patience_s, start_s
        self._number = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            extra_s = self._start_s if self._number == 0 else 0.0
            order = self._control.wait(order_key(self._number), self._patience_s + extra_s)
            yield order
            if order["do"] == "stop":
                return
            self._number += 1

    def answer(self, reply: Mapping[str, Any]) -> None:
        """Says how the order at hand went."""
        if self._answers:
            self._control.post(reply_key(self._number), reply)


class Waiter:
    """Waits for messages beside an event loop: who waits has a connection for itself, and a thread."""

    def __init__(self, address: str) -> None:
        self._control, self._thread = Control.connect(address), ThreadPoolExecutor(1)

    async def wait(self, key: str, timeout_s: float) -> dict[str, Any]:
        """`Control.wait`."""
        return await self._beside(partial(self._control.wait, key, timeout_s))

    async def take(self, key: str, timeout_s: float) -> dict[str, Any]:
        """`Control.take`."""
        return await self._beside(partial(self._control.take, key, timeout_s))

    async def _beside(self, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


class Orders:
    """The client's orders to the ranks, one at a time, each done by all of them and answered by rank 0.

    An order is {"do": "send" | "train" | "save" | "stop", ...}: ranks wait for nothing else, so that weights can be
    asked for whenever an engine needs them and the ranks do not train. `version`: of the ranks' weights, which every
    order carries; a reply that carries one changes it, before any other order is given.
    """

    def __init__(self, control: Control, timeout_s: float) -> None:
        """`timeout_s`: how long a reply may take."""
        self.control, self.timeout_s = control, timeout_s
        self._replies = Waiter(control.address)
        self._turn = asyncio.Lock()
        self._given = 0
        self.version = 0

    async def do(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Waits for its turn, gives an order, and returns the answer. Raises ControlTimeout.

        An order that was begun is carried out also when nobody waits for it any more.
        """
        return await asyncio.shield(asyncio.create_task(self._do(order)))

    async def _do(self, order: Mapping[str, Any]) -> dict[str, Any]:
        async with self._turn:
            reply = await self._replies.take(reply_key(self._give(order)), self.timeout_s)
            self.version = reply.get("version", self.version)
            return reply

    async def end(self, order: Mapping[str, Any]) -> None:
        """The last order, which nobody answers; in its turn."""
        async with self._turn:
            self._give(order)

    def _give(self, order: Mapping[str, Any]) -> int:
        number = self._given
        self.control.post(order_key(number), {"version": self.version, **order})
        self._given += 1
        return number
