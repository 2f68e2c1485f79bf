"""Which box of which Hugging Face tensor each worker of a rollout engine keeps, from numbers alone.

The rules are those of vLLM's unquantised layers (read in 0.30), engine pipeline parallelism and expert balancing
left out; an engine says at start which boxes its own weight loaders read, and this table is what plans and tests
use without one. SGLang cuts the same way where attention is not data parallel and its experts are spread over all
workers or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_dppo.architecture import Architecture
from megatron_dppo.weights.layout import Box
from megatron_dppo.weights.mapping import hub_shapes

Split = Literal["rows", "columns", "key_value_rows", "vocabulary", "replicated"]

VOCABULARY_MULTIPLE = 64  # vLLM's pad_vocab_size
_ROUTED_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")

# The module of a tensor -> how its shards are cut. The heads of latent attention are rows of q_b_proj and kv_b_proj.
_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("embed_tokens", "lm_head"), "vocabulary"),
    **dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj"), "rows"),
    **dict.fromkeys(("k_proj", "v_proj"), "key_value_rows"),
    **dict.fromkeys(("o_proj", "down_proj"), "columns"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa", "gate", "norm"), "replicated"),
    **dict.fromkeys(("q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm"), "replicated"),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), "replicated"),
}


@dataclass(frozen=True)
class EngineParallel:
    """How the `tensor` x `data` workers of one engine instance split a model.

    Worker number = data rank x tensor + tensor rank. Attention, embeddings and dense layers are split over `tensor`
    and repeated on every data rank. Experts are spread over all workers: with `expert_parallel` whole ones, in order,
    the first E mod workers getting one more; without it each is split over all workers along its intermediate axis.
    `sequence_parallel_moe`: every worker keeps the shared experts whole. vLLM does so with expert parallelism where
    tensor and data are both above 1 and the all-to-all backend is its default or one of DeepEP, NIXL, Mori and
    FlashInfer's one-sided NVLink (`ParallelConfig.use_sequence_parallel_moe`); else the shared experts are split over
    `tensor` like a dense layer.
    """

    tensor: int = 1
    data: int = 1
    expert_parallel: bool = False
    sequence_parallel_moe: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor", "data"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name}: got {getattr(self, name)}, expected at least 1")
        if self.sequence_parallel_moe and not (self.expert_parallel and self.tensor > 1 and self.data > 1):
            raise ValueError(
                f"engine.sequence_parallel_moe: got tensor = {self.tensor}, data = {self.data}, expert_parallel = "
                f"{self.expert_parallel}, expected expert parallelism with tensor and data above 1"
            )

    @property
    def workers(self) -> int:
        """Workers of one instance."""
        return self.tensor * self.data


def engine_layout(arch: Architecture, parallel: EngineParallel, worker: int) -> Iterator[Box]:
    """The boxes that worker number `worker` keeps, in the order of `hub_shapes`; none is empty.

    A tied head is the embedding and has no box of its own. Raises ValueError for a worker that there is not, and
    where the engine's degrees of parallelism do not divide the model (vLLM refuses the same).
    """
    if not 0 <= worker < parallel.workers:
        raise ValueError(f"worker: got {worker}, expected 0..{parallel.workers - 1}")
    _check_divides(arch, parallel)
    experts = _experts(arch.num_experts, parallel.workers, worker) if parallel.expert_parallel else None
    for name, shape in hub_shapes(arch, experts).items():
        split = _SPLITS[name.split(".")[-2]]
        axis = 1 if split == "columns" else 0
        start, stop = _share(name, split, shape[axis], arch, parallel, worker)
        if start < stop:
            low, high = [0] * len(shape), list(shape)
            low[axis], high[axis] = start, stop
            yield Box(name, tuple(low), tuple(high))


def padded_vocabulary(vocab_size: int) -> int:
    """Rows that vLLM's workers of all tensor ranks together have in the embedding and the head."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _experts(num_experts: int, workers: int, worker: int) -> range:
    """vLLM's linear placement."""
    each, rest = divmod(num_experts, workers)
    start = worker * each + min(worker, rest)
    return range(start, start + each + (worker < rest))


def _share(
    name: str, split: Split, size: int, arch: Architecture, parallel: EngineParallel, worker: int
) -> tuple[int, int]:
    """The worker's indices [start, stop) of a tensor with `size` of them along the axis that is cut."""
    parts, part = parallel.tensor, worker % parallel.tensor
    if split == "vocabulary":
        rows = padded_vocabulary(size) // parts
        return min(size, part * rows), min(size, (part + 1) * rows)
    if _ROUTED_EXPERT.search(name):
        parts, part = (1, 0) if parallel.expert_parallel else (parallel.workers, worker)
    elif split == "replicated" or (parallel.sequence_parallel_moe and ".shared_experts." in name):
        parts, part = 1, 0
    elif split == "key_value_rows" and arch.num_key_value_heads < parts:
        # Fewer heads than workers: neighbours keep the same head.
        parts, part = arch.num_key_value_heads, part // (parts // arch.num_key_value_heads)
    return size // parts * part, size // parts * (part + 1)


def indivisible(arch: Architecture, parallel: EngineParallel) -> Iterator[str]:
    """One line for each degree of parallelism that does not divide the model, as `engine.tensor: got X, expected Y`."""
    tensor, split_experts = parallel.tensor, arch.is_moe and not parallel.expert_parallel
    split_shared = 0 if parallel.sequence_parallel_moe else arch.shared_expert_intermediate_size
    for key, parts, size, what in (
        ("tensor", tensor, arch.num_attention_heads, "attention heads"),
        ("tensor", tensor, 0 if all(arch.moe_layers) else arch.intermediate_size, "intermediate columns"),
        ("tensor", tensor, split_shared, "columns of the shared experts"),
        ("tensor", tensor, padded_vocabulary(arch.vocab_size), "padded rows of the vocabulary"),
        ("tensor x data", parallel.workers, arch.moe_intermediate_size * split_experts, "columns of an expert"),
    ):
        if size % parts:
            yield f"engine.{key}: got {parts}, expected a divisor of the model's {size} {what}"
    heads = arch.num_key_value_heads
    if arch.latent is None and heads % tensor and tensor % heads:
        yield f"engine.tensor: got {tensor}, expected a divisor or a multiple of the model's {heads} key/value heads"


def _check_divides(arch: Architecture, parallel: EngineParallel) -> None:
    if fault := next(indivisible(arch, parallel), None):
        raise ValueError(fault)
