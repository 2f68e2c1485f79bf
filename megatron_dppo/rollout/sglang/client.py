"""`RolloutEngine` on an SGLang server, over its HTTP routes.

How SGLang's ways become the contract's:

- Versions. The server names its weights what we tell it ("VERSION.UPDATES") and says with each answer which tokens are
  from which: trajectories take that, not what this client believes.
- "keep". SGLang can hold requests in place, but their keys and values stay those of the old weights; or take them
  back ("retract"), but then it records the routes of early tokens anew, under the new weights. Neither is right for
  training. Held requests are therefore cut (aborted) with what they have, and go on after the update as new requests
  whose prompt is the old one and that; the parts are joined as turns of a conversation are. Each token, and each row of
  routes, is then of the weights that read it, and the cache can be flushed, since nothing runs.
- Weights. `sglang_worker`, if the server was started with it as its loader, takes of hub tensors the boxes that each
  worker keeps (`sglang_loader`). Another gets whole tensors from a file (`sglang_buckets`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_dppo.architecture import Architecture
from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.data.turns import join_turns, without_last_token
from megatron_dppo.rollout.engine import Capabilities, EngineBadAnswer, EngineError, PauseMode, Sampling, Update
from megatron_dppo.rollout.http_engine import HttpEngine
from megatron_dppo.rollout.sglang.answer import RouteShape, parse_answer, parse_version, request_body
from megatron_dppo.rollout.sglang.message import LOADER
from megatron_dppo.rollout.sglang.server import check_supported
from megatron_dppo.rollout.sglang.sessions import ServerWeights, Sessions
from megatron_dppo.rollout.sglang.shards import LoaderWeights
from megatron_dppo.rollout.sglang.whole_tensors import BucketWeights

MOST_CUTS = 20  # of a response, one after the other, that bring no token


class SglangEngine(HttpEngine):
    """See `HttpEngine`; `arch`: of the model that the server was started with, which it does not say itself."""

    sampling_path = "/generate"
    id_field = "rid"
    health_path = "/server_info"  # its /health samples a token, which a paused server does not

    def __init__(self, url: str, arch: Architecture, **kwargs: Any) -> None:
        super().__init__(url, **kwargs)
        self._arch = arch
        self._found: ServerWeights | None = None  # by the probe, which comes before everything else

    @property
    def _way(self) -> ServerWeights:
        assert self._found is not None, "the probe comes first"
        return self._found

    async def close(self) -> None:
        await self._leave()
        await super().close()

    async def _leave(self) -> None:
        if self._found is not None:
            await self._found.close()

    # ---- facts ----

    async def _probe(self) -> Capabilities:
        await self._leave()  # of a server that has been restarted
        try:
            return await self._facts()
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineBadAnswer(self.url, f"/server_info, /model_info: {type(error).__name__}: {error}") from error

    async def _facts(self) -> Capabilities:
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
        if draft := info.get("speculative_algorithm"):
            raise EngineError(self.url, f"got speculative_algorithm {draft}, expected none: drafts get no weights")
        sessions = Sessions(self.http, wanted=await self._has("/begin_weight_update"))
        workers = int(info["tp_size"])
        self._found = (
            LoaderWeights(self.http, sessions, self._arch, workers=workers, model_dir=str(model["model_path"]))
            if LOADER in (info.get("custom_weight_loader") or [])
            else BucketWeights(self.http, sessions, self._arch, workers=workers)
        )
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
            weights=self._way.how,
        )

    async def _has(self, path: str) -> bool:
        """Whether the server has a route for POST."""
        try:
            await self.http.once("GET", path)
        except EngineError as error:
            if "answered 404" not in str(error) and "answered 405" not in str(error):
                raise
            return "answered 405" in str(error)
        return True

    async def _weights(self) -> tuple[int, int]:
        name = (await self.http.retrying("GET", "/model_info")).get("weight_version")
        try:
            return parse_version(name)
        except ValueError as error:
            raise EngineBadAnswer(self.url, str(error)) from error

    async def _worker_layouts(self) -> list[dict[str, Any]]:
        return await self._way.layouts()

    async def _worker_fingerprints(self) -> list[dict[str, Any]]:
        return await self._way.fingerprints()

    # ---- sampling ----

    async def _respond(
        self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str, group_id: str
    ) -> Trajectory:
        facts = await self.capabilities()
        parts: list[Trajectory] = []
        ids, left, cuts = list(prompt_ids), sampling, 0
        while cuts < MOST_CUTS:
            part = await self._sample(ids, left, request_id, group_id, goes_on=bool(parts))
            bare = facts.routed_experts and part.routes is None  # cut while it waited for memory
            if part.finish_reason != "abort" or self._ending:
                whole = parts if parts and bare else [*parts, part]
                return replace(join_turns(whole), finish_reason=part.finish_reason)
            # Held, or aborted by somebody else (an abort is of all requests): what was cut short is no answer.
            cuts += 1
            if part.response_length < 2 or bare:
                continue  # nothing to keep
            # A cut comes before SGLang looks whether the last token ends the response. Which token that is must not
            # decide whether it is kept: it is always sampled anew.
            parts.append(without_last_token(part))
            ids += parts[-1].response_ids.tolist()
            left = replace(left, max_tokens=left.max_tokens - parts[-1].response_length)
            cuts = 0
        raise EngineBadAnswer(
            self.url,
            f"request {request_id}: aborted {cuts} times in a row without a token; by another client?",
        )

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
        # that comes to a paused server waits before the scheduler, out of an abort's reach: it is held as it is, or let
        # in to be aborted.
        if mode == "abort":
            await self.http.once("POST", "/continue_generation", {})
        await self.http.once("POST", "/pause_generation", {"mode": "abort"})

    async def _resume_server(self) -> None:
        await self.http.once("POST", "/continue_generation", {})

    async def _progress(self) -> Mapping[str, int]:
        return {}  # answers say it

    # ---- weights ----

    async def _hand_over(self, update: Update) -> None:
        await self._way.hand_over(update, self._updates)

    async def _put_in_use(self, version: int) -> int:
        updates = await self._way.put_in_use(version, self._updates)
        found = await self._weights()
        if found != (version, updates):
            raise EngineError(self.url, f"commit: got weights {found}, expected {(version, updates)}")
        return updates

    async def _discard(self) -> int:
        await self._way.discard()
        return (await self._weights())[0]
