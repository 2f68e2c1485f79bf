"""One job: starts engines, rollout client and trainer ranks, watches them, and ends them all.

Whatever way the job ends (done, a process that died, Ctrl-C, SIGTERM) nothing it started is left running and its
shared memory is given back. Where they run is for `job/machines.py` to know.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_dppo.architecture import load_architecture
from megatron_dppo.checkpoints import DIRECTORY, check_resumable, complete_checkpoints, read_state, start_of
from megatron_dppo.config import Config, objective_of
from megatron_dppo.config.loading import save_config
from megatron_dppo.control import (
    BACKEND_KEY,
    CONTROL_VARIABLE,
    ENGINE_URLS_VARIABLE,
    READY_KEY,
    SHARED_VARIABLE,
    STOP_KEY,
    STOPPED_KEY,
    Control,
)
from megatron_dppo.job.engine_server import wait_ready
from megatron_dppo.job.machines import Engine, Machines, ThisMachine
from megatron_dppo.job.nodes import NAMES_VARIABLE, named_nodes
from megatron_dppo.job.places import JOB_VARIABLE, RESTARTED_VARIABLE, elsewhere
from megatron_dppo.job.processes import Child, noted, start, stop_on_exit, supervise
from megatron_dppo.job.slurm import allocation
from megatron_dppo.metrics import (
    METRICS,
    Progress,
    evaluation_of,
    keep_records_before,
    plot_learning_curve,
    read_metrics,
    write_summary,
)
from megatron_dppo.placement import engines_apart, runs_on_cpu, transport_of
from megatron_dppo.rollout.engine import EngineUnreachable

ADDRESS_POLL_S = 0.2
OUTPUTS = (
    "resolved.yaml", "logs", METRICS, "tensorboard", "summary.json", "learning_curve.png", "model", DIRECTORY,
)  # fmt: skip


def launch(config: Config) -> bool:
    """Runs the job to its end and writes its summary. True where it was asked to stop before that.

    SIGUSR1 asks: the step under way is done, a checkpoint is saved, and `resume=auto` goes on from there. Without
    checkpoints (`checkpoint.every` 0) the signal ends the process, as ever.

    Raises RuntimeError when another run writes to the same directory, ChildDied with the last lines of its log when a
    process dies, EngineUnreachable when the engine does not get ready, KeyboardInterrupt on Ctrl-C or SIGTERM.
    """
    with run_lock(config.run.dir):
        config = with_checkpoint(config)
        own = (config.run.dir / DIRECTORY).resolve()
        if config.resume != "never" and Path(config.resume).resolve().is_relative_to(own):
            _go_back(config.run.dir, start_of(config.resume))
        else:
            set_aside(config.run.dir, [config.run.dir / name for name in OUTPUTS])
        return _run(config)


def _go_back(run_dir: Path, step: int) -> None:
    """Leaves of an earlier run what was there after `step`; what it did later is set aside, or will be done again."""
    later = [path for path in complete_checkpoints(run_dir) if read_state(path).step > step]
    set_aside(run_dir, later)
    if (run_dir / METRICS).is_file():
        keep_records_before(run_dir / METRICS, step)


def with_checkpoint(config: Config) -> Config:
    """The config with `resume` decided: a checkpoint's path, or "never". Raises ValueError where it cannot go on."""
    found = config.resume
    if found == "auto" or os.environ.get(RESTARTED_VARIABLE):
        complete = complete_checkpoints(config.run.dir)
        begin = "never" if found == "auto" else found  # a later start without a checkpoint does what the first one did
        found = complete[-1] if complete else begin
    if found != "never":
        state = read_state(Path(found))
        if state.step > config.training.steps:
            raise ValueError(
                f"resume: got a checkpoint of step {state.step}, expected at most training.steps, "
                f"{config.training.steps}"
            )
        check_resumable(
            state,
            model_type=load_architecture(config.model.path).model_type,
            dtype=config.model.dtype,
            distributed_optimizer=config.parallel.distributed_optimizer,
            seed=config.run.seed,
        )
    return config.model_copy(update={"resume": found})


def _run(config: Config) -> bool:
    started = time.time()
    console = Console()
    metrics = config.run.dir / METRICS
    with (
        _stop_requests(config) as asked,
        job(config, console, ranks="megatron_dppo.trainer", client="megatron_dppo.rollout.client") as running,
    ):
        control, progress, unsaid = running.control, Progress(metrics, console), [BACKEND_KEY, READY_KEY]

        def watch() -> None:
            for key in list(unsaid):
                if (message := control.peek(key)) is not None:
                    unsaid.remove(key)
                    for line in _introduction(message):
                        console.print(line, highlight=False, soft_wrap=True)
            if asked and control.peek(STOP_KEY) is None:
                control.post(STOP_KEY, {})
                console.print("asked to stop: a checkpoint after the step under way, then the end", highlight=False)
            progress()

        supervise(running.children, until=running.until, watch=watch)
        watch()
        if (stopped := control.peek(STOPPED_KEY)) is not None:
            console.print(f"stopped after step {stopped['steps']}: resume=auto goes on from there", highlight=False)
            return True
        engines = control.wait(READY_KEY, timeout_s=1.0)["engines"]
    _finish(config, engines, time.time() - started, console)
    return False


def _stop_requests(config: Config) -> contextlib.AbstractContextManager[list[int]]:
    """Signals that ask the run to stop early, as they come; none where it could not go on."""
    return noted(signal.SIGUSR1) if config.checkpoint.every else contextlib.nullcontext([])


@dataclass(frozen=True)
class Job:
    """Processes that run; all of `children` must live until those of `until` have ended."""

    control: Control
    children: list[Child]
    until: list[Child]


@contextlib.contextmanager
def job(config: Config, console: Console, *, ranks: str | None, client: str) -> Iterator[Job]:
    """Starts engines, ranks and, once the engines answer, the client; ends what is left of them with the block.

    `ranks`, `client`: the modules that they run, with the resolved config's path. No ranks: engines have all GPUs.
    """
    config = with_transport(config)
    machines = machines_of(config)
    logs, resolved = config.run.dir / "logs", config.run.dir / "resolved.yaml"
    save_config(config, resolved)
    if ranks is None:
        config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ranks": 0})})
    with machines.shared_directory(config) as shared, stop_on_exit() as children:  # memory goes after its writers
        control = Control.serve(machines.host(config))
        env = {**os.environ, CONTROL_VARIABLE: control.address, SHARED_VARIABLE: str(shared)}
        engines: list[Engine] = []
        if not config.rollout.urls:
            for engine in machines.start_engines(config, resolved, env=env, logs=logs):
                engines.append(engine)
                children.append(engine.child)
        if ranks is not None:
            children.extend(machines.start_ranks(ranks, config, resolved, env=env, logs=logs))
        started = children[len(engines) :]
        timeout_s = config.rollout.start_timeout_s
        urls = [*config.rollout.urls, *(_url_of(engine, control, timeout_s, children) for engine in engines)]
        console.print(
            f"{config.run.name}: {config.parallel.ranks} ranks, engine {', '.join(urls)}, weights by "
            f"{config.sync.transport}; logs in {logs}",
            highlight=False,
            soft_wrap=True,
        )
        for url, engine in zip(urls, engines, strict=False):
            wait_ready(url, engine.child, timeout_s, children)
        argv = [sys.executable, "-m", client, str(resolved)]
        env[ENGINE_URLS_VARIABLE] = ",".join(urls)
        children.append(start("rollout client", argv, env=env, log_path=logs / "client.log"))
        yield Job(control, children, [children[-1], *started])


def machines_of(config: Config) -> Machines:
    """Where the job runs.

    Raises ValueError where this machine lacks the GPUs that the config names, or the environment the nodes.
    """
    cluster, ranks = config.cluster, config.parallel.ranks
    if elsewhere(cluster):
        in_slurm = JOB_VARIABLE in os.environ  # which a user's variables of another day do not overrule
        return named_nodes(config) if os.environ.get(NAMES_VARIABLE) and not in_slurm else allocation(config)
    import torch

    gpus = torch.cuda.device_count()
    if cluster.device not in ("auto", "cpu"):
        if gpus < ranks:
            raise ValueError(
                f"cluster.device: got {cluster.device}, expected auto or cpu: here are {gpus} GPUs for {ranks} ranks"
            )
        if gpus < cluster.devices_per_node:
            raise ValueError(
                f"cluster.devices_per_node: got {cluster.devices_per_node}, expected at most the {gpus} GPUs that are "
                "here"
            )
    return ThisMachine()


def _url_of(engine: Engine, control: Control, deadline_s: float, others: Sequence[Child]) -> str:
    """Where an engine will answer, once its node has said so. Raises what `wait_ready` does."""
    give_up = time.monotonic() + deadline_s
    while (url := engine.url(control)) is None:
        for child in others:
            if child.poll() is not None:
                raise child.died()
        if time.monotonic() > give_up:
            raise EngineUnreachable(
                engine.child.name, f"its node did not say where after {deadline_s:.0f} s; {engine.child.log_path} may"
            )
        time.sleep(ADDRESS_POLL_S)
    return url


def _introduction(message: Mapping[str, Any]) -> list[str]:
    """What trainer and client say of themselves, in lines for the terminal."""
    if "text" in message:
        return [f"trainer: {message['text']}"]
    return [f"{path}: {prompts}" for path, prompts in message["prompts"].items()]


def with_transport(config: Config) -> Config:
    """The config with sync.transport decided. Raises ValueError where it cannot be what was asked for."""
    sync = config.sync
    on_gpus = elsewhere(config.cluster) or not runs_on_cpu(config.rollout.engine)
    if sync.transport == "ipc" and on_gpus and not config.rollout.urls and engines_apart(config):
        raise ValueError("sync.transport: got ipc, expected group: the engines have GPUs that no rank sees")
    chosen = transport_of(config, engines_on_gpus=on_gpus)
    return config.model_copy(update={"sync": sync.model_copy(update={"transport": chosen})})


@contextlib.contextmanager
def run_directory(path: Path) -> Iterator[None]:
    """Locks a run's directory, and moves what an earlier run left there to `previous-<n>`: nothing is overwritten."""
    with run_lock(path):
        set_aside(path, [path / name for name in OUTPUTS])
        yield


@contextlib.contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Raises RuntimeError where another run has the directory, or it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / "lock").open("w")
    except OSError as error:
        raise RuntimeError(f"run.dir: got {path}, expected a directory to write to: {error}") from None
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"run.dir: another run writes to {path}; wait for it, or set run.dir or run.name"
            ) from None
        except OSError as error:
            raise RuntimeError(
                f"run.dir: {path}/lock cannot be locked ({error.strerror}); mount its file system with locks (Lustre: "
                "-o flock), or set run.dir to another"
            ) from None
        yield


def set_aside(run_dir: Path, outputs: Sequence[Path]) -> None:
    """Moves what is there of `outputs` into a new `previous-<n>`."""
    left = [path for path in outputs if path.exists()]
    if left:
        previous = next(p for n in itertools.count(1) if not (p := run_dir / f"previous-{n}").exists())
        for output in left:
            place = previous / output.relative_to(run_dir)
            place.parent.mkdir(parents=True, exist_ok=True)
            output.rename(place)


def _step_seconds(trained: list[dict[str, Any]]) -> float:
    """Mean seconds of a step, evaluation left out; the first, which waits for the engine's start, only if alone."""
    if not trained:
        return 0.0
    steps = trained[1:] or trained
    return sum(step["seconds/total"] - step.get("seconds/evaluate", 0.0) for step in steps) / len(steps)


def _finish(config: Config, engines: list[dict[str, Any]], seconds: float, console: Console) -> None:
    """Summary and learning curve from the run's metrics."""
    run_dir = config.run.dir
    records = read_metrics(run_dir / METRICS)
    trained = [record for record in records if "loss" in record]
    evaluated = [found for record in records if (found := evaluation_of(record))]

    def accuracy(position: int, kind: str) -> float | None:
        return evaluated[position].get(f"eval/accuracy_{kind}") if evaluated else None

    def mean(name: str) -> float:
        return sum(record[name] for record in trained) / max(len(trained), 1)

    summary = {
        "accuracy_before": accuracy(0, "greedy"),
        "accuracy_after": accuracy(-1, "greedy"),
        "accuracy_before_sampled": accuracy(0, "sampled"),
        "accuracy_after_sampled": accuracy(-1, "sampled"),
        "evaluation_before": evaluated[0] if evaluated else None,
        "evaluation_after": evaluated[-1] if evaluated else None,
        "steps": len(trained),
        "seconds": round(seconds, 1),
        "step_seconds": round(_step_seconds(trained), 3),
        "objective": config.objective.name,
        "objective_settings": str(objective_of(config)),
        "tp": config.parallel.tensor,
        "ep": config.parallel.expert,
        "engine": config.rollout.engine,
        "engine_version": engines[0]["engine_version"],
        "mean_abs_pi_minus_mu": mean("mean_abs_pi_minus_mu"),
        "mismatch": mean("mismatch"),
        "load_average": os.getloadavg()[0],
    }
    write_summary(run_dir / "summary.json", summary)
    if config.logging.plot:
        plot_learning_curve(run_dir / METRICS, run_dir / "learning_curve.png")
    console.print(f"summary: {run_dir / 'summary.json'}", highlight=False, soft_wrap=True)
    for name, value in summary.items():
        console.print(f"  {name}: {value}", highlight=False, soft_wrap=True)
