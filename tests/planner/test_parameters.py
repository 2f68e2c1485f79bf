"""Counts of the closed form against the layout that weights are loaded and moved by."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from megatron_dppo.architecture import Architecture
from megatron_dppo.planner.engine import kv_bytes_per_token, worker_weights
from megatron_dppo.planner.parameters import stage_parameters
from megatron_dppo.weights.engine_layout import EngineParallel, engine_layout, indivisible
from megatron_dppo.weights.layout import Parallel, coordinates, megatron_layout, padded_vocab_size, parameter_shapes
from megatron_dppo.weights.mapping import float32_tensors
from tests.planner.configs import shape
from tests.weights.architectures import ARCHITECTURES, KIMI_K2, LAYOUTS

ENGINES = [
    EngineParallel(),
    EngineParallel(tensor=2),
    EngineParallel(tensor=2, expert_parallel=True),
    EngineParallel(tensor=4, expert_parallel=True),
]


def laid_out(arch: Architecture, parallel: Parallel, rank: int, transformer_engine: bool) -> Counter[str]:
    """Elements of a rank's parameters by kind, the vocabulary's padding added."""
    pieces = list(megatron_layout(arch, parallel, rank, transformer_engine, transformer_engine))
    vocabulary = padded_vocab_size(arch.vocab_size, parallel.tensor) // parallel.tensor * arch.hidden_size
    found: Counter[str] = Counter()
    for name, shape_ in parameter_shapes(pieces).items():
        if name.endswith("expert_bias"):
            found["float32"] += math.prod(shape_)
        elif ".mlp.experts." in name:
            found["expert"] += math.prod(shape_)
        elif name.endswith(("word_embeddings.weight", "output_layer.weight")):
            found["dense"] += vocabulary
        else:
            found["dense"] += math.prod(shape_)
    return found


@pytest.mark.parametrize("transformer_engine", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_every_rank_has_what_its_layout_says(family: str, parallel: Parallel, transformer_engine: bool) -> None:
    arch = ARCHITECTURES[family]
    if not arch.is_moe and parallel.expert * parallel.expert_tensor > 1:
        pytest.skip("no experts")
    for rank in range(parallel.ranks):
        found = stage_parameters(arch, parallel, coordinates(parallel, rank).pipeline)
        expected = laid_out(arch, parallel, rank, transformer_engine)
        assert (found.dense, found.expert, found.float32) == tuple(expected[k] for k in ("dense", "expert", "float32"))


def test_a_trillion_parameters_on_two_hundred_and_fifty_six_ranks() -> None:
    parallel = Parallel(tensor=8, expert=64, pipeline=4, ranks=256, chunk_layers=(15, 16, 15, 15))
    for rank in (0, 255):
        found = stage_parameters(KIMI_K2, parallel, coordinates(parallel, rank).pipeline)
        assert found.dense == laid_out(KIMI_K2, parallel, rank, False)["dense"]
        assert found.expert == laid_out(KIMI_K2, parallel, rank, False)["expert"]
    of_experts = sum(64 * stage_parameters(KIMI_K2, parallel, stage).expert for stage in range(4))
    assert of_experts == 60 * 384 * 3 * 7168 * 2048


def test_qwen3_30b_at_tp4_ep8_by_hand() -> None:
    found = stage_parameters(shape("Qwen3-30B-A3B-Base"), Parallel(tensor=4, expert=8, ranks=16), 0)
    attention = (32 + 2 * 4) * 128 * 2048 // 4 + 32 * 128 * 2048 // 4 + 2 * 128
    layer = attention + 2 * 2048 + 128 * 2048
    vocabulary = 152064 // 4 * 2048  # 151936 rows, padded to a multiple of 512
    assert found.dense == 48 * layer + 2 * vocabulary + 2048
    assert found.expert == 48 * (128 // 8) * 3 * 2048 * 768
    assert found.largest == vocabulary


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_an_engine_worker_keeps_what_its_layout_says(family: str, engine: EngineParallel) -> None:
    arch = ARCHITECTURES[family]
    if (engine.expert_parallel and not arch.is_moe) or list(indivisible(arch, engine)):
        pytest.skip("not a layout of this model")
    float32 = float32_tensors(arch)
    for worker in range(engine.workers):
        boxes = list(engine_layout(arch, engine, worker))
        sizes = [(math.prod(b - a for a, b in zip(x.start, x.stop, strict=True)), x.tensor in float32) for x in boxes]
        assert worker_weights(arch, engine, 2, worker) == sum(size * (4 if wide else 2) for size, wide in sizes)


def test_cache_of_a_token_by_hand() -> None:
    qwen = shape("Qwen3-30B-A3B-Base")  # 4 KV heads of 128, 48 layers
    assert [kv_bytes_per_token(qwen, tensor, 2) for tensor in (1, 4, 8)] == [2 * 2 * 48 * 128 * n for n in (4, 1, 1)]
    assert kv_bytes_per_token(shape("DeepSeek-V3"), 8, 2) == 2 * 61 * (512 + 64)
