"""How many parameters each rank has, by the rows of the mapping table.

All ranks of a stage have as many, so that a layer of each kind and one expert say it for a trillion parameters. Equal
to `weights.layout.megatron_layout` (tests/planner), but for the vocabulary's padding, which is in no layout and is
counted here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from megatron_dppo.architecture import Architecture
from megatron_dppo.weights.layout import Parallel, chunk_layers, padded_vocab_size
from megatron_dppo.weights.mapping import Entry, entries


@dataclass(frozen=True)
class Parameters:
    """Counts of one rank: of what data-parallel replicas share, of experts, and of buffers that stay in float32.

    `largest`: the elements of the largest parameter.
    """

    dense: int = 0
    expert: int = 0
    float32: int = 0
    largest: int = 0

    @property
    def trained(self) -> int:
        """What has a gradient."""
        return self.dense + self.expert

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(
            self.dense + other.dense,
            self.expert + other.expert,
            self.float32 + other.float32,
            max(self.largest, other.largest),
        )

    def times(self, count: int) -> Parameters:
        """So many of them."""
        return Parameters(self.dense * count, self.expert * count, self.float32 * count, self.largest)


@lru_cache(maxsize=4096)
def stage_parameters(arch: Architecture, parallel: Parallel, stage: int) -> Parameters:
    """Of each rank of a pipeline stage. Raises ValueError where the layers do not divide."""
    total = Parameters()
    for chunk in range(parallel.virtual):
        total += chunk_parameters(arch, parallel, chunk * parallel.pipeline + stage)
    return total


def chunk_parameters(arch: Architecture, parallel: Parallel, number: int) -> Parameters:
    """Of each rank that has chunk `number` of the model's depth; the embedding is the first's, the head the last's."""
    chunk, stage = divmod(number, parallel.pipeline)
    last = parallel.pipeline * parallel.virtual - 1
    total = Parameters()
    for layer in chunk_layers(arch.num_layers, parallel, stage, chunk):
        total += layer_parameters(
            arch, parallel.tensor, parallel.expert, parallel.expert_tensor, arch.moe_layers[layer]
        )
    for entry in _outer(arch, parallel.tensor):
        is_embedding = entry.param.startswith("embedding.")
        # With one stage a tied head is the embedding itself.
        is_copy = entry.param == "output_layer.weight" and arch.tie_word_embeddings and last == 0
        if number == (0 if is_embedding else last) and not is_copy:
            total += _counted([entry], parallel.tensor, 1)
    return total


@lru_cache(maxsize=256)
def layer_parameters(arch: Architecture, tensor: int, expert: int, expert_tensor: int, is_moe: bool) -> Parameters:
    """Of each rank, of one layer; counts are whole where the rules of a layout hold, else rounded up."""
    layer = arch.moe_layers.index(is_moe)
    rows = list(entries(arch, arch.vocab_size, layers=range(layer, layer + 1), experts=range(1 if is_moe else 0)))
    rows = [entry for entry in rows if entry.layer is not None]
    one_expert = _counted([entry for entry in rows if entry.expert is not None], tensor, expert_tensor)
    dense = _counted([entry for entry in rows if entry.expert is None], tensor, expert_tensor)
    return dense + one_expert.times(-(-arch.num_experts // expert) if is_moe else 0)


@lru_cache(maxsize=64)
def _outer(arch: Architecture, tensor: int) -> tuple[Entry, ...]:
    """Embedding, last norm and head."""
    return tuple(entries(arch, padded_vocab_size(arch.vocab_size, tensor), layers=range(0)))


def _counted(rows: Iterable[Entry], tensor: int, expert_tensor: int) -> Parameters:
    total = Parameters()
    for entry in rows:
        parts = 1 if entry.split == "replicated" else tensor if entry.expert is None else expert_tensor
        count = -(-math.prod(entry.shape) // parts)
        if entry.float32:
            total += Parameters(float32=count)
        else:
            dense, expert = (count, 0) if entry.expert is None else (0, count)
            total += Parameters(dense=dense, expert=expert, largest=count)
    return total
