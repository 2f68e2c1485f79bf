"""The rules of a config about the machines of its job."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dppo.config.loading import load_config
from megatron_dppo.config.rules import RULES, broken_rules
from megatron_dppo.job.run import with_transport

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
H100 = "cluster.device=h100"
SIXTEEN = ["cluster.nodes=2", "parallel.ranks=16", H100]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ([], None),
        (["cluster.nodes=2", "cluster.engine_nodes=1"], None),
        (["cluster.nodes=3"], "cluster.nodes: got 3, expected a divisor of parallel.ranks 2"),
        (["parallel.ranks=16", H100], "parallel.ranks: got 16, expected at most 8: cluster.nodes 1 x 8 GPUs"),
        (["parallel.ranks=16", "cluster.device=cpu"], None),
        ([*SIXTEEN, "cluster.engine_nodes=1", "rollout.tensor=4", "rollout.engines=2"], None),
        (
            [*SIXTEEN, "cluster.engine_nodes=1", "rollout.tensor=4", "rollout.engines=3"],
            "rollout.engines: got 3 of 4 GPUs, expected at most 2: what cluster.engine_nodes 1 have",
        ),
        (
            [*SIXTEEN, "cluster.engine_nodes=1", "rollout.tensor=16"],
            "rollout.engines: got 1 of 16 GPUs, expected at most 0: what cluster.engine_nodes 1 have",
        ),
        ([*SIXTEEN, "cluster.engine_nodes=2", "rollout.tensor=16"], None),
        (
            [*SIXTEEN, "cluster.engine_nodes=2", "rollout.tensor=12"],
            "rollout.tensor: got 12, expected at most a node's 8 GPUs, or a multiple of them on nodes of its own "
            "(cluster.engine_nodes)",
        ),
        ([*SIXTEEN], "rollout.engines: got 1 of 1 GPUs, expected at most 0: what ranks leave on nodes"),
        (["cluster.nodes=2", "parallel.ranks=8", "rollout.engines=2", "rollout.tensor=4", H100], None),
        (["parallel.ranks=8", "rollout.engines=2", "rollout.tensor=4", H100], None),  # ranks share their GPUs
        (
            ["parallel.ranks=8", "rollout.engines=4", "rollout.tensor=4", H100],
            "rollout.engines: got 4 of 4 GPUs, expected at most 2: what the 8 GPUs of one machine have room for, "
            "beside ranks or not",
        ),
        (
            ["rollout.engines=9", H100],
            "rollout.engines: got 9 of 1 GPUs, expected at most 8: what the 8 GPUs of one machine have room for, "
            "beside ranks or not",
        ),
        (
            ["parallel.ranks=8", "rollout.tensor=16", H100],
            "rollout.tensor: got 16, expected at most a node's 8 GPUs, or a multiple of them on nodes of its own "
            "(cluster.engine_nodes)",
        ),
        (["rollout.engines=9", "cluster.device=cpu"], None),
        (
            ["cluster.engine_nodes=2"],
            "rollout.engines: got 1, expected at least 2: none of cluster.engine_nodes 2 is without one",
        ),
        (
            ["cluster.engine_nodes=1", "rollout.urls=[http://10.0.0.1:8000]"],
            "cluster.engine_nodes: got 1, expected 0: engines of rollout.urls run already",
        ),
        (
            ["cluster.nodes=2", "sync.transport=shm"],
            "sync.transport: got shm, expected group or disk: the job has 2 machines",
        ),
        (
            ["cluster.nodes=2", "sync.transport=ipc", "rollout.urls=[http://10.0.0.1:8000]"],
            "sync.transport: got ipc, expected group or disk: http://10.0.0.1:8000 is on another machine",
        ),
    ],
)
def test_rules(overrides: list[str], fault: str | None) -> None:
    config = load_config(RECIPE, overrides)
    sections = {name: getattr(config, name) for name in ("parallel", "cluster", "rollout", "sync")}
    assert broken_rules(sections, RULES) == ([] if fault is None else [fault])


def test_weights_go_by_group_between_machines() -> None:
    assert with_transport(load_config(RECIPE, ["cluster.nodes=2"])).sync.transport == "group"
    assert with_transport(load_config(RECIPE)).sync.transport == "shm"
