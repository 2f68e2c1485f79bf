"""Layouts that fit, best first: for a number of machines, and for a config that does not fit as it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dppo.architecture import Architecture
from megatron_dppo.config import Config
from megatron_dppo.planner.hardware import device_of
from megatron_dppo.planner.plan import HEADROOM, MEMORY, Memory, Plan, estimate_of, make_plan, memory_of
from megatron_dppo.planner.rules import violations
from megatron_dppo.planner.workload import Workload, workload_of
from megatron_dppo.weights.layout import uneven_chunks

Overrides = Mapping[str, Any]  # dotted keys, as on the command line
RECOMPUTES = ("none", "selective", "full")  # dearer from left to right
ENGINE_SHARES = (0.25, 0.5, 0.75)  # of all nodes, that engines are tried with
MOST_CANDIDATES = 400  # of the fastest, that are planned as a whole
MOST_LAYOUTS, MOST_FIXES = 5, 3  # that are shown


@dataclass(frozen=True)
class Suggestion:
    """What to set, and the plan that results."""

    overrides: Overrides
    plan: Plan

    @property
    def seconds(self) -> float:
        """Of a step."""
        assert self.plan.estimate is not None
        return self.plan.estimate.time.total

    @property
    def needed(self) -> int:
        """Bytes of the rank that needs most."""
        assert self.plan.memory is not None
        return self.plan.memory.worst.needed

    @property
    def used(self) -> str:
        """Who has devices."""
        assert self.plan.config is not None
        config = self.plan.config
        engines = "" if config.rollout.urls else f" + {config.rollout.engines} engines of {config.rollout.tensor}"
        return f"{config.parallel.ranks} ranks{engines}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "overrides": self.command_line(),
            "seconds": self.seconds,
            "needed": self.needed,
            "used": self.used,
        }

    def command_line(self) -> str:
        """To be pasted behind the recipe."""
        return " ".join(f"{key}={_yaml(value)}" for key, value in self.overrides.items())


@dataclass(frozen=True)
class Search:
    """Layouts that fit, the fastest first; where none does, the faults that all have (none: memory is too small)."""

    found: tuple[Suggestion, ...] = ()
    unmended: tuple[str, ...] = ()


def machines(text: str) -> tuple[int, int]:
    """Nodes and devices of each, of "4x8"; raises ValueError for anything else."""
    nodes, _, devices = text.partition("x")
    if not (nodes.isdigit() and devices.isdigit() and int(nodes) and int(devices)):
        raise ValueError(f"--suggest: got {text!r}, expected NODESxGPUS, as in 4x8")
    return int(nodes), int(devices)


def suggest_layouts(plan: Plan, nodes: int, devices: int) -> Search:
    """Layouts for so many nodes of the trainer, by the estimate of a step's seconds.

    Searched: tensor, pipeline (with uneven stages where the layers do not divide), two virtual stages, context, expert
    and expert-tensor degrees, tokens of a micro-batch, and the least recomputation that fits; of engines, the tensor
    degree on as many devices. Where a recipe has no nodes for engines alone, the nodes are all that there are, and who
    gets which is searched, too. Of layouts with the same degrees the fastest is named.
    """
    config, arch = plan.config, plan.arch
    if config is None or arch is None:
        return Search(unmended=plan.violations)
    places = [(place, list(_layouts(with_overrides(config, place), arch))) for place in _places(config, nodes, devices)]
    if unmended := _in_all(config, arch, [place | layout for place, layouts in places for layout in layouts]):
        return Search(unmended=unmended)
    found = [s for place, layouts in places for s in _fastest(config, arch, place, layouts)]
    return Search(tuple(sorted(found, key=lambda s: s.seconds)[:MOST_LAYOUTS]))


def _places(config: Config, nodes: int, devices: int) -> Iterator[dict[str, Any]]:
    """Where ranks and engines are on the nodes: settings of machines, ranks and engines."""
    cluster, rollout = config.cluster, config.rollout
    base = {"cluster.nodes": nodes, "cluster.devices_per_node": devices}
    if cluster.engine_nodes or rollout.urls:
        yield base | {"parallel.ranks": nodes * devices}
        return
    if nodes == 1:  # an engine shares its devices with ranks
        yield base | {"parallel.ranks": devices, "rollout.engines": min(rollout.engines, devices // rollout.tensor)}
    own = rollout.engines * rollout.tensor // cluster.nodes
    for engines in sorted({own, devices // 2}):
        if 0 < engines < devices and engines % rollout.tensor == 0:
            ranks, number = nodes * (devices - engines), nodes * engines // rollout.tensor
            yield base | {"parallel.ranks": ranks, "rollout.engines": number}
    for alone in sorted({round(nodes * share) for share in ENGINE_SHARES}):
        if 0 < alone < nodes and devices % rollout.tensor == 0:
            ranks, number = (nodes - alone) * devices, alone * devices // rollout.tensor
            place = {"cluster.nodes": nodes - alone, "cluster.engine_nodes": alone}
            yield base | place | {"parallel.ranks": ranks, "rollout.engines": number}


def _in_all(config: Config, arch: Architecture, layouts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Faults that every layout has, with the engines that it has and with others."""
    longest = {"training.micro_batch_tokens": _longest(config, 8, 8)}  # the search sets it
    device = device_of(config.cluster, 1)
    first = [layouts[0] | engines for engines in engine_choices(with_overrides(config, layouts[0]))] if layouts else []
    common: set[str] | None = None
    for layout in (*first, *layouts[1:]):
        broken = set(violations(with_overrides(config, {**longest, **layout}), arch, device))
        common = broken if common is None else common & broken
        if not common:
            break
    return tuple(sorted(common or ()))


def engine_choices(config: Config) -> Iterator[dict[str, Any]]:
    """Tensor degrees of engines on as many devices, within a node; first as they are."""
    rollout = config.rollout
    yield {"rollout.tensor": rollout.tensor, "rollout.engines": rollout.engines}
    workers = rollout.engines * rollout.tensor
    for tensor in range(1, config.cluster.devices_per_node + 1) if not rollout.urls else ():
        if config.cluster.devices_per_node % tensor == workers % tensor == 0 and tensor != rollout.tensor:
            yield {"rollout.tensor": tensor, "rollout.engines": workers // tensor}


def _fastest(config: Config, arch: Architecture, place: Overrides, layouts: Sequence[Overrides]) -> list[Suggestion]:
    """Of the trainer's layouts in one place. Which engines are best, hardly depends on the trainer's layout: they are
    chosen with the first that fits."""
    found = []
    for layout in layouts:
        for tokens in _micro_batch_tokens(config, layout):
            if candidate := _least_recompute(config, arch, {**place, **layout, **tokens}):
                found.append(candidate)
    found.sort(key=lambda candidate: candidate[0])
    engines = list(engine_choices(with_overrides(config, place)))
    suggestions: dict[tuple[Any, ...], Suggestion] = {}
    for _, overrides in found[:MOST_CANDIDATES]:
        degrees = tuple(overrides[f"parallel.{name}"] for name in ("tensor", "context", "pipeline", "expert"))
        if degrees in suggestions:
            continue
        plans = [(make_plan(with_overrides(config, {**overrides, **chosen}), arch), chosen) for chosen in engines]
        fitting = [
            (Suggestion(_different(config, {**overrides, **chosen}), plan), chosen)
            for plan, chosen in plans
            if plan.fits
        ]
        if fitting:
            suggestions[degrees], best = min(fitting, key=lambda each: each[0].seconds)
            engines = [best]
        if len(suggestions) == MOST_LAYOUTS:
            break
    return list(suggestions.values())


def fixes(plan: Plan) -> list[Suggestion]:
    """The changes, one or two settings each, under which a config without enough memory fits; the fastest first, single
    ones before pairs. None where it fits, or where another rule is broken."""
    config, arch = plan.config, plan.arch
    if config is None or arch is None or not plan.violations:
        return []
    if not all(text.startswith(MEMORY) for text in plan.violations):
        return []
    single = list(_changes(config))
    for changes in (single, [a | b for a, b in itertools.combinations(single, 2) if not a.keys() & b.keys()]):
        plans = [Suggestion(change, make_plan(with_overrides(config, change), arch)) for change in changes]
        fitting = sorted((s for s in plans if s.plan.fits), key=lambda s: s.seconds)
        if fitting:
            return fitting[:MOST_FIXES]
    return []


def with_overrides(config: Config, overrides: Overrides) -> Config:
    """The config with `section.key` values replaced; they are not validated again."""
    changes: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, name = key.split(".")
        changes.setdefault(section, {})[name] = value
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=values) for section, values in changes.items()}
    )


def _different(config: Config, overrides: Overrides) -> Overrides:
    """Those that change something."""

    def current(key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    return {key: value for key, value in overrides.items() if value != current(key)}


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    """What can make a rank need less, in the order of what it usually costs."""
    parallel, training = config.parallel, config.training
    if config.head.path != "chunk":
        yield {"head.path": "chunk"}
    for recompute in RECOMPUTES[RECOMPUTES.index(training.recompute) + 1 :]:
        yield {"training.recompute": recompute}
    longest = _longest(config, parallel.tensor, parallel.context)
    if training.micro_batch_tokens > longest:
        yield {"training.micro_batch_tokens": longest}
    for name in ("context", "expert", "tensor", "pipeline"):
        yield {f"parallel.{name}": 2 * getattr(parallel, name)}
    if not training.offload_optimizer and not config.checkpoint.every:
        yield {"training.offload_optimizer": True}
    rollout = config.rollout
    if rollout.tensor < config.cluster.devices_per_node and not rollout.urls:
        yield {"rollout.tensor": 2 * rollout.tensor, "rollout.engines": max(1, rollout.engines // 2)}


def _layouts(config: Config, arch: Architecture) -> Iterator[dict[str, Any]]:
    """Degrees that divide the model and the ranks, with tensor parallelism within a node."""
    ranks, devices = config.parallel.ranks, config.cluster.devices_per_node
    heads, experts = arch.num_attention_heads, arch.num_experts
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt // config.training.minibatches
    degrees = [n for n in range(1, ranks + 1) if ranks % n == 0]
    for tensor, pipeline, context in itertools.product(degrees, degrees, (1, 2, 4, 8)):
        fits = devices % tensor == 0 and heads % tensor == 0 and pipeline <= arch.num_layers
        if not fits or ranks % (tensor * pipeline * context) or samples < ranks // (tensor * pipeline * context):
            continue
        of_stage = ranks // pipeline
        for expert in (n for n in degrees if of_stage % n == 0 and (experts % n == 0 if arch.is_moe else n == 1)):
            for expert_tensor in {1, tensor} if arch.is_moe else {1}:
                if of_stage % (expert * expert_tensor) or (arch.moe_intermediate_size % expert_tensor):
                    continue
                for virtual in (1, 2) if pipeline > 1 else (1,):
                    chunks = pipeline * virtual
                    uneven = arch.num_layers % chunks
                    yield {
                        "parallel.tensor": tensor,
                        "parallel.context": context,
                        "parallel.pipeline": pipeline,
                        "parallel.virtual": virtual,
                        "parallel.chunk_layers": uneven_chunks(arch.num_layers, chunks) if uneven else None,
                        "parallel.expert": expert,
                        "parallel.expert_tensor": expert_tensor,
                    }


def _micro_batch_tokens(config: Config, layout: Overrides) -> Iterator[dict[str, Any]]:
    for times in (2, 1):
        tokens = _longest(config, layout["parallel.tensor"], layout["parallel.context"], times)
        yield {"training.micro_batch_tokens": tokens}


def _longest(config: Config, tensor: int, context: int, times: int = 1) -> int:
    """Tokens of so many of the longest sequences, as ranks divide them."""
    multiple = tensor * (2 * context if context > 1 else 1)
    tokens = times * (config.data.max_prompt_tokens + config.rollout.max_response_tokens)
    return -(-tokens // multiple) * multiple


def _least_recompute(config: Config, arch: Architecture, overrides: Overrides) -> tuple[float, Overrides] | None:
    """Seconds of a step and settings, with the least recomputation under which the memory is enough."""
    device = device_of(config.cluster, 1)

    def fitting(recompute: str) -> tuple[Overrides, Config, Workload, Memory] | None:
        chosen = {**overrides, "training.recompute": recompute}
        settings = with_overrides(config, chosen)
        work = workload_of(settings)
        memory = memory_of(settings, arch, device, work)
        return (chosen, settings, work, memory) if memory.worst.needed <= HEADROOM * memory.limit else None

    most = fitting(RECOMPUTES[-1])
    if most is None:  # as most layouts of a large model
        return None
    chosen, settings, work, memory = next(filter(None, map(fitting, RECOMPUTES[:-1])), most)
    return estimate_of(settings, arch, device, work, memory).time.total, chosen


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f"[{','.join(map(str, value))}]" if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    )
