"""What the batch scripts make of a run's end, with programs in the places of the run and of Slurm's that say what they
were asked; tests/slurm has the real ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_dppo.job.submit import LAUNCHERS

# Says its arguments; ends with CODE, or, where that is "signal", with 75 once SIGUSR1 comes, after a while.
RUN = """#!/usr/bin/env bash
echo "run: ${*:3}${MEGATRON_DPPO_RESTARTED:+ (again)}${MEGATRON_DPPO_NODES:-}"
[ "$CODE" = signal ] || exit "$CODE"
trap 'sleep 0.3; echo "saved"; exit 75' USR1
echo ready
for _ in {1..400}; do sleep 0.05; done
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol: $*"\nexit 1\n'  # a cluster that does not requeue
SINFO = '#!/usr/bin/env bash\necho "${NODES:-n1 allocated}"\n'


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, text in (("python", RUN), ("scontrol", SCONTROL), ("sinfo", SINFO)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MEGATRON_DPPO_LAUNCHERS": str(LAUNCHERS),
        "MEGATRON_DPPO_PYTHON": str(tmp_path / "python"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-3]",
    }


def batch(environment: dict[str, str], script: str = "train", **more: str) -> subprocess.Popen[str]:
    argv = ["bash", str(LAUNCHERS / "slurm" / f"{script}.sbatch"), "recipe.yaml", "a.b=[1, 2]"]
    return subprocess.Popen(argv, env={**environment, **more}, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_run_that_ended_ends_the_job_with_its_code(environment: dict[str, str], code: int) -> None:
    job = batch(environment, CODE=str(code))
    output, _ = job.communicate(timeout=20)
    assert job.returncode == code
    assert "run: train recipe.yaml a.b=[1, 2]\n" in output
    assert "again" not in output and "scontrol" not in output


def test_a_later_start_goes_on(environment: dict[str, str]) -> None:
    output, _ = batch(environment, CODE="0", SLURM_RESTART_COUNT="2").communicate(timeout=20)
    assert "train recipe.yaml a.b=[1, 2] (again)\n" in output and "start 3" in output


@pytest.mark.parametrize("nodes", ["n1 allocated*", "n1 allocated\nn2 down"])
def test_a_run_that_failed_with_a_node_goes_back_into_the_queue(environment: dict[str, str], nodes: str) -> None:
    output, _ = batch(environment, CODE="1", NODES=nodes).communicate(timeout=20)
    assert nodes.splitlines()[-1] in output and "scontrol: requeue 7\n" in output


def test_nodes_of_the_way_without_slurm_are_not_taken(environment: dict[str, str]) -> None:
    output, _ = batch(environment, CODE="0", MEGATRON_DPPO_NODES="old1 old2").communicate(timeout=20)
    assert "old1" not in output


def test_a_site_may_read_variables_that_are_not_there(environment: dict[str, str], tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text('site_setup() { echo "prompt: $NOT_SET_ANYWHERE"; }\n')
    output, _ = batch(environment, CODE="0", MEGATRON_DPPO_SITE=str(site)).communicate(timeout=20)
    assert output.startswith("prompt: \n") and "run: " in output


def test_the_signal_reaches_the_run_and_the_job_is_requeued_after_it(environment: dict[str, str]) -> None:
    job = batch(environment, CODE="signal")
    assert job.stdout is not None
    while job.stdout.readline() != "ready\n":
        pass
    time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=20)
    assert output.startswith("saved\n") and "scontrol: requeue 7\n" in output
    assert job.returncode == 75  # what is left where Slurm refused


def test_site_setup_is_run_and_its_failure_is_the_jobs(environment: dict[str, str], tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text('site_setup() { echo "setup"; }\n')
    output, _ = batch(environment, CODE="0", MEGATRON_DPPO_SITE=str(site)).communicate(timeout=20)
    assert output.startswith("setup\n") and "run: " in output
    site.write_text("site_setup() { false; }\n")
    job = batch(environment, CODE="0", MEGATRON_DPPO_SITE=str(site))
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 1 and "run: " not in output


@pytest.mark.parametrize("script", ["evaluate", "convert"])
def test_other_scripts_pass_their_arguments_on(environment: dict[str, str], script: str) -> None:
    output, _ = batch(environment, script, CODE="0").communicate(timeout=20)
    assert output == f"run: {script} recipe.yaml a.b=[1, 2]\n"
