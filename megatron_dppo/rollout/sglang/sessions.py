"""What ways of giving weights to an SGLang server have in common: the protocol, and SGLang's sessions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

from megatron_dppo.rollout.engine import EngineError, Update
from megatron_dppo.rollout.http_client import HttpClient

UNUSABLE = -1  # the version of weights that are not whole
NO_SESSION, SESSION_OPEN = "no weight-update session is open", "session is already open"


class ServerWeights(Protocol):
    """A way to a server, whose requests are paused. Methods raise EngineError."""

    how: str  # in words

    async def layouts(self) -> list[dict[str, Any]]:
        """Every worker's `worker_weights.WorkerWeights.layout`."""
        ...

    async def fingerprints(self) -> list[dict[str, Any]]:
        """Every worker's `worker_weights.WorkerWeights.received`."""
        ...

    async def hand_over(self, update: Update, updates: int) -> None:
        """Gives an update, after `updates` before it, and has it checked."""
        ...

    async def put_in_use(self, version: int, updates: int) -> int:
        """Has the server take what it was given, flush its cache and name its weights; returns its updates."""
        ...

    async def discard(self) -> None:
        """Forgets what was given; the server has a name for the weights that it has."""
        ...

    async def close(self) -> None:
        """Gives back what it has at the server and here."""
        ...


class Sessions:
    """Updates stand between `/begin_weight_update` and `/end_weight_update` where the server has these (0.5.21)."""

    def __init__(self, http: HttpClient, *, wanted: bool) -> None:
        self._http, self._wanted = http, wanted

    async def begin(self) -> None:
        """SGLang undoes what it did to the loaded layout; a session that a client before left open will do."""
        if self._wanted:
            await self._unless(SESSION_OPEN, "/begin_weight_update")

    async def end(self) -> None:
        """SGLang prepares the loaded parameters for its kernels."""
        if self._wanted:
            await self._unless(NO_SESSION, "/end_weight_update")

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A session for what leaves the weights as they are."""
        await self.begin()
        try:
            yield
        finally:
            await self.end()

    async def _unless(self, done: str, path: str) -> None:
        try:
            await self._http.once("POST", path, {})
        except EngineError as error:
            if done not in str(error):
                raise
