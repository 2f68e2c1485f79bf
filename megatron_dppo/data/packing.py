"""From scored samples to the tensors of gradient steps: minibatches, data-parallel shares, padded micro-batches.

The plan is a pure function of sample lengths, made once by the rollout client for all ranks: every data-parallel
replica gets the same number of micro-batches, which the collectives of expert parallelism need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_dppo.rollout.trajectory import Scored

Normaliser = Literal["tokens", "sequences", "constant"]

# plan[minibatch][replica][micro_batch] = positions of samples; an empty list is a micro-batch of padding only
Plan = list[list[list[list[int]]]]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences padded on the right to one length, and what is known of their counted tokens.

    A token is counted when it was sampled by the policy (`loss_mask`). Of T counted tokens, in the order of the
    samples: `row i64[T]`, where the hidden state that predicts it lies in the model's [S, B] order (s * B + b);
    `target i64[T]`; `advantage f32[T]`; `mu_logprob f32[T]`; `topk_ids i64[T, K]` and `mu_topk_logprob
    f32[T, K + 1]` (last column: the target) or None; `weight f32[T]`, its share in the loss. `count`: what this
    micro-batch adds to the loss's divisor. `skipped`: counted tokens left out, for they have no gradient.
    `input_ids i64[B, S]`.
    """

    input_ids: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    advantage: npt.NDArray[np.float32]
    mu_logprob: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    count: int
    skipped: int = 0
    topk_ids: npt.NDArray[np.int64] | None = None
    mu_topk_logprob: npt.NDArray[np.float32] | None = None

    @property
    def num_tokens(self) -> int:
        """Counted tokens that are computed."""
        return len(self.target)


@dataclass(frozen=True)
class LossWeights:
    """How tokens are averaged: over all tokens; over sequences (each the mean of its tokens); by a constant length."""

    normaliser: Normaliser = "tokens"
    constant: int = 1

    def __post_init__(self) -> None:
        if self.constant < 1:
            raise ValueError(f"loss.constant: got {self.constant}, expected a whole number of tokens, at least 1")

    def weigh(self, num_counted: int) -> tuple[float, int]:
        """Weight of each token of a sequence with `num_counted` tokens, and the sequence's part in the divisor."""
        if self.normaliser == "tokens":
            return 1.0, num_counted
        if self.normaliser == "sequences":
            return 1.0 / max(num_counted, 1), 1
        return 1.0, self.constant


def plan_step(
    lengths: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    *,
    minibatches: int,
    replicas: int,
    micro_batch_tokens: int,
    seed: int,
    least_micro_batches: int = 1,
) -> Plan:
    """Splits one step's samples into gradient steps, replicas and micro-batches.

    Groups (responses to one prompt) are shuffled and dealt whole to the minibatches. Within one, samples go to
    replicas so that the longest share is as short as the greedy rule gets it; each replica's share is sorted by
    length and cut where rows x longest would exceed `micro_batch_tokens`, and into at least `least_micro_batches`.
    `lengths i64[N]`: prompt + response.

    Raises ValueError when there are fewer groups than minibatches or a sample exceeds the budget.
    """
    unique = np.unique(groups)
    if len(unique) < minibatches:
        raise ValueError(f"minibatches: got {minibatches}, expected at most the {len(unique)} groups of this step")
    if len(lengths) and lengths.max() > micro_batch_tokens:
        raise ValueError(
            f"training.micro_batch_tokens: got {micro_batch_tokens}, expected at least the longest sample's "
            f"{lengths.max()} tokens"
        )
    shuffled = np.random.default_rng(seed).permutation(unique)
    plan: Plan = []
    for part in np.array_split(shuffled, minibatches):
        members = np.flatnonzero(np.isin(groups, part))
        shares = [_cut(share, lengths, micro_batch_tokens) for share in _balance(members, lengths, replicas)]
        most = max(least_micro_batches, *(len(share) for share in shares))
        plan.append([_stretch(share, most) for share in shares])
    return plan


def _balance(members: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], replicas: int) -> list[list[int]]:
    """Longest first, each to the replica with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(replicas)]
    load = [0] * replicas
    for index in members[np.argsort(-lengths[members], kind="stable")]:
        lightest = load.index(min(load))
        shares[lightest].append(int(index))
        load[lightest] += int(lengths[index])
    return shares


def _cut(share: list[int], lengths: npt.NDArray[np.int64], budget: int) -> list[list[int]]:
    """`share` comes longest first, so a micro-batch is as long as its first sample."""
    micro_batches: list[list[int]] = []
    for index in share:
        if not micro_batches or (len(micro_batches[-1]) + 1) * lengths[micro_batches[-1][0]] > budget:
            micro_batches.append([])
        micro_batches[-1].append(index)
    return micro_batches


def _stretch(micro_batches: list[list[int]], count: int) -> list[list[int]]:
    """The same samples in `count` micro-batches: the largest are halved; what is still missing is empty."""
    result = list(micro_batches)
    while len(result) < count:
        largest = max(range(len(result)), key=lambda i: len(result[i]), default=None)
        if largest is None or len(result[largest]) < 2:
            result.append([])
            continue
        whole = result.pop(largest)
        result[largest:largest] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return result


def build_micro_batch(
    samples: Sequence[Scored],
    *,
    num_topk: int,
    weights: LossWeights,
    length_multiple: int = 1,
    skip_zero_advantage: bool = False,
) -> MicroBatch:
    """Pads `samples` to one length, a multiple of `length_multiple` (TP under sequence parallelism).

    `num_topk`: K of the objective's Top-K; 0 leaves it out. `skip_zero_advantage` leaves out tokens whose coefficient
    is 0 whatever the policy; the loss's divisor still counts them, so the gradient is the same. With no samples: one
    row of padding, nothing counted.
    """
    lengths = [len(s.trajectory.prompt_ids) + len(s.trajectory.response_ids) for s in samples]
    longest = max(lengths, default=1)
    width = -(-longest // length_multiple) * length_multiple
    input_ids = np.zeros((max(len(samples), 1), width), np.int64)
    parts = [
        _tokens_of(sample, b, len(input_ids), num_topk, weights, skip_zero_advantage)
        for b, sample in enumerate(samples)
    ]
    for b, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        trajectory = sample.trajectory
        input_ids[b, :length] = np.concatenate([trajectory.prompt_ids, trajectory.response_ids])

    def joined(name: str, dtype: type, *shape: int) -> npt.NDArray:
        return np.concatenate([part[name] for part in parts] or [np.empty((0, *shape))]).astype(dtype)

    return MicroBatch(
        input_ids=input_ids,
        row=joined("row", np.int64),
        target=joined("target", np.int64),
        advantage=joined("advantage", np.float32),
        mu_logprob=joined("mu_logprob", np.float32),
        weight=joined("weight", np.float32),
        count=sum(part["count"] for part in parts),
        skipped=sum(part["skipped"] for part in parts),
        topk_ids=joined("topk_ids", np.int64, num_topk) if num_topk else None,
        mu_topk_logprob=joined("mu_topk_logprob", np.float32, num_topk + 1) if num_topk else None,
    )


def _tokens_of(
    sample: Scored, b: int, batch: int, num_topk: int, weights: LossWeights, skip_zero_advantage: bool
) -> dict:
    """The counted tokens of one sample: token j of the response is predicted at position P + j - 1."""
    trajectory = sample.trajectory
    counted = np.flatnonzero(trajectory.loss_mask)
    weight, count = weights.weigh(len(counted))
    skipped = 0
    if skip_zero_advantage:
        skipped = int((sample.advantage[counted] == 0).sum())
        counted = counted[sample.advantage[counted] != 0]
    tokens = {
        "row": (len(trajectory.prompt_ids) + counted - 1) * batch + b,
        "target": trajectory.response_ids[counted],
        "advantage": sample.advantage[counted],
        "mu_logprob": trajectory.rollout_logprobs[counted],
        "weight": np.full(len(counted), weight),
        "count": count,
        "skipped": skipped,
    }
    if num_topk:
        have = trajectory.topk_ids.shape[1]
        if have < num_topk:
            raise ValueError(f"sample {trajectory.sample_id}: got {have} top-K entries, expected {num_topk}")
        tokens["topk_ids"] = trajectory.topk_ids[counted, :num_topk]
        tokens["mu_topk_logprob"] = np.concatenate(
            [trajectory.topk_logprobs[counted, :num_topk], trajectory.rollout_logprobs[counted, None]], axis=1
        )
    return tokens
