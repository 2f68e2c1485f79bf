"""Layouts that fit, best first: for a number of machines, and for a config that does not fit as it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dppo.architecture import Architecture
from megatron_dppo.config import Config
from megatron_dppo.planner.hardware import device_of
from megatron_dppo.planner.plan import MEMORY, Memory, Plan, estimate_of, make_plan, memory_of
from megatron_dppo.planner.workload import shares_devices, workload_of
from megatron_dppo.weights.layout import uneven_chunks

Overrides = Mapping[str, Any]  # dotted keys, as on the command line
RECOMPUTES = ("none", "selective", "full")  # dearer from left to right
HEADROOM = 0.92  # of a device that suggestions fill: experts are not even, and the model is not exact
MOST_CANDIDATES = 400  # of the fastest, that are planned as a whole


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

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"overrides": self.command_line(), "seconds": self.seconds, "needed": self.needed}

    def command_line(self) -> str:
        """To be pasted behind the recipe."""
        return " ".join(f"{key}={_yaml(value)}" for key, value in self.overrides.items())


def machines(text: str) -> tuple[int, int]:
    """Nodes and devices of each, of "4x8"; raises ValueError for anything else."""
    nodes, _, devices = text.partition("x")
    if not (nodes.isdigit() and devices.isdigit() and int(nodes) and int(devices)):
        raise ValueError(f"--suggest: got {text!r}, expected NODESxGPUS, as in 4x8")
    return int(nodes), int(devices)


def suggest_layouts(plan: Plan, nodes: int, devices: int, most: int = 5) -> list[Suggestion]:
    """Layouts for trainer nodes of so many devices, by the estimate of a step's seconds; engines stay as they are.

    Searched: tensor, pipeline (with uneven stages where the layers do not divide), two virtual stages, context, expert
    and expert-tensor degrees, tokens of a micro-batch, and the least recomputation that fits. None where the recipe
    could not be read, or breaks a rule that no layout mends.
    """
    config, arch = plan.config, plan.arch
    if config is None or arch is None:
        return []
    original = config
    base = {"cluster.nodes": nodes, "cluster.devices_per_node": devices}
    config = with_overrides(config, base)
    ranks = nodes * devices
    if not (config.cluster.engine_nodes or config.rollout.urls or shares_devices(config)):
        ranks -= config.rollout.engines * config.rollout.tensor
    found = []
    for layout in _layouts(config, arch, ranks):
        for tokens in _micro_batch_tokens(config, layout):
            if candidate := _least_recompute(config, arch, base | layout | tokens):
                found.append(candidate)
    found.sort(key=lambda candidate: candidate[0])
    suggestions: list[Suggestion] = []
    for _, overrides in found[:MOST_CANDIDATES]:
        plan = make_plan(with_overrides(config, overrides), arch)
        if plan.fits:
            suggestions.append(Suggestion(_different(original, overrides), plan))
        if len(suggestions) == most:
            break
    return suggestions


def fixes(plan: Plan, most: int = 3) -> list[Suggestion]:
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
            return fitting[:most]
    return []


def with_overrides(config: Config, overrides: Overrides) -> Config:
    """The config with `section.key` values replaced; they are not validated again."""
    for key, value in overrides.items():
        section, name = key.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


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
    longest = _rounded(config.data.max_prompt_tokens + config.rollout.max_response_tokens, parallel.tensor, 1)
    if training.micro_batch_tokens > longest:
        yield {"training.micro_batch_tokens": longest}
    for name in ("context", "expert", "tensor", "pipeline"):
        yield {f"parallel.{name}": 2 * getattr(parallel, name)}
    if not training.offload_optimizer and not config.checkpoint.every:
        yield {"training.offload_optimizer": True}
    if config.rollout.tensor < config.cluster.devices_per_node and not config.rollout.urls:
        yield {"rollout.tensor": 2 * config.rollout.tensor}


def _layouts(config: Config, arch: Architecture, ranks: int) -> Iterator[dict[str, Any]]:
    """Degrees that divide the model and the ranks, with tensor parallelism within a node."""
    devices = config.cluster.devices_per_node
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
                        "parallel.ranks": ranks,
                        "parallel.tensor": tensor,
                        "parallel.context": context,
                        "parallel.pipeline": pipeline,
                        "parallel.virtual": virtual,
                        "parallel.chunk_layers": uneven_chunks(arch.num_layers, chunks) if uneven else None,
                        "parallel.expert": expert,
                        "parallel.expert_tensor": expert_tensor,
                    }


def _micro_batch_tokens(config: Config, layout: Overrides) -> Iterator[dict[str, Any]]:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    for times in (2, 1):
        tokens = _rounded(times * longest, layout["parallel.tensor"], layout["parallel.context"])
        yield {"training.micro_batch_tokens": tokens}


def _rounded(tokens: int, tensor: int, context: int) -> int:
    multiple = tensor * (2 * context if context > 1 else 1)
    return -(-tokens // multiple) * multiple


def _least_recompute(config: Config, arch: Architecture, overrides: Overrides) -> tuple[float, Overrides] | None:
    """Seconds of a step and settings, with the least recomputation under which the memory is enough."""
    device = device_of(config.cluster, 1)

    def tried(recompute: str) -> tuple[float, Overrides] | None:
        chosen = {**overrides, "training.recompute": recompute}
        changed = with_overrides(config, chosen)
        work = workload_of(changed)
        memory: Memory = memory_of(changed, arch, device, work)
        if memory.worst.needed > HEADROOM * memory.limit:
            return None
        return estimate_of(changed, arch, device, work, memory).time.total, chosen

    most = tried(RECOMPUTES[-1])
    if most is None:  # as most layouts of a large model
        return None
    return next(filter(None, map(tried, RECOMPUTES[:-1])), most)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f"[{','.join(map(str, value))}]" if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    )
