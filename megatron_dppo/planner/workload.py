"""What a gradient step computes on each replica: micro-batches, their tokens, how many are kept at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_dppo.config import Config
from megatron_dppo.weights.layout import Parallel
from megatron_dppo.weights.update import Transport

MEAN_RESPONSE = 0.5  # of rollout.max_response_tokens, for times; memory is planned for the longest
MEAN_PROMPT = 0.25  # of data.max_prompt_tokens


@dataclass(frozen=True)
class Workload:
    """Of each data-parallel replica in one gradient step.

    `tokens`: of the largest micro-batch, padding included. `most_micro_batches`: where every sample is the longest;
    `mean_micro_batches`: at the mean length. `longest`, `mean_length`: tokens of a sample. `samples`: of all replicas
    in a step of the trainer, which has `minibatches` gradient steps.
    """

    tokens: int
    longest: int
    mean_length: float
    samples: int
    minibatches: int
    most_micro_batches: int
    mean_micro_batches: int

    @property
    def total_tokens(self) -> float:
        """Of all samples in a step of the trainer."""
        return self.samples * self.mean_length


def workload_of(config: Config) -> Workload:
    """The config's, as the client will pack it."""
    rollout, training, parallel = config.rollout, config.training, config.parallel
    layout_multiple = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    mean_length = config.data.max_prompt_tokens * MEAN_PROMPT + rollout.max_response_tokens * MEAN_RESPONSE
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    own = max(1, math.ceil(samples / training.minibatches / max(parallel.data, 1)))
    budget = max(training.micro_batch_tokens, longest)

    def micro_batches(length: float) -> int:
        count = math.ceil(own / max(1, math.floor(budget / length)))
        return -(-count // parallel.micro_batch_multiple) * parallel.micro_batch_multiple

    tokens = min(training.micro_batch_tokens, own * longest)
    return Workload(
        tokens=-(-tokens // layout_multiple) * layout_multiple,
        longest=longest,
        mean_length=mean_length,
        samples=samples,
        minibatches=training.minibatches,
        most_micro_batches=micro_batches(longest),
        mean_micro_batches=micro_batches(mean_length),
    )


def evaluation_samples(config: Config) -> int:
    """Responses of one evaluation: of `evaluation.prompts` of each set, where its file is not there to be counted."""
    evaluation = config.evaluation
    each = evaluation.samples * evaluation.sampled + evaluation.greedy
    return each * sum(
        min(evaluation.prompts, _lines(chosen.path) or evaluation.prompts) for chosen in config.data.eval.values()
    )


@lru_cache(maxsize=64)
def _lines(path: Path) -> int | None:
    """Of a JSONL file, blank ones left out; None where it is not there."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


@lru_cache(maxsize=4096)
def chunks_in_flight(parallel: Parallel, stage: int, micro_batches: int) -> tuple[int, ...]:
    """How many micro-batches each chunk of a stage keeps at the moment when the stage keeps most, in turn of depth.

    Megatron's 1F1B: a stage is ahead by the stages behind it. Interleaved, forward takes `pipeline` micro-batches
    through one chunk, then the next; a stage is ahead by twice the stages behind it and the chunks before its last.
    """
    behind = parallel.pipeline - stage - 1
    if parallel.virtual == 1:
        return (min(behind + 1, micro_batches),)
    virtual, group = parallel.virtual, parallel.pipeline
    steps = min(micro_batches, 4 * group) * virtual  # what is kept repeats from there on
    order = [step % (group * virtual) // group for step in range(steps)]
    ahead = min(2 * behind + (virtual - 1) * group + 1, steps)
    kept = [0] * virtual
    most = tuple(kept)
    for step in range(steps + ahead):
        if step < steps:
            kept[order[step]] += 1
        if sum(kept) > sum(most):
            most = tuple(kept)
        if step + 1 >= ahead and step + 1 - ahead < steps:
            kept[virtual - 1 - order[step + 1 - ahead]] -= 1
    return most


def shares_devices(config: Config) -> bool:
    """Whether engines run on devices that ranks have, too."""
    cluster, rollout = config.cluster, config.rollout
    if cluster.engine_nodes:
        return False
    return cluster.nodes * cluster.devices_per_node < config.parallel.ranks + rollout.engines * rollout.tensor


def transport_of(config: Config) -> Transport:
    """How weights get to the engines, with "auto" decided as the launchers do."""
    if config.sync.transport != "auto":
        return config.sync.transport
    own = not shares_devices(config) and config.cluster.device != "cpu"
    far = bool(config.cluster.engine_nodes) or config.cluster.nodes > 1 or bool(config.rollout.urls)
    return "group" if own and (far or config.rollout.engines == 1) else "shm"
