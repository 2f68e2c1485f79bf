"""What is read of Slurm and written to it, without one: text of a real 22.05 in, command lines out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_dppo.config import Config
from megatron_dppo.config.loading import load_config
from megatron_dppo.job.nodes import Node, failed_rank_log, python
from megatron_dppo.job.slurm import FAILED_TASK, allocation, nodes_of, step_command

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NODES = [Node(f"n{i}", f"10.0.0.{i}") for i in range(1, 5)]

# scontrol -o show node, shortened at its ends.
DESCRIPTION = """\
NodeName=n1 Arch=x86_64 CoresPerSocket=1  CPUAlloc=4 CPUTot=4 Gres=(null) NodeAddr=10.0.0.1 NodeHostName=vm Port=17001 \
Version=22.05.8 OS=Linux 6.18 #1 SMP PREEMPT_DYNAMIC @0  RealMemory=8000 State=ALLOCATED CfgTRES=cpu=4,mem=8000M
NodeName=n2 Arch=x86_64 CoresPerSocket=1  CPUAlloc=0 CPUTot=4 Gres=gpu:8 NodeAddr=node2.fabric State=IDLE
"""
# What srun 22.05 wrote when one task ended with code 3, and when srun was asked to end.
FAILED = """\
srun: error: n2: task 1: Exited with exit code 3
srun: launch/slurm: _step_signal: Terminating StepId=2.1
srun: error: n1: task 0: Terminated
srun: Force Terminated StepId=2.1
"""
ENDED = "srun: forcing job termination\nsrun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n"


def config(*overrides: str) -> Config:
    return load_config(RECIPE, overrides)


def test_addresses_are_those_that_slurm_gives() -> None:
    assert nodes_of(["n2", "n1", "n3"], DESCRIPTION) == [
        Node("n2", "node2.fabric"), Node("n1", "10.0.0.1"), Node("n3", "n3")
    ]  # fmt: skip


def test_outside_of_an_allocation_a_job_of_several_nodes_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3 machines outside of a Slurm job"):
        allocation(config("cluster.nodes=2", "cluster.engine_nodes=1"), {})


def test_a_step_of_ranks() -> None:
    assert step_command(NODES[:2], 4, ["python", "-m", "x"], Path("/run/logs/rank%t.log"), {}) == [
        "srun", "--overlap", "--cpu-bind=none", "--mpi=none", "--export=ALL", "--input=none", "--distribution=block",
        "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--nodelist=n1,n2",
        "--output=/run/logs/rank%t.log", "--open-mode=append", "python", "-m", "x",
    ]  # fmt: skip


def test_a_site_has_its_words_for_srun_and_before_each_command() -> None:
    site = {
        "MEGATRON_DPPO_SRUN": "--container-image='/images/a b.sqsh' --container-mounts=/shared:/shared",
        "MEGATRON_DPPO_STEP": "apptainer exec --nv image.sif",
        "MEGATRON_DPPO_STEP_PYTHON": "python3",
    }
    words = step_command(NODES[:1], 1, [python(site), "-m", "x"], environ=site)
    assert words[-9:] == [
        "--container-image=/images/a b.sqsh", "--container-mounts=/shared:/shared",
        "apptainer", "exec", "--nv", "image.sif", "python3", "-m", "x",
    ]  # fmt: skip
    assert python({}) == sys.executable


def test_the_log_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    log = tmp_path / "ranks.log"
    assert failed_rank_log(log, FAILED_TASK) is None
    log.write_text(ENDED)
    assert failed_rank_log(log, FAILED_TASK) is None
    log.write_text(FAILED)
    assert failed_rank_log(log, FAILED_TASK) == tmp_path / "rank1.log"
    log.write_text("srun: error: n2: tasks 4-7: Killed\n")
    assert failed_rank_log(log, FAILED_TASK) == tmp_path / "rank4.log"
    of_an_earlier_start = log.stat().st_size
    assert failed_rank_log(log, FAILED_TASK, of_an_earlier_start) is None
    log.write_text(log.read_text() + "srun: error: n2: task 7: Exited with exit code 1\n")
    assert failed_rank_log(log, FAILED_TASK, of_an_earlier_start) == tmp_path / "rank7.log"
