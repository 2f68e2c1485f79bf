"""Pure half of `VllmEngine`: requests to `/inference/v1/generate`, `Trajectory`s from the answers."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
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

CLAMP = -9999.0  # vLLM sends this for -inf and for what it has not got: JSON knows no infinity
TOKEN_PREFIX = "token_id:"


def num_asked(sampling: Sampling, vocab_size: int) -> int:
    """Log-probs a token to ask for, so that TopK(mu, K) can be read off: K + 1, at most the vocabulary.

    vLLM's HTTP route counts the sampled token among them and drops the last one when the sample lies outside.
    """
    K = sampling.num_topk_logprobs
    return min(K + 1, vocab_size) if K else 0


def request_body(facts: Capabilities, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> dict[str, Any]:
    """The JSON of a request but for its id. Raises ValueError as `RolloutEngine.generate` says."""
    ids, room = room_for_response(facts, prompt_ids, sampling, request_id)
    return {
        "token_ids": ids,
        "sampling_params": {
            **sampling_fields(sampling),
            "max_tokens": room,
            "logprobs": num_asked(sampling, facts.vocab_size),
            "seed": sampling.seed,
            "detokenize": False,
        },
    }


def parse_answer(
    url: str,
    facts: Capabilities,
    answer: dict[str, Any],
    prompt_ids: Sequence[int],
    sampling: Sampling,
    spans: Sequence[tuple[int, int]],
    request_id: str,
    group_id: str,
) -> Trajectory:
    """A validated trajectory from the answer. Raises EngineBadAnswer that says what is wrong with it.

    `spans`: (first token, version of the weights from there on), in order.
    """
    try:
        choice = _only_choice(answer)
        ids = response_ids(choice.get("token_ids"), facts.vocab_size)
        entries = _entries(choice, ids)
        logprobs, topk_ids, topk_logprobs = _logprobs(entries, sampling, facts.vocab_size)
        return Trajectory(
            sample_id=request_id,
            group_id=group_id,
            engine=url,
            finish_reason=str(choice.get("finish_reason")),
            temperature=float(sampling.temperature),
            prompt_ids=np.asarray(prompt_ids, np.int32),
            response_ids=ids,
            loss_mask=np.ones(len(ids), np.bool_),
            rollout_logprobs=logprobs,
            topk_ids=topk_ids,
            topk_logprobs=topk_logprobs,
            policy_versions=versions_of(spans, len(ids)),
            **_routes(choice, facts, len(prompt_ids) + len(ids) - 1),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # An answer may be wrong in any way at all; whatever it breaks here, it is the answer that is bad.
        raise EngineBadAnswer(url, f"request {request_id}: {type(error).__name__}: {error}") from error


def _only_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError(f"choices: got {choices!r:.80}, expected exactly one")
    return choices[0]


def _entries(choice: dict[str, Any], ids: Array) -> list[dict[str, Any]]:
    """The answer's log-prob entry of each response token, checked to be about that token."""
    entries = (choice.get("logprobs") or {}).get("content") or []
    if len(entries) != len(ids):
        raise ValueError(f"logprobs: got {len(entries)} entries, expected one for each of {len(ids)} tokens")
    for i, (entry, token) in enumerate(zip(entries, ids.tolist(), strict=True)):
        if entry["token"] != f"{TOKEN_PREFIX}{token}":
            raise ValueError(f"logprobs: got an entry for {entry['token']} at position {i}, expected token {token}")
        if not CLAMP < entry["logprob"] < np.inf:
            raise ValueError(f"logprobs: got {entry['logprob']} for the sampled token {token}, expected a finite one")
    return entries


def _logprobs(entries: list[dict[str, Any]], sampling: Sampling, vocab_size: int) -> tuple[Array, Array, Array]:
    """Sampled token's log-prob f32[R], TopK(mu, K) ids i32[R, K] and log-probs f32[R, K], descending.

    Absent entries (a vocabulary smaller than K, or probability zero) are -1 and -inf. A row with fewer
    entries than were asked for is refused: a top-K set with holes would bias every divergence computed on it.
    """
    R, K, asked = len(entries), sampling.num_topk_logprobs, num_asked(sampling, vocab_size)
    sampled = np.array([entry["logprob"] for entry in entries], np.float32)
    width = max(asked, K)
    ids = np.full((R, width), -1, np.int32)
    logprobs = np.full((R, width), -np.inf, np.float32)
    for i, entry in enumerate(entries if K else []):
        top = entry["top_logprobs"]
        if len(top) != asked:
            raise ValueError(f"top_logprobs: got {len(top)} at position {i}, expected {asked}")
        ids[i, :asked] = [int(one["token"].removeprefix(TOKEN_PREFIX)) for one in top]
        logprobs[i, :asked] = [one["logprob"] for one in top]
    return sampled, *largest(ids, logprobs, K, absent=logprobs <= CLAMP, vocab_size=vocab_size)


def _routes(choice: dict[str, Any], facts: Capabilities, rows: int) -> dict[str, Any]:
    """Routed experts of the MoE layers, or nothing where the engine was not asked to record them.

    A request that was aborted may come without any.
    """
    if not facts.routed_experts:
        return {}
    encoded = choice.get("routed_experts")
    aborted = choice.get("finish_reason") == "abort"
    if encoded is None:
        if aborted:
            return {}
        raise ValueError("routed_experts: got none, expected the routes that the server was started to return")
    try:
        recorded = np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError) as error:
        raise ValueError(f"routed_experts: not a base64 numpy array ({error})") from error
    if recorded.ndim != 3:
        raise ValueError(f"routed_experts: got shape {list(recorded.shape)}, expected [{rows}, layers, k]")
    return routes_fields(recorded[:, list(facts.moe_layers)], facts.moe_layers, rows, aborted=aborted)
