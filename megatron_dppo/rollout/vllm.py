"""`VllmEngine`: a vLLM server as a rollout engine, over HTTP. Token ids in, token ids and log-probs out.

The server is started by `vllm_server`, its workers carry `vllm_worker.WorkerExtension`. Needs vLLM's
development routes (pause, weight transfer, collective_rpc) and the scale-out route `/inference/v1/generate`.

A client stamps every token with the version it committed itself. For that to be true nothing of its own may
be in flight while weights change, also not on the way to the server, where a paused engine would queue it and
sample it later from the new weights: `pause` therefore first empties the client, and `generate` is refused
until `resume` or `commit`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from uuid import uuid4

import aiohttp
from tenacity import (
    AsyncRetrying,
    RetryError,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from megatron_dppo.rollout.engine import (
    Capabilities,
    EngineBadAnswer,
    EngineError,
    EngineNotReady,
    EngineRestarted,
    EngineUnreachable,
    PauseMode,
    Sampling,
    Update,
)
from megatron_dppo.rollout.trajectory import Trajectory
from megatron_dppo.rollout.vllm_answer import parse_answer, request_body
from megatron_dppo.weights.fingerprint import MODULUS
from megatron_dppo.weights.layout import Box

State = Literal["ready", "paused", "updating", "unusable"]
GENERATE = "/inference/v1/generate"
TRANSPORT_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)
ABORT_POLL_S = 0.2
MESSAGE_CHARS = 500  # of a server's error body in our message


class _ServerFault(Exception):
    """A 5xx answer."""


@dataclass
class _Flight:
    """A request at the engine: which of its tokens come from which weights, as (first token, version)."""

    spans: list[tuple[int, int]]
    tokens: int = 0  # sampled when it was last held


class VllmEngine:
    """One vLLM server. Implements `engine.RolloutEngine`; use it from one event loop.

    Args:
        concurrency: `generate` calls sent at a time; further ones wait in the client.
        timeout_s: of one attempt, from its sending to its answer; a long sample must fit.
        attempts: how often a request that may be repeated is sent before EngineUnreachable, with random
            waits between, up to `backoff_s` x 2, x 4... at most 8 s. What changes weights is sent once.
    """

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
        self.url = url.rstrip("/")
        # aiohttp, not httpx: httpx scans all its connections for each request, quadratic in the concurrency.
        # Made on first use, inside the event loop. Control requests have connections of their own, so that they never
        # wait for a sample, and new ones: a kept connection may be closed by the server just as a request leaves, and
        # most of them must not be repeated blindly.
        self._sampling: aiohttp.ClientSession | None = None
        self._control: aiohttp.ClientSession | None = None
        self._connections = concurrency
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_timeout_s)
        self._attempts, self._backoff_s = attempts, backoff_s
        self._slots = asyncio.Semaphore(concurrency)
        self._probing = asyncio.Lock()
        self._capabilities: Capabilities | None = None
        self._version = 0  # of the weights in use, as this client knows; asked from the engine by the probe
        self._updates = 0  # that the engine has taken since its start: tells one that was restarted
        self._staged_version: int | None = None
        self._state: State = "ready"
        self._in_flight = 0
        self._flights: dict[str, _Flight] = {}  # by the id that the server knows
        self._held = False  # requests are kept in a paused server
        self._open = asyncio.Event()  # set when `generate` need not wait for held requests to go on
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()

    # ---- facts ----

    async def capabilities(self) -> Capabilities:
        async with self._probing:
            if self._capabilities is None:
                facts = await self._ask_workers("mdppo_describe")
                if facts["logprobs_mode"].rsplit(".")[-1].lower() != "processed_logprobs":
                    raise EngineError(
                        self.url,
                        f"got logprobs_mode {facts['logprobs_mode']}, expected processed_logprobs (those at "
                        "the sampling temperature); start the server with vllm_server.server_command",
                    )
                if facts["data_parallel_size"] != 1:
                    # Such a server asks all its replicas and passes on the answer of the first.
                    raise EngineError(
                        self.url,
                        f"got --data-parallel-size {facts['data_parallel_size']}, expected 1: start a server a replica",
                    )
                self._version, self._updates = await self._weights()
                if self._version < 0:
                    self._state = "unusable"
                self._capabilities = Capabilities(
                    engine="vllm",
                    engine_version=str(facts["engine_version"]),
                    vocab_size=int(facts["vocab_size"]),
                    max_model_len=int(facts["max_model_len"]),
                    max_logprobs=int(facts["max_logprobs"]),
                    routed_experts=bool(facts["routed_experts"]),
                    moe_layers=tuple(facts["moe_layers"]),
                    dtype=str(facts["dtype"]),
                )
            return self._capabilities

    async def version(self) -> int:
        return (await self._weights())[0]

    async def _weights(self) -> tuple[int, int]:
        answer = await self._ask_workers("mdppo_version")
        return int(answer["version"]), int(answer["updates"])

    async def layout(self) -> list[list[Box]]:
        answers = await self._ask_each_worker("mdppo_boxes")
        answers.sort(key=lambda answer: int(answer["worker"]))
        return [[*map(Box.from_json, answer["boxes"])] for answer in answers]

    async def checksum(self) -> dict[str, int]:
        answers = await self._ask_each_worker("mdppo_fingerprints")
        answers.sort(key=lambda answer: int(answer["worker"]))
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
        await self._retrying("GET", "/health", parse=False)
        await self._check_version()

    async def rejoin(self) -> None:
        self._capabilities, self._staged_version, self._state = None, None, "ready"
        self._release()
        await self.capabilities()

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
        facts = await self.capabilities()
        wire_id = f"{request_id}.{uuid4().hex}"  # two samples, or another client's, may have the same id
        body = request_body(facts, prompt_ids, sampling, wire_id)
        await self._open.wait()
        async with self._flight(), self._slots:
            await self._open.wait()
            self._require_ready()  # again: it may have been paused while this call waited for its slot
            flight = self._flights[wire_id] = _Flight([(0, self._version)])
            try:
                answer = await self._retrying("POST", GENERATE, body, flight=flight)
            finally:
                del self._flights[wire_id]
        return parse_answer(self.url, facts, answer, prompt_ids, sampling, flight.spans, request_id, group_id)

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
        self._held = False
        self._open.set()

    async def _count_tokens(self) -> None:
        """How far every held request has come; one that the workers never saw has no token yet."""
        progress = (await self._ask_workers("mdppo_progress"))["tokens"]
        for wire_id, flight in self._flights.items():
            at_server = re.compile(re.escape(f"generate-tokens-{wire_id}") + "(-[0-9a-f]{8})?")
            found = (tokens for name, tokens in progress.items() if at_server.fullmatch(name))
            flight.tokens = max(flight.tokens, *found, 0)

    async def _pause_server(self, mode: PauseMode) -> None:
        await self._once("POST", "/pause", params={"mode": mode, "clear_cache": "true"})

    async def resume(self) -> None:
        if self._state not in ("ready", "paused"):
            raise EngineError(self.url, f"resume refused: the engine is {self._state}")
        await self._once("POST", "/resume")
        self._state = "ready"
        self._release()

    # ---- weights ----

    async def begin_update(self, version: int, update: Update) -> None:
        if version != update.version:
            raise ValueError(f"begin_update: got version {version}, expected the update's {update.version}")
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
            await self._pause_server("wait")  # no-op after pause(); else for requests of other clients
        payload = {"version": version, update.transport: update.as_json()}
        await self._ask_workers("mdppo_discard_update")
        try:
            await self._once("POST", "/start_weight_update")
            await self._once("POST", "/update_weights", {"update_info": payload})
            await self._ask_workers("mdppo_fault")
        except EngineError:
            if self._state == "unusable":
                self._open.set()  # who waits for held requests to go on learns that they do not
            raise
        self._staged_version = version

    async def commit(self) -> None:
        if self._staged_version is None:
            raise EngineError(self.url, "commit refused: no update was handed over, expected begin_update() first")
        version, self._staged_version = self._staged_version, None
        self._state = "unusable"  # until all of this has succeeded
        await self._once("POST", "/finish_weight_update", {"weight_version": str(version)})
        await self._ask_workers("mdppo_fault")
        found, updates = await self._weights()
        if found != version:
            raise EngineError(self.url, f"commit: the workers report version {found}, expected {version}")
        if (await self._once("POST", "/reset_prefix_cache")).get("success") is not True:
            raise EngineError(
                self.url, "commit: the prefix cache could not be reset, its entries are of the old weights"
            )
        for flight in self._flights.values():
            flight.spans.append((flight.tokens, version))
        await self._once("POST", "/resume")
        self._version, self._updates, self._state = version, updates, "ready"
        self._release()

    async def abort_update(self) -> None:
        self._staged_version = None
        found = int((await self._ask_workers("mdppo_discard_update"))["version"])
        if found < 0 or found != self._version:
            self._state = "unusable"
            raise EngineError(
                self.url,
                f"abort_update: got weights of version {found}, expected {self._version}; send a full update",
            )
        await self._once("POST", "/resume")
        self._state = "ready"
        self._release()

    async def close(self) -> None:
        for session in (self._sampling, self._control):
            if session is not None:
                await session.close()

    # ---- HTTP ----

    async def _ask_workers(self, method: str, *args: Any) -> dict[str, Any]:
        """Call a method of the worker extension; all workers must answer the same."""
        results = await self._ask_each_worker(method, *args)
        if any(result != results[0] for result in results):
            raise EngineError(self.url, f"{method}: its workers disagree: {results!r:.{MESSAGE_CHARS}}")
        return results[0]

    async def _ask_each_worker(self, method: str, *args: Any) -> list[dict[str, Any]]:
        answer = await self._retrying("POST", "/collective_rpc", {"method": method, "args": list(args)})
        results = answer.get("results")
        if not isinstance(results, list) or not results or not isinstance(results[0], dict):
            raise EngineBadAnswer(self.url, f"{method}: got {answer!r:.200}, expected one result a worker")
        if errors := sorted({str(result["error"]) for result in results if "error" in result}):
            raise EngineError(self.url, f"{method}: {'; '.join(errors):.{MESSAGE_CHARS}}")
        return results

    async def _once(
        self, verb: str, path: str, body: dict[str, Any] | None = None, params: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Send a request that must not be repeated blindly."""
        try:
            return await self._send(verb, path, body, params)
        except TRANSPORT_ERRORS as error:
            raise EngineUnreachable(self.url, f"{path}: {_described(error)}") from error
        except _ServerFault as error:
            raise EngineError(self.url, f"{path} {error}") from error

    async def _retrying(
        self,
        verb: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        flight: _Flight | None = None,
        parse: bool = True,
    ) -> dict[str, Any]:
        """Send a request that may be repeated after transport errors and 5xx answers.

        flight: of a sample; before a repetition, make sure that no restart brought other weights, and count anew.
        """
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(self._attempts),
                wait=wait_random_exponential(multiplier=self._backoff_s, max=8.0),
                retry=retry_if_exception_type((*TRANSPORT_ERRORS, _ServerFault)),
            ):
                with attempt:
                    if flight and attempt.retry_state.attempt_number > 1:
                        await self._open.wait()  # in the middle of an update it has neither weights
                        self._require_ready()
                        await self._check_version()
                        flight.spans, flight.tokens = [(0, self._version)], 0
                    return await self._send(verb, path, body, parse=parse)
        except RetryError as error:
            last = error.last_attempt.exception()
            raise EngineUnreachable(
                self.url, f"{path} failed {self._attempts} times, last with {_described(last)}"
            ) from last
        raise AssertionError("tenacity either returns or raises")

    async def _send(
        self,
        verb: str,
        path: str,
        body: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
        *,
        parse: bool = True,
    ) -> dict[str, Any]:
        async with self._session(path).request(verb, path, json=body, params=params) as response:
            status, text = response.status, await response.text()
        if status >= 500:
            raise _ServerFault(f"answered {status}: {text[:MESSAGE_CHARS]}")
        if status >= 400:
            raise EngineError(self.url, f"{path} answered {status}: {text[:MESSAGE_CHARS]}")
        if not parse:
            return {}
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise EngineBadAnswer(self.url, f"{path}: got {text[:80]!r}, expected JSON") from error
        if not isinstance(answer, dict):
            raise EngineBadAnswer(self.url, f"{path}: got a JSON {type(answer).__name__}, expected an object")
        return answer

    def _session(self, path: str) -> aiohttp.ClientSession:
        if self._sampling is None or self._control is None:
            kept = aiohttp.TCPConnector(limit=self._connections)
            self._sampling = aiohttp.ClientSession(self.url, timeout=self._timeout, connector=kept)
            fresh = aiohttp.TCPConnector(force_close=True)
            self._control = aiohttp.ClientSession(self.url, timeout=self._timeout, connector=fresh)
        return self._sampling if path == GENERATE else self._control


def _described(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
