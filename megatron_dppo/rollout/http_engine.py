"""What engines behind HTTP have in common: the order of things, and which weights each token is from.

A client stamps every token with the version it committed itself. A fleet pauses with "keep": what is in flight is
held by the server and goes on with the new weights, its tokens of one version before and another after
(`Flight.spans`). With "wait" and "abort" nothing of its own is in flight while weights change, also not on the way to
the server, where a paused engine would queue it: `pause` first empties the client. `generate` is refused until `resume`
or `commit`.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args
from uuid import uuid4

from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.rollout.answers import room_for_response
from megatron_dppo.rollout.engine import Capabilities, EngineError, EngineNotReady, EngineRestarted, PauseMode, Sampling
from megatron_dppo.rollout.http_client import HttpClient
from megatron_dppo.weights.fingerprint import MODULUS
from megatron_dppo.weights.layout import Box
from megatron_dppo.weights.update import Update

State = Literal["ready", "paused", "updating", "unusable"]
ABORT_POLL_S = 0.2
ABORT_S = 5.0  # for a server to hear of a cancelled request


@dataclass(eq=False)
class Flight:
    """A request at the engine: which of its tokens come from which weights, as (first token, version)."""

    wire_id: str  # by which the server knows it: two samples, or another client's, may have the same id
    spans: list[tuple[int, int]]
    tokens: int = 0  # sampled when it was last held


def wire_id(request_id: str) -> str:
    return f"{request_id}.{uuid4().hex}"


class HttpEngine(abc.ABC):
    """One server, as `engine.RolloutEngine` wants it; use it from one event loop. Subclasses know its routes.

    Args:
        concurrency: `generate` calls sent at a time; further ones wait in the client.
        timeout_s, connect_timeout_s, attempts, backoff_s: as for `HttpClient`. What changes weights is sent once.
    """

    sampling_path: ClassVar[str]
    id_field: ClassVar[str]  # of a request
    health_path: ClassVar[str]  # asks the process that computes, also one that is paused

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
        attempts: int = 4,
        backoff_s: float = 0.25,
    ) -> None:
        self.http = HttpClient(
            url,
            connections=concurrency,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            attempts=attempts,
            backoff_s=backoff_s,
            sampling_path=self.sampling_path,
        )
        self.url = self.http.url
        self._slots = asyncio.Semaphore(concurrency)
        self._probing = asyncio.Lock()
        self._capabilities: Capabilities | None = None
        self._version = 0  # of the weights in use, as this client knows; asked from the engine by the probe
        self._updates = 0  # that the engine has taken since its start: tells one that was restarted
        self._staged_version: int | None = None
        self._state: State = "ready"
        self._in_flight = 0
        self._flights: set[Flight] = set()
        self._held = False  # requests are kept in a paused server
        self._ending = False  # by pause("abort"): what is in flight is to come back as it is
        self._open = asyncio.Event()  # set when `generate` need not wait for held requests to go on
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()

    # ---- what a subclass knows ----

    @abc.abstractmethod
    async def _probe(self) -> Capabilities:
        """Asks the server what it is. Raises EngineError for one that will not do."""

    @abc.abstractmethod
    async def _weights(self) -> tuple[int, int]:
        """Version of the weights in use (-1 unusable), and how many updates the engine has taken since its start."""

    @abc.abstractmethod
    async def _worker_layouts(self) -> list[dict[str, Any]]:
        """Every worker's `worker_weights.WorkerWeights.layout`."""

    @abc.abstractmethod
    async def _worker_fingerprints(self) -> list[dict[str, Any]]:
        """Every worker's `worker_weights.WorkerWeights.received`."""

    @abc.abstractmethod
    def _request(
        self, facts: Capabilities, prompt_ids: Sequence[int], sampling: Sampling, request_id: str
    ) -> dict[str, Any]:
        """The JSON of a sample but for its id. Raises ValueError as `RolloutEngine.generate` says."""

    @abc.abstractmethod
    def _parse(
        self,
        facts: Capabilities,
        answer: dict[str, Any],
        prompt_ids: Sequence[int],
        sampling: Sampling,
        spans: Sequence[tuple[int, int]],
        request_id: str,
        group_id: str,
    ) -> Trajectory:
        """A validated trajectory from the answer. Raises EngineBadAnswer that says what is wrong with it."""

    async def _abort(self, wire_id: str) -> None:
        """Has the server forget a request for which nobody waits any more, where it would not see that at once."""
        return

    @abc.abstractmethod
    async def _pause_server(self, mode: PauseMode) -> None: ...

    @abc.abstractmethod
    async def _resume_server(self) -> None: ...

    @abc.abstractmethod
    async def _progress(self) -> Mapping[str, int]:
        """How many tokens each held request has, by the id that the client sent; those without any may be missing."""

    @abc.abstractmethod
    async def _hand_over(self, update: Update) -> None:
        """Gives an update to the engine, whose sampling is paused, and has it checked."""

    @abc.abstractmethod
    async def _put_in_use(self, version: int) -> int:
        """Has the engine take what it was given and forget what it cached; returns its number of updates."""

    @abc.abstractmethod
    async def _discard(self) -> int:
        """Has the engine forget what it was given; returns the version of the weights that it has."""

    # ---- facts ----

    async def capabilities(self) -> Capabilities:
        async with self._probing:
            if self._capabilities is None:
                found = await self._probe()
                self._version, self._updates = await self._weights()
                if self._version < 0:
                    self._state = "unusable"
                self._capabilities = found
            return self._capabilities

    async def version(self) -> int:
        return (await self._weights())[0]

    async def layout(self) -> list[list[Box]]:
        await self.capabilities()
        answers = sorted(await self._worker_layouts(), key=lambda answer: int(answer["worker"]))
        return [[*map(Box.from_json, answer["boxes"])] for answer in answers]

    async def checksum(self) -> dict[str, int]:
        await self.capabilities()
        answers = sorted(await self._worker_fingerprints(), key=lambda answer: int(answer["worker"]))
        found: dict[str, dict[tuple[Box, ...], int]] = {}
        for boxes, answer in zip(await self.layout(), answers, strict=True):
            kept: dict[str, list[Box]] = {}
            for box in boxes:
                kept.setdefault(box.tensor, []).append(box)
            for name, value in answer["fingerprints"].items():
                same = found.setdefault(name, {})
                if same.setdefault(tuple(kept[name]), value) != value:
                    raise EngineError(
                        self.url, f"checksum: workers that keep the same of {name} received other numbers"
                    )
        return {name: sum(of_boxes.values()) % MODULUS for name, of_boxes in found.items()}

    async def health(self) -> None:
        await self.capabilities()
        await self.http.retrying("GET", self.health_path, parse=False)
        await self._check_version()

    async def rejoin(self) -> None:
        self._capabilities, self._staged_version, self._state = None, None, "ready"
        try:
            await self.capabilities()  # says whether its weights are usable
        finally:
            self._release()

    async def _check_version(self) -> None:
        version, updates = await self._weights()
        if (version, updates) != (self._version, self._updates):
            raise EngineRestarted(
                self.url,
                f"got weights of version {version}, expected {self._version} (updates since its start: {updates}, "
                f"expected {self._updates}): restarted, or updated by another client; send it the current weights",
            )

    # ---- sampling ----

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str, *, group_id: str = ""
    ) -> Trajectory:
        room_for_response(await self.capabilities(), prompt_ids, sampling, request_id)  # refused before it waits
        await self._open.wait()
        async with self._flight(), self._slots:
            return await self._respond(prompt_ids, sampling, request_id, group_id)

    async def _respond(
        self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str, group_id: str
    ) -> Trajectory:
        """A whole response, in the slot of its own."""
        return await self._sample(prompt_ids, sampling, request_id, group_id)

    async def _sample(
        self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str, group_id: str, *, goes_on: bool = False
    ) -> Trajectory:
        """What one request brings; `goes_on`: with a response that was begun, for whose end a pause waits."""
        facts = await self.capabilities()
        body = self._request(facts, prompt_ids, sampling, request_id)
        await self._open.wait()
        if not (goes_on and self._state == "paused"):
            self._require_ready()  # it may have been paused while this call waited for its slot
        flight = Flight(wire_id(request_id), [(0, self._version)])
        body[self.id_field] = flight.wire_id
        self._flights.add(flight)
        try:
            answer = await self.http.retrying(
                "POST",
                self.sampling_path,
                body,
                before_repeating=partial(self._begin_anew, flight, body, request_id),
            )
        except asyncio.CancelledError:
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(ABORT_S):
                    await self._abort(flight.wire_id)
            raise
        finally:
            self._flights.remove(flight)
        return self._parse(facts, answer, prompt_ids, sampling, flight.spans, request_id, group_id)

    async def _begin_anew(self, flight: Flight, body: dict[str, Any], request_id: str) -> None:
        """Makes sure that no restart brought other weights. The server may still have what was sent before."""
        await self._open.wait()  # in the middle of an update it has neither weights
        self._require_ready()
        await self._check_version()
        flight.spans, flight.tokens = [(0, self._version)], 0
        flight.wire_id = body[self.id_field] = wire_id(request_id)

    @contextlib.asynccontextmanager
    async def _flight(self) -> AsyncIterator[None]:
        """Count a request of this client as in flight, its wait for a slot included."""
        self._require_ready()
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    def _require_ready(self) -> None:
        why = {
            "paused": "it is paused, expected resume() first",
            "updating": "a weight update is under way, expected commit() or abort_update() first",
            "unusable": "its weights are unusable after a failed update, expected a full update first",
        }
        if self._state != "ready":
            raise EngineNotReady(self.url, f"generate refused: {why[self._state]}")

    async def pause(self, mode: PauseMode) -> None:
        if mode not in get_args(PauseMode):
            raise ValueError(f"pause: got mode {mode!r}, expected one of {', '.join(get_args(PauseMode))}")
        if self._state == "updating":
            raise EngineError(self.url, "pause refused: the engine is updating")
        if self._held and mode != "keep":
            raise EngineError(self.url, "pause refused: requests are held, expected resume() or an update first")
        if self._state == "ready":  # an unusable one stays so until a full update has succeeded
            self._state = "paused"
        if mode == "keep":
            self._held = True
            self._open.clear()
            try:
                await self._pause_server(mode)
                await self._count_tokens()
            except EngineError:
                self._release()  # nobody waits for what may never go on
                raise
            return
        self._ending = mode == "abort"
        if mode == "wait":
            await self._idle.wait()
        await self._pause_server(mode)
        while not self._idle.is_set():
            # A request that was on its way arrived after the abort and waits in the paused server: again.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), ABORT_POLL_S)
                break
            await self._pause_server(mode)

    def _release(self) -> None:
        self._held = self._ending = False
        self._open.set()

    async def _count_tokens(self) -> None:
        """How far every held request has come; one that the engine never saw has no token yet."""
        progress = await self._progress()
        for flight in self._flights:
            flight.tokens = max(flight.tokens, progress.get(flight.wire_id, 0))

    async def resume(self) -> None:
        if self._state not in ("ready", "paused"):
            raise EngineError(self.url, f"resume refused: the engine is {self._state}")
        await self._resume_server()
        self._state = "ready"
        self._release()

    # ---- weights ----

    async def begin_update(self, update: Update) -> None:
        await self.capabilities()
        if self._in_flight and not self._held:
            raise EngineError(self.url, f"update refused: {self._in_flight} requests in flight, expected pause() first")
        if self._staged_version is not None:
            raise EngineError(
                self.url, "update refused: another is handed over, expected commit() or abort_update() first"
            )
        if self._state != "unusable":  # over a group the model changes as numbers come, from a file at `commit`
            self._state = "unusable" if update.transport == "group" else "updating"
        if not self._held:
            await self._pause_server("wait")  # after pause() already done; else for requests of other clients
        try:
            await self._hand_over(update)
        except EngineError:
            if self._state == "unusable":
                self._open.set()  # who waits for held requests to go on learns that they do not
            raise
        self._staged_version = update.version

    async def commit(self) -> None:
        if self._staged_version is None:
            raise EngineError(self.url, "commit refused: no update was handed over, expected begin_update() first")
        version, self._staged_version = self._staged_version, None
        self._state = "unusable"  # until all of this has succeeded
        updates = await self._put_in_use(version)
        for flight in self._flights:
            flight.spans.append((flight.tokens, version))
        await self._resume_server()
        self._version, self._updates, self._state = version, updates, "ready"
        self._release()

    async def abort_update(self) -> None:
        self._staged_version = None
        found = await self._discard()
        if found < 0 or found != self._version:
            self._state = "unusable"
            raise EngineError(
                self.url,
                f"abort_update: got weights of version {found}, expected {self._version}; send a full update",
            )
        await self._resume_server()
        self._state = "ready"
        self._release()

    async def close(self) -> None:
        await self.http.close()
