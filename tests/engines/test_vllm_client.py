"""`VllmEngine` against a server that is not there, hangs, or answers nonsense: a small local stub."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.job.engine_server import wait_ready
from megatron_dppo.job.processes import ChildDied, free_port, start
from megatron_dppo.rollout.engine import EngineBadAnswer, EngineError, EngineUnreachable, Sampling
from megatron_dppo.rollout.vllm.client import VllmEngine
from megatron_dppo.rollout.vllm.server import server_command, server_env
from megatron_dppo.weights.update import FileUpdate

VOCAB = 8
SAMPLING = Sampling(1.0, 4, training=True, num_topk_logprobs=2)


def logprob_entry(token: int, logprob: float, top: list[tuple[int, float]]) -> dict[str, Any]:
    return {
        "token": f"token_id:{token}",
        "logprob": logprob,
        "top_logprobs": [{"token": f"token_id:{t}", "logprob": value} for t, value in top],
    }


def good_choice() -> dict[str, Any]:
    """Two tokens at K = 2, the first among the top 2, the second not, entries in vLLM's order."""
    return {
        "index": 0,
        "finish_reason": "length",
        "token_ids": [3, 5],
        "logprobs": {
            "content": [
                logprob_entry(3, -1.0, [(3, -1.0), (1, -0.9), (2, -1.5)]),
                logprob_entry(5, -4.0, [(5, -4.0), (6, -0.2), (7, -3.0)]),
            ]
        },
    }


class Stub:
    """What the stub server answers; `generate` is called with the number of the request, from 0."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {
            "engine_version": "0",
            "data_parallel_size": 1,
            "vocab_size": VOCAB,
            "max_model_len": 16,
            "max_logprobs": 20,
            "logprobs_mode": "processed_logprobs",
            "routed_experts": False,
            "moe_layers": [0],
            "dtype": "float32",
        }
        self.versions: list[list[int]] = [[0]]  # of each worker, call by call; the last one stays
        self.generate: Callable[[int], tuple[int, bytes]] = lambda _: answer(good_choice())
        self.requests = 0
        self.ids: list[str] = []  # of requests for samples
        self.url = ""

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path == "/inference/v1/generate":
            self.requests += 1
            self.ids.append(body["request_id"])
            return self.generate(self.requests - 1)
        if body.get("method") == "mdppo_describe":
            return 200, json.dumps({"results": [self.facts]}).encode()
        if body.get("method") == "mdppo_version":
            versions = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
            return 200, json.dumps({"results": [{"version": version, "updates": 0} for version in versions]}).encode()
        return 200, b"{}"


def answer(*choices: dict[str, Any], status: int = 200) -> tuple[int, bytes]:
    return status, json.dumps({"choices": choices}).encode()


@pytest.fixture
def stub() -> Iterator[Stub]:
    state = Stub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"] or 0)) or b"{}")
            status, data = state.respond(self.path.partition("?")[0], body)
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def ask(url: str, sampling: Sampling = SAMPLING, **kwargs: Any) -> Trajectory:
    async def main() -> Trajectory:
        engine = VllmEngine(url, **({"backoff_s": 0.02, "attempts": 3} | kwargs))
        try:
            return await engine.generate([1, 2], sampling, "r7")
        finally:
            await engine.close()

    return asyncio.run(main())


def test_a_good_answer_is_read(stub: Stub) -> None:
    t = ask(stub.url)
    assert t.response_ids.tolist() == [3, 5] and t.finish_reason == "length"
    assert t.rollout_logprobs.tolist() == [-1.0, -4.0]
    assert t.topk_ids.tolist() == [
        [1, 3],
        [6, 7],
    ]  # descending, the third entry (or the sample outside) dropped
    np.testing.assert_array_equal(t.topk_logprobs, np.array([[-0.9, -1.0], [-0.2, -3.0]], np.float32))
    assert t.routed_experts is None


def test_clamped_entries_and_a_small_vocabulary_are_absent_entries(stub: Stub) -> None:
    stub.facts["vocab_size"] = 3
    choice = good_choice()
    choice["token_ids"] = [0]
    choice["logprobs"]["content"] = [logprob_entry(0, -0.5, [(0, -0.5), (1, -1.0), (2, -9999.0)])]
    stub.generate = lambda _: answer(choice)
    t = ask(stub.url, Sampling(1.0, 4, training=True, num_topk_logprobs=5))
    assert t.topk_ids.tolist() == [[0, 1, -1, -1, -1]]
    np.testing.assert_array_equal(t.topk_logprobs[0], np.array([-0.5, -1.0] + [-np.inf] * 3, np.float32))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good choice with one place changed: "a.0.b" is choice["a"][0]["b"]."""
    choice: Any = good_choice()
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = choice
    for key in parents:
        place = place[key]
    place[last] = value
    return choice


NONSENSE = {
    "token outside the vocabulary": (
        changed("token_ids", [3, 8]),
        r"token_ids: got \[8\], expected ids in \[0, 8\)",
    ),
    "negative token": (changed("token_ids", [3, -1]), r"token_ids: got \[-1\]"),
    "tokens as text": (changed("token_ids", ["3", "5"]), "token_ids: got .* expected a list of integers"),
    "no tokens": (changed("token_ids", None), "token_ids: got None"),
    "no logprobs": (changed("logprobs", None), "logprobs: got 0 entries, expected one for each of 2 tokens"),
    "too few logprobs": (
        changed("logprobs.content", good_choice()["logprobs"]["content"][:1]),
        "logprobs: got 1 entries",
    ),
    "another token's": (
        changed("logprobs.content.1.token", "token_id:6"),
        "got an entry for token_id:6 at position 1",
    ),
    "missing sampled logprob": (
        changed("logprobs.content.0.logprob", -9999.0),
        "got -9999.0 for the sampled token 3",
    ),
    "NaN": (changed("logprobs.content.0.logprob", float("nan")), "got nan for the sampled token 3"),
    "positive": (
        changed("logprobs.content.0.logprob", 0.5),
        "rollout_logprobs: got an infinite or positive value",
    ),
    "text as logprob": (changed("logprobs.content.0.logprob", "-1"), "TypeError"),
    "missing top logprob": (
        changed("logprobs.content.0.top_logprobs", good_choice()["logprobs"]["content"][0]["top_logprobs"][:2]),
        "top_logprobs: got 2 at position 0, expected 3",
    ),
    "top id outside": (
        changed("logprobs.content.1.top_logprobs.1.token", "token_id:9"),
        "got token id 9, expected ids in",
    ),
    "top id twice": (changed("logprobs.content.1.top_logprobs.2.token", "token_id:6"), "same id twice"),
    "finish reason": (changed("finish_reason", "error"), "finish_reason: got 'error'"),
}


@pytest.mark.parametrize(("choice", "message"), NONSENSE.values(), ids=NONSENSE.keys())
def test_an_answer_that_cannot_be_right_is_named(stub: Stub, choice: dict[str, Any], message: str) -> None:
    stub.generate = lambda _: answer(choice)
    with pytest.raises(EngineBadAnswer, match=message) as error:
        ask(stub.url)
    assert str(error.value).startswith(f"engine {stub.url}: request r7: ")
    assert stub.requests == 1  # asking again would not help


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"<html>", "got '<html>', expected JSON"),
        (b"[1]", "got a JSON list, expected an object"),
        (b"{}", "choices: got None, expected exactly one"),
        (json.dumps({"choices": [good_choice()] * 2}).encode(), "expected exactly one"),
    ],
)
def test_an_answer_that_is_no_answer_is_named(stub: Stub, raw: bytes, message: str) -> None:
    stub.generate = lambda _: (200, raw)
    with pytest.raises(EngineBadAnswer, match=message):
        ask(stub.url)


def encoded(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (None, "routed_experts: got none"),
        ("%%%", "not a base64 numpy array"),
        (base64.b64encode(b"nothing").decode(), "not a base64 numpy array"),
        (encoded(np.zeros((4, 1, 2), np.uint8)), r"got shape \[4, 1, 2\], expected \[3, layers, k\]"),
        (encoded(np.zeros((3, 1, 2), np.float32)), "routed_experts: got float32"),
        (encoded(np.zeros((3, 0, 2), np.uint8)), "IndexError"),
    ],
)
def test_routes_that_were_promised_must_come_and_fit(stub: Stub, routes: str | None, message: str) -> None:
    stub.facts["routed_experts"] = True
    stub.generate = lambda _: answer(good_choice() | {"routed_experts": routes})
    with pytest.raises(EngineBadAnswer, match=message):
        ask(stub.url)


def test_an_aborted_response_may_lack_routes(stub: Stub) -> None:
    stub.facts["routed_experts"] = True
    cut = good_choice() | {"finish_reason": "abort"}
    stub.generate = lambda _: answer(cut | {"routed_experts": encoded(np.ones((2, 1, 2), np.uint8))})
    t = ask(stub.url)
    assert t.routes_valid.tolist() == [True, True, False] and t.routed_experts.shape == (3, 1, 2)
    stub.generate = lambda _: answer(cut | {"routed_experts": None})
    assert ask(stub.url).routed_experts is None


def test_server_faults_are_retried_and_then_succeed(stub: Stub) -> None:
    stub.generate = lambda n: (503, b"busy") if n < 2 else answer(good_choice())
    assert ask(stub.url).response_length == 2
    assert stub.requests == len(set(stub.ids)) == 3  # the server may still know what it answered with a fault


def test_server_faults_without_end_are_an_error_with_the_last_one(stub: Stub) -> None:
    stub.generate = lambda n: (500, f"fault {n}".encode())
    with pytest.raises(EngineUnreachable, match="generate failed 3 times, last with .*500: fault 2"):
        ask(stub.url)
    assert stub.requests == 3


def test_a_refusal_is_not_retried(stub: Stub) -> None:
    stub.generate = lambda _: (400, b"bad request: because")
    with pytest.raises(EngineError, match="answered 400: bad request: because"):
        ask(stub.url)
    assert stub.requests == 1


def test_an_engine_that_was_restarted_between_attempts_is_not_asked_again(stub: Stub) -> None:
    stub.versions = [[4], [0]]
    stub.generate = lambda n: (500, b"fault")
    with pytest.raises(EngineError, match="got weights of version 0, expected 4"):
        ask(stub.url)
    assert stub.requests == 1


def test_workers_must_agree(stub: Stub) -> None:
    stub.versions = [[3, 2]]
    with pytest.raises(EngineError, match="its workers disagree"):
        ask(stub.url)


def test_a_server_with_other_logprobs_is_refused(stub: Stub) -> None:
    stub.facts["logprobs_mode"] = "raw_logprobs"
    with pytest.raises(EngineError, match="got logprobs_mode raw_logprobs, expected processed_logprobs"):
        ask(stub.url)


def test_a_pause_that_fails_leaves_nobody_waiting(stub: Stub) -> None:
    """The workers do not say how far the held requests are: later ones are refused, and go on after `resume`."""

    async def main() -> None:
        engine = VllmEngine(stub.url)
        try:
            with pytest.raises(EngineBadAnswer, match="mdppo_progress: got {}"):
                await engine.pause("keep")
            with pytest.raises(EngineError, match="generate refused: it is paused"):
                await engine.generate([1, 2], SAMPLING, "r")
            await engine.resume()
            assert (await engine.generate([1, 2], SAMPLING, "r")).response_length
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_nobody_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    before = time.monotonic()
    with pytest.raises(EngineUnreachable, match="failed 3 times, last with ClientConnectorError") as error:
        ask(url)
    assert time.monotonic() - before < 2 and url in str(error.value)


def test_a_server_that_hangs_is_given_up_in_time(stub: Stub) -> None:
    def hang(_: int) -> tuple[int, bytes]:
        time.sleep(1.0)
        return answer(good_choice())

    stub.generate = hang
    before = time.monotonic()
    with pytest.raises(EngineUnreachable, match="failed 2 times, last with TimeoutError"):
        ask(stub.url, timeout_s=0.2, attempts=2)
    assert time.monotonic() - before < 2


def test_more_requests_than_slots_wait_in_the_client_and_all_are_answered(stub: Stub) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def slow(_: int) -> tuple[int, bytes]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return answer(good_choice())

    stub.generate = slow

    async def main() -> list[Trajectory]:
        engine = VllmEngine(stub.url, concurrency=5)
        try:
            return await asyncio.gather(*(engine.generate([1], SAMPLING, f"{i}") for i in range(40)))
        finally:
            await engine.close()

    assert len(asyncio.run(main())) == stub.requests == 40
    assert most <= 5


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        ({"top_p": 0.9}, ["top_p: got 0.9, expected 1.0 in training"]),
        ({"top_k": 50, "min_p": 0.1}, ["top_k: got 50, expected -1", "min_p: got 0.1, expected 0.0"]),
        ({"temperature": 0.0}, [r"temperature: got 0 \(greedy\), expected > 0 in training"]),
        (
            {"presence_penalty": 0.5, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "max_tokens": 0},
            [
                "presence_penalty: got 0.5",
                "frequency_penalty: got 0.1",
                "repetition_penalty: got 1.1",
                "max_tokens: got 0",
            ],
        ),
        ({"temperature": -1.0}, ["temperature: got -1.0"]),
        ({"temperature": float("inf")}, ["temperature: got inf"]),
        ({"num_topk_logprobs": -1}, ["num_topk_logprobs: got -1"]),
    ],
)
def test_sampling_that_cannot_be_reproduced_is_refused_with_every_fault(
    fields: dict[str, Any], faults: list[str]
) -> None:
    for fault in faults:
        with pytest.raises(ValueError, match=fault):
            Sampling(**({"temperature": 1.0, "max_tokens": 4, "training": True} | fields))


def test_evaluation_may_truncate() -> None:
    Sampling(0.0, 4, training=False, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": -1}, "got version -1"),
        ({"path": "weights"}, "expected an absolute one"),
        ({"transport": "pigeon"}, "got transport 'pigeon'"),
        ({"nbytes": 23}, "got 23 bytes, expected at least 24"),
        ({"crc32": (1,)}, "got 1 checksums for 2 tensors"),
        (
            {"tensors": (("a", "float32", (2, 2), 0), ("b", "bfloat16", (4,), 8))},
            "b at 8 overlaps its predecessor",
        ),
        ({"tensors": (("a", "float32", (2,), 0), ("a", "float32", (2,), 8))}, "2 tensors with 1 names"),
        ({"tensors": (("a", "int8", (2,), 0),)}, "got dtype int8 for a"),
    ],
)
def test_a_broken_update_is_refused(fields: dict[str, Any], message: str) -> None:
    good = {
        "version": 1,
        "path": "/dev/shm/w",
        "tensors": (("a", "float32", (2, 2), 0), ("b", "bfloat16", (4,), 16)),
        "nbytes": 24,
    }
    FileUpdate(**good)
    with pytest.raises(ValueError, match=message):
        FileUpdate(**(good | fields))


def test_the_command_and_environment_of_a_server(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a local Hugging Face directory"):
        server_command(tmp_path, port=1, cpu=True, dtype="float32")
    (tmp_path / "config.json").write_text("{}")
    cpu = server_command(tmp_path, port=1, cpu=True, dtype="float32", gpu_memory_utilization=0.9, extra=["--seed", "3"])
    assert cpu[0] == sys.executable and cpu[-2:] == ["--seed", "3"]
    options = dict(zip(cpu, cpu[1:], strict=False))
    assert (options["--logprobs-mode"], options["--generation-config"]) == ("processed_logprobs", "vllm")
    assert options["--block-size"] == "32" and "--enforce-eager" in cpu and "--gpu-memory-utilization" not in cpu
    gpu = server_command(
        tmp_path,
        port=1,
        cpu=False,
        dtype="bfloat16",
        gpu_memory_utilization=0.9,
        tensor_parallel_size=8,
        routed_experts=True,
    )
    options = dict(zip(gpu, gpu[1:], strict=False))
    assert (options["--tensor-parallel-size"], options["--gpu-memory-utilization"]) == ("8", "0.9")
    assert "--enforce-eager" not in gpu and "--block-size" not in gpu and "--enable-return-routed-experts" in gpu
    env = server_env(cpu=True, cache_root=tmp_path, base={"PATH": "/bin"})
    assert (env["PATH"], env["VLLM_SERVER_DEV_MODE"], env["TORCHDYNAMO_DISABLE"]) == ("/bin", "1", "1")
    assert "TORCHDYNAMO_DISABLE" not in server_env(cpu=False, cache_root=tmp_path, base={})


def test_waiting_for_a_server_ends_at_once_when_it_dies(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    child = start("engine", argv, env=os.environ, log_path=tmp_path / "log")
    before = time.monotonic()
    with pytest.raises(ChildDied, match="engine ended with code 3(.|\n)*no such model"):
        wait_ready(f"http://127.0.0.1:{free_port()}", child, 60)
    assert time.monotonic() - before < 10


def test_waiting_for_a_server_ends_at_the_deadline(tmp_path: Path) -> None:
    argv = [sys.executable, "-u", "-c", "import time; print('loading'); time.sleep(60)"]
    child = start("engine", argv, env=os.environ, log_path=tmp_path / "log")
    try:
        with pytest.raises(EngineUnreachable, match="not ready after 1 s(.|\n)*loading"):
            wait_ready(f"http://127.0.0.1:{free_port()}", child, 1.0)
    finally:
        child.stop()
