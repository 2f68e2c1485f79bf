"""A real Slurm of four nodes on this machine, in a directory of its own, on ports that are free.

Its daemons run in the foreground under guards (`job/processes.py`), so that each is ended with all that it started.
What runs on a node are descendants of its slurmd's guard: a node is killed by killing those.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dppo.job.processes import Child, free_port, start, stop_on_exit

NODES = ("n1", "n2", "n3", "n4")
CPUS = 4  # of each node; what is there is shared by all
READY_S = 180.0

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
SlurmdTimeout=10
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire is also how long a requeued job waits before it starts again; SlurmdTimeout, until Slurm gives up a node.
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000 State=UNKNOWN\n"


@dataclass(frozen=True)
class Cluster:
    """The running daemons, and Slurm's commands."""

    directory: Path
    slurmd: dict[str, Child]
    start: Callable[..., Child]  # of a daemon, which ends with the cluster

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever calls Slurm's commands."""
        return {**os.environ, "SLURM_CONF": str(self.directory / "slurm.conf")}

    def run(self, *argv: str) -> str:
        """The output of one of Slurm's commands."""
        found = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)
        assert found.returncode == 0, f"{' '.join(argv)}: {found.stderr}"
        return found.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, what: Callable[[], bool], seconds: float, described: Callable[[], str]) -> None:
        """Until `what`; fails with what `described` says."""
        give_up = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < give_up, f"waited {seconds:.0f} s: {described()}"
            time.sleep(0.3)

    def processes(self) -> list[int]:
        """All that jobs run on nodes: what the daemons started, but for Slurm's own."""
        pids = [pid for slurmd in self.slurmd.values() for pid in descendants(slurmd.pid)]
        return [pid for pid in pids if _name(pid) not in ("", "slurmd", "slurmstepd")]

    def kill_node(self, name: str) -> None:
        """As when its machine loses power: nothing on it runs on, and nobody is told."""
        for pid in descendants(self.slurmd[name].pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """A node's daemon, for the first time or again."""
        self.slurmd[name] = self.start(name, "slurmd", "-D", "-N", name)

    def wait_until_idle(self) -> None:
        """All nodes are there and have nothing to do."""

        def idle() -> bool:
            argv = ["sinfo", "-h", "-o", "%D %t"]
            found = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)
            return found.stdout.strip() == f"{len(NODES)} idle"

        self.wait(idle, READY_S, lambda: (self.directory / "slurmctld.log").read_text()[-2000:])


def _name(pid: int) -> str:
    """Of a process; nothing if it has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Of a process, whatever their group or session."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                found += [child, *descendants(child)]
    return found


@contextlib.contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    """Up with all nodes idle; its daemons, and all that they started, end with the block."""
    host = socket.gethostname()
    conf = CONF.format(host=host, directory=directory, port=free_port())
    conf += "".join(NODE.format(name=name, host=host, port=free_port(), cpus=CPUS) for name in NODES)
    (directory / "slurm.conf").write_text(conf)
    for name in ("state", "munge"):
        (directory / name).mkdir(mode=0o700)
    key = directory / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    env = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    munge = [f"--{name}={directory}/munge/{name.partition('-')[0]}" for name in ("key-file", "socket", "pid-file")]
    munge += [f"--log-file={directory}/munge/log", f"--seed-file={directory}/munge/seed"]
    with stop_on_exit() as children:

        def run(name: str, *argv: str) -> Child:
            children.append(start(name, argv, env=env, log_path=directory / f"{name}.log"))
            return children[-1]

        run("munged", "munged", "--foreground", "--force", *munge)
        cluster = Cluster(directory, {}, run)
        cluster.wait((directory / "munge" / "socket").exists, READY_S, lambda: children[0].log_tail())
        run("slurmctld", "slurmctld", "-D", "-c")
        for name in NODES:
            cluster.start_node(name)
        cluster.wait_until_idle()
        yield cluster
