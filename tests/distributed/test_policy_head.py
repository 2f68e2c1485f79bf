"""The policy head over real ranks: exact against float64, the same bits on every rank, and no collective too many."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dppo.algorithm.objectives import TokenStats
from megatron_dppo.backend.parallel import Rank
from megatron_dppo.head.policy_head import HeadMemory, VocabShard, policy_loss, token_stats
from megatron_dppo.head.rows import counted_rows
from megatron_dppo.weights.layout import Parallel
from tests.distributed.rank_pool import RankPool
from tests.head.cases import CASES, PADDED, Case, H, answer, assert_equal, make_case

CHUNK_TOKENS = 4


class Collectives(TorchDispatchMode):
    """Counts the collectives that run inside it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.count[func._opname.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def run_heads(rank: Rank, cases: list[Case], path: str, sequence_parallel: bool) -> list[dict[str, Any]]:
    return [run_head(rank, case, path, sequence_parallel) for case in cases]


def run_head(rank: Rank, case: Case, path: str, sequence_parallel: bool) -> dict[str, Any]:
    """The head on this rank's shard, from a sequence of hidden states of which the case's tokens are a part."""
    tensor, at = rank.parallel.tensor, rank.at.tensor
    rows = PADDED // tensor
    weight = case.weight[at * rows : (at + 1) * rows].clone().requires_grad_()
    positions, sequence = spread(case, tensor)
    if sequence_parallel:
        per_rank = len(sequence) // tensor
        sequence = sequence[at * per_rank : (at + 1) * per_rank]
    sequence = sequence.clone().requires_grad_()
    shard = VocabShard(at * rows, case.vocab_size, rank.tensor_group)
    memory = HeadMemory("store") if path == "store" else HeadMemory("chunk", CHUNK_TOKENS * 4 * rows)

    gather = lambda: counted_rows(sequence, positions, rank.tensor_group, sequence_parallel=sequence_parallel)  # noqa: E731
    with Collectives() as in_gather:
        hidden = gather()
    with Collectives() as in_forward:
        loss, stats = policy_loss(
            hidden, weight, case.targets, case.topk_ids, case.coefficients,
            shard=shard, temperature=case.temperature,
            entropy_gradient=case.c_entropy is not None, memory=memory,
        )  # fmt: skip
    with Collectives() as in_backward:
        loss.backward()
    with torch.no_grad(), Collectives() as in_stats:
        alone = token_stats(
            gather(), weight, case.targets, case.topk_ids, shard=shard, temperature=case.temperature, memory=memory
        )
    assert torch.equal(alone.logprob, stats.logprob) and torch.equal(alone.entropy, stats.entropy)
    assert sequence.grad is not None and weight.grad is not None
    parts = (stats.logprob, stats.entropy, stats.topk_logprob, loss, sequence.grad.float(), weight.grad.float())
    return {
        "parts": [None if part is None else part.detach().numpy().copy() for part in parts],
        "collectives": [dict(seen.count) for seen in (in_gather, in_forward, in_backward, in_stats)],
    }


def spread(case: Case, tensor: int) -> tuple[np.ndarray, torch.Tensor]:
    """Positions of the case's tokens, in no order, in a longer sequence, and that sequence's hidden states."""
    tokens = len(case.targets)
    length = 4 * (tokens + 4)
    positions = np.random.default_rng(1).permutation(length)[:tokens]
    sequence = torch.full((length, H), 7.0, dtype=case.hidden.dtype)
    sequence[torch.from_numpy(positions)] = case.hidden
    return positions, sequence


@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
@pytest.mark.parametrize("path", ["store", "chunk"])
def test_exact_and_the_same_on_every_rank(ranks: RankPool, path: str, tensor: int, sequence_parallel: bool) -> None:
    cases = {name: make() for name, make in CASES.items()}
    parallel = Parallel(tensor=tensor, ranks=tensor)
    answers = ranks.run(run_heads, parallel, list(cases.values()), path, sequence_parallel)
    for (name, case), of_ranks in zip(cases.items(), zip(*answers, strict=True), strict=True):
        try:
            check(case, of_ranks, tensor, sequence_parallel)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def check(case: Case, answers: tuple[dict[str, Any], ...], tensor: int, sequence_parallel: bool) -> None:
    for other in answers[1:]:  # bit-identical: masks that differ between ranks would tear the gradient apart
        for mine, theirs in zip(answers[0]["parts"][:4], other["parts"][:4], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    first = [None if part is None else torch.from_numpy(part) for part in answers[0]["parts"]]
    stats = TokenStats(first[0], first[1], first[2], None)
    # Gradients in the coordinates of the whole: LM head rows in order, sequence rows in order.
    d_weight = torch.from_numpy(np.concatenate([a["parts"][5] for a in answers]))
    d_sequence = [torch.from_numpy(a["parts"][4]) for a in answers]
    whole = torch.cat(d_sequence) if sequence_parallel else d_sequence[0]
    positions, _ = spread(case, tensor)
    d_hidden = whole[torch.from_numpy(positions)]
    assert_equal(case, answer(case), stats, first[3], d_hidden, d_weight, ranks=tensor)
    whole[torch.from_numpy(positions)] = 0.0
    assert not whole.any()  # tokens that do not count get no gradient


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("path", ["store", "chunk"])
@pytest.mark.parametrize("k", [0, 6])
def test_collectives_are_the_documented_ones(ranks: RankPool, k: int, path: str, sequence_parallel: bool) -> None:
    tokens = 3 * CHUNK_TOKENS
    answers = ranks.run(run_head, Parallel(tensor=2, ranks=2), make_case(tokens=tokens, k=k), path, sequence_parallel)
    chunks = 3 if path == "chunk" else 1

    def statistics(chunks: int) -> dict[str, int]:
        return {"allgather_base": chunks} | ({"allreduce": chunks} if k else {})

    gather = {"allgather_base": 1} if sequence_parallel else {}
    backward = {"reduce_scatter_base": 1} if sequence_parallel else {"allreduce": 1}
    for one in answers:
        in_gather, in_forward, in_backward, in_stats = one["collectives"]
        assert in_gather == gather
        assert in_forward == statistics(chunks)
        assert in_backward == backward  # what a column-parallel layer must do, and nothing of the head's
        alone = statistics(3 if path == "chunk" else 1)
        alone["allgather_base"] += gather.get("allgather_base", 0)
        assert in_stats == alone


def test_one_rank_alone_communicates_nothing(ranks: RankPool) -> None:
    (one,) = ranks.run(run_head, Parallel(), make_case(), "chunk", False)
    assert one["collectives"] == [{}, {}, {}, {}]


def test_uneven_shares_of_counted_rows(ranks: RankPool) -> None:
    """All counted tokens on the last rank, as when prompts fill the others."""
    case = make_case(tokens=8)
    case = replace(case, topk_ids=None)
    answers = ranks.run(run_rows, Parallel(tensor=4, ranks=4), case.hidden.numpy())
    for at, (gathered, gradient) in enumerate(answers):
        np.testing.assert_array_equal(gathered, case.hidden.numpy())
        np.testing.assert_array_equal(gradient, 10.0 if at == 3 else 0.0)  # 1 + 2 + 3 + 4


def run_rows(rank: Rank, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    local = torch.from_numpy(hidden).clone().requires_grad_()
    rows = 3 * len(hidden) + np.arange(len(hidden))
    gathered = counted_rows(local, rows, rank.tensor_group, sequence_parallel=True)
    (gathered * (rank.rank + 1)).sum().backward()
    assert local.grad is not None
    return gathered.detach().numpy(), local.grad.numpy()
