"""JSON over HTTP to an engine: bounded repetition where that is safe, errors that name the engine."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from tenacity import (
    AsyncRetrying,
    RetryError,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from megatron_dppo.rollout.engine import EngineBadAnswer, EngineError, EngineUnreachable

TRANSPORT_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)
MESSAGE_CHARS = 500  # of a server's error body in our message
LONGEST_WAIT_S = 8.0


class _ServerFault(Exception):
    """A 5xx answer."""


class HttpClient:
    """One server. Use it from one event loop.

    Args:
        connections: kept open for samples, so the most requests on their way at a time.
        timeout_s: of one attempt, from its sending to its answer; a long sample must fit.
        attempts: how often a request that may be repeated is sent before EngineUnreachable, with random
            waits between, up to `backoff_s` x 2, x 4... at most 8 s.
        sampling_path: requests to it use the kept connections.
    """

    def __init__(
        self,
        url: str,
        *,
        connections: int,
        timeout_s: float,
        connect_timeout_s: float,
        attempts: int,
        backoff_s: float,
        sampling_path: str,
    ) -> None:
        self.url = url.rstrip("/")
        # aiohttp, not httpx: httpx scans all its connections for each request, quadratic in the concurrency.
        # Made on first use, inside the event loop. Control requests have connections of their own, so that they never
        # wait for a sample, and new ones: a kept connection may be closed by the server just as a request leaves, and
        # most of them must not be repeated blindly.
        self._sampling: aiohttp.ClientSession | None = None
        self._control: aiohttp.ClientSession | None = None
        self._connections = connections
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_timeout_s)
        self._attempts, self._backoff_s = attempts, backoff_s
        self._sampling_path = sampling_path

    async def once(
        self,
        verb: str,
        path: str,
        body: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
        *,
        parse: bool = True,
    ) -> dict[str, Any]:
        """Send a request that must not be repeated blindly."""
        try:
            return await self._send(verb, path, body, params, parse=parse)
        except TRANSPORT_ERRORS as error:
            raise EngineUnreachable(self.url, f"{path}: {_described(error)}") from error
        except _ServerFault as error:
            raise EngineError(self.url, f"{path} {error}") from error

    async def retrying(
        self,
        verb: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        before_repeating: Callable[[], Awaitable[None]] | None = None,
        parse: bool = True,
    ) -> dict[str, Any]:
        """Send a request that may be repeated after transport errors and 5xx answers, `before_repeating` first."""
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(self._attempts),
                wait=wait_random_exponential(multiplier=self._backoff_s, max=LONGEST_WAIT_S),
                retry=retry_if_exception_type((*TRANSPORT_ERRORS, _ServerFault)),
            ):
                with attempt:
                    if before_repeating and attempt.retry_state.attempt_number > 1:
                        await before_repeating()
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
            raise _ServerFault(f"answered {status}: {_one_line(text)}")
        if status >= 400:
            raise EngineError(self.url, f"{path} answered {status}: {_one_line(text)}")
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
        if self._control.closed:
            raise EngineUnreachable(self.url, f"{path}: this client was closed")
        return self._sampling if path == self._sampling_path else self._control

    async def close(self) -> None:
        for session in (self._sampling, self._control):
            if session is not None:
                await session.close()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MESSAGE_CHARS]


def _described(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
