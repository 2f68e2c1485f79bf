"""From scored samples to the tensors of gradient steps: minibatches, data-parallel shares, micro-batches.

The plan is a pure function of the samples' lengths and costs, made once by the rollout client for all ranks: every
data-parallel replica gets the same number of micro-batches, which the collectives of expert parallelism need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_dppo.data.trajectory import Scored
from megatron_dppo.weights.layout import Parallel

Normaliser = Literal["tokens", "sequences", "constant"]

# plan[minibatch][replica][micro_batch] = positions of samples; an empty list is a micro-batch of padding only
Plan = list[list[list[list[int]]]]
_OF_TOKENS = ("target", "advantage", "mu_logprob", "weight", "topk_ids", "mu_topk_logprob")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences of some samples, and what is known of their counted tokens.

    Packed: one behind the other in one row, `input_ids i64[1, S]`, sequence i from `cu_seqlens[i]` up to
    `cu_seqlens[i + 1]` (`i32[n + 1]`), a few tokens of padding at its end included. Padded: on the right to one
    length, `input_ids i64[B, S]`, and `cu_seqlens` is None.

    A token is counted when it was sampled by the policy (`loss_mask`). Of T counted tokens, in the order of the
    samples: `row i64[T]`, where the hidden state that predicts it lies in the model's [S, B] order (s * B + b);
    `target i64[T]`; `advantage f32[T]`; `mu_logprob f32[T]`; `topk_ids i64[T, K]` and `mu_topk_logprob
    f32[T, K + 1]` (last column: the target) or None; `weight f32[T]`, its share in the loss. `count`: what this
    micro-batch adds to the loss's divisor. `skipped`: counted tokens left out, for they have no gradient. `padding`:
    where `input_ids` has no token. Of packed samples with recorded routes, for the MoE layers that were asked for:
    `routes [S, L, k]`, the experts of each position's token, and `routes_valid bool[S]`, False on padding and wherever
    the engine recorded nothing (the last token of a sample).
    """

    input_ids: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    advantage: npt.NDArray[np.float32]
    mu_logprob: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    count: int
    padding: npt.NDArray[np.bool_]
    skipped: int = 0
    routes: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None = None
    routes_valid: npt.NDArray[np.bool_] | None = None
    cu_seqlens: npt.NDArray[np.int32] | None = None
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
    micro_batch_multiple: int = 1,
    packed: bool = True,
    cost: npt.NDArray[np.float64] | None = None,
) -> Plan:
    """Splits one step's samples into gradient steps, replicas and micro-batches.

    Groups (responses to one prompt) are shuffled and dealt whole to the minibatches. Within one, samples go to
    replicas so that their `cost` (f64[N], of each sample; None: its length) is even, as far as the greedy rule gets it.
    A replica's share is cut into micro-batches, a multiple of `micro_batch_multiple` of them: packed ones, of even cost
    and at most `micro_batch_tokens` tokens; or padded ones of similar lengths, where rows x longest is at most that.
    All replicas have the same number of micro-batches, the dearest first. `lengths i64[N]`: prompt + response.

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
    cost = lengths.astype(np.float64) if cost is None else cost
    shuffled = np.random.default_rng(seed).permutation(unique)
    plan: Plan = []
    for part in np.array_split(shuffled, minibatches):
        members = np.flatnonzero(np.isin(groups, part))
        dearest_first = members[np.argsort(-cost[members], kind="stable")].tolist()
        shares = _even(dearest_first, cost, replicas)
        if packed:
            plan.append(_pack(shares, lengths, cost, micro_batch_tokens, micro_batch_multiple))
            continue
        cut = [_cut(sorted(share, key=lambda i: -lengths[i]), lengths, micro_batch_tokens) for share in shares]
        most = up_to_multiple(max(1, *map(len, cut)), micro_batch_multiple)
        plan.append([_stretch(share, most) for share in cut])
    return plan


def imbalance(plan: Plan, cost: npt.NDArray[np.float64]) -> float:
    """The dearest replica's cost over the mean of all, in the gradient step where that is worst."""
    worst = 1.0
    for minibatch in plan:
        shares = [sum(float(cost[i]) for micro_batch in replica for i in micro_batch) for replica in minibatch]
        worst = max(worst, max(shares) * len(shares) / (sum(shares) or 1.0))
    return worst


def _even(
    members: Sequence[int],
    cost: npt.NDArray[np.float64],
    parts: int,
    lengths: npt.NDArray[np.int64] | None = None,
    budget: int = 0,
) -> list[list[int]]:
    """Each of `members`, which come dearest first, to the part that costs least so far.

    With `lengths`, to the cheapest one whose tokens stay within `budget`, or to a new part.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    load, tokens = [0.0] * parts, [0] * parts
    for index in members:
        length = 0 if lengths is None else int(lengths[index])
        open_to_it = [part for part in range(len(shares)) if tokens[part] + length <= budget or lengths is None]
        if not open_to_it:
            shares.append([])
            load.append(0.0)
            tokens.append(0)
            open_to_it = [len(shares) - 1]
        cheapest = min(open_to_it, key=load.__getitem__)
        shares[cheapest].append(index)
        load[cheapest] += float(cost[index])
        tokens[cheapest] += length
    return shares


def _pack(
    shares: Sequence[Sequence[int]],
    lengths: npt.NDArray[np.int64],
    cost: npt.NDArray[np.float64],
    budget: int,
    multiple: int,
) -> list[list[list[int]]]:
    """Every share in the same number of micro-batches: the fewest that the greedy rule needs for all of them."""
    count = max(1, *(-(-int(lengths[list(share)].sum()) // budget) for share in shares))
    while True:
        count = up_to_multiple(count, multiple)
        packed = [_even(share, cost, count, lengths, budget) for share in shares]
        if max(map(len, packed)) == count:
            break
        count = max(map(len, packed))
    return [sorted(share, key=lambda micro_batch: -float(cost[micro_batch].sum())) for share in packed]


def up_to_multiple(count: Any, of: int) -> Any:
    """The least multiple that is not less than `count`, a number or an array of them."""
    return -(-count // of) * of


def _cut(share: Sequence[int], lengths: npt.NDArray[np.int64], budget: int) -> list[list[int]]:
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
    weights: LossWeights = LossWeights(),
    packed: bool = True,
    length_multiple: int = 1,
    sequence_multiple: int = 1,
    skip_zero_advantage: bool = False,
    routed_layers: Sequence[int] | None = None,
) -> MicroBatch:
    """Packs `samples` into one row, or pads them to one length; a multiple of `length_multiple` (TP under sequence
    parallelism). Each packed sequence is padded to a multiple of `sequence_multiple` (2 x CP).

    `num_topk`: K of the objective's Top-K; 0 leaves it out. `skip_zero_advantage` leaves out tokens whose coefficient
    is 0 whatever the policy; the loss's divisor still counts them, so the gradient is the same. `routed_layers`: those
    of which recorded routes are wanted, by number in the model. With no samples: padding, nothing counted.

    Raises ValueError for a sample without routes of such a layer.
    """
    texts = [np.concatenate([s.trajectory.prompt_ids, s.trajectory.response_ids]) for s in samples]
    lengths = up_to_multiple(np.array([len(text) for text in texts], np.int64), sequence_multiple)
    width = max(1, int(lengths.sum() if packed else lengths.max(initial=0)))
    input_ids = np.zeros((1 if packed else max(len(samples), 1), up_to_multiple(width, length_multiple)), np.int64)
    padding = np.ones(input_ids.shape, np.bool_)
    starts = np.cumsum(lengths) - lengths if packed else np.zeros_like(lengths)
    parts = []
    for b, (sample, text, start) in enumerate(zip(samples, texts, starts.tolist(), strict=True)):
        row = 0 if packed else b
        input_ids[row, start : start + len(text)] = text
        padding[row, start : start + len(text)] = False
        parts.append(_tokens_of(sample, start, row, len(input_ids), num_topk, weights, skip_zero_advantage))

    def joined(name: str, dtype: type, *shape: int) -> npt.NDArray:
        return np.concatenate([part[name] for part in parts] or [np.empty((0, *shape))]).astype(dtype)

    return MicroBatch(
        input_ids=input_ids,
        padding=padding,
        row=joined("row", np.int64),
        target=joined("target", np.int64),
        advantage=joined("advantage", np.float32),
        mu_logprob=joined("mu_logprob", np.float32),
        weight=joined("weight", np.float32),
        count=sum(part["count"] for part in parts),
        skipped=sum(part["skipped"] for part in parts),
        cu_seqlens=np.array([*(starts if samples else [0]), input_ids.shape[1]], np.int32) if packed else None,
        topk_ids=joined("topk_ids", np.int64, num_topk) if num_topk else None,
        mu_topk_logprob=joined("mu_topk_logprob", np.float32, num_topk + 1) if num_topk else None,
        **({} if routed_layers is None else _routes_of(samples, starts, input_ids.shape[1], routed_layers)),
    )


def _routes_of(
    samples: Sequence[Scored], starts: npt.NDArray[np.int64], width: int, layers: Sequence[int]
) -> dict[str, Any]:
    """Of `width` packed positions; uint16 where any sample's are."""
    trajectories = [sample.trajectory for sample in samples]
    recorded = [t.routed_experts for t in trajectories if t.routed_experts is not None]
    topk = recorded[0].shape[2] if recorded else 1
    dtype = np.result_type(np.uint8, *recorded)
    routes, routes_valid = np.zeros((width, len(layers), topk), dtype), np.zeros(width, np.bool_)
    for t, start in zip(trajectories, starts.tolist(), strict=True):
        if t.routes is None:
            if t.finish_reason == "abort":
                continue
            raise ValueError(f"sample {t.sample_id}: got no routes, expected those that routing.mode rollout replays")
        experts, valid, found = t.routes
        places = np.searchsorted(found, layers)
        if len(layers) and (places.max() >= len(found) or (found[places] != layers).any()):
            raise ValueError(
                f"sample {t.sample_id}: got routes of layers {found.tolist()}, expected all of {list(layers)}"
            )
        stop = start + len(valid)
        routes[start:stop], routes_valid[start:stop] = experts[:, places], valid
    return {"routes": routes, "routes_valid": routes_valid}


def rank_micro_batch(
    samples: Sequence[Scored],
    *,
    layout: Parallel,
    context_rank: int,
    routes_of_tensor_rank: int | None = None,
    num_topk: int = 0,
    **settings: Any,
) -> MicroBatch:
    """`build_micro_batch` in the multiples that `layout` needs, and of it what a context rank computes.

    `routes_of_tensor_rank`: under sequence parallelism, whose part of the routes is kept: [S / TP, L, k].
    """
    whole = build_micro_batch(
        samples,
        num_topk=num_topk,
        length_multiple=layout.length_multiple,
        sequence_multiple=layout.sequence_multiple,
        **settings,
    )
    batch = context_share(whole, layout.context, context_rank)
    if routes_of_tensor_rank is None or batch.routes is None or batch.routes_valid is None:
        return batch
    rows = len(batch.routes) // layout.tensor
    own = slice(routes_of_tensor_rank * rows, (routes_of_tensor_rank + 1) * rows)
    return replace(batch, routes=batch.routes[own].copy(), routes_valid=batch.routes_valid[own].copy())


def context_share(batch: MicroBatch, context: int, rank: int) -> MicroBatch:
    """What context rank `rank` of `context` computes of a packed micro-batch: of every sequence two of 2 x `context`
    chunks, one from its begin and one from its end, so that causal attention costs all ranks the same.

    `cu_seqlens` stay those of the whole sequences. The divisor's `count` is the first rank's.
    """
    if context == 1:
        return batch
    assert batch.cu_seqlens is not None, "context parallelism divides packed sequences"
    kept = []
    for start, stop in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens[1:].tolist(), strict=False):
        chunks = np.arange(start, stop).reshape(2 * context, -1)
        kept += [chunks[rank], chunks[2 * context - 1 - rank]]
    positions = np.concatenate(kept)
    place = np.full(batch.input_ids.shape[1], -1, np.int64)
    place[positions] = np.arange(len(positions))
    mine = place[batch.row] >= 0

    tokens: dict[str, Any] = {name: values[mine] for name in _OF_TOKENS if (values := getattr(batch, name)) is not None}
    return replace(
        batch,
        **tokens,
        input_ids=batch.input_ids[:, positions],
        padding=batch.padding[:, positions],
        routes=None if batch.routes is None else batch.routes[positions],
        routes_valid=None if batch.routes_valid is None else batch.routes_valid[positions],
        row=place[batch.row[mine]],
        count=batch.count if rank == 0 else 0,
        skipped=batch.skipped if rank == 0 else 0,
    )


def _tokens_of(
    sample: Scored, start: int, b: int, batch: int, num_topk: int, weights: LossWeights, skip_zero_advantage: bool
) -> dict:
    """The counted tokens of one sample, which begins at `start` in row `b` of `batch`: token j of the response is
    predicted at its position P + j - 1."""
    trajectory = sample.trajectory
    counted = np.flatnonzero(trajectory.loss_mask)
    weight, count = weights.weigh(len(counted))
    skipped = 0
    if skip_zero_advantage:
        skipped = int((sample.advantage[counted] == 0).sum())
        counted = counted[sample.advantage[counted] != 0]
    tokens = {
        "row": (start + len(trajectory.prompt_ids) + counted - 1) * batch + b,
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
