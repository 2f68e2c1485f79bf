"""Several nodes as the machines of a job: who runs where, whatever starts processes there.

The first `cluster.nodes` of them have the trainer's ranks, evenly, the next `cluster.engine_nodes` the engines. The
launcher and the rollout client run on the first. `job/slurm.py` has the nodes of an allocation; here are nodes that the
environment names, with a command that runs another one there (`launchers/local/over_ssh.sh`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_dppo.config import Config
from megatron_dppo.config.cluster_rules import startable
from megatron_dppo.control import Control, engine_url_key
from megatron_dppo.job.machines import Engine, engine_name, engine_place, job_environment
from megatron_dppo.job.processes import Child, start

PYTHON_VARIABLE = "MEGATRON_DPPO_STEP_PYTHON"  # the interpreter on the nodes; the launcher's own if not set
NAMES_VARIABLE = "MEGATRON_DPPO_NODES"  # without Slurm: addresses of the nodes, this one first
ON_VARIABLE = "MEGATRON_DPPO_ON"  # without Slurm: words to which a node and a command are added
# What a node gets of the launcher's environment where no scheduler carries all of it there.
CARRIED = (
    "MEGATRON_DPPO_", "NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_", "PYTHON", "HF_", "VLLM_", "SGLANG_", "MASTER_",
    "WORLD_SIZE", "RANK", "LOCAL_RANK",
)  # fmt: skip
SECRET = ("TOKEN", "_KEY", "SECRET", "PASSWORD")  # of a variable's name: command lines are seen by everybody on a node
SHARED = "shared"  # in a run's directory
RANK_SHELL = 'log=$1/rank$RANK.log; shift; exec "$@" >>"$log" 2>&1'
FAILED_RANK = re.compile(r"Root Cause.*?\brank +: (\d+)", re.DOTALL)


@dataclass(frozen=True)
class Node:
    """A node's name for whatever starts processes, and the address at which others reach it."""

    name: str
    address: str


@dataclass(frozen=True)
class Seat:
    """Where one engine runs. `first_gpu`: of those of its node; `shared`: with ranks."""

    node: Node
    first_gpu: int
    shared: bool = False


@dataclass(frozen=True)
class Nodes(ABC):
    """What jobs on several nodes have in common."""

    trainers: tuple[Node, ...]
    engines: tuple[Node, ...]  # the trainers where engines have no nodes of their own

    def host(self, config: Config) -> str:
        """The launcher's node is the first."""
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
        """On each node `rollout.node_engine` starts the server and tells where it answers."""
        for number, seat in enumerate(engine_seats(config, self.engines)):
            words = [
                str(resolved.absolute()),
                str(number),
                seat.node.address,
                str(seat.first_gpu),
                str(int(seat.shared)),
            ]
            argv = [python(env), "-m", "megatron_dppo.job.node_engine", *words]
            name = engine_name(config, number)
            child = self.start_on(seat.node, name, argv, env=env, log=logs / f"{name}.log")
            yield Engine(child, partial(_posted_url, number))

    @abstractmethod
    def start_on(self, node: Node, name: str, argv: Sequence[str], *, env: Mapping[str, str], log: Path) -> Child:
        """Starts one process on a node."""

    @abstractmethod
    def start_ranks(
        self, module: str, config: Config, resolved: Path, *, env: Mapping[str, str], logs: Path
    ) -> Iterator[Child]:
        """Starts `module` once a rank, with a log for each."""


class NamedNodes(Nodes):
    """Nodes that the environment names: a child for each process there."""

    def start_on(self, node: Node, name: str, argv: Sequence[str], *, env: Mapping[str, str], log: Path) -> Child:
        """By the command that the environment names."""
        return start(name, self._on(node, argv, env), env=env, log_path=log)

    def start_ranks(
        self, module: str, config: Config, resolved: Path, *, env: Mapping[str, str], logs: Path
    ) -> Iterator[Child]:
        """One torchrun on each node, and so one connection to it, with a log for each rank."""
        nodes, ranks = len(self.trainers), config.parallel.ranks
        environment = {**env, **job_environment(ranks, self.trainers[0].address, env)}
        for number, node in enumerate(self.trainers):
            rank = ["sh", "-c", RANK_SHELL, "sh", str(logs.absolute()), python(env), "-m", module]
            words = torchrun(python(env), nodes, ranks // nodes, number, environment)
            argv = self._on(node, [*words, *rank, str(resolved.absolute())], environment)
            name, log = f"ranks on {node.name}", logs / f"torchrun{number}.log"
            yield start(name, argv, env=environment, log_path=log, culprit=culprit_in(log, FAILED_RANK))

    def _on(self, node: Node, argv: Sequence[str], env: Mapping[str, str]) -> list[str]:
        """The command that runs `argv` on a node, in this working directory."""
        carried = [f"{key}={value}" for key, value in env.items() if is_carried(key)]
        return [*shlex.split(env[ON_VARIABLE]), node.name, "env", "-C", os.getcwd(), *carried, *argv]


def torchrun(python: str, nodes: int, on_each: int, number: int, job: Mapping[str, str]) -> list[str]:
    """torchrun's words for node `number`, before the command of a rank. `job`: of `job_environment`."""
    return [
        python, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={number}",
        f"--nproc-per-node={on_each}", f"--master-addr={job['MASTER_ADDR']}", f"--master-port={job['MASTER_PORT']}",
        "--max-restarts=0", "--no-python",
    ]  # fmt: skip


def culprit_in(log: Path, said: re.Pattern[str]) -> Callable[[Path], Path | None]:
    """For `processes.start`: finds the rank that failed first in what will be added to `log`. Earlier starts of the run
    wrote to it too."""
    return partial(failed_rank_log, said=said, offset=log.stat().st_size if log.is_file() else 0)


def failed_rank_log(log: Path, said: re.Pattern[str], offset: int = 0) -> Path | None:
    """The log of the first rank that `said` finds in `log`, after so many bytes."""
    found = said.search(log.read_bytes()[offset:].decode(errors="replace")) if log.is_file() else None
    return log.with_name(f"rank{found[1]}.log") if found else None


def named_nodes(config: Config, environ: Mapping[str, str] = os.environ) -> NamedNodes:
    """The nodes of NAMES_VARIABLE. Raises ValueError where there are too few, or no command to run things there."""
    if not environ.get(ON_VARIABLE):
        raise ValueError(f"{ON_VARIABLE}: missing, expected a command such as launchers/local/over_ssh.sh")
    names = environ[NAMES_VARIABLE].replace(",", " ").split()
    return NamedNodes(*divided(config, [Node(name, name.rpartition("@")[2]) for name in names]))


def divided(config: Config, nodes: Sequence[Node]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Trainer nodes, and engine nodes. Raises ValueError where there are too few."""
    cluster = config.cluster
    if len(nodes) < cluster.machines:
        raise ValueError(
            f"cluster: got {len(nodes)} nodes, expected cluster.nodes + cluster.engine_nodes = {cluster.machines}"
        )
    trainers = tuple(nodes[: cluster.nodes])
    return trainers, tuple(nodes[cluster.nodes : cluster.machines]) or trainers


def engine_seats(config: Config, nodes: Sequence[Node]) -> list[Seat]:
    """Engines go round the nodes; on each, one behind the other, after the ranks where they share it.

    Raises ValueError for engines that are larger than a node.
    """
    cluster, rollout = config.cluster, config.rollout
    for fault in startable(cluster, rollout):
        raise ValueError(fault)
    if cluster.machines == 1:
        return [Seat(nodes[0], *engine_place(config, number)) for number in range(rollout.engines)]
    before = 0 if cluster.engine_nodes else config.parallel.ranks // cluster.nodes
    return [
        Seat(nodes[number % len(nodes)], before + number // len(nodes) * rollout.tensor)
        for number in range(rollout.engines)
    ]


def is_carried(variable: str) -> bool:
    """Whether a node is given it on a command line."""
    return variable.startswith(CARRIED) and not any(word in variable for word in SECRET)


def python(environ: Mapping[str, str]) -> str:
    """The interpreter on the nodes."""
    return environ.get(PYTHON_VARIABLE) or sys.executable


def _posted_url(number: int, control: Control) -> str | None:
    """What `rollout.node_engine` told."""
    found = control.peek(engine_url_key(number))
    return None if found is None else str(found["url"])
