"""A recipe planned as a whole: what it breaks, what every rank needs, and whether that is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dppo.architecture import Architecture
from megatron_dppo.config import Config
from megatron_dppo.config.loading import ConfigError, load_config, sections_of
from megatron_dppo.planner.engine import EngineMemory, engine_memory, engine_parallel
from megatron_dppo.planner.hardware import GIB, Device, device_of
from megatron_dppo.planner.memory import RankMemory, all_stages
from megatron_dppo.planner.rules import advice, broken_sections, violations
from megatron_dppo.planner.shapes import find_architecture
from megatron_dppo.planner.step_time import StepTime, step_time
from megatron_dppo.planner.traffic import Sync, Wire, step_wires, sync_traffic
from megatron_dppo.planner.workload import Workload, shares_devices, workload_of
from megatron_dppo.weights.engine_layout import indivisible

MEMORY = "memory of "  # what a violation begins with that no rule is
HEADROOM = 0.92  # of a device that a rank should fill at most: experts are not even, and the model is not exact


@dataclass(frozen=True)
class Memory:
    """What the ranks of every pipeline stage need, and a worker of an engine (None: not this job's)."""

    stages: tuple[RankMemory, ...]
    engine: EngineMemory | None
    limit: int  # of a device, for a rank

    @property
    def worst(self) -> RankMemory:
        """Of the stage that needs most."""
        return max(self.stages, key=lambda memory: memory.needed)


@dataclass(frozen=True)
class Estimate:
    """Wire bytes of a rank in a step, the weight sync (None: engines that others start), and seconds."""

    wires: dict[str, Wire]
    sync: Sync | None
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """What can be said of a config before it runs. `memory` and `estimate` are None where the layout has none."""

    config: Config | None
    arch: Architecture | None
    device: Device | None
    work: Workload | None
    violations: tuple[str, ...]
    advice: tuple[str, ...] = ()
    memory: Memory | None = None
    estimate: Estimate | None = None

    @property
    def fits(self) -> bool:
        """Nothing is broken, and all memory is there."""
        return not self.violations and self.memory is not None

    def as_json(self) -> dict[str, Any]:
        """For programs; bytes, and seconds."""
        found: dict[str, Any] = {"fits": self.fits, "violations": list(self.violations), "advice": list(self.advice)}
        found |= {"device": asdict(self.device) if self.device else None}
        if self.memory is None or self.estimate is None:
            return found | {"bytes_per_rank": None, "engine": None, "sync": None, "step_time": None}
        worst, engine = self.memory.worst, self.memory.engine
        found["bytes_per_rank"] = worst.by_kind() | {"stage": worst.stage, "limit": self.memory.limit}
        found["stages"] = [stage.by_kind() | {"stage": stage.stage} for stage in self.memory.stages]
        found["engine"] = asdict(engine) | {"fits": engine.fits} if engine else None
        time, sync = self.estimate.time, self.estimate.sync
        found["wire"] = {kind: asdict(wire) for kind, wire in self.estimate.wires.items()}
        found["sync"] = asdict(sync) if sync else None
        found["step_time"] = asdict(time) | {"total": time.total}
        return found


def plan_recipe(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Reads and plans a recipe. Where it cannot be read as a whole, what is broken of the rest is said all the same.

    Raises ConfigError for what is no recipe at all.
    """
    config, faults = None, []
    try:
        config = load_config(path, overrides, ())
        sections: Mapping[str, Any] = sections_of(config)
    except ConfigError as error:
        if not error.sections:
            raise
        sections, faults = error.sections, error.faults
    arch = None
    if "model" in sections:
        try:
            arch, _ = find_architecture(sections["model"].path, path)
        except ValueError as error:
            faults.append(str(error))
    if config is not None and arch is not None:
        return make_plan(config, arch)
    device = device_of(sections["cluster"], 1) if "cluster" in sections else None
    faults += broken_sections(sections, arch, device)
    return Plan(config, arch, device, None, tuple(dict.fromkeys(faults)))  # a model's fault is said by rules, too


def make_plan(config: Config, arch: Architecture) -> Plan:
    """Pure, but for what `cluster.device: auto` asks of this machine, and the lines of `data.eval`'s files."""
    device = device_of(config.cluster, _processes_per_node(config))
    broken = violations(config, arch, device)
    try:
        config.parallel.layout  # noqa: B018 - raises where ranks do not divide
        work = workload_of(config)
        memory = memory_of(config, arch, device, work)
        estimate = estimate_of(config, arch, device, work, memory)
    except ValueError as error:  # a rule says it, unless none does
        return Plan(config, arch, device, None, tuple(broken or [str(error)]))
    broken += _too_little_memory(config, device, memory)
    better = (*advice(config, arch, device, work, memory.engine), *_little_headroom(memory, device))
    return Plan(config, arch, device, work, tuple(broken), better, memory, estimate)


def memory_of(config: Config, arch: Architecture, device: Device, work: Workload) -> Memory:
    """Of trainer and engine. Raises ValueError where a degree of the trainer does not divide the model."""
    planned = not config.rollout.urls and not any(indivisible(arch, engine_parallel(config)))
    engine = engine_memory(config, arch, device) if planned else None
    limit = device.memory_bytes
    if engine is not None and device.is_gpu and shares_devices(config):
        limit -= engine.budget
    return Memory(tuple(all_stages(config, arch, device, work)), engine, limit)


def estimate_of(config: Config, arch: Architecture, device: Device, work: Workload, memory: Memory) -> Estimate:
    """Traffic and time of a layout that `memory_of` could plan."""
    wires = step_wires(config, arch, device, work)
    sync = sync_traffic(config, arch, device) if memory.engine else None
    return Estimate(wires, sync, step_time(config, arch, device, work, wires, sync, memory.engine))


def _processes_per_node(config: Config) -> int:
    """Ranks and engine workers of a trainer's node: what a machine without GPUs is shared by."""
    cluster, rollout = config.cluster, config.rollout
    engines = 0 if rollout.urls or cluster.engine_nodes else rollout.engines * rollout.tensor
    return -(-(config.parallel.ranks + engines) // cluster.nodes)


def _little_headroom(memory: Memory, device: Device) -> Iterator[str]:
    share = memory.worst.needed / memory.limit
    if device.is_gpu and HEADROOM < share <= 1:
        yield (
            f"{MEMORY}a rank: {memory.worst.needed / GIB:.1f} GiB of {memory.limit / GIB:.1f} are {share:.0%}, at most "
            f"{HEADROOM:.0%} leave room for uneven experts and what is not planned exactly: recompute more, or smaller "
            "training.micro_batch_tokens"
        )


def _too_little_memory(config: Config, device: Device, memory: Memory) -> Iterator[str]:
    worst, engine = memory.worst, memory.engine
    each = config.parallel.ranks // config.parallel.pipeline
    if worst.needed > memory.limit:
        kinds = sorted(worst.by_kind().items(), key=lambda item: -item[1])
        named = ", ".join(
            f"{kind} {size / GIB:.1f}"
            for kind, size in kinds
            if size > worst.needed / 20 and kind not in ("peak", "needed", "optimizer_host", "checkpoint_host")
        )
        share = "" if memory.limit == device.memory_bytes else " that an engine leaves"
        yield (
            f"{MEMORY}a rank: pipeline stage {worst.stage} (ranks {worst.stage * each} to "
            f"{(worst.stage + 1) * each - 1}) needs {worst.needed / GIB:.1f} GiB, expected at most the "
            f"{memory.limit / GIB:.1f} GiB of {device.name}{share} ({named})"
        )
    if engine is not None and not engine.fits:
        yield (
            f"{MEMORY}an engine: a worker has {engine.budget / GIB:.1f} GiB of {device.name}, expected "
            f"{(engine.weights + engine.staging + engine.forward) / GIB:.1f} GiB and a sequence's "
            f"{engine.kv_bytes_per_token / 1024:.0f} KiB a token (weights {engine.weights / GIB:.1f}): "
            "raise rollout.tensor or give engines nodes of their own (cluster.engine_nodes)"
        )
