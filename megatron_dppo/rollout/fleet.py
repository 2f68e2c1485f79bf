"""All engines of a job as one: new weights for every one of them, samples from any, and what to do when one is lost.

An engine gets no prompt before it has the current weights. Weights come from the trainer's ranks, who send them
whenever they are told to (`control.Orders`) and do not train meanwhile. Requests in flight are held while their engine
is updated, and go on with the new weights.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dppo.control import Orders, Waiter, engine_layout_key, meeting_key
from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.rollout.engine import (
    Capabilities,
    EngineError,
    EngineNotReady,
    EngineRestarted,
    EngineUnreachable,
    GroupUpdate,
    Manifest,
    RolloutEngine,
    Sampling,
    Transport,
    Update,
)

Failures = dict[RolloutEngine, EngineError]
POLL_S = 1.0
ANSWER_S = 30.0  # for an engine that is looked at anew
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One sample. Requests of the same `spread` go to the same engine, where they share the prompt's cache."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    request_id: str
    group_id: str
    spread: int


class Fleet:
    """Engines that are lost (they do not answer, or were restarted) are brought back where that can be done."""

    def __init__(
        self,
        engines: Sequence[RolloutEngine],
        orders: Orders,
        *,
        transport: Transport,
        attempts: int = 3,
        patience_s: float = 300.0,
        check: Callable[[str, Capabilities], None] = lambda url, found: None,
        fingerprints: bool = False,
    ) -> None:
        """`attempts`: of an update, at engines that answer. `patience_s`: for the last engine to come back. `check`:
        raises ValueError for an engine that will not do. `fingerprints`: let engines take checksums of what they get.
        """
        self.engines = list(engines)
        self.living = list(engines)
        self._orders, self._transport = orders, transport
        self._attempts, self._patience_s, self._check = attempts, patience_s, check
        self._fingerprints = fingerprints
        self._meetings = Waiter(orders.control.address)
        self._mending = asyncio.Lock()
        self._losses: Counter[RolloutEngine] = Counter()  # how often each was lost: errors of before are old news
        self._given_up: Exception | None = None
        # Names of groups must be new to engines that have served other jobs: numbers that only time brings.
        self._generation = time.time_ns()
        self._met: list[RolloutEngine] = []  # who can be sent to without a new meeting
        self._layout = ""  # the digest of what each of them keeps

    # ---- weights ----

    async def update(self, version: int) -> None:
        """Gives `version`, which the ranks have, to all engines, those that were lost and are back included.

        Raises EngineError naming an engine that answers and cannot be updated, or one that was lost when none is left.
        """
        self._orders.version = version
        async with self._mending:
            if self._given_up:
                raise self._given_up
            lost = [engine for engine in self.engines if engine not in self.living]
            error = await self._bring([*self.living, *await self._back(lost)])
            if not self.living:
                await self._wait_for_one(error or EngineUnreachable(self.engines[0].url, "no engine answers"))

    async def _back(self, lost: Sequence[RolloutEngine]) -> list[RolloutEngine]:
        """Those that answer again."""
        answers = await asyncio.gather(*map(self._answers, lost))
        back = [engine for engine, answer in zip(lost, answers, strict=True) if answer]
        for engine in back:
            self._met = []  # a meeting of before would let them wait while ranks still train
            log.warning("engine %s is back", engine.url)
        return back

    async def _wait_for_one(self, error: EngineError) -> None:
        """Until some engine is back and up to date; raises `error` when patience is at its end."""
        give_up = time.monotonic() + self._patience_s
        while not self.living:
            if time.monotonic() > give_up:
                raise error
            await asyncio.sleep(POLL_S)
            await self._bring(await self._back(self.engines))

    async def _bring(self, engines: Sequence[RolloutEngine]) -> EngineError | None:
        """Gives the current weights to `engines`, which are living afterwards, or left out if they do not answer.

        Returns the last error, if any.
        """
        left, updated, error = list(engines), [], None
        for attempt in range(self._attempts):
            failures = await self._send(left)
            updated += [engine for engine in left if engine not in failures]
            left = []
            for engine, error in failures.items():
                self._losses[engine] += 1  # it may have been restarted, and answered from the weights of its start
                log.warning("version %d, attempt %d: %s", self._orders.version, attempt + 1, error)
                if await self._answers(engine):
                    left.append(engine)
            self.living = [e for e in self.engines if e in updated or (e in self.living and e not in engines)]
            if not left:
                return error
        tried = f"version {self._orders.version} could not be brought to it in {self._attempts} attempts"
        raise EngineError(left[0].url, f"{tried}; the last: {failures[left[0]]}")

    async def _answers(self, engine: RolloutEngine) -> bool:
        """Looks at an engine anew. Raises what `check` does."""
        try:
            async with asyncio.timeout(ANSWER_S):
                await engine.rejoin()
                self._check(engine.url, await engine.capabilities())
        except (EngineUnreachable, TimeoutError):
            return False
        return True

    async def _send(self, engines: Sequence[RolloutEngine]) -> Failures:
        """Has the ranks send the current weights; returns who did not get them, and why. The others are in use."""
        failures = await _each(engines, self._prepare)
        able = [engine for engine in engines if engine not in failures]
        if not able:
            return failures
        if self._transport in ("group", "ipc"):
            return failures | await self._send_by_group(able)
        return failures | await self._send_by_file(able)

    async def _prepare(self, engine: RolloutEngine) -> None:
        """Pauses an engine; one that was restarted meanwhile is looked at anew, and has to be met anew."""
        await engine.pause("keep")
        try:
            await engine.health()
        except EngineRestarted as error:
            self._met = []
            self._losses[engine] += 1  # what it has sampled since is from the weights of its start
            if not await self._answers(engine):
                raise EngineUnreachable(engine.url, "it was restarted, and does not answer any more") from error

    async def _send_by_file(self, engines: Sequence[RolloutEngine]) -> Failures:
        reply = await self._orders.do({"do": "send", "transport": self._transport})
        manifest = dataclasses.replace(Manifest.from_json(reply["file"]), fingerprints=self._fingerprints)
        return await _each(engines, lambda engine: self._take(engine, manifest))

    async def _send_by_group(self, engines: Sequence[RolloutEngine]) -> Failures:
        if self._met != engines and (failures := await self._introduce(engines)):
            unsent = "nothing was sent: another engine did not say what it keeps"
            return {engine: failures.get(engine) or EngineError(engine.url, unsent) for engine in engines}
        order = {
            "do": "send",
            "transport": self._transport,
            "instances": len(engines),
            "generation": self._generation,
            "layout": self._layout,
        }
        sending = asyncio.create_task(self._orders.do(order))
        meeting = await self._meetings.wait(meeting_key(self._generation), self._orders.timeout_s)
        own = {"version": self._orders.version, "fingerprints": self._fingerprints}
        updates = {e: GroupUpdate(**{**meeting, **own, "instance": i}) for i, e in enumerate(engines)}
        failures = await self._take_until(updates, sending, meeting["timeout_s"])
        errors = (await sending)["errors"]
        for error in errors:
            log.warning("version %d: %s", self._orders.version, error)
        self._met = [] if failures or errors else list(engines)
        return failures

    async def _introduce(self, engines: Sequence[RolloutEngine]) -> Failures:
        """A new generation of these engines, whose layout the ranks can read; returns who did not say its own."""
        layouts: dict[RolloutEngine, str] = {}

        async def look(engine: RolloutEngine) -> None:
            layouts[engine] = await self._publish_layout(engine)

        if failures := await _each(engines, look):
            return failures
        _require_alike(layouts)
        self._generation += 1
        self._layout = layouts[engines[0]]
        return {}

    async def _take_until(
        self, updates: Mapping[RolloutEngine, Update], sending: asyncio.Task[Any], grace_s: float
    ) -> Failures:
        """Engines take their updates; `grace_s` after the ranks have sent, those that have not are given up."""
        deadlines: dict[RolloutEngine, asyncio.Timeout] = {}

        async def take(engine: RolloutEngine) -> None:
            try:
                async with asyncio.timeout(None) as deadlines[engine]:
                    await self._take(engine, updates[engine])
            except TimeoutError:
                message = f"its update did not end in {grace_s:.0f} s after the ranks'"
                raise EngineUnreachable(engine.url, message) from None
            finally:
                del deadlines[engine]

        taking = asyncio.create_task(_each(updates, take))
        await asyncio.wait([sending])
        for deadline in deadlines.values():
            deadline.reschedule(asyncio.get_running_loop().time() + grace_s)
        return await taking

    async def _take(self, engine: RolloutEngine, update: Update) -> None:
        await engine.begin_update(update.version, update)
        await engine.commit()  # asks the engine for its version, too

    async def _publish_layout(self, engine: RolloutEngine) -> str:
        """Leaves what the engine's workers keep for the ranks; returns its digest."""
        workers = [[dataclasses.astuple(box) for box in boxes] for boxes in await engine.layout()]
        digest = hashlib.sha256(json.dumps(workers).encode()).hexdigest()
        if self._orders.control.peek(engine_layout_key(digest)) is None:
            self._orders.control.post(engine_layout_key(digest), {"workers": workers})
        return digest

    # ---- sampling ----

    async def sample(self, requests: Sequence[Request]) -> list[Trajectory]:
        """A response to each request, from the current weights; those of an update meanwhile are for the tokens after.

        Raises EngineError when no engine is left, or for a request that fails wherever it goes.
        """
        results = list(await asyncio.gather(*map(self._sample, requests)))
        while True:
            await self._mend_restarted()
            # Until somebody noticed, a server that was restarted has answered from the weights of its start.
            again = [i for i, (engine, losses, _) in enumerate(results) if self._losses[engine] != losses]
            if not again:
                return [trajectory for *_, trajectory in results]
            log.warning("%d samples are taken again", len(again))
            for i, result in zip(again, await asyncio.gather(*(self._sample(requests[i]) for i in again)), strict=True):
                results[i] = result

    async def _sample(self, request: Request) -> tuple[RolloutEngine, int, Trajectory]:
        """The response, who gave it, and how often that engine had been lost when it was asked."""
        failures = 0
        while True:
            if self._given_up:
                raise self._given_up
            if not self.living:
                async with self._mending:  # somebody waits for one to come back
                    continue
            engine = self.living[request.spread % len(self.living)]
            losses = self._losses[engine]
            try:
                trajectory = await engine.generate(
                    request.prompt_ids, request.sampling, request.request_id, group_id=request.group_id
                )
            except (EngineUnreachable, EngineRestarted, EngineNotReady) as error:
                failures += 1
                if failures > self._attempts + len(self.engines):
                    raise
                await self._mend(engine, error, losses)
            else:
                return engine, losses, trajectory

    async def _mend_restarted(self) -> None:
        async with self._mending:  # in the middle of an update an engine has neither weights
            failures = await _each(list(self.living), lambda engine: engine.health())
        for engine, error in failures.items():
            if not isinstance(error, EngineUnreachable | EngineRestarted):
                raise error
            await self._mend(engine, error, self._losses[engine])

    async def _mend(self, engine: RolloutEngine, error: EngineError, losses: int) -> None:
        """Brings an engine back with the current weights, or goes on without it; waits for the last one.

        `losses`: of the engine when what failed was begun.
        """
        if engine not in self.living or self._losses[engine] != losses:
            if not self.living:
                async with self._mending:  # another request is seeing to it
                    pass
            return
        log.warning("%s", error)
        self.living.remove(engine)
        self._losses[engine] += 1
        async with self._mending:
            if engine in self.living:
                return  # an update has brought it back
            try:
                if not self.living:
                    await self._wait_for_one(error)
                elif await self._back([engine]):
                    await self._bring([engine])
            except Exception as error:
                self._given_up = error  # of all who wait
                raise


async def _each(engines: Iterable[RolloutEngine], action: Callable[[RolloutEngine], Awaitable[Any]]) -> Failures:
    """Does something to all engines at the same time; returns which of them failed."""
    chosen = list(engines)
    results = await asyncio.gather(*map(action, chosen), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, EngineError):
            raise result
    return {e: result for e, result in zip(chosen, results, strict=True) if isinstance(result, EngineError)}


def _require_alike(layouts: dict[RolloutEngine, str]) -> None:
    first, *others = layouts
    for other in others:
        if layouts[other] != layouts[first]:
            raise ValueError(
                f"engines {first.url} and {other.url} keep different parts of the weights, expected the same of all: "
                "start them alike, or set sync.transport to shm or disk"
            )
