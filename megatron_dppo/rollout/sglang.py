"""`RolloutEngine` on an SGLang server, over its HTTP routes.

How SGLang's ways become the contract's:

- Versions. The server names its weights what we tell it ("VERSION.UPDATES") and says with each answer which tokens are
  from which: trajectories take that, not what this client believes.
- "keep". SGLang can hold requests in place, but their keys and values stay those of the old weights; or take them
  back ("retract"), but then it records the routes of early tokens anew, under the new weights. Neither is right for
  training. Held requests are therefore cut (aborted) with what they have, and go on after the update as new requests
  whose prompt is the old one and that; the parts are joined as turns of a conversation are. Each token, and each row of
  routes, is then of the weights that read it, and the cache can be flushed, since nothing runs.
- Weights. `sglang_worker`, which the server loads, takes of hub tensors the boxes that each worker keeps.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from megatron_dppo.architecture import Architecture
from megatron_dppo.rollout.engine import Capabilities, EngineBadAnswer, EngineError, PauseMode, Sampling, Update
from megatron_dppo.rollout.http_engine import HttpEngine
from megatron_dppo.rollout.sglang_answer import RouteShape, parse_answer, parse_version, request_body, wire_version
from megatron_dppo.rollout.sglang_call import LOADER, Call, answer_key
from megatron_dppo.rollout.sglang_server import check_supported
from megatron_dppo.rollout.trajectory import Trajectory
from megatron_dppo.rollout.turns import join_turns
from megatron_dppo.weights.image import shown

STORE_TIMEOUT = timedelta(seconds=30)
NO_SESSION, SESSION_OPEN = "no weight-update session is open", "session is already open"
UNUSABLE = -1


class SglangEngine(HttpEngine):
    """See `HttpEngine`; `arch`: of the model that the server was started with, which it does not say itself."""

    sampling_path = "/generate"
    id_field = "rid"
    health_path = "/server_info"  # its /health samples a token, which a paused server does not

    def __init__(self, url: str, arch: Architecture, **kwargs: Any) -> None:
        super().__init__(url, **kwargs)
        self._arch = arch
        self._calls = count()
        self._store: dist.TCPStore | None = None
        self._sessions = False  # whether the server wants updates inside of one
        self._workers = 1
        self._model_dir = ""

    # ---- facts ----

    async def _probe(self) -> Capabilities:
        try:
            info = await self.http.retrying("GET", "/server_info")
        except EngineError as error:
            if "answered 404" not in str(error):
                raise
            raise EngineError(
                self.url, "it has no /server_info: no SGLang server (what does rollout.engine say?)"
            ) from error
        model = await self.http.retrying("GET", "/model_info")
        version = str(info.get("version"))
        try:
            check_supported(version)
        except ValueError as error:
            raise EngineError(self.url, str(error)) from error
        if model.get("model_type") != self._arch.model_type:
            raise EngineError(
                self.url, f"got a model of type {model.get('model_type')}, expected {self._arch.model_type}"
            )
        for name in ("dp_size", "pp_size"):
            if info[name] != 1:
                raise EngineError(self.url, f"got {name} {info[name]}, expected 1: start a server a replica")
        if LOADER not in (info.get("custom_weight_loader") or []):
            raise EngineError(
                self.url,
                f"got --custom-weight-loader {info.get('custom_weight_loader')}, expected {LOADER}; start the server "
                "with sglang_server.server_command",
            )
        self._workers, self._model_dir = int(info["tp_size"]), str(model["model_path"])
        self._sessions = await self._has("/begin_weight_update")
        return Capabilities(
            engine="sglang",
            engine_version=version,
            vocab_size=self._arch.vocab_size,
            max_model_len=int(info["max_req_input_len"]),  # SGLang keeps a few positions of the context back
            max_logprobs=self._arch.vocab_size + 1,
            routed_experts=bool(info["enable_return_routed_experts"]),
            moe_layers=self._arch.moe_layer_numbers,
            dtype=str(info["dtype"]),
            seeds=bool(info["enable_deterministic_inference"]),
        )

    async def _has(self, path: str) -> bool:
        """Whether the server has a route for POST."""
        try:
            await self.http.once("GET", path)
        except EngineError as error:
            return "answered 405" in str(error)
        return True

    async def _weights(self) -> tuple[int, int]:
        name = (await self.http.retrying("GET", "/model_info")).get("weight_version")
        try:
            return parse_version(name)
        except ValueError as error:
            raise EngineBadAnswer(self.url, str(error)) from error

    async def _worker_layouts(self) -> list[dict[str, Any]]:
        async with self._session():
            answers = await self._call("layout")
        dropped = [name for name in _in_all(answers, "unread") if not self._may_be_unread(name)]
        if dropped or (unreached := _in_all(answers, "unreached")):
            what = (
                f"reads nothing of {len(dropped)} tensors ({shown(dropped)})"
                if dropped
                else f"has {len(unreached)} parameters that no tensor reaches ({shown(unreached)})"
            )
            raise EngineError(
                self.url, f"it {what}, without a word: this SGLang does not serve the config.json's model"
            )
        return answers

    def _may_be_unread(self, name: str) -> bool:
        """A head that is tied, and layers of multi-token prediction."""
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        return name == "lm_head.weight" or (layer.isdigit() and int(layer) >= self._arch.num_layers)

    async def _worker_fingerprints(self) -> list[dict[str, Any]]:
        async with self._session():
            return await self._call("received")

    # ---- sampling ----

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str, *, group_id: str = ""
    ) -> Trajectory:
        parts: list[Trajectory] = []
        ids, left = list(prompt_ids), sampling
        while True:
            part, held = await self._sample(ids, left, request_id, group_id)
            if part.response_length or not parts:
                parts.append(part)
            if not held or part.finish_reason != "abort":
                # A part that was cut before its first token has nothing to join.
                whole = [one for one in parts if one.response_length] or parts[-1:]
                return replace(join_turns(whole), finish_reason=part.finish_reason)
            ids += part.response_ids.tolist()
            left = replace(left, max_tokens=left.max_tokens - part.response_length)

    def _request(
        self, facts: Capabilities, prompt_ids: Sequence[int], sampling: Sampling, request_id: str
    ) -> dict[str, Any]:
        return request_body(facts, prompt_ids, sampling, request_id)

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
        arch = self._arch
        routes = RouteShape(arch.num_layers, arch.num_experts_per_tok, arch.num_experts)
        return parse_answer(self.url, facts, answer, prompt_ids, sampling, routes, request_id, group_id)

    async def _abort(self, wire_id: str) -> None:
        # SGLang itself looks only every few seconds whether somebody still waits.
        await self.http.once("POST", "/abort_request", {"rid": wire_id}, parse=False)

    async def _pause_server(self, mode: PauseMode) -> None:
        # Whatever the mode: what may go on has ended when this is called for "wait", and what is held is cut. A request
        # that came to a paused server waits before the scheduler, out of an abort's reach: it is let in first.
        await self.http.once("POST", "/continue_generation", {})
        await self.http.once("POST", "/pause_generation", {"mode": "abort"})

    async def _resume_server(self) -> None:
        await self.http.once("POST", "/continue_generation", {})

    async def _progress(self) -> Mapping[str, int]:
        return {}  # answers say it

    # ---- weights ----

    async def _hand_over(self, update: Update) -> None:
        arguments = {"version": update.version, update.transport: update.as_json()}
        unusable = wire_version(UNUSABLE, self._updates) if update.transport == "group" else None
        await self._begin()
        await self._call("receive", arguments, names_weights=unusable)

    async def _put_in_use(self, version: int) -> int:
        # In this order, so that the server never has a name for weights that are not whole.
        await self._call("finish", names_weights=wire_version(UNUSABLE, self._updates))
        await self.http.once("POST", "/flush_cache", parse=False)
        states = await self._call("state")
        updates = int(states[0]["updates"])
        if any(state != {"version": version, "updates": updates} for state in states):
            raise EngineError(self.url, f"commit: the workers report {states}, expected version {version} of all")
        await self._call("state", names_weights=wire_version(version, updates))
        await self._end()
        found = await self._weights()
        if found != (version, updates):
            raise EngineError(self.url, f"commit: got weights {found}, expected {(version, updates)}")
        return updates

    async def _discard(self) -> int:
        await self._begin()
        states = await self._call("discard")
        version, updates = int(states[0]["version"]), int(states[0]["updates"])
        if any(state != states[0] for state in states):
            version = UNUSABLE
        await self._call("state", names_weights=wire_version(version, updates))
        await self._end()
        return version

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[None]:
        await self._begin()
        yield
        await self._end()

    async def _begin(self) -> None:
        """SGLang undoes what it did to the loaded layout; one that a client before left open will do."""
        if self._sessions:
            await self._unless(SESSION_OPEN, "/begin_weight_update")

    async def _end(self) -> None:
        """SGLang prepares the loaded parameters for its kernels."""
        if self._sessions:
            await self._unless(NO_SESSION, "/end_weight_update")

    async def _unless(self, done: str, path: str) -> None:
        try:
            await self.http.once("POST", path, {})
        except EngineError as error:
            if done not in str(error):
                raise

    # ---- calls to workers ----

    async def _call(
        self, method: str, arguments: dict[str, Any] | None = None, *, names_weights: str | None = None
    ) -> list[dict[str, Any]]:
        """Every worker's answer, in order. `names_weights`: what the server calls its weights from then on."""
        store, address = await self._served_store()
        call = Call(next(self._calls), method, arguments or {}, self._model_dir, address)
        body = {
            "serialized_named_tensors": [call.message()] * self._workers,
            "load_format": LOADER,
            "flush_cache": False,
            "weight_version": names_weights,
        }
        await self.http.once("POST", "/update_weights_from_tensor", body)
        answers = []
        for worker in range(self._workers):
            key = answer_key(call.number, worker)
            if not store.check([key]):
                raise EngineBadAnswer(
                    self.url, f"{method}: worker {worker} left no answer at {address}; its log may say why"
                )
            answers.append(json.loads(store.get(key)))
            store.delete_key(key)
        if errors := sorted({str(answer["error"]) for answer in answers if "error" in answer}):
            raise EngineError(self.url, f"{method}: {'; '.join(errors)}")
        return answers

    async def _served_store(self) -> tuple[dist.TCPStore, str]:
        """Where workers leave their answers: served by this process, at the address that the engine's machine sees."""
        where = urlsplit(self.url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((where.hostname or "localhost", where.port or 80))  # sends nothing
            host = probe.getsockname()[0]
        if self._store is None:
            self._store = dist.TCPStore(host, 0, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False)
        return self._store, f"{host}:{self._store.port}"

    async def close(self) -> None:
        await super().close()
        self._store = None


def _in_all(answers: Sequence[dict[str, Any]], name: str) -> list[str]:
    """What is in a list of every worker's answer; a worker may have nothing but padding of a small vocabulary."""
    return sorted(set.intersection(*(set(answer[name]) for answer in answers)))
