"""How weights get to the engines, as launchers and the planner alike take it from `placement`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_dppo.config.loading import load_config
from megatron_dppo.job.run import with_transport
from megatron_dppo.placement import engine_place, engines_apart, transport_of

RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
EIGHT = ["cluster.device=h100", "cluster.devices_per_node=8"]


@pytest.mark.parametrize(
    ("overrides", "transport", "apart"),
    [
        ([], "shm", False),  # ranks and the engine share the cores
        (["rollout.urls=[http://127.0.0.1:8000]"], "shm", False),
        (["rollout.urls=[http://10.0.0.1:8000]"], "group", False),
        (["cluster.device=cpu", "cluster.nodes=2"], "group", False),
        ([*EIGHT, "parallel.ranks=4", "rollout.tensor=4"], "group", True),
        ([*EIGHT, "parallel.ranks=4", "rollout.tensor=2", "rollout.engines=2"], "shm", True),  # both read one file
        ([*EIGHT, "parallel.ranks=8", "rollout.tensor=4"], "shm", False),
        ([*EIGHT, "parallel.ranks=8", "rollout.tensor=4", "cluster.engine_nodes=1"], "group", True),
        ([*EIGHT, "parallel.ranks=8", "rollout.tensor=4", "sync.transport=disk"], "disk", False),
    ],
)
def test_the_transport_that_auto_means(overrides: list[str], transport: str, apart: bool) -> None:
    config = load_config(RECIPE, overrides)
    assert (transport_of(config), engines_apart(config)) == (transport, apart)


@pytest.mark.parametrize("overrides", [[], ["rollout.urls=[http://127.0.0.1:8000]"], ["cluster.nodes=2"]])
def test_launchers_take_it(overrides: list[str]) -> None:
    config = load_config(RECIPE, overrides)
    assert with_transport(config).sync.transport == transport_of(config)


def test_an_engine_of_a_cpu_gets_no_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with vLLM's CPU build on a machine with GPUs enough."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = load_config(RECIPE, ["cluster.device=auto"])
    assert [transport_of(config, engines_on_gpus=here) for here in (True, False)] == ["group", "shm"]


def test_engines_stand_behind_the_ranks_where_all_have_gpus() -> None:
    apart = load_config(RECIPE, [*EIGHT, "parallel.ranks=4", "rollout.tensor=2", "rollout.engines=2"])
    assert [engine_place(apart, number) for number in range(2)] == [(4, False), (6, False)]
    shared = load_config(RECIPE, [*EIGHT, "parallel.ranks=8", "rollout.tensor=2", "rollout.engines=2"])
    assert [engine_place(shared, number) for number in range(2)] == [(0, True), (2, True)]
