"""What a fleet does when engines fail; the engines here only say when. Real ones: tests/engines/test_sync.py."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_dppo.control import Control, ControlTimeout, Orders, engine_layout_key, meeting_key, order_key, reply_key
from megatron_dppo.rollout import fleet as fleet_module
from megatron_dppo.rollout.engine import EngineError, EngineNotReady, EngineRestarted, EngineUnreachable, Sampling
from megatron_dppo.rollout.fleet import Fleet, Request
from megatron_dppo.weights.layout import Box
from megatron_dppo.weights.update import FileUpdate, GroupUpdate

SAMPLING = Sampling(1.0, 4, training=True)
FILE_UPDATE = FileUpdate(0, "/weights", (("a", "float32", (2,), 0),), 8).as_json()


@dataclass(eq=False)
class Engine:
    """Answers with its weights; `up`, `refusals` and `restart` are what a test does to it."""

    url: str
    up: bool = True
    weights: int = -1  # those of its start
    known: int = -1  # what a client has given it
    refusals: int = 0
    boxes: tuple[Box, ...] = (Box("a", (0,), (2,)),)
    taken: list[Any] = field(default_factory=list)

    def restart(self) -> None:
        self.up, self.weights = True, -1

    def _reach(self) -> None:
        if not self.up:
            raise EngineUnreachable(self.url, "connection refused")

    async def capabilities(self) -> None:
        self._reach()

    async def rejoin(self) -> None:
        self._reach()
        self.known = self.weights

    async def pause(self, mode: str) -> None:
        self._reach()

    async def layout(self) -> list[list[Box]]:
        self._reach()
        return [list(self.boxes)]

    async def begin_update(self, update: Any) -> None:
        self._reach()
        if self.refusals:
            self.refusals -= 1
            self.weights = -2
            raise EngineError(self.url, "a checksum differs")
        self.taken.append(update)

    async def commit(self) -> None:
        self._reach()
        self.weights = self.known = self.taken[-1].version

    async def health(self) -> None:
        self._reach()
        if self.known != self.weights:
            raise EngineRestarted(self.url, "it was restarted")

    async def generate(self, prompt: Any, sampling: Sampling, request_id: str, *, group_id: str) -> Any:
        await asyncio.sleep(0)
        self._reach()
        if self.known < 0:
            raise EngineNotReady(self.url, "its weights are unusable")
        return self.url, request_id, self.weights


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Orders]:
    """Ranks that send what they are told to."""
    monkeypatch.setattr(fleet_module, "POLL_S", 0.01)
    orders, over = Orders(Control.serve(), 5.0), threading.Event()
    done: list[dict[str, Any]] = []

    def ranks() -> None:
        control = Control.connect(orders.control.address)  # one that waits holds its connection
        for number in itertools.count():
            while (order := control.peek(order_key(number))) is None:
                if over.wait(0.002):
                    return
            done.append(order)
            if order["transport"] == "group":
                control.wait(engine_layout_key(order["layout"]), 1.0)
                update = GroupUpdate(
                    order["version"], "here:1", "digest", order["generation"], 2, 0, order["instances"], timeout_s=1.0
                )
                control.post(meeting_key(order["generation"]), update.as_json())
                control.post(reply_key(number), {"errors": []})
            else:
                control.post(reply_key(number), {"file": {**FILE_UPDATE, "version": order["version"]}})

    thread = threading.Thread(target=ranks)
    thread.start()
    orders.done = done  # type: ignore[attr-defined]
    yield orders
    over.set()
    thread.join()


def requests(count: int) -> list[Request]:
    return [Request([1], SAMPLING, str(i), str(i), i) for i in range(count)]


def run(body: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(body(), 20))


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_every_engine_gets_every_version(orders: Any, transport: Any) -> None:
    engines = [Engine("a"), Engine("b")]
    fleet = Fleet(engines, orders, transport=transport)

    async def body() -> None:
        for version in range(3):
            await fleet.update(version)
            assert {(url, found) for url, _, found in await fleet.sample(requests(4))} == {
                ("a", version),
                ("b", version),
            }

    run(body)
    assert [order["version"] for order in orders.done] == [0, 1, 2]  # once for both
    if transport == "group":
        assert [[u.instance for u in engine.taken] for engine in engines] == [[0, 0, 0], [1, 1, 1]]
        assert len({order["generation"] for order in orders.done}) == 1


@pytest.mark.parametrize("transport", ["shm", "group"])
def test_an_update_that_fails_is_sent_again_to_who_needs_it(orders: Any, transport: Any) -> None:
    engines = [Engine("a"), Engine("b", refusals=2)]
    fleet = Fleet(engines, orders, transport=transport)
    run(lambda: fleet.update(5))
    assert [engine.weights for engine in engines] == [5, 5] and len(engines[0].taken) == 1
    if transport == "group":  # a broken group is not used again
        assert len({order["generation"] for order in orders.done}) == 3
        assert [order["instances"] for order in orders.done] == [2, 1, 1]


def test_an_engine_that_never_takes_an_update_is_named(orders: Any) -> None:
    fleet = Fleet([Engine("a"), Engine("b", refusals=9)], orders, transport="shm", attempts=2)
    with pytest.raises(
        EngineError, match="engine b: version 1 could not be .* 2 attempts; the last: .*a checksum differs"
    ):
        run(lambda: fleet.update(1))


def test_a_lost_engine_is_left_out_until_it_is_back(orders: Any) -> None:
    a, b = engines = [Engine("a"), Engine("b")]
    fleet = Fleet(engines, orders, transport="group")

    async def body() -> None:
        await fleet.update(0)
        b.up = False
        assert {url for url, *_ in await fleet.sample(requests(6))} == {"a"} and fleet.living == [a]
        await fleet.update(1)
        b.restart()
        assert {url for url, *_ in await fleet.sample(requests(6))} == {"a"}
        await fleet.update(2)
        assert {(url, found) for url, _, found in await fleet.sample(requests(6))} == {("a", 2), ("b", 2)}

    run(body)
    assert [order["instances"] for order in orders.done] == [2, 1, 2]


def test_what_a_restarted_engine_sampled_is_sampled_again(orders: Any) -> None:
    a, b = engines = [Engine("a"), Engine("b")]
    fleet = Fleet(engines, orders, transport="shm")

    async def body() -> list[Any]:
        await fleet.update(3)
        b.restart()  # and nobody noticed
        return await fleet.sample(requests(6))

    samples = run(body)
    assert [name for _, name, _ in samples] == list("012345")
    assert [(url, found) for url, _, found in samples] == [("a", 3), ("b", 3)] * 3
    assert len(a.taken) == 1 and len(b.taken) == 2


def test_what_it_answered_before_anybody_noticed_is_sampled_again(orders: Any) -> None:
    """One request is answered from the weights of the start; another one's failure brings the engine up to date."""
    a, b = engines = [Engine("a"), Engine("b")]
    fleet = Fleet(engines, orders, transport="shm")

    async def body() -> list[Any]:
        await fleet.update(3)
        b.restart()
        generate, asked = b.generate, []

        async def noticing(*args: Any, **kwargs: Any) -> Any:
            asked.append(args[2])
            if len(asked) == 2:
                raise EngineRestarted("b", "it was restarted")
            return await generate(*args, **kwargs)

        b.generate = noticing  # type: ignore[method-assign]
        return await fleet.sample(requests(6))

    assert [found for *_, found in run(body)] == [3] * 6


def test_what_it_answered_before_an_update_found_out_is_sampled_again(orders: Any) -> None:
    """A batch is still being sampled when an update meets a restarted engine, which has answered some of it."""
    a, b = engines = [Engine("a"), Engine("b")]
    fleet = Fleet(engines, orders, transport="shm")

    async def body() -> list[Any]:
        await fleet.update(3)
        b.restart()
        generate, go_on = a.generate, asyncio.Event()

        async def slow(*args: Any, **kwargs: Any) -> Any:
            await go_on.wait()
            return await generate(*args, **kwargs)

        a.generate = slow  # type: ignore[method-assign]
        sampling = asyncio.create_task(fleet.sample(requests(6)))
        await asyncio.sleep(0.02)  # b has answered, from the weights of its start
        await fleet.update(4)
        go_on.set()
        return await sampling

    assert [(url, found) for url, _, found in run(body)] == [("a", 4), ("b", 4)] * 3


def test_an_engine_that_comes_back_as_another_ends_the_wait_of_all(orders: Any) -> None:
    engine = Engine("a")

    def check(url: str, found: Any) -> None:
        if engine.weights == -7:
            raise ValueError("another model")

    fleet = Fleet([engine], orders, transport="shm", check=check)

    async def body() -> None:
        await fleet.update(0)
        engine.up = False

        def come_back() -> None:
            engine.up, engine.weights = True, -7

        asyncio.get_running_loop().call_later(0.05, come_back)
        results = await asyncio.gather(*(fleet.sample(requests(2)) for _ in range(2)), return_exceptions=True)
        assert all(isinstance(result, ValueError) for result in results)

    run(body)


def test_a_request_that_always_fails_is_an_error(orders: Any) -> None:
    engine = Engine("a")
    fleet = Fleet([engine], orders, transport="shm", attempts=2)

    async def body() -> None:
        await fleet.update(0)

        async def failing(*args: Any, **kwargs: Any) -> Any:
            raise EngineUnreachable("a", "answered 500")

        engine.generate = failing  # type: ignore[method-assign]
        with pytest.raises(EngineUnreachable, match="answered 500"):
            await fleet.sample(requests(1))

    run(body)


def test_a_restarted_engine_is_met_anew(orders: Any) -> None:
    """Between two updates, at the same address: the old group is not used again."""
    engine = Engine("a")
    fleet = Fleet([engine], orders, transport="group")

    async def body() -> None:
        await fleet.update(0)
        engine.restart()
        await fleet.update(1)

    run(body)
    assert engine.weights == 1 and len({order["generation"] for order in orders.done}) == 2


@pytest.mark.parametrize("during", ["sampling", "an update"])
def test_the_last_engine_is_waited_for(orders: Any, during: str) -> None:
    engine = Engine("a")
    fleet = Fleet([engine], orders, transport="shm")

    async def body() -> list[Any]:
        await fleet.update(3)
        engine.up = False
        asyncio.get_running_loop().call_later(0.1, engine.restart)
        if during == "an update":
            await fleet.update(4)
        return await fleet.sample(requests(5))

    version = 4 if during == "an update" else 3
    assert [found for *_, found in run(body)] == [version] * 5


def test_the_last_engine_is_met_anew_when_it_is_back(orders: Any) -> None:
    """It was alone in its group, so that who meets is the same as before; its workers are not."""
    engine = Engine("a")
    fleet = Fleet([engine], orders, transport="group")

    async def body() -> list[Any]:
        await fleet.update(3)
        engine.up = False
        asyncio.get_running_loop().call_later(0.05, engine.restart)
        return await fleet.sample(requests(2))

    assert [found for *_, found in run(body)] == [3, 3]
    assert [order["version"] for order in orders.done] == [3, 3]
    assert len({order["generation"] for order in orders.done}) == 2


def test_patience_ends_for_everybody(orders: Any) -> None:
    engine = Engine("a")
    fleet = Fleet([engine], orders, transport="shm", patience_s=0.05)

    async def body() -> None:
        await fleet.update(0)
        engine.up = False
        results = await asyncio.gather(*(fleet.sample(requests(3)) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, EngineUnreachable) for result in results)

    run(body)


def test_engines_that_keep_different_parts_are_refused(orders: Any) -> None:
    engines = [Engine("a"), Engine("b", boxes=(Box("a", (0,), (1,)),))]
    with pytest.raises(ValueError, match="engines a and b keep different parts"):
        run(lambda: Fleet(engines, orders, transport="group").update(0))
    run(lambda: Fleet(engines, orders, transport="shm").update(0))


def test_ranks_that_do_not_answer_are_a_timeout() -> None:
    orders = Orders(Control.serve(), 0.1)
    with pytest.raises(ControlTimeout, match="'reply/0'"):
        run(lambda: Fleet([Engine("a")], orders, transport="shm").update(0))
