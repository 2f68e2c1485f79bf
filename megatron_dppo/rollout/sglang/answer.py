"""Pure half of `SglangEngine`: requests to `/generate`, `Trajectory`s from the answers."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dppo.data.trajectory import Array, Trajectory
from megatron_dppo.rollout.answers import (
    largest,
    response_ids,
    room_for_response,
    routes_fields,
    sampling_fields,
    versions_of,
)
from megatron_dppo.rollout.engine import Capabilities, EngineBadAnswer, Sampling

FIRST_WEIGHTS = "default"  # what SGLang calls those that it was started with
UINT8_EXPERTS = 256
LOWEST = -1e30  # SGLang's log-prob of what has probability zero is the lowest float, or null


@dataclass(frozen=True)
class RouteShape:
    """Of a row of recorded routes: all layers of the model, experts a token, and how many there are to choose from."""

    layers: int
    k: int
    experts: int


def wire_version(version: int, updates: int) -> str:
    """What the weights are called at the server: their version, and how many updates it has had since its start."""
    return f"{version}.{updates}"


def parse_version(name: Any) -> tuple[int, int]:
    """Version and updates from the server's name of its weights. Raises ValueError for one that is not ours."""
    if name == FIRST_WEIGHTS:
        return 0, 0
    numbers = re.fullmatch(r"(-?\d+)\.(\d+)", str(name))
    if numbers is None:
        raise ValueError(f"weight_version: got {name!r}, expected one that this client gave (VERSION.UPDATES)")
    return int(numbers[1]), int(numbers[2])


def request_body(facts: Capabilities, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> dict[str, Any]:
    """The JSON of a request but for its id. Raises ValueError as `RolloutEngine.generate` says.

    What would end the server is refused or cut here: ids and K beyond the vocabulary.
    """
    ids, room = room_for_response(facts, prompt_ids, sampling, request_id)
    return {
        "input_ids": ids,
        "sampling_params": {
            **sampling_fields(sampling),
            "max_new_tokens": room,
            "sampling_seed": sampling.seed,  # heeded by servers with --enable-deterministic-inference
            "skip_special_tokens": False,
        },
        "return_logprob": True,
        "top_logprobs_num": min(sampling.num_topk_logprobs, facts.vocab_size),
        "return_routed_experts": facts.routed_experts,
    }


def parse_answer(
    url: str,
    facts: Capabilities,
    answer: dict[str, Any],
    prompt_ids: Sequence[int],
    sampling: Sampling,
    routes: RouteShape,
    request_id: str,
    group_id: str,
) -> Trajectory:
    """A validated trajectory from the answer. Raises EngineBadAnswer that says what is wrong with it."""
    try:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        ids = response_ids(answer.get("output_ids"), facts.vocab_size)
        logprobs, topk_ids, topk_logprobs = _logprobs(meta, ids, sampling, facts.vocab_size)
        return Trajectory(
            sample_id=request_id,
            group_id=group_id,
            engine=url,
            finish_reason=str(reason),
            temperature=float(sampling.temperature),
            prompt_ids=np.asarray(prompt_ids, np.int32),
            response_ids=ids,
            loss_mask=np.ones(len(ids), np.bool_),
            rollout_logprobs=logprobs,
            topk_ids=topk_ids,
            topk_logprobs=topk_logprobs,
            policy_versions=versions_of(_spans(meta, len(ids), routed=facts.routed_experts), len(ids)),
            **_routes(meta, facts, len(prompt_ids) + len(ids) - 1, routes, aborted=reason == "abort"),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # An answer may be wrong in any way at all; whatever it breaks here, it is the answer that is bad.
        raise EngineBadAnswer(url, f"request {request_id}: {type(error).__name__}: {error}") from error


def _spans(meta: dict[str, Any], length: int, *, routed: bool) -> list[tuple[int, int]]:
    """(first token, version of the weights from there on), as the server says; 0.5.18 knows those of the end only."""
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": length}]
    bounds = [(int(span["start"]), int(span["end"])) for span in spans]
    if [0, *(end for _, end in bounds)] != [*(start for start, _ in bounds), length]:
        raise ValueError(f"weight_versions: got spans {bounds}, expected them to follow each other from 0 to {length}")
    found = [(int(span["start"]), parse_version(span["version"])[0]) for span in spans]
    if any(version < 0 for _, version in found):
        raise ValueError("weight_versions: got tokens of weights that a failed update left half-written")
    if routed and len(found) > 1 and meta.get("num_retractions"):
        raise ValueError(
            "routed_experts: its weights were changed while it was retracted, so routes of early tokens were recorded "
            "anew under later weights (another client updated it with pause mode retract)"
        )
    return found


def _logprobs(meta: dict[str, Any], ids: Array, sampling: Sampling, vocab_size: int) -> tuple[Array, Array, Array]:
    """Sampled token's log-prob f32[R], TopK(mu, K) ids i32[R, K] and log-probs f32[R, K], descending.

    A row with fewer entries than were asked for is refused: a top-K set with holes would bias every divergence.
    """
    R, K = len(ids), sampling.num_topk_logprobs
    entries = meta.get("output_token_logprobs") or []
    if len(entries) != R:
        raise ValueError(f"logprobs: got {len(entries)} entries, expected one for each of {R} tokens")
    for i, ((logprob, token, *_), expected) in enumerate(zip(entries, ids.tolist(), strict=True)):
        if token != expected:
            raise ValueError(f"logprobs: got an entry for {token} at position {i}, expected token {expected}")
        if logprob is None or not LOWEST < logprob < np.inf:
            raise ValueError(f"logprobs: got {logprob} for the sampled token {token}, expected a finite one")
    asked = min(K, vocab_size)
    topk_ids, topk_logprobs = np.full((R, K), -1, np.int32), np.full((R, K), -np.inf, np.float32)
    rows = (meta.get("output_top_logprobs") or []) if K else []
    if K and len(rows) != R:
        raise ValueError(f"top_logprobs: got {len(rows)} rows, expected one for each of {R} tokens")
    for i, row in enumerate(rows):
        if len(row) != asked:
            raise ValueError(f"top_logprobs: got {len(row)} at position {i}, expected {asked}")
        topk_ids[i, :asked] = [token for _, token, *_ in row]
        topk_logprobs[i, :asked] = [-np.inf if logprob is None else logprob for logprob, *_ in row]
    sampled = np.array([logprob for logprob, *_ in entries], np.float32)
    absent = topk_logprobs <= LOWEST
    return sampled, *largest(topk_ids, topk_logprobs, K, absent=absent, vocab_size=vocab_size)


def _routes(
    meta: dict[str, Any], facts: Capabilities, rows: int, shape: RouteShape, *, aborted: bool
) -> dict[str, Any]:
    """Routed experts of the MoE layers, or nothing where the engine does not record them."""
    if not facts.routed_experts:
        return {}
    encoded = meta.get("routed_experts")
    if encoded is None:
        if aborted:
            return {}
        raise ValueError("routed_experts: got none, expected the routes that the server was started to return")
    try:
        flat = np.frombuffer(base64.b64decode(encoded, validate=True), np.int32)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"routed_experts: not base64 of int32 ({error})") from error
    if len(flat) % (shape.layers * shape.k):
        raise ValueError(
            f"routed_experts: got {len(flat)} numbers, expected rows of {shape.layers} layers x {shape.k} experts"
        )
    recorded = flat.reshape(-1, shape.layers, shape.k)[:, list(facts.moe_layers)]
    outside = recorded[(recorded < 0) | (recorded >= shape.experts)]
    if len(outside):
        raise ValueError(f"routed_experts: got experts {outside[:5].tolist()}, expected numbers below {shape.experts}")
    narrow = recorded.astype(np.uint8 if shape.experts <= UINT8_EXPERTS else np.uint16)
    return routes_fields(narrow, facts.moe_layers, rows, aborted=aborted)
