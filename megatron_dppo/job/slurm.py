"""The nodes of a Slurm allocation, where the batch step runs the launcher: its processes are steps, started by srun.

Each srun is a child like any other (`job/processes.py`): when it is ended, Slurm ends its step, on whatever nodes that
runs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_dppo.config import Config
from megatron_dppo.job.machines import job_environment
from megatron_dppo.job.nodes import NAMES_VARIABLE, Node, Nodes, culprit_in, divided, python
from megatron_dppo.job.places import JOB_VARIABLE, SRUN_VARIABLE, STEP_VARIABLE
from megatron_dppo.job.processes import STOP_THERE, Child, start

NODES_VARIABLE = "SLURM_JOB_NODELIST"
HERE_VARIABLE = "SLURMD_NODENAME"

# Steps share their nodes with each other and with the batch step; whoever needs cores of its own binds them itself.
SRUN = (
    "srun", "--overlap", "--cpu-bind=none", "--mpi=none", "--export=ALL", "--input=none", "--distribution=block",
    "--kill-on-bad-exit=1",
)  # fmt: skip
RANK_SHELL = 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"'
# The first that srun names: it ends the others for it.
FAILED_TASK = re.compile(r"^srun: error: \S+: tasks? (\d+)", re.MULTILINE)


class Allocation(Nodes):
    """Nodes of a Slurm allocation."""

    def start_on(self, node: Node, name: str, argv: Sequence[str], *, env: Mapping[str, str], log: Path) -> Child:
        """One step of one task."""
        return start(name, step_command([node], 1, argv), env=env, log_path=log, stop_signal=STOP_THERE)

    def start_ranks(
        self, module: str, config: Config, resolved: Path, *, env: Mapping[str, str], logs: Path
    ) -> Iterator[Child]:
        """One step for all of them, with a log for each."""
        ranks = config.parallel.ranks
        argv = ["sh", "-c", RANK_SHELL, "sh", python(env), "-m", module, str(resolved)]
        log = logs.absolute() / "rank%t.log"
        argv = step_command(self.trainers, ranks // len(self.trainers), argv, log)
        environment = {**env, **job_environment(ranks, self.trainers[0].address, env)}
        said = logs / "ranks.log"
        culprit = culprit_in(said, FAILED_TASK)
        yield start("ranks", argv, env=environment, log_path=said, stop_signal=STOP_THERE, culprit=culprit)


def allocation(config: Config, environ: Mapping[str, str] = os.environ) -> Allocation:
    """The allocation that the environment tells of.

    Raises ValueError where there is none, or one of too few nodes, or this is not its first.
    """
    node_list = environ.get(NODES_VARIABLE)
    if JOB_VARIABLE not in environ or node_list is None:
        raise ValueError(
            f"cluster: got {config.cluster.machines} machines outside of a Slurm job, expected to be in one: start it "
            f"by `megatron-dppo launch slurm`, or name the nodes in {NAMES_VARIABLE}"
        )
    names = _scontrol("show", "hostnames", node_list).split()
    if (here := environ.get(HERE_VARIABLE)) != names[0]:
        raise ValueError(
            f"cluster: got {here or 'no node of the job'} as the launcher's, expected its first, {names[0]}"
        )
    return Allocation(*divided(config, nodes_of(names, _scontrol("-o", "show", "node", node_list))))


def nodes_of(names: Sequence[str], description: str) -> list[Node]:
    """`names` with the addresses that `scontrol -o show node` gives them."""
    lines = (dict(word.partition("=")[::2] for word in line.split()) for line in description.splitlines())
    addresses = {line["NodeName"]: line["NodeAddr"] for line in lines if "NodeAddr" in line}
    return [Node(name, addresses.get(name, name)) for name in names]


def step_command(
    nodes: Sequence[Node],
    tasks_per_node: int,
    argv: Sequence[str],
    output: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """srun's command line of a step. `output`: with %t, a file for each task; srun's own output by default."""
    words = [
        *SRUN,
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes) * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--nodelist={','.join(node.name for node in nodes)}",
        *([f"--output={output}", "--open-mode=append"] if output else []),
        *shlex.split(environ.get(SRUN_VARIABLE, "")),
    ]
    return [*words, *shlex.split(environ.get(STEP_VARIABLE, "")), *argv]


def _scontrol(*words: str) -> str:
    try:
        found = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("scontrol: not found, expected Slurm's commands on the PATH of the batch step") from None
    if found.returncode:
        raise RuntimeError(f"scontrol {' '.join(words)}: {found.stderr.strip()}")
    return found.stdout
