"""A plan for people: one screen, and in words why a layout does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_dppo.planner.engine import EngineMemory
from megatron_dppo.planner.hardware import GIB
from megatron_dppo.planner.memory import RankMemory
from megatron_dppo.planner.plan import Estimate, Memory, Plan
from megatron_dppo.planner.suggest import Suggestion

KINDS = {
    "weights": "weights",
    "gradients": "gradients (float32)",
    "optimizer": "optimizer's state",
    "reference": "reference model",
    "staging": "buckets of the weight sync",
    "routes": "recorded routes",
    "recorded": "recorded log-probs",
    "activations": "activations kept for backward",
    "logits": "policy head",
    "working": "a layer's backward",
    "scratch": "gradients' reduction, Adam",
    "overhead": "context, buffers, fragments",
    "needed": "needed",
}


def print_plan(plan: Plan) -> None:
    """Head line, memory by stage, engine, what is broken and what would be better."""
    console = Console(soft_wrap=True, highlight=False)
    for line in _title(plan):
        console.print(line, markup=False)
    if plan.memory is not None:
        console.print(_memory_table(plan.memory))
        if plan.memory.engine is not None:
            console.print(_engine_line(plan.memory.engine))
    if plan.estimate is not None:
        for line in _time_lines(plan.estimate):
            console.print(line)
    for text in plan.violations:
        console.print(f"[red]violation[/red] {escape(text)}")
    for text in plan.advice:
        console.print(f"[yellow]advice[/yellow] {escape(text)}")
    console.print("fits" if plan.fits else "does not fit", style="bold green" if plan.fits else "bold red")


def print_suggestions(title: str, suggestions: Sequence[Suggestion], unmended: Sequence[str] = ()) -> None:
    """What one can paste behind the recipe, with what comes of it; or why there is nothing (`unmended`)."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{title}: seconds of a step, GiB of a rank, devices, overrides", style="bold")
    for each in suggestions:
        line = f"  {each.seconds:8.4g} s {each.needed / GIB:7.1f} GiB  {each.used}  {each.command_line()}"
        console.print(line, markup=False)
    if not suggestions:
        console.print("  none was found: no layout mends this" if unmended else "  none was found")
    for text in unmended:
        console.print(f"  {text}", markup=False)


def _title(plan: Plan) -> Iterator[str]:
    if plan.config is None or plan.arch is None or plan.device is None:
        return
    p, cluster = plan.config.parallel, plan.config.cluster
    degrees = f"TP {p.tensor} x CP {p.context} x PP {p.pipeline} x DP {p.data}, EP {p.expert} x ETP {p.expert_tensor}"
    virtual = f", {p.virtual} chunks a stage" if p.virtual > 1 else ""
    yield (
        f"{plan.config.run.name}: {plan.config.model.path.name} on {cluster.nodes} nodes of "
        f"{cluster.devices_per_node} x {plan.device.name}, {p.ranks} ranks: {degrees}{virtual}"
    )
    if plan.work is not None:
        work = plan.work
        yield (
            f"a gradient step of a replica: up to {work.most_micro_batches} micro-batches of {work.tokens} tokens; "
            f"{work.samples} samples of at most {work.longest} tokens a step"
        )


def _memory_table(memory: Memory) -> Table:
    """Bytes of a rank, for the first and the last stage and the one that needs most."""
    last = len(memory.stages) - 1
    shown = sorted({0, memory.worst.stage, last})
    table = Table(title="GiB of a rank")
    table.add_column("")
    for stage in shown:
        worst = " (most)" if stage == memory.worst.stage and last else ""
        table.add_column(f"stage {stage}{worst}", justify="right")
    for kind, name in KINDS.items():
        values = [_value(memory.stages[stage], kind) for stage in shown]
        if any(values):
            style = "bold" if kind == "needed" else None
            table.add_row(name, *(f"{value / GIB:.2f}" for value in values), style=style)
    table.add_row("of", *(f"{memory.limit / GIB:.2f}" for _ in shown))
    for kind, name in (("optimizer_host", "on the host"), ("checkpoint_host", "on the host, for a checkpoint")):
        values = [_value(memory.stages[stage], kind) for stage in shown]
        if any(values):
            table.add_row(name, *(f"{value / GIB:.2f}" for value in values), style="dim")
    return table


def _time_lines(estimate: Estimate) -> Iterator[str]:
    time, sync, wires = estimate.time, estimate.sync, estimate.wires
    terms = sorted(time.terms.items(), key=lambda term: -term[1])
    shown = ", ".join(f"{name} {seconds:.3g}" for name, seconds in terms if seconds >= time.total / 1000)
    hidden = f", of them {time.hidden:.3g} at the same time" if time.hidden else ""
    yield (
        f"a step, roughly: {time.total:.3g} s ({shown}{hidden}); {time.tokens:.3g} tokens, "
        f"{time.tokens_per_second_per_device:.0f} a second and device, model FLOP utilisation "
        f"{time.model_flops_utilisation:.0%} while training"
    )
    sent = ", ".join(f"{kind} {wire.bytes / GIB:.1f}" for kind, wire in wires.items() if wire.bytes >= GIB / 20)
    if sent:
        yield f"wire of a rank and step, GiB: {sent}"
    if sync is not None:
        yield (
            f"weight sync by {sync.transport}: {sync.trainer_to_engine_bytes / GIB:.1f} GiB to an engine, "
            f"{sync.engine_to_engine_bytes / GIB:.1f} on to the others, {sync.bytes_per_worker / GIB:.1f} a worker, "
            f"{sync.seconds:.2g} s"
        )


def _value(memory: RankMemory, kind: str) -> int:
    return int(getattr(memory, kind))


def _engine_line(engine: EngineMemory) -> str:
    shared = " (it shares the device with a rank)" if engine.shares_devices else ""
    return (
        f"engine worker: {engine.weights / GIB:.2f} GiB of weights in {engine.budget / GIB:.1f}{shared}; "
        f"{engine.cache / GIB:.1f} GiB of cache at {engine.kv_bytes_per_token / 1024:.0f} KiB a token hold "
        f"{engine.sequences} of the longest sequences"
    )
