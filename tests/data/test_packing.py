"""Minibatches, replicas and micro-batches: every sample once, the same count everywhere; the tensors by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dppo.data.packing import (
    LossWeights,
    build_micro_batch,
    context_share,
    imbalance,
    plan_step,
    rank_micro_batch,
)
from megatron_dppo.data.trajectory import Scored, Trajectory
from megatron_dppo.weights.layout import Parallel


def sample(prompt: list[int], response: list[int], mask: list[bool], advantage: float, topk: int = 0) -> Scored:
    num = len(response)
    trajectory = Trajectory(
        sample_id="s", group_id="g", engine="test", finish_reason="stop", temperature=1.0,
        prompt_ids=np.array(prompt, np.int32), response_ids=np.array(response, np.int32),
        loss_mask=np.array(mask), rollout_logprobs=-np.arange(1, num + 1, dtype=np.float32),
        topk_ids=np.tile(np.arange(topk, dtype=np.int32), (num, 1)),
        topk_logprobs=np.full((num, topk), -5.0, np.float32), policy_versions=np.zeros(num, np.int32),
    )  # fmt: skip
    return Scored(trajectory, {}, np.full(num, advantage, np.float32))


def test_a_micro_batch_by_hand() -> None:
    """Two samples of 4 and 3 tokens, padded to 4; the second's middle token is the environment's."""
    first = sample([5, 6], [7, 8], [True, True], 1.0, topk=3)
    second = sample([9], [1, 2, 3][:2], [False, True], -2.0, topk=3)
    settings = {"num_topk": 2, "weights": LossWeights("sequences"), "length_multiple": 4}
    batch = build_micro_batch([first, second], packed=False, **settings)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 1, 2, 0]] and batch.cu_seqlens is None
    # token 7 is predicted at position 1 of row 0, 8 at position 2; 2 at position 1 of row 1: s * B + b
    assert batch.row.tolist() == [1 * 2 + 0, 2 * 2 + 0, 1 * 2 + 1]
    assert batch.target.tolist() == [7, 8, 2]
    assert batch.advantage.tolist() == [1.0, 1.0, -2.0]
    assert batch.mu_logprob.tolist() == [-1.0, -2.0, -2.0]
    assert batch.topk_ids is not None and batch.topk_ids.tolist() == [[0, 1]] * 3
    assert batch.mu_topk_logprob is not None
    assert batch.mu_topk_logprob.tolist() == [[-5.0, -5.0, -1.0], [-5.0, -5.0, -2.0], [-5.0, -5.0, -2.0]]
    assert batch.weight.tolist() == [0.5, 0.5, 1.0] and batch.count == 2  # the mean of each sequence's tokens
    one_row = build_micro_batch([first, second], **settings)
    assert one_row.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 0]]
    assert one_row.cu_seqlens is not None and one_row.cu_seqlens.tolist() == [0, 4, 8]  # padding counts as the last's
    assert one_row.row.tolist() == [1, 2, 5]
    for name in ("target", "advantage", "mu_logprob", "topk_ids", "mu_topk_logprob", "weight"):
        np.testing.assert_array_equal(getattr(one_row, name), getattr(batch, name))


def test_context_ranks_share_every_sequence() -> None:
    """Sequences of 6 and 3 tokens, padded to 8 and 4: rank 0 of 2 has the first and last quarter of each."""
    first = sample([5, 6], [7, 8, 9, 10], [True] * 4, 1.0, topk=2)
    second = sample([9], [1, 2], [False, True], -2.0, topk=2)
    whole = build_micro_batch(
        [first, second], num_topk=2, weights=LossWeights("sequences"), length_multiple=4, sequence_multiple=4
    )
    assert whole.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 0, 0, 9, 1, 2, 0]]
    assert whole.cu_seqlens is not None and whole.cu_seqlens.tolist() == [0, 8, 12]
    assert whole.row.tolist() == [1, 2, 3, 4, 9]
    zero, one = (context_share(whole, 2, rank) for rank in range(2))
    assert zero.input_ids.tolist() == [[5, 6, 0, 0, 9, 0]] and one.input_ids.tolist() == [[7, 8, 9, 10, 1, 2]]
    assert (zero.row.tolist(), zero.target.tolist()) == ([1], [7])
    assert (one.row.tolist(), one.target.tolist()) == ([0, 1, 2, 4], [8, 9, 10, 2])
    assert one.mu_logprob.tolist() == [-2.0, -3.0, -4.0, -2.0] and one.weight.tolist() == [0.25, 0.25, 0.25, 1.0]
    assert (zero.count, one.count) == (2, 0)  # of the divisor, once
    assert zero.cu_seqlens is whole.cu_seqlens


def routed(scored: Scored, first_id: int) -> Scored:
    """With experts that tell row, layer and place: of layers 1 and 4, two a token; the second row was not recorded."""
    rows = scored.trajectory.num_tokens - 1
    routes = {
        "routed_experts": first_id + np.arange(rows * 4, dtype=np.uint8).reshape(rows, 2, 2),
        "routes_valid": np.arange(rows) != 1,
        "moe_layers": np.array([1, 4], np.int32),
    }
    return replace(scored, trajectory=replace(scored.trajectory, **routes))


def test_routes_go_where_their_tokens_go() -> None:
    """Sequences of 6 and 3 tokens at TP 2 x CP 2, padded to 8 each: each rank has the rows of its own positions."""
    samples = [
        routed(sample([5, 6], [7, 8, 9, 10], [True] * 4, 1.0), 0),
        routed(sample([9], [1, 2], [True] * 2, 1.0), 100),
    ]
    layout = Parallel(tensor=2, context=2, ranks=4)
    # First and last quarter of each sequence, halved; a last token and padding have no row.
    positions = {(0, 0): [0, 1, 6, 7], (0, 1): [8, 9, 14, 15], (1, 0): [2, 3, 4, 5], (1, 1): [10, 11, 12, 13]}
    experts = {p: np.arange(4 * p, 4 * p + 4).reshape(2, 2) for p in range(5)}
    experts |= {8 + p: 100 + np.arange(4 * p, 4 * p + 4).reshape(2, 2) for p in range(2)}
    for (context_rank, tensor_rank), own in positions.items():
        batch = rank_micro_batch(
            samples, layout=layout, context_rank=context_rank, routes_of_tensor_rank=tensor_rank, routed_layers=[4, 1]
        )
        assert batch.routes is not None and batch.routes_valid is not None and batch.routes.dtype == np.uint8
        assert batch.routes_valid.tolist() == [p in experts and p not in (1, 9) for p in own]
        for row, p in enumerate(own):
            expected = experts[p][::-1] if p in experts else np.zeros((2, 2))  # layer 4, then layer 1
            np.testing.assert_array_equal(batch.routes[row], expected)
    whole = rank_micro_batch(samples, layout=Parallel(), context_rank=0, routed_layers=[])
    assert whole.routes is not None and whole.routes.shape == (9, 0, 2)
    assert rank_micro_batch(samples, layout=Parallel(), context_rank=0).routes is None


def test_samples_that_lack_routes_are_refused() -> None:
    one = sample([9], [1, 2], [True, True], 1.0)
    with pytest.raises(ValueError, match="sample s: got no routes, expected those that routing.mode rollout replays"):
        build_micro_batch([routed(one, 0), one], num_topk=0, routed_layers=[1])
    with pytest.raises(ValueError, match=r"sample s: got routes of layers \[1, 4\], expected all of \[1, 3\]"):
        build_micro_batch([routed(one, 0)], num_topk=0, routed_layers=[1, 3])


def test_loss_weights() -> None:
    assert LossWeights("tokens").weigh(5) == (1.0, 5)
    assert LossWeights("sequences").weigh(4) == (0.25, 1)
    assert LossWeights("constant", 100).weigh(5) == (1.0, 100)
    assert LossWeights("sequences").weigh(0) == (1.0, 1)
    with pytest.raises(ValueError, match="loss.constant: got 0"):
        LossWeights("constant", 0)


@pytest.mark.parametrize("packed", [True, False])
def test_a_micro_batch_of_padding_only(packed: bool) -> None:
    batch = build_micro_batch([], num_topk=2, weights=LossWeights(), packed=packed, length_multiple=2)
    assert batch.cu_seqlens is None if not packed else batch.cu_seqlens.tolist() == [0, 2]
    assert batch.input_ids.shape == (1, 2) and batch.num_tokens == 0 and batch.count == 0
    assert batch.topk_ids is not None and batch.topk_ids.shape == (0, 2)


def test_too_few_topk_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="sample s: got 1 top-K entries, expected 2"):
        build_micro_batch([sample([1], [2], [True], 0.0, topk=1)], num_topk=2, weights=LossWeights())


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    group_size=st.integers(1, 6),
    minibatches=st.integers(1, 4),
    replicas=st.integers(1, 5),
    seed=st.integers(0, 10),
    packed=st.booleans(),
)
def test_a_plan_uses_every_sample_once_within_budget(
    lengths: list[int], group_size: int, minibatches: int, replicas: int, seed: int, packed: bool
) -> None:
    groups = np.arange(len(lengths)) // group_size
    minibatches = min(minibatches, int(groups.max()) + 1)
    plan = plan_step(
        np.array(lengths), groups, minibatches=minibatches, replicas=replicas, micro_batch_tokens=64, seed=seed,
        packed=packed, cost=np.array(lengths, float) ** 2,
    )  # fmt: skip
    assert len(plan) == minibatches
    used = [i for minibatch in plan for replica in minibatch for micro in replica for i in micro]
    assert sorted(used) == list(range(len(lengths)))
    for minibatch in plan:
        assert len(minibatch) == replicas and len({len(replica) for replica in minibatch}) == 1
        inside = {groups[i] for replica in minibatch for micro in replica for i in micro}
        assert all(groups[i] not in inside for other in plan if other is not minibatch
                   for replica in other for micro in replica for i in micro)  # fmt: skip
        for replica in minibatch:
            for micro in replica:
                used_lengths = [lengths[i] for i in micro]
                assert (sum(used_lengths) if packed else len(micro) * max(used_lengths, default=0)) <= 64


def test_replicas_get_even_shares() -> None:
    lengths = np.array([40, 30, 20, 10, 10, 10])
    ((first, second),) = plan_step(lengths, np.zeros(6), minibatches=1, replicas=2, micro_batch_tokens=40, seed=0)
    loads = [sum(lengths[i] for micro in share for i in micro) for share in (first, second)]
    assert loads == [60, 60]
    cost = lengths.astype(float) ** 2  # the longest costs more than all others
    ((first, second),) = plan_step(
        lengths, np.zeros(6), minibatches=1, replicas=2, micro_batch_tokens=40, seed=0, cost=cost
    )
    assert sorted(i for micro in first for i in micro) == [0] and len(first) == len(second) == 2
    assert imbalance([[first, second]], cost) == pytest.approx(1600 / ((1600 + 900 + 400 + 300) / 2))


def test_long_tailed_lengths_are_balanced() -> None:
    """512 lognormal lengths over 8 replicas; micro-batches of one replica cost alike, as far as their tokens permit."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(np.log(400), 1.0, 512)).astype(np.int64) + 1, 4096)
    cost = lengths * (1 + lengths / 4096)
    plan = plan_step(lengths, np.arange(512), minibatches=1, replicas=8, micro_batch_tokens=8192, seed=0, cost=cost)
    assert imbalance(plan, cost) <= 1.05
    of_micro_batches = [float(cost[micro].sum()) for replica in plan[0] for micro in replica]
    assert max(of_micro_batches) <= 1.35 * np.mean(of_micro_batches)
    filled = [int(lengths[micro].sum()) for replica in plan[0] for micro in replica]
    assert np.mean(filled) >= 0.8 * 8192


def test_a_multiple_of_micro_batches() -> None:
    """Seven samples that fit into one become four; with fewer samples than that some are empty; five become eight."""
    ((share,),) = plan_step(
        np.full(7, 3), np.zeros(7), minibatches=1, replicas=1, micro_batch_tokens=64, seed=0, micro_batch_multiple=4
    )
    assert sorted(len(micro) for micro in share) == [1, 2, 2, 2]
    ((share,),) = plan_step(
        np.full(2, 3), np.zeros(2), minibatches=1, replicas=1, micro_batch_tokens=64, seed=0, micro_batch_multiple=4
    )
    assert sorted(len(micro) for micro in share) == [0, 0, 1, 1]
    for packed in (True, False):
        ((share,),) = plan_step(
            np.full(10, 32), np.zeros(10), minibatches=1, replicas=1, micro_batch_tokens=64, seed=0,
            micro_batch_multiple=4, packed=packed,
        )  # fmt: skip
        assert len(share) == 8 and sum(len(micro) for micro in share) == 10


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens: got 8, expected at least the longest sample's 9"):
        plan_step(np.array([9]), np.array([0]), minibatches=1, replicas=1, micro_batch_tokens=8, seed=0)
    with pytest.raises(ValueError, match="minibatches: got 2, expected at most the 1 groups"):
        plan_step(np.array([4, 4]), np.array([0, 0]), minibatches=2, replicas=1, micro_batch_tokens=8, seed=0)
