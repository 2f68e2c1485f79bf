"""`SglangEngine` and what it makes of answers: what a server may say that cannot be right, from a small local stub."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dppo.architecture import Architecture, load_architecture
from megatron_dppo.control import connect_store
from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.data.turns import without_last_token
from megatron_dppo.rollout.engine import Capabilities, EngineBadAnswer, EngineError, Sampling
from megatron_dppo.rollout.sglang.answer import (
    RouteShape,
    parse_answer,
    parse_version,
    request_body,
    wire_version,
)
from megatron_dppo.rollout.sglang.client import SglangEngine
from megatron_dppo.rollout.sglang.message import LOADER, Call, answer_key
from megatron_dppo.rollout.sglang.whole_tensors import buckets_of
from tests.tiny_models import tiny_config

VOCAB = 8
PROMPT = [1, 2]
SAMPLING = Sampling(1.0, 4, training=True, num_topk_logprobs=2)
SHAPE = RouteShape(layers=3, k=2, experts=300)
FACTS = Capabilities(
    engine="sglang",
    engine_version="0.5.23",
    vocab_size=VOCAB,
    max_model_len=16,
    max_logprobs=VOCAB + 1,
    routed_experts=True,
    moe_layers=(1, 2),
    dtype="float32",
    seeds=False,
)
ROUTES = np.arange(3 * 3 * 2, dtype=np.int32).reshape(3, 3, 2) * 10


def encoded(routes: np.ndarray) -> str:
    return base64.b64encode(routes.tobytes()).decode()


def good_answer() -> dict[str, Any]:
    """Two tokens at K = 2, the first among the top 2, the second not."""
    return {
        "output_ids": [3, 5],
        "meta_info": {
            "finish_reason": {"type": "length"},
            "weight_version": "4.9",
            "weight_versions": [
                {"version": "3.8", "start": 0, "end": 1},
                {"version": "4.9", "start": 1, "end": 2},
            ],
            "output_token_logprobs": [[-1.0, 3, None], [-4.0, 5, None]],
            "output_top_logprobs": [[[-0.9, 1, None], [-1.0, 3, None]], [[-0.2, 6, None], [None, 7, None]]],
            "routed_experts": encoded(ROUTES),
            "num_retractions": 0,
        },
    }


def parsed(answer: dict[str, Any], facts: Capabilities = FACTS) -> Trajectory:
    return parse_answer("http://engine", facts, answer, PROMPT, SAMPLING, SHAPE, "r", "g")


def test_an_answer_becomes_a_trajectory() -> None:
    t = parsed(good_answer())
    assert t.response_ids.tolist() == [3, 5] and t.rollout_logprobs.tolist() == [-1.0, -4.0]
    assert t.topk_ids.tolist() == [[1, 3], [6, -1]] and t.topk_logprobs[1, 1] == -np.inf
    assert t.policy_versions.tolist() == [3, 4] and t.finish_reason == "length"
    assert t.moe_layers is not None and t.moe_layers.tolist() == [1, 2]
    assert t.routed_experts is not None and t.routed_experts.dtype == np.uint16
    assert np.array_equal(t.routed_experts, ROUTES[:, 1:]) and t.routes_valid.all()


def test_a_server_without_spans_says_which_weights_it_has() -> None:
    answer = good_answer()
    del answer["meta_info"]["weight_versions"]  # 0.5.18
    assert parsed(answer).policy_versions.tolist() == [4, 4]


def test_an_aborted_answer_may_lack_routes() -> None:
    answer = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}, "weight_version": "default"}}
    t = parsed(answer)
    assert t.response_length == 0 and t.finish_reason == "abort"


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def at(answer: dict[str, Any]) -> None:
        for step in path[:-1]:
            answer = answer[step]
        answer[path[-1]] = to

    return at


META = "meta_info"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda answer: answer.pop(META), "KeyError: 'meta_info'"),
        (change("output_ids", to=[3, VOCAB]), r"got \[8\], expected ids in \[0, 8\)"),
        (change("output_ids", to="35"), "expected a list of integers"),
        (change("output_ids", to=[3]), "got 2 entries, expected one for each of 1 tokens"),
        (change("output_ids", to=[3, 6]), "got an entry for 5 at position 1, expected token 6"),
        (change(META, "output_token_logprobs", 0, 0, to=None), "got None for the sampled token 3"),
        (change(META, "output_top_logprobs", 0, to=[[-0.9, 1, None]]), "top_logprobs: got 1 at position 0, expected 2"),
        (change(META, "output_top_logprobs", to=None), "got 0 rows, expected one for each of 2 tokens"),
        (change(META, "output_top_logprobs", 0, 0, 1, to=VOCAB), "got token id 8"),
        (lambda answer: answer[META].pop("routed_experts"), "routed_experts: got none"),
        (change(META, "routed_experts", to=encoded(ROUTES[:2])), r"got shape \[2, 2, 2\], expected \[3, layers, k\]"),
        (change(META, "routed_experts", to=encoded(ROUTES[:, :2])), r"expected \[3, layers, k\]"),
        (change(META, "routed_experts", to=encoded(ROUTES.ravel()[:7])), "got 7 numbers, expected rows of 3 layers"),
        (change(META, "routed_experts", to=encoded(ROUTES + 200)), r"expected numbers below 300"),
        (change(META, "routed_experts", to="?"), "not base64 of int32"),
        (
            change(META, "weight_versions", 1, "version", to="step-7"),
            "got 'step-7', expected one that this client",
        ),
        (change(META, "weight_versions", 1, "version", to="-1.9"), "weights that a failed update left half-written"),
        (change(META, "num_retractions", to=1), "recorded anew under later weights"),
    ],
)
def test_an_answer_that_cannot_be_right_is_named(fault: Callable[[dict[str, Any]], Any], message: str) -> None:
    answer = copy.deepcopy(good_answer())
    fault(answer)
    with pytest.raises(EngineBadAnswer, match=f"engine http://engine: request r: .*{message}"):
        parsed(answer)


def test_a_cut_answer_is_as_before_its_last_token() -> None:
    t = without_last_token(parsed(good_answer()))
    assert t.response_ids.tolist() == [3] and t.policy_versions.tolist() == [3] and t.topk_ids.tolist() == [[1, 3]]
    assert t.routed_experts is not None and np.array_equal(t.routed_experts, ROUTES[:2, 1:])


def test_versions_on_the_wire() -> None:
    assert parse_version("default") == (0, 0)
    assert parse_version(wire_version(12, 3)) == (12, 3) and parse_version(wire_version(-1, 3)) == (-1, 3)


def test_what_would_end_the_server_is_not_sent() -> None:
    body = request_body(FACTS, PROMPT, Sampling(1.0, 99, training=True, num_topk_logprobs=20), "r")
    assert body["top_logprobs_num"] == VOCAB and body["sampling_params"]["max_new_tokens"] == 14
    with pytest.raises(ValueError, match=r"token ids \[8\], expected ids in \[0, 8\)"):
        request_body(FACTS, [1, VOCAB], SAMPLING, "r")


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    path = tmp_path_factory.mktemp("model")
    tiny_config().save_pretrained(path)
    return load_architecture(path)


class Stub:
    """What the stub server answers to GET, and to POST where that is not success; paths that it does not have."""

    def __init__(self) -> None:
        self.url = ""
        self.info: dict[str, Any] = {
            "version": "0.5.23",
            "dp_size": 1,
            "pp_size": 1,
            "tp_size": 2,
            "custom_weight_loader": [LOADER],
            "max_req_input_len": 100,
            "enable_return_routed_experts": True,
            "enable_deterministic_inference": False,
            "dtype": "float32",
        }
        self.model: dict[str, Any] = {"model_type": "qwen3_moe", "model_path": "/model", "weight_version": "default"}
        self.absent: set[str] = set()
        self.posted: list[tuple[str, Any]] = []
        self.workers: list[dict[str, Any]] = []  # what each answers to a call


@pytest.fixture
def stub() -> Iterator[Stub]:
    state = Stub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            found = {"/server_info": state.info, "/model_info": state.model}
            if self.path in state.absent:
                self.answer(404, {})
            elif self.path in found:
                self.answer(200, found[self.path])
            else:
                self.answer(405, {})

        def do_POST(self) -> None:
            state.posted.append(
                (self.path, json.loads(self.rfile.read(int(self.headers["content-length"] or 0)) or "{}"))
            )
            path, body = state.posted[-1]
            if path == "/update_weights_from_tensor" and state.workers:
                call = decoded(body["serialized_named_tensors"][0])
                store = connect_store(call.store, 10.0)
                for number, found in enumerate(state.workers):
                    store.set(answer_key(call.number, number), json.dumps(found))
            self.answer(200, {"success": True})

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def ask(stub: Stub, arch: Architecture, what: Callable[[SglangEngine], Any]) -> Any:
    async def main() -> Any:
        engine = SglangEngine(stub.url, arch, attempts=1)
        try:
            return await what(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def test_facts_come_from_the_server_and_the_model(stub: Stub, arch: Architecture) -> None:
    facts = ask(stub, arch, lambda engine: engine.capabilities())
    assert (facts.engine, facts.engine_version, facts.vocab_size, facts.max_model_len) == ("sglang", "0.5.23", 64, 100)
    assert facts.moe_layers == (0, 1) and facts.routed_experts and not facts.seeds


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"version": "0.5.17"}, "got SGLang 0.5.17, expected 0.5.18 to 0.5.23"),
        ({"version": "0.6.0"}, "got SGLang 0.6.0, expected"),
        ({"dp_size": 2}, "got dp_size 2, expected 1: start a server a replica"),
        ({"pp_size": 2}, "got pp_size 2, expected 1"),
        ({"speculative_algorithm": "EAGLE"}, "got speculative_algorithm EAGLE, expected none"),
    ],
)
def test_a_server_that_will_not_do_is_refused(
    stub: Stub, arch: Architecture, info: dict[str, Any], message: str
) -> None:
    stub.info |= info
    with pytest.raises(EngineError, match=f"engine {stub.url}: {message}"):
        ask(stub, arch, lambda engine: engine.capabilities())


def test_a_server_that_says_less_than_it_should_is_named(stub: Stub, arch: Architecture) -> None:
    del stub.info["max_req_input_len"]
    with pytest.raises(EngineBadAnswer, match="/server_info, /model_info: KeyError: 'max_req_input_len'"):
        ask(stub, arch, lambda engine: engine.capabilities())


def test_another_model_or_another_engine_is_refused(stub: Stub, arch: Architecture) -> None:
    stub.model["model_type"] = "llama"
    with pytest.raises(EngineError, match="got a model of type llama, expected qwen3_moe"):
        ask(stub, arch, lambda engine: engine.capabilities())
    stub.absent.add("/server_info")
    with pytest.raises(EngineError, match="it has no /server_info: no SGLang server"):
        ask(stub, arch, lambda engine: engine.capabilities())


def test_a_stock_server_says_how_it_takes_weights(stub: Stub, arch: Architecture) -> None:
    assert ask(stub, arch, lambda engine: engine.capabilities()).weights == "shard to shard"
    stub.info["custom_weight_loader"] = None
    assert ask(stub, arch, lambda engine: engine.capabilities()).weights == "whole tensors, in buckets"

    async def layout(engine: SglangEngine) -> None:
        await engine.capabilities()
        await engine.layout()

    with pytest.raises(EngineError, match="takes whole tensors only: expected sync.transport shm or disk"):
        ask(stub, arch, layout)


def test_buckets_hold_tensors_in_order_as_many_as_fit() -> None:
    tensors = {name: torch.zeros(size) for name, size in (("a", 2), ("b", 1), ("c", 9), ("d", 1), ("e", 1))}
    tensors["f"] = torch.zeros(1, dtype=torch.bfloat16)  # would lie where its bytes cannot be read
    assert [list(bucket) for bucket in buckets_of(tensors, 16)] == [["a", "b"], ["c"], ["d", "e"], ["f"]]


@pytest.mark.parametrize("sessions", [True, False])
def test_a_call_whose_worker_leaves_no_answer_is_named(stub: Stub, arch: Architecture, sessions: bool) -> None:
    """Servers before 0.5.21 have no sessions; every worker gets its copy of the message."""
    if not sessions:
        stub.absent.add("/begin_weight_update")

    async def layout(engine: SglangEngine) -> None:
        await engine.capabilities()
        await engine.layout()

    with pytest.raises(EngineBadAnswer, match=r"layout: worker 0 left no answer at 127.0.0.1:\d+; its log may say why"):
        ask(stub, arch, layout)
    paths = [path for path, _ in stub.posted]
    assert ("/begin_weight_update" in paths) == sessions
    body = dict(stub.posted)["/update_weights_from_tensor"]
    assert len(body["serialized_named_tensors"]) == 2 and body["load_format"] == LOADER and not body["flush_cache"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"unread": ["a", "b"]}, {"unread": ["b"]}, r"it reads nothing of 1 tensors \(b\), without a word"),
        ({"unreached": ["a"]}, {"unreached": ["a"]}, r"it has 1 parameters that no tensor reaches \(a\)"),
        ({"error": "RuntimeError: full"}, {}, "layout: RuntimeError: full"),
    ],
)
def test_what_sglang_leaves_out_is_named(
    stub: Stub, arch: Architecture, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    common = {"boxes": [], "unread": [], "unreached": []}
    stub.workers = [{"worker": 0, **common, **first}, {"worker": 1, **common, **second}]
    with pytest.raises(EngineError, match=message):
        ask(stub, arch, lambda engine: engine.layout())


def test_workers_may_keep_different_parts(stub: Stub, arch: Architecture) -> None:
    """One has the padding of a small vocabulary, and tied heads and layers of multi-token prediction go unread."""
    unread = ["lm_head.weight", "model.layers.2.enorm.weight"]
    boxes = [["model.norm.weight", [0], [64]]]
    stub.workers = [
        {"worker": 0, "boxes": boxes, "unread": unread, "unreached": []},
        {"worker": 1, "boxes": boxes, "unread": [*unread, "model.embed_tokens.weight"], "unreached": ["embed"]},
    ]
    tied = replace(arch, tie_word_embeddings=True)
    layout = ask(stub, tied, lambda engine: engine.layout())
    assert [[box.tensor for box in boxes] for boxes in layout] == [["model.norm.weight"]] * 2
    with pytest.raises(EngineError, match=r"it reads nothing of 1 tensors \(lm_head.weight\), without a word"):
        ask(stub, arch, lambda engine: engine.layout())


def test_a_message_survives_the_wire() -> None:
    call = Call(7, "receive", {"version": 3, "file": {"path": "/x"}}, "/model", "host:1")
    assert decoded(call.message()) == call


def decoded(message: str) -> Call:
    ((name, tensor),) = pickle.loads(base64.b64decode(message))
    assert tensor.numel() == 0
    return Call.from_json(name)
