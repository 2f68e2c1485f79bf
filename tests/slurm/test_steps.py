"""What the launcher counts on of srun: it hands a signal on, and says which task failed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from megatron_dppo.config.loading import load_config
from megatron_dppo.job.nodes import Node
from megatron_dppo.job.processes import ChildDied, supervise
from megatron_dppo.job.slurm import Allocation
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
NODES = (Node("n1", "127.0.0.1"), Node("n2", "127.0.0.1"))
SERVER = """
import os, signal, sys, time
from megatron_dppo.job.processes import become_guarded
server = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(print('gently', flush=True)));"
become_guarded([sys.executable, "-c", server + "print('up', flush=True); time.sleep(600)"], os.environ, 5.0)
"""
RANK = """
import os, sys, time
print(os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["SLURMD_NODENAME"], flush=True)
if os.environ["RANK"] == "2":
    raise ValueError("this rank says no")
time.sleep(600)
"""


@pytest.fixture
def environment(cluster: Cluster, tmp_path: Path) -> dict[str, str]:
    return {**cluster.environment, "PYTHONPATH": f"{ROOT}:{tmp_path}"}


def test_a_step_ends_gently(cluster: Cluster, environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    argv = [sys.executable, "-c", SERVER]
    child = Allocation(NODES, NODES).start_on(NODES[1], "engine", argv, env=environment, log=log)
    cluster.wait(lambda: "up\n" in child.log_tail() + "\n", 30.0, child.log_tail)
    started = time.monotonic()
    child.stop()
    assert "gently" in log.read_text(), log.read_text()
    assert time.monotonic() - started < child.grace_s  # it was not killed
    cluster.wait(lambda: not cluster.run("squeue", "-h"), 30.0, lambda: cluster.run("squeue"))


def test_ranks_are_numbered_by_node_and_the_one_that_fails_is_shown(
    cluster: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "some_rank.py").write_text(RANK)
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["cluster.nodes=2", "parallel.ranks=4"])
    (ranks,) = Allocation(NODES, NODES).start_ranks("some_rank", config, tmp_path / "x", env=environment, logs=tmp_path)
    with pytest.raises(ChildDied, match="ranks ended with code(.|\n)*rank2.log:(.|\n)*this rank says no"):
        supervise([ranks], until=[ranks])
    assert [(tmp_path / f"rank{rank}.log").read_text().splitlines()[0] for rank in range(4)] == [
        "0 0 n1", "1 1 n1", "2 0 n2", "3 1 n2"
    ]  # fmt: skip
