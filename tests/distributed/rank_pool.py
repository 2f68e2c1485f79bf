"""Real processes over gloo for tests, used by many: forked from one that has imported torch and Megatron, which takes
seconds.

A job is a module-level function `job(parallel, *args)`; it runs on every rank with the process groups of
`parallel` set up, and what it returns comes back, one a rank. Tensors travel as numpy.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import psutil

from megatron_dppo.job.processes import free_port
from megatron_dppo.weights.layout import Parallel

TIMEOUT_S = 240.0
PRELOADED = "tests.distributed.jobs"


class RankPool:
    """Up to `size` ranks; `run` uses the first `parallel.ranks` of them."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        self.jobs_done = 0
        self._pipes, self._processes = [], []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,))  # not a daemon: Megatron's save starts processes
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

        atexit.register(self.close)  # or an unclosed pool would keep the interpreter waiting for its ranks

    def run(self, job: Callable[..., Any], parallel: Parallel, *args: Any) -> list[Any]:
        """Results of all ranks; an error on any rank is raised here with its traceback."""
        self.jobs_done += 1
        port = free_port()
        pipes = self._pipes[: parallel.ranks]
        for rank, pipe in enumerate(pipes):
            pipe.send((job, parallel, rank, port, args))
        answers: dict[int, Any] = {}
        while len(answers) < len(pipes):
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in answers], TIMEOUT_S)
            if not ready:
                self.close()
                raise TimeoutError(f"ranks of {job.__name__} gave no answer in {TIMEOUT_S} s")
            for pipe in ready:
                rank = pipes.index(pipe)
                error, answers[rank] = pipe.recv()
                if error:
                    self.close()  # the other ranks may be waiting for this one in a collective
                    raise RuntimeError(f"rank {rank} of {job.__name__}:\n{error}")
        return [answers[rank] for rank in range(len(pipes))]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """Ranks end when their pipes do; what has not ended then is killed, with what it started."""
        descendants = [child for p in self._processes if p.pid and p.is_alive() for child in _children(p.pid)]
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=2.0)
            process.kill()
            process.join()
        for child in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _serve(pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job, parallel, rank, port, args = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(job, parallel, rank, port, args))


def _answer(job: Callable, parallel: Parallel, rank: int, port: int, args: tuple) -> tuple[str | None, Any]:
    from megatron_dppo.backend.parallel import finalise_parallel, initialise_parallel

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(parallel.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        result = job(initialise_parallel(parallel, seed=1, timeout_s=60.0), *args)
        finalise_parallel()
        return None, result
    except Exception:
        return traceback.format_exc(), None
