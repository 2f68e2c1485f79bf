"""`VllmEngine`: a vLLM server as a rollout engine, over HTTP. Token ids in, token ids and log-probs out.

The server is started by `vllm_server`, its workers carry `vllm_worker.WorkerExtension`. Needs vLLM's
development routes (pause, weight transfer, collective_rpc) and the scale-out route `/inference/v1/generate`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.rollout.engine import Capabilities, EngineBadAnswer, EngineError, PauseMode, Sampling, Update
from megatron_dppo.rollout.http_client import MESSAGE_CHARS
from megatron_dppo.rollout.http_engine import HttpEngine
from megatron_dppo.rollout.vllm.answer import parse_answer, request_body

# vLLM's name of a request: ours, and a suffix of its own.
AT_SERVER = re.compile("generate-tokens-(.*?)(-[0-9a-f]{8})?")


class VllmEngine(HttpEngine):
    """One vLLM server. Implements `engine.RolloutEngine`."""

    sampling_path = "/inference/v1/generate"
    id_field = "request_id"
    health_path = "/health"

    # ---- facts ----

    async def _probe(self) -> Capabilities:
        try:
            facts = await self._ask_workers("mdppo_describe")
        except EngineError as error:
            if "answered 404" not in str(error):
                raise
            raise EngineError(
                self.url,
                "it has no /collective_rpc: no vLLM server (what does rollout.engine say?), or not started as "
                "vllm_server.server_command does",
            ) from error
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
        return Capabilities(
            engine="vllm",
            engine_version=str(facts["engine_version"]),
            vocab_size=int(facts["vocab_size"]),
            max_model_len=int(facts["max_model_len"]),
            max_logprobs=int(facts["max_logprobs"]),
            routed_experts=bool(facts["routed_experts"]),
            moe_layers=tuple(facts["moe_layers"]),
            dtype=str(facts["dtype"]),
            seeds=True,
        )

    async def _weights(self) -> tuple[int, int]:
        answer = await self._ask_workers("mdppo_version")
        return int(answer["version"]), int(answer["updates"])

    async def _worker_layouts(self) -> list[dict[str, Any]]:
        return await self._ask_each_worker("mdppo_boxes")

    async def _worker_fingerprints(self) -> list[dict[str, Any]]:
        return await self._ask_each_worker("mdppo_fingerprints")

    # ---- sampling ----

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
        return parse_answer(self.url, facts, answer, prompt_ids, sampling, spans, request_id, group_id)

    async def _pause_server(self, mode: PauseMode) -> None:
        await self.http.once("POST", "/pause", params={"mode": mode, "clear_cache": "true"})

    async def _resume_server(self) -> None:
        await self.http.once("POST", "/resume")

    async def _progress(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for name, tokens in (await self._ask_workers("mdppo_progress"))["tokens"].items():
            if ours := AT_SERVER.fullmatch(name):
                found[ours[1]] = max(found.get(ours[1], 0), int(tokens))
        return found

    # ---- weights ----

    async def _hand_over(self, update: Update) -> None:
        payload = {"version": update.version, update.transport: update.as_json()}
        await self._ask_workers("mdppo_discard_update")
        await self.http.once("POST", "/start_weight_update")
        await self.http.once("POST", "/update_weights", {"update_info": payload})
        await self._ask_workers("mdppo_fault")

    async def _put_in_use(self, version: int) -> int:
        await self.http.once("POST", "/finish_weight_update", {"weight_version": str(version)})
        await self._ask_workers("mdppo_fault")
        found, updates = await self._weights()
        if found != version:
            raise EngineError(self.url, f"commit: the workers report version {found}, expected {version}")
        if (await self.http.once("POST", "/reset_prefix_cache")).get("success") is not True:
            raise EngineError(
                self.url, "commit: the prefix cache could not be reset, its entries are of the old weights"
            )
        return updates

    async def _discard(self) -> int:
        return int((await self._ask_workers("mdppo_discard_update"))["version"])

    # ---- HTTP ----

    async def _ask_workers(self, method: str, *args: Any) -> dict[str, Any]:
        """Call a method of the worker extension; all workers must answer the same."""
        results = await self._ask_each_worker(method, *args)
        if any(result != results[0] for result in results):
            raise EngineError(self.url, f"{method}: its workers disagree: {results!r:.{MESSAGE_CHARS}}")
        return results[0]

    async def _ask_each_worker(self, method: str, *args: Any) -> list[dict[str, Any]]:
        answer = await self.http.retrying("POST", "/collective_rpc", {"method": method, "args": list(args)})
        results = answer.get("results")
        if not isinstance(results, list) or not results or not isinstance(results[0], dict):
            raise EngineBadAnswer(self.url, f"{method}: got {answer!r:.200}, expected one result a worker")
        if errors := sorted({str(result["error"]) for result in results if "error" in result}):
            raise EngineError(self.url, f"{method}: {'; '.join(errors):.{MESSAGE_CHARS}}")
        return results
