"""Jobs on several nodes: who runs where; and nodes without Slurm, of which each is this machine."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from megatron_dppo.config import Config
from megatron_dppo.config.loading import load_config
from megatron_dppo.job.node_engine import listening_address
from megatron_dppo.job.nodes import Node, Seat, divided, engine_seats, is_carried, named_nodes
from megatron_dppo.job.processes import ChildDied, stop_on_exit, supervise

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NODES = tuple(Node(f"n{i}", f"10.0.0.{i}") for i in range(1, 5))
# Writes what it was started with beside its argument; the last rank fails if told to.
RANK = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "NODE")
open(sys.argv[1] + os.environ["RANK"], "w").write(json.dumps([os.environ[name] for name in names]))
if os.environ["RANK"] == os.environ.get("MEGATRON_DPPO_TEST_FAILS"):
    raise ValueError("this rank says no")
"""
# Runs a command on a "node": here.
ON = '#!/bin/sh\nnode=$1; shift\nNODE=$node exec "$@"\n'


def config(*overrides: str) -> Config:
    return load_config(RECIPE, overrides)


def test_trainer_nodes_come_first_and_engines_share_them_where_they_have_none() -> None:
    assert divided(config("cluster.nodes=2", "cluster.engine_nodes=1"), NODES) == (NODES[:2], NODES[2:3])
    assert divided(config("cluster.nodes=2"), NODES) == (NODES[:2], NODES[:2])
    with pytest.raises(ValueError, match="got 4 nodes, expected cluster.nodes [+] cluster.engine_nodes = 5"):
        divided(config("cluster.nodes=4", "cluster.engine_nodes=1"), NODES)


def test_engines_have_gpus_of_their_own() -> None:
    own = config("cluster.engine_nodes=2", "rollout.engines=3", "rollout.tensor=2")
    assert engine_seats(own, NODES[2:]) == [Seat(NODES[2], 0), Seat(NODES[3], 0), Seat(NODES[2], 2)]
    shared = config("cluster.nodes=2", "parallel.ranks=8", "rollout.engines=3", "rollout.tensor=2")
    assert engine_seats(shared, NODES[:2]) == [Seat(NODES[0], 4), Seat(NODES[1], 4), Seat(NODES[0], 6)]


def test_nodes_that_the_environment_names() -> None:
    wanted = config("cluster.nodes=2", "cluster.engine_nodes=1")
    found = named_nodes(wanted, {"MEGATRON_DPPO_NODES": "me@a,me@b c", "MEGATRON_DPPO_ON": "ssh"})
    assert found.trainers == (Node("me@a", "a"), Node("me@b", "b")) and found.engines == (Node("c", "c"),)
    assert found.host(wanted) == "a"
    with pytest.raises(ValueError, match="MEGATRON_DPPO_ON: missing"):
        named_nodes(wanted, {"MEGATRON_DPPO_NODES": "a b c"})


def test_engines_that_share_the_ranks_gpus_on_one_node() -> None:
    one = config("cluster.device=h100", "parallel.ranks=8", "rollout.engines=2", "rollout.tensor=4")
    assert engine_seats(one, NODES[:1]) == [Seat(NODES[0], 0, True), Seat(NODES[0], 4, True)]
    apart = config("cluster.device=h100", "parallel.ranks=4", "rollout.engines=2", "rollout.tensor=2")
    assert engine_seats(apart, NODES[:1]) == [Seat(NODES[0], 4), Seat(NODES[0], 6)]


def test_secrets_are_not_on_command_lines() -> None:
    assert is_carried("HF_HOME") and is_carried("NCCL_IB_HCA") and not is_carried("HOME")
    assert not any(map(is_carried, ("HF_TOKEN", "VLLM_API_KEY", "HF_HUB_TOKEN")))


@pytest.mark.parametrize(
    ("name", "means", "listens"),
    [("n2", "10.0.0.2", "10.0.0.2"), ("vm", "127.0.1.1", "0.0.0.0"), ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
     ("only.others.know", None, "0.0.0.0")],
)  # fmt: skip
def test_an_engine_listens_where_others_reach_it(
    monkeypatch: pytest.MonkeyPatch, name: str, means: str | None, listens: str
) -> None:
    def resolve(host: str) -> str:
        if means is None:
            raise OSError
        return means

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    assert listening_address(name) == listens


@pytest.mark.parametrize("fails", ["", "3"])
def test_ranks_on_named_nodes(tmp_path: Path, fails: str) -> None:
    (tmp_path / "some_rank.py").write_text(RANK)
    on = tmp_path / "on.sh"
    on.write_text(ON)
    on.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "MEGATRON_DPPO_TEST_FAILS": fails}
    env |= {"MEGATRON_DPPO_NODES": "127.0.0.1 b", "MEGATRON_DPPO_ON": str(on)}
    wanted = config("cluster.nodes=2", "parallel.ranks=4")
    nodes = named_nodes(wanted, env)
    with stop_on_exit() as children:
        children.extend(nodes.start_ranks("some_rank", wanted, tmp_path / "seen", env=env, logs=tmp_path))
        if fails:
            with pytest.raises(
                ChildDied, match="ranks on b ended with code 1(.|\n)*rank3.log:(.|\n)*this rank says no"
            ):
                supervise(children, until=children)
            return
        supervise(children, until=children)
    seen = [json.loads((tmp_path / f"seen{rank}").read_text()) for rank in range(4)]
    names = ("127.0.0.1", "b")
    assert seen == [[str(rank), str(rank % 2), "4", "127.0.0.1", names[rank // 2]] for rank in range(4)]


def test_samples_go_through_the_runs_directory(tmp_path: Path) -> None:
    wanted = config("cluster.nodes=2", f"run.dir={tmp_path}")
    nodes = named_nodes(wanted, {"MEGATRON_DPPO_NODES": "a b", "MEGATRON_DPPO_ON": sys.executable})
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "of a job that was killed").touch()
    with nodes.shared_directory(wanted) as shared:
        assert shared == tmp_path / "shared" and not list(shared.iterdir())
        (shared / "batch-0-0.safetensors").touch()
    assert not shared.exists()
