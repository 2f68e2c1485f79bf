"""Bytes on the wire by hand, and against the plan that the weight sync carries out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dppo.config.rules import SETTING_RULES, broken_rules
from megatron_dppo.planner.engine import engine_parallel
from megatron_dppo.planner.hardware import FILE_BANDWIDTH, GPUS
from megatron_dppo.planner.parameters import stage_parameters
from megatron_dppo.planner.plan import make_plan
from megatron_dppo.planner.traffic import LINK_SHARE, step_wires, sync_traffic
from megatron_dppo.planner.workload import workload_of
from megatron_dppo.weights.engine_layout import EngineParallel, engine_layout
from megatron_dppo.weights.layout import Parallel, megatron_layout
from megatron_dppo.weights.mapping import hub_dtypes
from megatron_dppo.weights.plan import sync_plan
from tests.planner.configs import config, shape
from tests.weights.architectures import LATENT, SMALL

H100 = GPUS["h100"]


@pytest.mark.parametrize("arch", [SMALL, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("engine", [{"tensor": 1}, {"tensor": 2}, {"tensor": 2, "expert_parallel": True}], ids=str)
def test_sync_has_the_bytes_of_the_plan_that_is_carried_out(arch: Any, engine: dict[str, Any]) -> None:
    settings = config(
        parallel={"tensor": 2, "expert": 2, "ranks": 4}, rollout={**engine, "engines": 3}, sync={"bucket_mib": 1}
    )
    found = sync_traffic(settings, arch, H100)
    layout, parallel = settings.parallel.layout, engine_parallel(settings)
    report = sync_plan(
        [list(megatron_layout(arch, layout, rank)) for rank in range(4)],
        [list(engine_layout(arch, parallel, worker)) for worker in range(parallel.workers)],
        hub_dtypes(arch, "bfloat16"),
        bucket_bytes=settings.sync.bucket_bytes,
        instances=3,
    ).report()
    assert found.trainer_to_engine_bytes == report.trainer_to_engine_bytes
    assert found.engine_to_engine_bytes == report.engine_to_engine_bytes
    assert found.bytes_per_worker == max(report.received_bytes)


@pytest.mark.parametrize(
    ("parallel", "workers"),
    [
        ({"tensor": 4, "expert": 8}, 8),
        ({"tensor": 2, "expert": 4, "pipeline": 2}, 8),
        ({"tensor": 1, "expert": 1, "pipeline": 8}, 8),
        ({"tensor": 1, "expert": 1, "pipeline": 4, "virtual": 2}, 8),
        ({"tensor": 1, "expert": 2, "pipeline": 4}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("bucket_mib", [16, 100, 10_000])
def test_a_bucket_is_sent_by_those_who_hold_it(parallel: dict[str, int], workers: int, bucket_mib: int) -> None:
    """Layers go in order: of a small bucket most stages have nothing."""
    arch = replace(shape("Qwen3-30B-A3B-Base"), num_layers=8, num_experts=16, moe_layers=(True,) * 8, vocab_size=512)
    settings = config(parallel={"ranks": 8, **parallel}, rollout={"tensor": workers}, sync={"bucket_mib": bucket_mib})
    layout, engine, size = settings.parallel.layout, engine_parallel(settings), settings.sync.bucket_bytes
    senders = [list(megatron_layout(arch, layout, rank)) for rank in range(8)]
    receivers = [list(engine_layout(arch, engine, worker)) for worker in range(workers)]
    plan = sync_plan(senders, receivers, hub_dtypes(arch, "bfloat16"), bucket_bytes=size)
    busiest = 0
    for bucket in range(plan.num_buckets):
        rows = plan.rows(bucket)
        moved = [np.bincount(end[rows], plan.nbytes[rows]).max() for end in (plan.src_rank, plan.dst)]
        busiest += int(max(moved))
    assert sync_traffic(settings, arch, H100).busiest_bytes == pytest.approx(busiest, rel=0.35)


@pytest.mark.parametrize("arch", [SMALL, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_smallest_bucket_that_the_rule_takes_is_the_smallest_that_is_sent(arch: Any, tensor: int) -> None:
    def faults(bucket_bytes: int) -> list[str]:
        settings = config(rollout={"tensor": tensor}, sync={"bucket_mib": bucket_bytes / 2**20})
        return broken_rules(
            {"sync": settings.sync, "rollout": settings.rollout, "model": settings.model}, SETTING_RULES, arch
        )

    def planned(bucket_bytes: int) -> bool:
        engine = EngineParallel(tensor=tensor)
        receivers = [list(engine_layout(arch, engine, worker)) for worker in range(tensor)]
        senders = [list(megatron_layout(arch, Parallel(), 0))]
        try:
            sync_plan(senders, receivers, hub_dtypes(arch, "bfloat16"), bucket_bytes=bucket_bytes)
        except ValueError:
            return False
        return True

    least = next(size for size in range(4, 1 << 14, 4) if planned(size))
    assert faults(least) == []
    assert [text.split(":")[0] for text in faults(least - 4)] == ["sync.bucket_mib"]


def test_collectives_of_qwen3_30b_by_hand() -> None:
    settings = config(training={"recompute": "none"})
    arch = shape("Qwen3-30B-A3B-Base")
    wires = step_wires(settings, arch, H100, workload_of(settings))
    tokens = 1024 * (1024 * 0.25 + 7168 * 0.5) / 4  # of a replica
    rows = tokens / 4
    assert wires["tensor"].bytes == pytest.approx(5 * 48 * rows * 2048 * 2 * 3)
    assert wires["experts"].bytes == pytest.approx(4 * 48 * 8 * rows * 2048 * 2 * 7 / 8)
    assert wires["experts"].seconds == pytest.approx(wires["experts"].bytes / 450e9 / LINK_SHARE)  # within a node
    dense, expert = 394_999_808, 3_623_878_656
    assert wires["gradients"].bytes == pytest.approx(4 * 4 * (dense * 3 / 4 + expert / 2))  # 4 gradient steps
    assert wires["weights"].bytes * 2 == wires["gradients"].bytes
    assert wires["context"].bytes == wires["pipeline"].bytes == 0


def test_full_recomputation_and_slow_links_take_longer() -> None:
    arch = shape("Qwen3-30B-A3B-Base")
    full, none = (make_plan(config(training={"recompute": r}), arch).estimate for r in ("full", "none"))
    far = make_plan(config(parallel={"expert": 16}), arch).estimate
    assert full is not None and none is not None and far is not None
    assert full.time.terms["compute"] == pytest.approx(none.time.terms["compute"] * 4 / 3)
    assert full.wires["experts"].bytes == pytest.approx(none.wires["experts"].bytes * 6 / 4)
    assert far.wires["experts"].seconds > 3 * full.wires["experts"].seconds


def test_a_pipeline_has_a_bubble_and_virtual_stages_halve_it() -> None:
    arch = shape("Qwen3-30B-A3B-Base")
    degrees = {"tensor": 1, "expert": 4, "pipeline": 4}
    one, two = (make_plan(config(parallel=degrees | {"virtual": v}), arch).estimate for v in (1, 2))
    assert one is not None and two is not None
    busy = sum(one.time.terms[kind] for kind in ("compute", "tensor", "experts", "context", "pipeline", "head"))
    assert one.time.terms["bubble"] == pytest.approx(
        busy * 3 / workload_of(config(parallel=degrees)).mean_micro_batches
    )
    assert two.time.terms["bubble"] < 0.6 * one.time.terms["bubble"]


def test_engines_of_others_have_no_sync_and_no_rollout() -> None:
    arch = shape("Qwen3-30B-A3B-Base")
    settings = config(rollout={"urls": ["http://far:8000"], "engines": 1, "tensor": 1}, cluster={"engine_nodes": 0})
    plan = make_plan(settings, arch)
    assert plan.estimate is not None and plan.estimate.sync is None
    assert "rollout" not in plan.estimate.time.terms


def test_evaluation_and_checkpoints_are_terms_of_a_step(tmp_path: Path) -> None:
    arch = shape("Qwen3-30B-A3B-Base")
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text("{}\n" * 60 + "\n")

    def terms(path: str, **evaluation: Any) -> dict[str, float]:
        sections = {
            "evaluation": {"samples": 32, "greedy": False, "every": 5, **evaluation},
            "checkpoint": {"every": 5},
        }
        estimate = make_plan(config(data={"eval": path}, **sections), arch).estimate
        assert estimate is not None
        return estimate.time.terms

    # before, after 5 and after all 10 steps, of 60 x 32 samples as long as the 1024 of a step
    found = terms(str(held_out))
    assert found["evaluation"] == pytest.approx(found["rollout"] * 3 / 10 * 60 * 32 / 1024, rel=0.01)
    assert terms("/nowhere/x.jsonl", prompts=60) == found  # not there: as many as `prompts`
    assert terms(str(held_out), prompts=30)["evaluation"] == pytest.approx(found["evaluation"] / 2)
    assert terms(str(held_out), greedy=True)["evaluation"] == pytest.approx(found["evaluation"] * 33 / 32)
    parameters = stage_parameters(arch, Parallel(), 0).trained
    assert found["checkpoint"] == pytest.approx(14 * parameters / FILE_BANDWIDTH["disk"] / 5)  # 8 ranks, of one node
    assert not {"evaluation", "checkpoint"} & make_plan(config(), arch).estimate.time.terms.keys()  # type: ignore[union-attr]


def test_rollouts_hide_behind_training_only_on_devices_of_their_own() -> None:
    arch = shape("Qwen3-30B-A3B-Base")
    stale = {"max_staleness": 2}
    own = make_plan(config(rollout=stale), arch).estimate
    alone = {"cluster": {"nodes": 1, "engine_nodes": 0, "device": "h200"}, "parallel": {"ranks": 8}}
    shared = make_plan(config(rollout=stale | {"engines": 2}, **alone), arch).estimate
    assert own is not None and shared is not None
    assert own.time.hidden > 0
    assert shared.time.hidden == 0


def test_latents_are_gathered_not_hidden_states() -> None:
    arch = shape("DeepSeek-V3")
    settings = config(parallel={"tensor": 4, "expert": 1, "ranks": 16}, training={"recompute": "none"})
    work = workload_of(settings)
    rows = work.total_tokens / 4 / 4  # of a replica, of a tensor rank
    latents, hidden = 1536 + 512 + 64, 7168
    numbers = 61 * (3 * latents + 2 * hidden) + 61 * 5 * hidden  # 3 dense MLPs and 58 shared experts
    assert step_wires(settings, arch, H100, work)["tensor"].bytes == pytest.approx(numbers * rows * 2 * 3)
