"""`VllmEngine` where weights change under held requests, and where a server was restarted: which weights each token is
from, to the token, by a small stub whose requests come as far as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.rollout.engine import EngineRestarted, Sampling
from megatron_dppo.rollout.vllm.client import VllmEngine
from megatron_dppo.weights.update import FileUpdate

TOKEN = 3
FACTS = {
    "engine_version": "0", "data_parallel_size": 1, "vocab_size": 8, "max_model_len": 16, "max_logprobs": 20,
    "logprobs_mode": "processed_logprobs", "routed_experts": False, "moe_layers": [0], "dtype": "float32",
}  # fmt: skip


class Stub:
    """A server that knows requests as vLLM does: by our id, between words of its own."""

    def __init__(self) -> None:
        self.version, self.updates = 2, 1
        self.tokens: dict[str, int] = {}  # of its requests, by its name
        self.ends: dict[str, asyncio.Future[int]] = {}  # how many tokens a request ends with (0: with a fault)
        self.arrived: list[str] = []  # names of requests, as they came
        self.faulty = False  # answers further requests with faults
        self.clients: list[asyncio.Task[Trajectory]] = []  # who waits for answers

    def comes_to(self, name: str, tokens: int) -> None:
        self.tokens[self._last(name)] = tokens

    def finish(self, name: str, tokens: int) -> None:
        self.ends[self._last(name)].set_result(tokens)

    def _last(self, name: str) -> str:
        """The request that came last under a name, as the server calls it."""
        return [at_server for at_server in self.ends if at_server.startswith(f"generate-tokens-{name}.")][-1]

    async def generate(self, request: web.Request) -> web.Response:
        wire_id = (await request.json())["request_id"]
        self.arrived.append(wire_id.split(".")[0])
        end = self.ends[f"generate-tokens-{wire_id}-0a1b2c3d"] = asyncio.get_running_loop().create_future()
        length = 0 if self.faulty else await end
        if not length:
            return web.Response(status=500)
        entry = {"token": f"token_id:{TOKEN}", "logprob": -1.0, "top_logprobs": []}
        choice = {"finish_reason": "length", "token_ids": [TOKEN] * length, "logprobs": {"content": [entry] * length}}
        return web.json_response({"choices": [choice]})

    async def rpc(self, request: web.Request) -> web.Response:
        answers: dict[str, dict[str, Any]] = {
            "mdppo_describe": FACTS,
            "mdppo_version": {"version": self.version, "updates": self.updates},
            "mdppo_progress": {"tokens": self.tokens},
        }
        return web.json_response({"results": [answers.get((await request.json())["method"], {})] * 2})

    async def finish_update(self, request: web.Request) -> web.Response:
        self.version, self.updates = int((await request.json())["weight_version"]), self.updates + 1
        return web.json_response({})

    async def other(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True})


def served(body: Callable[[Stub, VllmEngine], Awaitable[Any]]) -> None:
    async def main() -> None:
        stub, app = Stub(), web.Application()
        app.router.add_post("/inference/v1/generate", stub.generate)
        app.router.add_post("/collective_rpc", stub.rpc)
        app.router.add_post("/finish_weight_update", stub.finish_update)
        app.router.add_route("*", "/{path:.*}", stub.other)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        engine = VllmEngine(f"http://127.0.0.1:{runner.addresses[0][1]}", attempts=2, backoff_s=0.01)
        try:
            await engine.capabilities()
            await asyncio.wait_for(body(stub, engine), 20)
        finally:
            for task in stub.clients:  # left over by a test that fails
                task.cancel()
            await asyncio.gather(*stub.clients, return_exceptions=True)
            await engine.close()
            await runner.cleanup()

    asyncio.run(main())


async def begun(stub: Stub, engine: VllmEngine, *names: str) -> list[asyncio.Task[Trajectory]]:
    """Requests that are at the server."""
    sampling, number = Sampling(1.0, 8, training=True), len(stub.ends) + len(names)
    tasks = [asyncio.create_task(engine.generate([1, 2], sampling, name)) for name in names]
    stub.clients += tasks
    await arrivals(stub, number)
    return tasks


async def arrivals(stub: Stub, number: int) -> None:
    """So many requests have come to the server."""
    while len(stub.ends) < number:
        assert not [task.exception() for task in stub.clients if task.done()]
        await asyncio.sleep(0.002)


async def updated(engine: VllmEngine, version: int) -> None:
    await engine.begin_update(FileUpdate(version, "/x", (), 0))
    await engine.commit()


def versions(task: asyncio.Task[Trajectory]) -> list[int]:
    return task.result().policy_versions.tolist()


def test_each_token_of_a_held_request_has_the_version_that_sampled_it() -> None:
    """Held at 3, 1 and 0 tokens, then at 5, 4 and 2; what begins later has one version."""

    async def body(stub: Stub, engine: VllmEngine) -> None:
        a, b, c = await begun(stub, engine, "A", "B", "C")
        stub.comes_to("A", 3)
        stub.comes_to("B", 1)  # of C the engine knows nothing
        await engine.pause("keep")
        await updated(engine, 4)
        stub.comes_to("A", 5)
        stub.comes_to("B", 4)
        stub.comes_to("C", 2)
        (d,) = await begun(stub, engine, "D")
        await engine.pause("keep")
        await updated(engine, 9)
        (e,) = await begun(stub, engine, "E")
        for name, tokens in {"A": 7, "B": 5, "C": 3, "D": 2, "E": 2}.items():
            stub.finish(name, tokens)
        await asyncio.gather(a, b, c, d, e)
        assert versions(a) == [2, 2, 2, 4, 4, 9, 9]
        assert versions(b) == [2, 4, 4, 4, 9]
        assert versions(c) == [4, 4, 9]
        assert versions(d) == versions(e) == [9, 9]

    served(body)


def test_a_hold_without_an_update_begins_no_version() -> None:
    async def body(stub: Stub, engine: VllmEngine) -> None:
        (a,) = await begun(stub, engine, "A")
        stub.comes_to("A", 2)
        await engine.pause("keep")
        await engine.resume()
        stub.comes_to("A", 4)
        await engine.pause("keep")
        await updated(engine, 3)
        stub.finish("A", 6)
        await a
        assert versions(a) == [2, 2, 2, 2, 3, 3]

    served(body)


def test_a_request_that_begins_anew_forgets_its_versions() -> None:
    """Its tokens were of versions 2 and 4 when the server failed; sent again it is held at 1 token."""

    async def body(stub: Stub, engine: VllmEngine) -> None:
        (a,) = await begun(stub, engine, "A")
        stub.comes_to("A", 3)
        await engine.pause("keep")
        await updated(engine, 4)
        stub.finish("A", 0)
        await arrivals(stub, 2)
        stub.comes_to("A", 1)
        await engine.pause("keep")  # the server still says that there were three under the first id
        await updated(engine, 9)
        stub.finish("A", 4)
        await a
        assert versions(a) == [4, 9, 9, 9]

    served(body)


@pytest.mark.parametrize(
    ("version", "updates"),
    [(4, 1), (4, 3), (7, 2)],
    ids=["restarted, with an equal version", "given an equal version by another", "with another version"],
)
def test_a_server_with_other_weights_is_found_out(version: int, updates: int) -> None:
    """By a check of its health, and before a request is repeated; until it is met anew."""
    message = f"got weights of version {version}, expected 4 .updates since its start: {updates}, expected 2."

    async def body(stub: Stub, engine: VllmEngine) -> None:
        await engine.pause("keep")
        await updated(engine, 4)  # its second since its start
        await engine.health()
        (a,) = await begun(stub, engine, "A")
        stub.version, stub.updates, stub.faulty = version, updates, True
        with pytest.raises(EngineRestarted, match=message):
            await engine.health()
        stub.finish("A", 0)
        with pytest.raises(EngineRestarted, match=message):
            await a
        assert stub.arrived == ["A"]
        await engine.rejoin()
        await engine.health()

    served(body)
