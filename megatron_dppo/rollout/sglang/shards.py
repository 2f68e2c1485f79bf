"""Weights shard to shard: the server has `sglang_worker` as its weight loader, and each worker takes what it keeps."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from megatron_dppo.architecture import Architecture
from megatron_dppo.rollout.engine import EngineBadAnswer, EngineError, EngineUnreachable, Update
from megatron_dppo.rollout.http_client import HttpClient
from megatron_dppo.rollout.sglang.answer import wire_version
from megatron_dppo.rollout.sglang.message import LOADER, Call, answer_key
from megatron_dppo.rollout.sglang.sessions import UNUSABLE, Sessions
from megatron_dppo.weights.image import shown

STORE_TIMEOUT = timedelta(seconds=30)


class LoaderWeights:
    """See `ServerWeights`. Workers are called by `/update_weights_from_tensor`, and answer in a store."""

    how = "shard to shard"

    def __init__(
        self, http: HttpClient, sessions: Sessions, arch: Architecture, *, workers: int, model_dir: str
    ) -> None:
        self._http, self._sessions, self._arch = http, sessions, arch
        self._workers, self._model_dir = workers, model_dir
        self._calls = count()
        self._store: dist.TCPStore | None = None
        self._serves_the_model = False

    async def layouts(self) -> list[dict[str, Any]]:
        async with self._sessions.one():
            return await self._layouts()

    async def _layouts(self) -> list[dict[str, Any]]:
        """Raises EngineError where SGLang would leave out parts of the model."""
        answers = await self._call("layout")
        dropped = [name for name in _in_all(answers, "unread") if not self._may_be_unread(name)]
        if dropped or (unreached := _in_all(answers, "unreached")):
            what = (
                f"reads nothing of {len(dropped)} tensors ({shown(dropped)})"
                if dropped
                else f"has {len(unreached)} parameters that no tensor reaches ({shown(unreached)})"
            )
            raise EngineError(
                self._http.url, f"it {what}, without a word: this SGLang does not serve the config.json's model"
            )
        return answers

    def _may_be_unread(self, name: str) -> bool:
        """A head that is the embedding, and layers of multi-token prediction."""
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        tied = name == "lm_head.weight" and self._arch.tie_word_embeddings
        return tied or (layer.isdigit() and int(layer) >= self._arch.num_layers)

    async def fingerprints(self) -> list[dict[str, Any]]:
        async with self._sessions.one():
            return await self._call("received")

    async def hand_over(self, update: Update, updates: int) -> None:
        arguments = {"version": update.version, update.transport: update.as_json()}
        unusable = wire_version(UNUSABLE, updates) if update.transport == "group" else None
        await self._sessions.begin()
        if not self._serves_the_model:
            await self._layouts()
            self._serves_the_model = True
        await self._call("receive", arguments, names_weights=unusable)

    async def put_in_use(self, version: int, updates: int) -> int:
        # In this order, so that the server never has a name for weights that are not whole.
        await self._call("finish", names_weights=wire_version(UNUSABLE, updates))
        await self._http.once("POST", "/flush_cache", parse=False)
        states = await self._call("state")
        updates = int(states[0]["updates"])
        if any(state != {"version": version, "updates": updates} for state in states):
            raise EngineError(self._http.url, f"commit: the workers report {states}, expected version {version} of all")
        await self._call("state", names_weights=wire_version(version, updates))
        await self._sessions.end()
        return updates

    async def discard(self) -> None:
        await self._sessions.begin()
        states = await self._call("discard")
        version, updates = int(states[0]["version"]), int(states[0]["updates"])
        if any(state != states[0] for state in states):
            version = UNUSABLE
        await self._call("state", names_weights=wire_version(version, updates))
        await self._sessions.end()

    async def close(self) -> None:
        self._store = None

    async def _call(
        self, method: str, arguments: dict[str, Any] | None = None, *, names_weights: str | None = None
    ) -> list[dict[str, Any]]:
        """Every worker's answer, in order. `names_weights`: what the server calls its weights from then on."""
        store, address = self._served_store()
        call = Call(next(self._calls), method, arguments or {}, self._model_dir, address)
        body = {
            "serialized_named_tensors": [call.message()] * self._workers,
            "load_format": LOADER,
            "flush_cache": False,
            "weight_version": names_weights,
        }
        await self._http.once("POST", "/update_weights_from_tensor", body)
        answers = []
        for worker in range(self._workers):
            key = answer_key(call.number, worker)
            if not store.check([key]):
                raise EngineBadAnswer(
                    self._http.url, f"{method}: worker {worker} left no answer at {address}; its log may say why"
                )
            answers.append(json.loads(store.get(key)))
            store.delete_key(key)
        if errors := sorted({str(answer["error"]) for answer in answers if "error" in answer}):
            raise EngineError(self._http.url, f"{method}: {'; '.join(errors)}")
        return answers

    def _served_store(self) -> tuple[dist.TCPStore, str]:
        """Where workers leave their answers: served by this process."""
        host = own_address(self._http.url)
        if self._store is None:
            self._store = dist.TCPStore(host, 0, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False)
        return self._store, f"{host}:{self._store.port}"


def own_address(url: str) -> str:
    """Of this machine, as the one at `url` sees it. Raises EngineUnreachable."""
    where = urlsplit(url)
    try:
        found = socket.getaddrinfo(where.hostname or "localhost", where.port or 80, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineUnreachable(url, f"no way to {where.hostname}: {error}") from error


def _in_all(answers: Sequence[dict[str, Any]], name: str) -> list[str]:
    """What is in a list of every worker's answer; a worker may have nothing but padding of a small vocabulary."""
    return sorted(set.intersection(*(set(answer[name]) for answer in answers)))
