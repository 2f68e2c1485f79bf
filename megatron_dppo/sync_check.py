"""`megatron-dppo sync-check CONFIG`: do the engines of a recipe get what its trainer has?

Starts engines and ranks as a run would. Then, as often as asked: every weight is changed on the ranks; they send them;
of every tensor, the engines' checksum is compared with the ranks'; prompts are sampled, and the log-probs that the
engines recorded are compared with those of the trainer's own model.

This module is the command's part in the launcher and, run as `python -m megatron_dppo.sync_check CONFIG`, its client;
what the ranks do is in `sync_check_rank.py`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from megatron_dppo.architecture import load_architecture
from megatron_dppo.config import Config
from megatron_dppo.config.loading import load_config
from megatron_dppo.control import CONTROL_VARIABLE, SHARED_VARIABLE, Control, Orders
from megatron_dppo.data.trajectory import Scored, save_batch
from megatron_dppo.job.processes import supervise
from megatron_dppo.job.run import job, run_directory
from megatron_dppo.rollout.engine import Sampling
from megatron_dppo.rollout.engines import connect_engines, fleet_of
from megatron_dppo.rollout.fleet import Fleet, Request

# Of the log-prob of one token: rounding. The quickstart's trained model, fp32 against fp64, has up to 3e-5 after these
# changes; a wrong weight gives more than 1e-3. Two bf16 models differ by their kernels.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
SAMPLES = 8  # of each engine after each update, in as many micro-batches


@dataclass(frozen=True)
class Row:
    """What one update showed. `different`: tensors of which an engine has other bits than the trainer; `lost`: engines
    that could not be asked."""

    version: int
    seconds: float
    tensors: int
    different: tuple[str, ...]
    tokens: int
    worst: float  # difference of a token's log-prob
    tolerance: float
    lost: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all is as it must be."""
        return not self.different and not self.lost and self.worst <= self.tolerance


def check_sync(config: Config, updates: int, console: Console) -> list[Row]:
    """Runs the check and prints a line an update. Raises what `launch` does."""
    run = config.run.model_copy(update={"dir": config.run.dir / "sync-check"})
    training = config.training.model_copy(update={"steps": updates})
    config = config.model_copy(update={"run": run, "training": training})
    rows: list[Row] = []
    with (
        run_directory(run.dir),
        job(config, console, ranks="megatron_dppo.sync_check_rank", client="megatron_dppo.sync_check") as running,
    ):

        def watch() -> None:
            while (found := running.control.peek(_row_key(len(rows) + 1))) is not None:
                rows.append(Row(**{**found, "different": tuple(found["different"]), "lost": tuple(found["lost"])}))
                console.print(_line(rows[-1]), highlight=False)

        supervise(running.children, until=running.until, watch=watch)
        watch()
    return rows


def _row_key(version: int) -> str:
    return f"row/{version}"


def _line(row: Row) -> str:
    lost = f"lost: {', '.join(row.lost)}; " if row.lost else ""
    bits = f"{len(row.different)} differ, {', '.join(row.different[:3])}" if row.different else "equal bit by bit"
    verdict = "ok" if row.passed else "FAILED"
    return (
        f"update {row.version}: {row.seconds:.2f} s, {lost}{row.tensors} tensors: {bits}; "
        f"log-probs of {row.tokens} tokens within {row.worst:.1e} (at most {row.tolerance:g}): {verdict}"
    )


async def run_client(config: Config) -> None:
    """The client's part: orders, comparisons, a row for each update."""
    control = Control.connect(os.environ[CONTROL_VARIABLE])
    orders = Orders(control, config.training.rollout_timeout_s)
    arch = load_architecture(config.model.path)
    engines, _ = await connect_engines(config, arch)
    try:
        fleet = fleet_of(config, arch, engines, orders, fingerprints=True)
        for version in range(1, config.training.steps + 1):
            control.post(
                _row_key(version), asdict(await _check_update(config, arch.vocab_size, fleet, orders, version))
            )
        await orders.end({"do": "stop"})
    finally:
        for engine in engines:
            await engine.close()


async def _check_update(config: Config, vocab_size: int, fleet: Fleet, orders: Orders, version: int) -> Row:
    expected = (await orders.do({"do": "change", "seed": version}))["fingerprints"]
    started = time.perf_counter()
    await fleet.update(version)
    seconds = time.perf_counter() - started
    different: set[str] = set()
    for engine in fleet.living:
        received = await engine.checksum()
        different |= {name for name in expected if received.get(name) != expected[name]}
    trajectories = await fleet.sample(_requests(config, vocab_size, version, len(fleet.living)))
    path = Path(os.environ[SHARED_VARIABLE]) / f"samples-{version}.safetensors"
    save_batch(path, [Scored(t, {}, np.zeros(t.response_length, np.float32)) for t in trajectories])
    worst = (await orders.do({"do": "score", "file": str(path)}))["worst"]
    tokens = sum(trajectory.response_length for trajectory in trajectories)
    names = tuple(sorted(different))
    lost = tuple(engine.url for engine in fleet.engines if engine not in fleet.living)
    return Row(version, seconds, len(expected), names, tokens, worst, TOLERANCE[config.rollout.dtype], lost)


def _requests(config: Config, vocab_size: int, version: int, engines: int) -> list[Request]:
    """Prompts of random ids, the same number for each engine."""
    rng = np.random.default_rng([config.run.seed, version])
    rollout, requests = config.rollout, []
    for i in range(SAMPLES * engines * config.parallel.micro_batch_multiple):
        ids = rng.integers(0, vocab_size, rng.integers(1, config.data.max_prompt_tokens + 1)).tolist()
        sampling = Sampling(
            rollout.temperature, rollout.max_response_tokens, training=True, seed=int(rng.integers(1 << 31))
        )
        requests.append(Request(ids, sampling, f"{version}-{i}", str(i), i))
    return requests


if __name__ == "__main__":
    asyncio.run(run_client(load_config(sys.argv[1])))
