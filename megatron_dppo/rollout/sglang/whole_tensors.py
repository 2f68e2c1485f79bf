"""Whole tensors by bucket: a stock SGLang server, without our loader, gets a file's weights from the client.

The client is rank 0 of a gloo group of SGLang's own (`/init_weights_update_group`), and broadcasts buckets that
SGLang's loaders take (`/update_weights_from_distributed`, one flat tensor of bytes each). The file lies where the
client sees it; the server may be anywhere. All of a model goes to every worker: a server with our loader gets far less.

SGLang drops names that it does not know and says that all went well. The first update is therefore given twice, from
different random weights each time (`/weights_checker`): what differs afterwards was not in it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator, Mapping
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_dppo.architecture import Architecture
from megatron_dppo.control import connect_store
from megatron_dppo.rollout.engine import EngineError, Manifest, Update
from megatron_dppo.rollout.http_client import HttpClient
from megatron_dppo.rollout.sglang.answer import wire_version
from megatron_dppo.rollout.sglang.sessions import UNUSABLE, Sessions
from megatron_dppo.rollout.sglang.shards import own_address
from megatron_dppo.weights.image import checked_tensors, map_tensors, shown
from megatron_dppo.weights.mapping import hub_shapes

BUCKET_BYTES = 512 << 20
GROUP_TIMEOUT = timedelta(seconds=120)
LEAVE_S = 5.0  # for a server to hear that a group has ended
VOCABULARY_MULTIPLE = 64  # to which SGLang pads: no update reaches rows beyond the vocabulary
VOCABULARY_PARAMETERS = ("embed_tokens.weight", "lm_head.weight")
Checksums = list[dict[str, str]]  # of every parameter, a worker each


class BucketWeights:
    """See `sglang_weights.ServerWeights`; `updates` are counted here, by the name of the server's weights."""

    how = "whole tensors, in buckets"
    bucket_bytes = BUCKET_BYTES

    def __init__(self, http: HttpClient, sessions: Sessions, arch: Architecture, *, workers: int) -> None:
        self._http, self._sessions, self._arch, self._workers = http, sessions, arch, workers
        self._staged: Manifest | None = None
        self._group: dist.ProcessGroup | None = None
        self._meeting: dist.TCPStore | None = None  # where its members find each other; served here
        self._group_name = ""
        self._proved = False

    async def layouts(self) -> list[dict[str, Any]]:
        raise EngineError(
            self._http.url,
            "it takes whole tensors only: expected sync.transport shm or disk, or a server with our loader "
            "(sglang_server.server_command)",
        )

    async def fingerprints(self) -> list[dict[str, Any]]:
        raise EngineError(self._http.url, "checksum: a server without our loader does not take fingerprints")

    async def hand_over(self, update: Update, updates: int) -> None:
        if not isinstance(update, Manifest):
            await self.layouts()  # says why not
            return
        self._staged = None
        try:
            shapes = {name: tuple(shape) for name, shape in hub_shapes(self._arch).items()}
            await asyncio.to_thread(checked_tensors, update, shapes, needed=set(shapes))
        except (ValueError, OSError) as error:
            raise EngineError(self._http.url, f"{type(error).__name__}: {error}") from error
        self._staged = update

    async def put_in_use(self, version: int, updates: int) -> int:
        manifest, self._staged = self._staged, None
        assert manifest is not None, "the client hands over before it commits"
        tensors = dict(map_tensors(manifest))
        unusable = wire_version(UNUSABLE, updates)
        if not self._proved:
            await self._check_weights("checksum")  # before anything is lost: some versions cannot, on a CPU
        await self._name_weights(unusable)  # a load that fails midway leaves the name that they had
        if not self._proved:
            first = await self._from_other_weights(tensors, unusable)
            second = await self._from_other_weights(tensors, unusable)
            if left := sorted({n for a, b in zip(first, second, strict=True) for n in a if a[n] != b.get(n)}):
                raise EngineError(
                    self._http.url,
                    f"{len(left)} parameters are not, or not all, replaced by an update ({shown(left)}): this SGLang "
                    "does not serve the config.json's model",
                )
            self._proved = True
        else:
            await self._send(tensors, unusable)
        await self._http.once("POST", "/flush_cache", parse=False)
        await self._name_weights(wire_version(version, updates + 1))
        return updates + 1

    async def discard(self) -> None:
        self._staged = None

    async def close(self) -> None:
        if self._group is not None:
            await self._leave()

    async def _from_other_weights(self, tensors: Mapping[str, Tensor], unusable: str) -> Checksums:
        """Checksums of what an update makes of random weights."""
        await self._check_weights("reset_tensors")
        await self._send(tensors, unusable)
        ranks = (await self._check_weights("checksum"))["ranks"]
        padded = self._arch.vocab_size % VOCABULARY_MULTIPLE != 0
        return [
            {
                name: value
                for name, value in rank["checksums"].items()
                if not (padded and name.endswith(VOCABULARY_PARAMETERS))
            }
            for rank in ranks
        ]

    async def _name_weights(self, name: str) -> None:
        body = {"new_version": name, "abort_all_requests": False}
        await self._http.once("POST", "/update_weight_version", body)

    async def _check_weights(self, action: str) -> dict[str, Any]:
        return await self._http.once("POST", "/weights_checker", {"action": action})

    async def _send(self, tensors: Mapping[str, Tensor], named: str) -> None:
        """Broadcasts tensors, a bucket and a request at a time; `named`: what the server calls its weights then."""
        group = await self._joined()
        await self._sessions.begin()
        for bucket in buckets_of(tensors, self.bucket_bytes):
            names = list(bucket)
            body = {
                "names": names,
                "dtypes": [str(bucket[name].dtype).removeprefix("torch.") for name in names],
                "shapes": [list(bucket[name].shape) for name in names],
                "group_name": self._group_name,
                "load_format": "flattened_bucket",
                "flush_cache": False,
                "weight_version": named,
            }
            flat = torch.cat([bucket[name].contiguous().flatten().view(torch.uint8) for name in names])
            sent = asyncio.to_thread(_broadcast, group, flat)
            asked = self._http.once("POST", "/update_weights_from_distributed", body)
            await self._both(sent, asked)
        await self._sessions.end()

    async def _joined(self) -> dist.ProcessGroup:
        """The group of this process and the server's workers, which a failure ends."""
        if self._group is None:
            host, size, self._group_name = own_address(self._http.url), self._workers + 1, f"weights-{uuid4().hex}"
            self._meeting = dist.TCPStore(
                host, 0, size, is_master=True, timeout=GROUP_TIMEOUT, wait_for_workers=False
            )  # fmt: skip
            body = {
                "master_address": host,
                "master_port": self._meeting.port,
                "rank_offset": 1,
                "world_size": size,
                "group_name": self._group_name,
                "backend": "gloo",
            }
            joined = asyncio.to_thread(_join, f"{host}:{self._meeting.port}", size, self._group_name)
            self._group = await self._both(joined, self._http.once("POST", "/init_weights_update_group", body))
        return self._group

    async def _both(self, ours: Awaitable[Any], servers: Awaitable[Any]) -> Any:
        """What both sides of the group do at the same time; returns our result. Raises EngineError."""

        async def result(awaitable: Awaitable[Any]) -> Any:
            return await awaitable

        try:
            async with asyncio.TaskGroup() as both:
                own = both.create_task(result(ours))
                both.create_task(result(servers))
        except BaseException as error:
            await self._leave()  # somebody may still wait in it
            if not isinstance(error, ExceptionGroup):
                raise
            faults = "; ".join(map(str, error.exceptions))
            raise EngineError(self._http.url, f"weight update: {faults}") from error
        return own.result()

    async def _leave(self) -> None:
        """The next update meets anew. Whoever waits for the others where they were to meet learns that it is gone."""
        group, self._group, self._meeting = self._group, None, None
        if group is not None:
            with contextlib.suppress(Exception):
                dist.destroy_process_group(group)
        with contextlib.suppress(EngineError, TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self._http.once("POST", "/destroy_weights_update_group", {"group_name": self._group_name})


def buckets_of(tensors: Mapping[str, Tensor], bucket_bytes: int) -> Iterator[Mapping[str, Tensor]]:
    """Tensors of one dtype together, in order, as many as fit; one that is larger has a bucket of its own."""
    bucket: dict[str, Tensor] = {}
    nbytes = 0
    for name, tensor in tensors.items():
        another = bool(bucket) and tensor.dtype != next(iter(bucket.values())).dtype
        if bucket and (another or nbytes + tensor.nbytes > bucket_bytes):
            yield bucket
            bucket, nbytes = {}, 0
        bucket[name], nbytes = tensor, nbytes + tensor.nbytes
    if bucket:
        yield bucket


def _join(meeting: str, size: int, name: str) -> dist.ProcessGroup:
    """As SGLang's workers do (`init_custom_process_group`): a group beside any default one, this process rank 0."""
    store = connect_store(meeting, GROUP_TIMEOUT.total_seconds())
    new_group: Any = distributed_c10d._new_process_group_helper
    backend = distributed_c10d.Backend("gloo")
    group, _ = new_group(size, 0, [], backend, dist.PrefixStore(name, store), group_name=name, timeout=GROUP_TIMEOUT)
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


def _broadcast(group: dist.ProcessGroup, flat: Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout = 0, 0, GROUP_TIMEOUT
    group.broadcast([flat], options).wait()
