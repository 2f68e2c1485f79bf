"""`SglangEngine` where requests are cut, held or aborted by somebody else, and where updates fail midway: orders of
events that a real server brings about by chance only, from a small stub that samples token 3 every few milliseconds."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web

from megatron_dppo.architecture import Architecture, load_architecture
from megatron_dppo.rollout.engine import EngineBadAnswer, EngineError, EngineUnreachable, Manifest, Sampling
from megatron_dppo.rollout.sglang.client import MOST_CUTS, SglangEngine
from megatron_dppo.rollout.sglang.server import PYTHON_VARIABLE, interpreter, server_env
from megatron_dppo.rollout.sglang.shards import own_address
from megatron_dppo.rollout.sglang.whole_tensors import BucketWeights
from megatron_dppo.weights.mapping import hub_shapes
from tests.tiny_models import tiny_config

TOKEN, TOKEN_S = 3, 0.01
PROMPT = [1, 2]


class Stub:
    """A server whose pauses abort, as SGLang's do."""

    info = {
        "version": "0.5.23", "dp_size": 1, "pp_size": 1, "tp_size": 1, "custom_weight_loader": None,
        "max_req_input_len": 200, "enable_return_routed_experts": True, "enable_deterministic_inference": False,
        "dtype": "float32",
    }  # fmt: skip

    def __init__(self, arch: Architecture) -> None:
        self.arch, self.version, self.paused = arch, "default", False
        self.arrived: list[str] = []  # names of requests, as they came
        self.running: dict[str, asyncio.Event] = {}  # set: abort it
        self.queued: set[str] = set()  # names of requests that wait for memory whenever they come again
        self.refused: set[str] = set()  # paths that answer 400
        self.posted: list[str] = []

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["rid"].split(".")[0]
        self.arrived.append(name)
        while self.paused:
            await asyncio.sleep(0.002)
        aborted = self.running[body["rid"]] = asyncio.Event()
        ids: list[int] = []
        waits = name in self.queued and self.arrived.count(name) > 1
        while not aborted.is_set() and (waits or len(ids) < body["sampling_params"]["max_new_tokens"]):
            await asyncio.sleep(TOKEN_S)
            ids += [] if waits else [TOKEN]
        del self.running[body["rid"]]
        meta: dict[str, Any] = {
            "finish_reason": {"type": "abort" if aborted.is_set() else "length"},
            "weight_version": self.version,
            "output_token_logprobs": [[-1.0, TOKEN, None]] * len(ids),
        }
        if not waits:
            rows = len(body["input_ids"]) + len(ids) - 1
            routes = np.tile(np.arange(2, dtype=np.int32), (rows, self.arch.num_layers, 1))
            meta["routed_experts"] = base64.b64encode(routes.tobytes()).decode()
        return web.json_response({"output_ids": ids, "meta_info": meta})

    async def post(self, request: web.Request) -> web.Response:
        self.posted.append(request.path)
        if request.path in self.refused:
            return web.json_response({"success": False, "message": "no"}, status=400)
        if request.path == "/update_weight_version":
            self.version = (await request.json())["new_version"]
        if request.path == "/pause_generation":
            self.paused = True
            await self.abort_all()
        if request.path == "/continue_generation":
            self.paused = False
        return web.json_response({"success": True})

    async def abort_all(self) -> None:
        while self.running:
            for aborted in self.running.values():
                aborted.set()
            await asyncio.sleep(0.002)

    async def get(self, request: web.Request) -> web.Response:
        model = {"model_type": "qwen3_moe", "model_path": "/model", "weight_version": self.version}
        found = {"/server_info": self.info, "/model_info": model}.get(request.path)
        return web.json_response(found or {}, status=200 if found else 405)


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    path = tmp_path_factory.mktemp("model")
    tiny_config().save_pretrained(path)
    return load_architecture(path)


def served(arch: Architecture, body: Callable[[Stub, SglangEngine], Awaitable[Any]], **kwargs: Any) -> Any:
    async def main() -> Any:
        stub, app = Stub(arch), web.Application()
        app.router.add_post("/generate", stub.generate)
        app.router.add_post("/{path:.*}", stub.post)
        app.router.add_get("/{path:.*}", stub.get)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        engine = SglangEngine(f"http://127.0.0.1:{runner.addresses[0][1]}", arch, attempts=1, **kwargs)
        try:
            await engine.capabilities()
            return await asyncio.wait_for(body(stub, engine), 60)
        finally:
            await engine.close()
            await runner.cleanup()

    return asyncio.run(main())


def sampling(max_tokens: int) -> Sampling:
    return Sampling(1.0, max_tokens, training=True)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def begun(stub: Stub, engine: SglangEngine, max_tokens: int = 40) -> asyncio.Task[Any]:
    """A request that has some tokens."""
    task = asyncio.create_task(engine.generate(PROMPT, sampling(max_tokens), "A"))
    await until(lambda: bool(stub.running))
    await asyncio.sleep(5 * TOKEN_S)
    return task


def test_what_another_client_aborts_is_sampled_to_its_end(arch: Architecture) -> None:
    async def body(stub: Stub, engine: SglangEngine) -> None:
        task = await begun(stub, engine)
        await stub.abort_all()
        t = await task
        assert t.finish_reason == "length" and t.response_length == 40 and stub.arrived == ["A", "A"]
        assert t.routed_experts.shape[0] == len(PROMPT) + 39 and t.routes_valid.all()

    served(arch, body)


def test_what_is_always_aborted_is_an_error(arch: Architecture) -> None:
    async def body(stub: Stub, engine: SglangEngine) -> None:
        task = asyncio.create_task(engine.generate(PROMPT, sampling(4), "A"))
        while not task.done():
            await stub.abort_all()
            await asyncio.sleep(0)
        with pytest.raises(EngineBadAnswer, match=f"request A: aborted {MOST_CUTS} times in a row without a token"):
            await task

    served(arch, body)


def test_an_abort_ends_a_held_request_with_what_it_had(arch: Architecture) -> None:
    async def body(stub: Stub, engine: SglangEngine) -> None:
        stub.queued.add("A")  # its second part waits, and comes back without routes
        task = await begun(stub, engine)
        await engine.pause("keep")
        await engine.resume()
        await until(lambda: stub.arrived == ["A", "A"] and bool(stub.running))
        await engine.pause("abort")
        t = await task
        assert t.finish_reason == "abort" and 0 < t.response_length < 40
        assert len(t.routed_experts) == len(t.routes_valid) == len(PROMPT) + t.response_length - 1

    served(arch, body)


def test_held_requests_keep_their_place(arch: Architecture) -> None:
    async def body(stub: Stub, engine: SglangEngine) -> None:
        tasks = [asyncio.create_task(engine.generate(PROMPT, sampling(20), name)) for name in "ABCD"]
        await until(lambda: len(stub.running) == 2)
        await asyncio.sleep(5 * TOKEN_S)
        await engine.pause("keep")
        await engine.resume()
        await asyncio.gather(*tasks)
        assert sorted(stub.arrived[:2]) == sorted(stub.arrived[2:4]) == ["A", "B"]

    served(arch, body, concurrency=2)


def test_a_pause_waits_for_held_requests(arch: Architecture) -> None:
    async def body(stub: Stub, engine: SglangEngine) -> None:
        task = await begun(stub, engine)
        await engine.pause("keep")
        await engine.resume()
        with pytest.raises(EngineError, match="1 requests in flight, expected pause"):
            await engine.begin_update(1, Manifest(1, "/x", (), 0))
        await engine.pause("wait")
        assert task.done() and (await task).finish_reason == "length"

    served(arch, body)


@pytest.fixture
def manifest(arch: Architecture, tmp_path: Path) -> Manifest:
    """Zeros for all of the model, version 4."""
    entries, end = [], 0
    for name, shape in hub_shapes(arch).items():
        entries.append((name, "float32", tuple(shape), end))
        end += torch.Size(shape).numel() * 4
    (tmp_path / "weights").write_bytes(bytes(end))
    return Manifest(4, str(tmp_path / "weights"), tuple(entries), end)


def test_weights_that_a_bucket_left_half_written_have_no_version(
    arch: Architecture, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang answers 400 in the middle of a load, and goes on under the name that the weights had."""

    async def fails(self: BucketWeights, *args: Any) -> None:
        raise EngineError(self._http.url, "partially updated")

    monkeypatch.setattr(BucketWeights, "_send", fails)

    async def body(stub: Stub, engine: SglangEngine) -> None:
        stub.version = "3.3"
        await engine.rejoin()
        engine._way._proved = True
        await engine.pause("wait")
        await engine.begin_update(4, manifest)
        with pytest.raises(EngineError, match="partially updated"):
            await engine.commit()
        with pytest.raises(EngineError, match="abort_update: got weights of version -1, expected 3; send a full"):
            await engine.abort_update()

    served(arch, body)


def test_a_server_that_refuses_a_group_leaves_nobody_waiting(arch: Architecture, manifest: Manifest) -> None:
    """The test ends: a thread that waits for the server would hold this process for two minutes."""

    async def body(stub: Stub, engine: SglangEngine) -> None:
        stub.refused.add("/init_weights_update_group")
        engine._way._proved = True
        await engine.pause("wait")
        await engine.begin_update(4, manifest)
        with pytest.raises(EngineError, match="/init_weights_update_group answered 400"):
            await engine.commit()
        assert stub.posted[-1] == "/destroy_weights_update_group" and engine._way._meeting is None

    served(arch, body)


def test_a_server_sees_this_package_and_not_what_is_installed_beside_it(tmp_path: Path) -> None:
    env = server_env(cpu=True, cache_root=tmp_path, base={"PATH": os.environ["PATH"]})
    assert env == server_env(cpu=True, cache_root=tmp_path, base={"PATH": os.environ["PATH"]})
    assert os.listdir(env["PYTHONPATH"]) == ["megatron_dppo"]
    script = "import megatron_dppo.rollout.sglang.message as module; print(module.LOADER)"
    found = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.startswith("megatron_dppo.rollout.sglang.worker"), found.stderr


def test_an_interpreter_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="expected an interpreter that has SGLang installed"):
        interpreter()


def test_addresses() -> None:
    assert own_address("http://127.0.0.1:80") == "127.0.0.1"
    with pytest.raises(EngineUnreachable, match="no way to no.such.host.invalid"):
        own_address("http://no.such.host.invalid:1")
