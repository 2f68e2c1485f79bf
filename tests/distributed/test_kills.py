"""Ranks or the client killed at random moments, also in a save: training goes on from the last checkpoint to the same
bits.

MDPPO_KILLS says how often (`make test-long`: 20); samples are recorded ones, so that nothing but training is repeated.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_dppo.checkpoints import complete_checkpoints, queued_batches, start_of
from megatron_dppo.config import Config
from megatron_dppo.config.loading import save_config
from megatron_dppo.control import CONTROL_VARIABLE, SHARED_VARIABLE, Control, Orders, reply_key
from megatron_dppo.data.trajectory import load_batch
from megatron_dppo.job.machines import start_ranks
from megatron_dppo.job.processes import stop_on_exit
from megatron_dppo.job.run import with_checkpoint
from megatron_dppo.metrics import keep_records_before
from megatron_dppo.rollout.client import place_batch
from megatron_dppo.weights.layout import Parallel
from tests.distributed.test_resume import config as config_of
from tests.distributed.test_trainer import samples
from tests.tiny_models import tiny_config, tiny_model, write_checkpoint

KILLS = int(os.environ.get("MDPPO_KILLS", "1"))
STEPS = 8
DEADLINE_S = 120.0
LAYOUT = Parallel(tensor=2, expert=2, ranks=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    return write_checkpoint(path, tiny_model(tiny_config(num_layers=4), seed=5))


def settings(run_dir: Path, checkpoint: Path) -> Config:
    config = config_of(LAYOUT, run_dir, checkpoint)
    fields = config.model_dump(mode="json")
    fields["training"]["steps"] = STEPS
    fields["checkpoint"] = {"every": 1, "keep": 2}
    fields["logging"] = {"tensorboard": False}
    return Config.model_validate(fields)


chance = random.Random(0)


def train(config: Config, checkpoint: Path, kill: tuple[str, float] | None) -> bool:
    """Runs ranks from the last checkpoint on, as the launcher and the client do; kills one of them, or all as the
    launcher does when the client was killed, at the first save after so many seconds or after them. Whether training
    came to its end."""
    config = with_checkpoint(config.model_copy(update={"resume": "auto"}))
    run_dir, start = config.run.dir, start_of(config.resume)
    shared = run_dir / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    if (run_dir / "metrics.jsonl").is_file():
        keep_records_before(run_dir / "metrics.jsonl", start)
    save_config(config, run_dir / "resolved.yaml")
    control = Control.serve()
    orders = Orders(control, DEADLINE_S)
    env = {**os.environ, CONTROL_VARIABLE: control.address, SHARED_VARIABLE: str(shared), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-W", "ignore", "-m", "megatron_dppo.trainer", str(run_dir / "resolved.yaml")]
    batch, groups = samples(checkpoint)
    empty = {"evaluation": None, "seconds": {}}
    with stop_on_exit() as children:
        children.extend(start_ranks(argv, LAYOUT.ranks, env=env, logs=run_dir / "logs"))
        give_up, kill_at = time.monotonic() + DEADLINE_S, None
        for step in range(start, STEPS):
            placed = place_batch(shared, step, load_batch(batch), groups, config)
            for order in (
                {"do": "train", **placed, **empty},
                {"do": "save", "queue": {str(step + 1): placed["files"][0]}},
            ):
                reply = reply_key(orders._give(order))
                while control.peek(reply) is None:
                    now = time.monotonic()
                    assert now < give_up and all(child.poll() is None for child in children), children[0].log_tail()
                    if step > start and kill_at is None and kill is not None:  # everybody is there
                        kill_at = now + kill[1]
                    saving = any((run_dir / "checkpoints").glob("*.tmp"))
                    if kill_at is not None and now >= kill_at and (saving or kill[0] == "any"):
                        # The client takes ranks with it when they have saved.
                        victim = chance.choice([*children, None] if kill[0] == "any" else children)
                        if victim is not None:
                            os.kill(_process(victim.pid), signal.SIGKILL)
                        return False
                    time.sleep(0.002)
        asyncio.run(orders.end({"do": "stop", **empty}))
        while any(child.poll() is None for child in children):
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert all(child.poll() == 0 for child in children), children[0].log_tail()
    return True


def _process(guard: int) -> int:
    """What runs under a guard."""
    return int(Path(f"/proc/{guard}/task/{guard}/children").read_text().split()[0])


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds/")} for line in lines]


@pytest.mark.timeout(120 * (KILLS + 2))
def test_killed_runs_end_in_the_same_bits(checkpoint: Path, tmp_path: Path) -> None:
    assert train(settings(tmp_path / "whole", checkpoint), checkpoint, None)
    expected = metrics(tmp_path / "whole")
    assert [record["step"] for record in expected] == [*range(STEPS), STEPS]
    killed = saved = run = 0

    def more() -> bool:
        """A rank that is killed as a save begins may be too late: a few more, then."""
        return killed < KILLS or (not saved and killed < KILLS + 5)

    while more():
        run += 1
        broken = settings(tmp_path / f"broken{run}", checkpoint)
        finished = False
        while not finished:
            kind = "any" if killed % 2 and killed < KILLS else "saving"
            finished = train(broken, checkpoint, (kind, chance.uniform(0.0, 1.5)) if more() else None)
            if not finished:
                killed += 1
                saved += any((broken.run.dir / "checkpoints").glob("*.tmp"))
        assert metrics(broken.run.dir) == expected
        kept = complete_checkpoints(broken.run.dir)
        assert [queued_batches(path).keys() for path in kept] == [{STEPS - 1}, {STEPS}]
        assert all(len(load_batch(file)) > 0 for path in kept for file in queued_batches(path).values())
    print(f"{killed} kills in {run} runs, {saved} of them in the middle of a save")
    assert saved
