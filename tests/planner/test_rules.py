"""Every rule that a plan can break, by its message; all of them in one plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_dppo.planner import rules
from megatron_dppo.planner.hardware import GPUS
from megatron_dppo.planner.plan import make_plan
from tests.planner.configs import config, shape

ARCH = "Qwen3-30B-A3B-Base"
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"parallel": {"tensor": 3}}, "parallel.ranks: got 16, expected a multiple of tensor x context x pipeline = 3"),
    ({"parallel": {"expert": 3}}, "parallel.expert: got 3, expected a divisor of the model's 128 experts"),
    ({"parallel": {"pipeline": 16, "tensor": 1, "expert": 1, "virtual": 2}}, "parallel.pipeline x virtual: got 32"),
    ({"parallel": {"expert": 16, "expert_tensor": 2}}, "a multiple of expert x expert_tensor x pipeline = 32"),
    ({"parallel": {"tensor": 16}}, "parallel.tensor: got 16, expected a divisor of the 8 ranks of a node"),
    ({"parallel": {"expert": 1, "expert_tensor": 16}}, "parallel.expert_tensor: got 16, expected a divisor of the 8"),
    ({"parallel": {"ranks": 8}}, "parallel.ranks: got 8, expected 16: cluster.nodes 2 x devices_per_node 8 hold 16"),
    ({"parallel": {"sequence_parallel": False}}, "parallel.sequence_parallel: got false, expected true or auto"),
    ({"rollout": {"tensor": 3}}, "rollout.tensor: got 3, expected a divisor of the model's 32 attention heads"),
    ({"rollout": {"tensor": 3}}, "rollout.tensor: got 3, expected a divisor or a multiple of the model's 4 key/value"),
    ({"rollout": {"max_response_tokens": 65536}}, "expected at most the model's max_position_embeddings 32768"),
    ({"training": {"micro_batch_tokens": 4096}}, "training.micro_batch_tokens: got 4096, expected at least 8192"),
    ({"training": {"minibatches": 5}}, "training.minibatches: got 5, expected a divisor of rollout.prompts_per_step"),
    ({"training": {"optimizer": "sgd"}}, "parallel.distributed_optimizer: got true, expected false: sgd has no state"),
    ({"head": {"memory_mib": 0.1}}, "head.memory_mib: got 0.1, expected at least"),
    ({"sync": {"bucket_mib": 1e-4}}, "sync.bucket_mib: got 0.0001, expected at least 0.0079: two rows of 2048 numbers"),
    ({"parallel": {"expert": 1}}, "memory of a rank: pipeline stage 0 (ranks 0 to 15) needs"),
    (
        {"rollout": {"tensor": 8}, "cluster": {"engine_nodes": 0}, "parallel": {"ranks": 16}},
        "GiB of h100 that an engine",
    ),
]


@pytest.mark.parametrize(("sections", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
def test_a_broken_rule_is_named(sections: dict[str, Any], message: str) -> None:
    plan = make_plan(config(**sections), shape(ARCH))
    assert not plan.fits
    assert any(message in text for text in plan.violations), plan.violations


def test_all_are_in_one_plan_and_memory_is_there_all_the_same() -> None:
    plan = make_plan(
        config(rollout={"tensor": 3, "top_p": 0.9}, training={"minibatches": 5}, parallel={"expert": 2}),
        shape(ARCH),
    )
    for key in ("rollout.tensor", "rollout.top_p", "training.minibatches", "memory of a rank"):
        assert any(text.startswith(key) for text in plan.violations), plan.violations
    assert plan.memory is not None and plan.memory.worst.weights > 0


def test_nothing_is_wrong_with_the_recipe() -> None:
    plan = make_plan(config(), shape(ARCH))
    assert plan.violations == ()
    assert plan.fits


def test_norms_of_latents_that_transformer_engine_computes_otherwise() -> None:
    odd = replace(shape("DeepSeek-V3"), rms_norm_eps=1e-5)
    for kind, faults in (("auto", 1), ("torch", 0)):
        found = rules.violations(config(model={"layers": kind}), odd, GPUS["h200"])
        assert sum(text.startswith(f"model.layers: got {kind}, expected torch") for text in found) == faults


def test_an_engine_that_has_no_room_for_its_weights() -> None:
    plan = make_plan(config(cluster={"nodes": 32}, rollout={"tensor": 8, "engines": 2}), shape("Kimi-K2-Instruct"))
    assert any("memory of an engine: a worker has 71.7 GiB of h100" in text for text in plan.violations)
    assert plan.memory is not None and plan.memory.engine is not None
    assert plan.memory.engine.weights > 240 * 2**30


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"engines": 2}}, "rollout.engines: 2 leave devices of the engine nodes idle, which hold 4"),
        ({"rollout": {"max_concurrency": 32}}, "rollout.max_concurrency: 32 requests at a time, where the caches hold"),
        ({"rollout": {"tensor": 16, "engines": 1}}, "rollout.tensor: got 16, an engine over 2 nodes, expected one"),
        ({"parallel": {"expert": 16}}, "parallel.expert: 16 x expert_tensor 1 reach over nodes of 8"),
        (
            {"parallel": {"pipeline": 4, "tensor": 1, "expert": 4}, "rollout": {"prompts_per_step": 16}},
            "parallel.pipeline: 4 stages have 4 micro-batches of a gradient step to share, at least 16 keep them busy",
        ),
    ],
)
def test_what_runs_and_would_run_better(sections: dict[str, Any], message: str) -> None:
    plan = make_plan(config(**sections), shape(ARCH))
    assert any(message in text for text in plan.advice), plan.advice
    assert plan.fits
