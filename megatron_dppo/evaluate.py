"""`megatron-dppo evaluate CONFIG`: the accuracy of a model on held-out prompts, without a trainer.

Engines are started on `model.path` as a run would start them, or those of `rollout.urls` are asked, whatever weights
they have; then the `evaluation` section is done once. This module is the command's part in the launcher and, run as
`python -m megatron_dppo.evaluate CONFIG`, its client.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from megatron_dppo.architecture import load_architecture
from megatron_dppo.config import ClusterConfig, Config, ParallelConfig, RoutingConfig
from megatron_dppo.config.loading import load_config
from megatron_dppo.control import CONTROL_VARIABLE, Control
from megatron_dppo.data.rewards import MathAnswer, make_reward
from megatron_dppo.data.trajectory import Trajectory
from megatron_dppo.job.processes import supervise
from megatron_dppo.job.run import job, run_directory
from megatron_dppo.metrics import write_summary
from megatron_dppo.placement import gpus_per_machine
from megatron_dppo.rollout.engine import RolloutEngine
from megatron_dppo.rollout.engines import connect_engines
from megatron_dppo.rollout.evaluation import Result, describe_eval_sets, evaluate, load_eval_sets, measures_of
from megatron_dppo.rollout.fleet import Request

RESULTS_KEY = "evaluation"  # client to launcher


@dataclass(frozen=True)
class Evaluation:
    """What was found, and of what."""

    model: str
    engine: str  # name and version
    prompts: dict[str, str]  # which were taken of each file, in words
    results: tuple[Result, ...]


def for_evaluation(config: Config) -> Config:
    """The config without its trainer, on one machine, with as many of its engines as that has GPUs for."""
    rollout = config.rollout
    gpus = gpus_per_machine(config.cluster)
    if not rollout.urls and gpus is not None:
        room = max(1, gpus // rollout.tensor)
        rollout = rollout.model_copy(update={"engines": min(rollout.engines, room)})
    cluster = ClusterConfig(devices_per_node=config.cluster.devices_per_node, device=config.cluster.device)
    run = config.run.model_copy(update={"dir": config.run.dir / "evaluate"})
    changes = {"run": run, "parallel": ParallelConfig(), "cluster": cluster, "rollout": rollout}
    return config.model_copy(update=changes | {"routing": RoutingConfig()})


def evaluate_model(config: Config, console: Console) -> Evaluation:
    """Evaluates as a config of `for_evaluation` says, and leaves summary.json in its directory.

    Raises ValueError where it names no held-out prompts, and what `launch` does.
    """
    if not config.data.eval:
        raise ValueError("data.eval: got none, expected held-out prompts to evaluate on")
    with run_directory(config.run.dir), job(config, console, ranks=None, client="megatron_dppo.evaluate") as running:
        supervise(running.children, until=running.until)
        found = running.control.wait(RESULTS_KEY, timeout_s=1.0)
        results = tuple(Result(**result) for result in found["results"])
        evaluation = Evaluation(str(config.model.path), found["engine"], found["prompts"], results)
        write_summary(config.run.dir / "summary.json", asdict(evaluation))
    return evaluation


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """What was taken of the files, and a table."""
    for name, taken in evaluation.prompts.items():
        console.print(f"{name}: {taken}", highlight=False, markup=False)
    table = Table(title=f"{evaluation.model}, {evaluation.engine}")
    for title in ("accuracy of", "accuracy", "prompts", "samples", "cut off", "tokens"):
        table.add_column(title, justify="left" if title == "accuracy of" else "right")
    for row in evaluation.results:
        table.add_row(
            row.name.replace("accuracy_", ""),
            f"{row.accuracy:.4f}",
            str(row.prompts),
            str(row.samples),
            f"{row.truncated_share:.1%}",
            f"{row.response_length:.1f}",
        )
    console.print(table, highlight=False)


async def run_client(config: Config) -> None:
    """The client's part: prompts, samples, scores."""
    from transformers import AutoTokenizer

    control = Control.connect(os.environ[CONTROL_VARIABLE])
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    sets = load_eval_sets(config, tokenizer)
    engines, facts = await connect_engines(config, load_architecture(config.model.path))
    reward = make_reward(config.reward)
    try:
        measures = measures_of(config, {name: found.prompts for name, found in sets.items()}, "evaluate")
        results = await evaluate(
            measures, lambda requests: _sample(engines, requests), tokenizer, reward, config.run.seed
        )
    finally:
        for engine in engines:
            await engine.close()
        if isinstance(reward, MathAnswer):
            reward.close()
    message = {"engine": f"{facts[0].engine} {facts[0].engine_version}", "prompts": describe_eval_sets(config, sets)}
    control.post(RESULTS_KEY, message | {"results": [asdict(result) for result in results]})


async def _sample(engines: Sequence[RolloutEngine], requests: Sequence[Request]) -> list[Trajectory]:
    """A response to each request, from the weights that the engines have. Raises what `generate` does."""

    def ask(request: Request) -> asyncio.Task[Trajectory]:
        engine = engines[request.spread % len(engines)]
        asked = engine.generate(request.prompt_ids, request.sampling, request.request_id, group_id=request.group_id)
        return group.create_task(asked)

    async with asyncio.TaskGroup() as group:
        tasks = [ask(request) for request in requests]
    return [task.result() for task in tasks]


if __name__ == "__main__":
    asyncio.run(run_client(load_config(sys.argv[1])))
