"""Bytes of a rank by hand, and what settings do to them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dppo.planner.hardware import GPUS
from megatron_dppo.planner.memory import RankMemory, rank_memory
from megatron_dppo.planner.workload import chunks_in_flight, workload_of
from megatron_dppo.weights.layout import Parallel
from tests.planner.configs import config, shape

ARCH = "Qwen3-30B-A3B-Base"
DENSE, EXPERT = 394_999_808, 3_623_878_656  # test_parameters has them by hand


def memory(stage: int = 0, **sections: dict[str, Any]) -> RankMemory:
    settings = config(**sections)
    return rank_memory(settings, shape(ARCH), GPUS["h100"], workload_of(settings), stage)


def test_qwen3_30b_at_tp4_ep8_by_hand() -> None:
    found = memory()
    assert found.weights == 2 * (DENSE + EXPERT)
    assert found.gradients == 4 * (DENSE + EXPERT)
    # float32 weights and two moments: dense over 4 replicas, experts over 16 / 8
    assert found.optimizer == 12 * (DENSE // 4 + EXPERT // 2)
    assert found.staging == 2 * 512 * 2**20
    # of each of 48 layers its input, of which a rank has a quarter; behind them the last norm, and all counted rows
    assert found.activations == 8192 * (48 * 2 * 2048 // 4 + (2 * 2048 + 4) // 4 + 2 * 2048)
    chunk = (1 << 30) // (4 * 38016)  # tokens whose float32 logits fit into head.memory_mib
    assert found.logits == 6 * chunk * 38016 + 2 * 8192 * 2048 + 2 * 38016 * 2048
    assert found.routes == found.reference == found.optimizer_host == 0
    assert found.needed == found.peak + 5 * 2**30


def test_replicas_share_a_stages_state() -> None:
    """Of 16 ranks in two stages: the dense layers have 16 / (4 x 2) replicas, the experts 16 / (2 x 2)."""
    found = memory(parallel={"pipeline": 2, "expert": 2})
    expert = 24 * 64 * 3 * 768 * 2048  # half of the layers, half of the experts
    dense = found.weights // 2 - expert
    assert found.optimizer == 12 * (dense // 2 + expert // 4)


def test_adam_without_sharding_and_on_the_host() -> None:
    assert memory(parallel={"distributed_optimizer": False}).optimizer == 12 * (DENSE + EXPERT)
    offloaded = memory(training={"offload_optimizer": True})
    assert offloaded.optimizer == 0
    assert offloaded.optimizer_host == 16 * (DENSE // 4 + EXPERT // 2)
    sgd = memory(training={"optimizer": "sgd"}, parallel={"distributed_optimizer": False})
    assert sgd.optimizer == 4 * (DENSE + EXPERT)


def test_torchs_adam_on_a_gpu_takes_the_roots_of_all_moments() -> None:
    """A shard of dense and expert parameters together over 4 replicas; Transformer Engine's Adam needs none."""
    assert memory().scratch == 0
    torch_layers = {"model": {"path": "/nowhere/" + ARCH, "layers": "torch"}}
    assert memory(**torch_layers).scratch == 4 * (DENSE + EXPERT) // 4
    assert memory(**torch_layers, training={"offload_optimizer": True}).scratch == 0


def test_a_reference_and_recorded_routes() -> None:
    found = memory(loss={"kl": {"coefficient": 0.1}}, routing={"mode": "rollout"})
    assert found.reference == found.weights
    samples, longest = 128 * 8 // 4, 8192
    assert found.routes == samples * longest // 4 * (48 * 8 + 1)  # u8 ids, and whether a token has any


def test_what_is_recorded_of_a_steps_tokens() -> None:
    tokens = 128 * 8 // 4 * 7168  # of a replica, all sampled
    assert memory().recorded == 4 * 2 * tokens  # advantage and log-prob
    topk = {"objective": {"name": "dppo_topk_tv", "top_k": 128}}
    assert memory(**topk).recorded == 4 * (2 + 129) * tokens
    assert memory(**topk).peak - memory().peak == 4 * 129 * tokens
    assert memory(**topk, parallel={"tensor": 2, "context": 2}).recorded == memory(**topk).recorded // 2
    stages = {"parallel": {"tensor": 1, "pipeline": 4, "expert": 4}}
    recomputed = topk | {"loss": {"kl": {"coefficient": 0.1}}} | stages
    recomputed["objective"] = recomputed["objective"] | {"anchor": "recomputed"}
    first, last = memory(0, **recomputed).recorded, memory(3, **recomputed).recorded
    assert (first, last) == (4 * (2 + 129) * tokens, 4 * (2 + 129 + 130 + 1) * tokens)


def test_recompute_keeps_less_and_pays_for_it_in_one_layer() -> None:
    none, selective, full = (memory(training={"recompute": r}) for r in ("none", "selective", "full"))
    assert none.activations > selective.activations > full.activations
    assert full.working > none.working


def test_checkpoints_are_gathered_on_the_host() -> None:
    assert memory(checkpoint={"every": 10}).checkpoint_host == 12 * (DENSE + EXPERT)


def test_context_and_tensor_ranks_share_activations() -> None:
    one = memory(training={"recompute": "none"}, parallel={"tensor": 1})
    two = memory(training={"recompute": "none"}, parallel={"tensor": 2})
    by_context = memory(training={"recompute": "none"}, parallel={"tensor": 1, "context": 2})
    assert 0.5 <= two.activations / one.activations < 0.52  # cos and sin are whole on every rank
    assert by_context.activations * 2 == pytest.approx(one.activations, rel=1e-6)


@pytest.mark.parametrize(
    ("parallel", "micro_batches", "expected"),
    [
        (Parallel(pipeline=4, ranks=4), 8, [(4,), (3,), (2,), (1,)]),
        (Parallel(pipeline=4, ranks=4), 2, [(2,), (2,), (2,), (1,)]),
        # two warm-up passes for each stage behind, a group of `pipeline` through the first chunk, and the one at work
        (Parallel(pipeline=2, virtual=2, ranks=2), 4, [(3, 2), (2, 1)]),
        (Parallel(pipeline=4, virtual=2, ranks=4), 8, [(7, 4), (5, 4), (4, 3), (4, 1)]),
    ],
)
def test_micro_batches_in_flight(parallel: Parallel, micro_batches: int, expected: list[tuple[int, ...]]) -> None:
    assert [chunks_in_flight(parallel, s, micro_batches) for s in range(parallel.pipeline)] == expected


def test_more_micro_batches_do_not_keep_more() -> None:
    parallel = Parallel(pipeline=4, virtual=3, ranks=4)
    for stage in range(4):
        kept = [sum(chunks_in_flight(parallel, stage, micro_batches)) for micro_batches in (4, 16, 64)]
        ahead = 2 * (3 - stage) + 2 * 4 + 1
        assert kept == [min(ahead, 3 * 4), ahead, ahead]
