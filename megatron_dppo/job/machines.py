"""Where the processes of a job run. `launch.job` asks one of these to start them, and watches what it gets.

Here: what every kind of place has, and this machine. Nodes of a Slurm allocation are in `job/slurm.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_dppo.config import Config
from megatron_dppo.control import Control
from megatron_dppo.job.engine_server import server_of
from megatron_dppo.job.processes import Child, free_port, start
from megatron_dppo.placement import SHARED_GPU_MEMORY, engine_place, is_local, runs_on_cpu

HOST = "127.0.0.1"
SHARED_MEMORY, SHARED_PREFIX = Path("/dev/shm"), "megatron_dppo-"
HOLD = ".held"  # in a shared directory, locked by its launcher
NEW_S = 60.0  # within which a shared directory is not taken for an abandoned one


@dataclass(frozen=True)
class Engine:
    """A server that starts. `url` tells where it will answer; None while only its node knows."""

    child: Child
    url: Callable[[Control], str | None]


class Machines(Protocol):
    """Where a job's processes run, the launcher and the rollout client apart: they are on the first."""

    def host(self, config: Config) -> str:
        """Where all processes of the job reach the launcher."""
        ...

    def shared_directory(self, config: Config) -> AbstractContextManager[Path]:
        """A directory of the job's own that ranks and client see; it is removed at the end."""
        ...

    def start_engines(self, config: Config, resolved: Path, *, env: Mapping[str, str], logs: Path) -> Iterator[Engine]:
        """Starts the config's engines as the iterator is read, so that the caller knows each as soon as it runs."""
        ...

    def start_ranks(
        self, module: str, config: Config, resolved: Path, *, env: Mapping[str, str], logs: Path
    ) -> Iterator[Child]:
        """Starts `module` once a rank, as torchrun would: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and so on."""
        ...


class ThisMachine:
    """All processes are children of the launcher."""

    def host(self, config: Config) -> str:
        """This machine's name only where engines are elsewhere."""
        return HOST if all(map(is_local, config.rollout.urls)) else socket.gethostname()

    def shared_directory(self, config: Config) -> AbstractContextManager[Path]:
        """In shared memory."""
        return shared_directory(config.run.name)

    def start_engines(self, config: Config, resolved: Path, *, env: Mapping[str, str], logs: Path) -> Iterator[Engine]:
        """On GPUs that no rank and no engine before has; where there are too few, each engine shares others'."""
        for number in range(config.rollout.engines):
            yield _start_engine(config, number, logs)

    def start_ranks(
        self, module: str, config: Config, resolved: Path, *, env: Mapping[str, str], logs: Path
    ) -> Iterator[Child]:
        """One child a rank."""
        return start_ranks([sys.executable, "-m", module, str(resolved)], config.parallel.ranks, env=env, logs=logs)


def visible_gpus(first: int, count: int) -> str:
    """CUDA_VISIBLE_DEVICES of a process that gets `count` of the GPUs that this one sees, in a circle from `first`."""
    import torch

    gpus = [(first + i) % torch.cuda.device_count() for i in range(count)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ",".join(visible.split(",")[gpu] if visible else str(gpu) for gpu in gpus)


def engine_name(config: Config, number: int) -> str:
    """Of its process and its log."""
    return "engine" if config.rollout.engines == 1 else f"engine{number}"


def _start_engine(config: Config, number: int, logs: Path) -> Engine:
    port, cpu = free_port(), runs_on_cpu(config.rollout.engine)
    first, shared = engine_place(config, number)
    argv, env = server_of(config, port=port, cpu=cpu, gpu_memory_utilization=SHARED_GPU_MEMORY if shared else None)
    if not cpu:
        env["CUDA_VISIBLE_DEVICES"] = visible_gpus(first, config.rollout.tensor)
    name, url = engine_name(config, number), f"http://{HOST}:{port}"
    return Engine(start(name, argv, env=env, log_path=logs / f"{name}.log"), lambda control: url)


def job_environment(ranks: int, host: str, env: Mapping[str, str]) -> dict[str, str]:
    """What all ranks of a job find in their environment. `host`: where rank 0 runs; the caller runs there too."""
    return {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron needs it for sequence parallelism on GPUs before Blackwell
    }


def start_ranks(argv: Sequence[str], ranks: int, *, env: Mapping[str, str], logs: Path) -> Iterator[Child]:
    """Starts `argv` once a rank, as torchrun would on one machine: RANK, WORLD_SIZE, MASTER_ADDR and so on.

    One after the other as the iterator is read, so that the caller knows each as soon as it runs.
    """
    job = job_environment(ranks, HOST, env)
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        yield start(f"rank {rank}", argv, env={**env, **job, **place}, log_path=logs / f"rank{rank}.log")


@contextlib.contextmanager
def shared_directory(name: str) -> Iterator[Path]:
    """A directory in shared memory that is removed at the end, or by the next job where this process was killed."""
    root = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    _remove_abandoned(root)
    path = Path(tempfile.mkdtemp(prefix=f"{SHARED_PREFIX}{name}-", dir=root))
    (path / HOLD).touch()
    lock = _locked(path / HOLD)  # held as long as this process lives
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_abandoned(root: Path) -> None:
    """What launchers left that were killed: directories that nobody holds. A new one may not be held yet."""
    for hold in root.glob(f"{SHARED_PREFIX}*/{HOLD}"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if time.time() - hold.stat().st_mtime > NEW_S and (lock := _locked(hold)) is not None:
                shutil.rmtree(hold.parent, ignore_errors=True)
                os.close(lock)


def _locked(file: Path) -> int | None:
    """A descriptor that holds the file; None where another process does, or its file system has no locks."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
