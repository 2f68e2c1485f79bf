"""What is checked of every request and answer, whichever engine it goes to and comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_dppo.data.trajectory import Array
from megatron_dppo.rollout.engine import Capabilities, Sampling


def room_for_response(
    facts: Capabilities, prompt_ids: Sequence[int], sampling: Sampling, request_id: str
) -> tuple[list[int], int]:
    """The prompt, and how many tokens may be sampled after it. Raises ValueError as `RolloutEngine.generate` says."""
    ids = np.asarray(prompt_ids)
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"prompt {request_id}: got {ids.dtype}{list(ids.shape)}, expected at least one integer id")
    outside = ids[(ids < 0) | (ids >= facts.vocab_size)]
    if len(outside):
        raise ValueError(
            f"prompt {request_id}: got token ids {outside[:5].tolist()}, expected ids in [0, {facts.vocab_size})"
        )
    room = facts.max_model_len - len(ids)
    if room < 1:
        raise ValueError(
            f"prompt {request_id}: got {len(ids)} tokens, expected fewer than the context of {facts.max_model_len}"
        )
    if min(sampling.num_topk_logprobs + 1, facts.vocab_size) > facts.max_logprobs:
        raise ValueError(
            f"sampling: got K={sampling.num_topk_logprobs}, expected at most {facts.max_logprobs - 1} "
            "(the server's limit, less one)"
        )
    return ids.tolist(), min(sampling.max_tokens, room)


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """What engines call by the same names in a request."""
    return {
        "temperature": sampling.temperature,
        "stop_token_ids": list(sampling.stop_token_ids),
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
    }


def response_ids(token_ids: Any, vocab_size: int) -> Array:
    """i32[R]. Raises ValueError."""
    if not isinstance(token_ids, list) or not all(type(token) is int for token in token_ids):
        raise ValueError(f"token_ids: got {token_ids!r:.80}, expected a list of integers")
    ids = np.array(token_ids, np.int64)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(f"token_ids: got {outside[:5].tolist()}, expected ids in [0, {vocab_size})")
    return ids.astype(np.int32)


def largest(ids: Array, logprobs: Array, K: int, *, absent: Array, vocab_size: int) -> tuple[Array, Array]:
    """TopK(mu, K): ids i32[R, K] and log-probs f32[R, K], descending, of rows that hold at least those.

    `absent` entries (a vocabulary smaller than K, or probability zero) become -1 and -inf. Raises ValueError.
    """
    if ids.size and ids.max() >= vocab_size:
        raise ValueError(f"top_logprobs: got token id {ids.max()}, expected ids in [0, {vocab_size})")
    ids, logprobs = np.where(absent, -1, ids), np.where(absent, np.float32(-np.inf), logprobs)
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)


def versions_of(spans: Sequence[tuple[int, int]], length: int) -> Array:
    """i32[R] from (first token, version of the weights from there on), in order."""
    versions = np.empty(length, np.int32)
    for first, version in spans:
        versions[first:] = version
    return versions


def routes_fields(recorded: Array, moe_layers: Sequence[int], rows: int, *, aborted: bool) -> dict[str, Any]:
    """Routed experts, of an answer's `recorded [rows, MoE layers, k]`.

    A request that was aborted may come with fewer rows; the missing ones are marked not valid. Raises ValueError.
    """
    if len(recorded) != rows and not aborted:
        raise ValueError(f"routed_experts: got shape {list(recorded.shape)}, expected [{rows}, layers, k]")
    layers = np.array(moe_layers, np.int32)
    num_recorded = min(rows, len(recorded))
    experts = np.zeros((rows, len(layers), recorded.shape[2]), recorded.dtype)
    experts[:num_recorded] = recorded[:num_recorded]
    return {"routed_experts": experts, "routes_valid": np.arange(rows) < num_recorded, "moe_layers": layers}
