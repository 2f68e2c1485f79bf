"""The nodes of a Slurm allocation, where the batch step runs the launcher: its processes are steps, started by srun.

The first `cluster.nodes` nodes have the trainer's ranks, the next `cluster.engine_nodes` the engines. Each srun is a
child like any other (`processes.py`): when it is ended, Slurm ends its step, on whatever nodes that runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_dppo.config import Config
from megatron_dppo.control import Control, engine_url_key
from megatron_dppo.machines import Engine, engine_name, job_environment
from megatron_dppo.processes import Child, start

JOB_VARIABLE, NODES_VARIABLE = "SLURM_JOB_ID", "SLURM_JOB_NODELIST"
# A site's, in the environment of the batch script:
SRUN_VARIABLE = "MEGATRON_DPPO_SRUN"  # words for srun, such as a container's options
STEP_VARIABLE = "MEGATRON_DPPO_STEP"  # words before the command of every step, such as `apptainer exec --nv IMAGE`
PYTHON_VARIABLE = "MEGATRON_DPPO_STEP_PYTHON"  # in those steps; the launcher's own if not set

# Steps share their nodes with each other and with the batch step; whoever needs cores of its own binds them itself.
SRUN = (
    "srun", "--overlap", "--cpu-bind=none", "--mpi=none", "--export=ALL", "--input=none", "--distribution=block",
    "--kill-on-bad-exit=1",
)  # fmt: skip
RANK_SHELL = 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"'
FAILED_TASK = re.compile(r"^srun: error: \S+: tasks? (\d+)", re.MULTILINE)
SHARED = "shared"  # in a run's directory


@dataclass(frozen=True)
class Node:
    """A node's name in Slurm, and the address at which others reach it."""

    name: str
    address: str


@dataclass(frozen=True)
class Seat:
    """Where one engine runs. `first_gpu`: of those of its node."""

    node: Node
    first_gpu: int


@dataclass(frozen=True)
class Allocation:
    """The machines of a job in a Slurm allocation."""

    trainers: tuple[Node, ...]
    engines: tuple[Node, ...]  # the trainers where engines have no nodes of their own

    def host(self, config: Config) -> str:
        """The batch step's node is the first."""
        return self.trainers[0].address

    @contextlib.contextmanager
    def shared_directory(self, config: Config) -> Iterator[Path]:
        """In the run's directory, which all nodes see; of a job that was killed it may still be there."""
        path = (config.run.dir / SHARED).absolute()
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def start_engines(self, config: Config, resolved: Path, *, env: Mapping[str, str], logs: Path) -> Iterator[Engine]:
        """One step an engine, in which `rollout.node_engine` starts the server and tells where it answers."""
        for number, seat in enumerate(engine_seats(config, self.engines)):
            module = ["megatron_dppo.rollout.node_engine", str(resolved), str(number), seat.node.address]
            argv = step_command([seat.node], 1, [*python_words(), "-m", *module, str(seat.first_gpu)])
            name = engine_name(config, number)
            child = start(name, argv, env=env, log_path=logs / f"{name}.log")
            yield Engine(child, partial(_posted_url, number))

    def start_ranks(
        self, module: str, config: Config, resolved: Path, *, env: Mapping[str, str], logs: Path
    ) -> Iterator[Child]:
        """One step for all of them, with a log for each."""
        ranks = config.parallel.ranks
        argv = ["sh", "-c", RANK_SHELL, "sh", *python_words(), "-m", module, str(resolved)]
        log = logs.absolute() / "rank%t.log"
        argv = step_command(self.trainers, ranks // len(self.trainers), argv, log)
        environment = {**env, **job_environment(ranks, self.trainers[0].address, env)}
        yield start("ranks", argv, env=environment, log_path=logs / "ranks.log", culprit=failed_rank_log)


def _posted_url(number: int, control: Control) -> str | None:
    """What `rollout.node_engine` told."""
    found = control.peek(engine_url_key(number))
    return None if found is None else str(found["url"])


def allocation(config: Config, environ: Mapping[str, str] = os.environ) -> Allocation:
    """The allocation that the environment tells of. Raises ValueError where there is none, or one of too few nodes."""
    node_list = environ.get(NODES_VARIABLE)
    if JOB_VARIABLE not in environ or node_list is None:
        raise ValueError(
            f"cluster: got {config.cluster.machines} machines outside of a Slurm job, expected to be in one: start it "
            "by `megatron-dppo launch slurm`"
        )
    names = _scontrol("show", "hostnames", node_list).split()
    return divided(config, nodes_of(names, _scontrol("-o", "show", "node", node_list)))


def nodes_of(names: Sequence[str], description: str) -> list[Node]:
    """`names` with the addresses that `scontrol -o show node` gives them."""
    lines = (dict(word.partition("=")[::2] for word in line.split()) for line in description.splitlines())
    addresses = {line["NodeName"]: line["NodeAddr"] for line in lines if "NodeAddr" in line}
    return [Node(name, addresses.get(name, name)) for name in names]


def divided(config: Config, nodes: Sequence[Node]) -> Allocation:
    """Trainer nodes first, then engine nodes. Raises ValueError where there are too few."""
    cluster = config.cluster
    if len(nodes) < cluster.machines:
        raise ValueError(
            f"cluster: got an allocation of {len(nodes)} nodes, expected cluster.nodes + cluster.engine_nodes = "
            f"{cluster.machines}"
        )
    trainers = tuple(nodes[: cluster.nodes])
    return Allocation(trainers, tuple(nodes[cluster.nodes : cluster.machines]) or trainers)


def engine_seats(config: Config, nodes: Sequence[Node]) -> list[Seat]:
    """Engines go round the nodes; on each, one behind the other, after the ranks where they share it."""
    cluster, rollout = config.cluster, config.rollout
    before = 0 if cluster.engine_nodes else config.parallel.ranks // cluster.nodes
    return [
        Seat(nodes[number % len(nodes)], before + number // len(nodes) * rollout.tensor)
        for number in range(rollout.engines)
    ]


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


def python_words(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The interpreter in steps."""
    return [environ.get(PYTHON_VARIABLE) or sys.executable]


def failed_rank_log(srun_log: Path) -> Path | None:
    """The log of the rank that srun says failed first; srun ends the others for it."""
    found = FAILED_TASK.search(srun_log.read_text(errors="replace")) if srun_log.is_file() else None
    return srun_log.with_name(f"rank{found[1]}.log") if found else None


def _scontrol(*words: str) -> str:
    try:
        found = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("scontrol: not found, expected Slurm's commands on the PATH of the batch step") from None
    if found.returncode:
        raise RuntimeError(f"scontrol {' '.join(words)}: {found.stderr.strip()}")
    return found.stdout
