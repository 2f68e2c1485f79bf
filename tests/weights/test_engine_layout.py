"""The boxes of an engine's workers: some by hand, and every element counted over all workers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_dppo.architecture import Architecture
from megatron_dppo.weights.engine_layout import EngineParallel, engine_layout, padded_vocabulary
from megatron_dppo.weights.mapping import hub_shapes
from tests.weights.architectures import ARCHITECTURES, KIMI_K2, LATENT, QWEN3_235B, SMALL

ENGINES = [
    EngineParallel(),
    EngineParallel(tensor=2),
    EngineParallel(tensor=4),  # more workers than key/value heads
    EngineParallel(tensor=2, expert_parallel=True),
    EngineParallel(tensor=2, data=2),
    EngineParallel(data=3, expert_parallel=True),  # four experts on three workers
    EngineParallel(tensor=2, data=2, expert_parallel=True, sequence_parallel_moe=True),
]


def expected_copies(name: str, arch: Architecture, parallel: EngineParallel) -> int:
    """On how many workers of an instance every element of a tensor is."""
    if ".experts." in name:
        return 1
    if "shared_experts" in name and parallel.sequence_parallel_moe:
        return parallel.workers
    if any(part in name for part in ("norm", "gate.weight", "correction_bias", "q_a_proj", "kv_a_proj")):
        return parallel.workers
    if any(part in name for part in (".k_proj", ".v_proj")):
        return parallel.data * max(1, parallel.tensor // arch.num_key_value_heads)
    return parallel.data


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("parallel", ENGINES, ids=str)
def test_every_element_is_on_as_many_workers_as_it_should(parallel: EngineParallel, family: str) -> None:
    arch = dataclasses.replace(ARCHITECTURES[family], vocab_size=150)
    copies = {name: np.zeros(shape, int) for name, shape in hub_shapes(arch).items()}
    names = list(copies)
    for worker in range(parallel.workers):
        boxes = list(engine_layout(arch, parallel, worker))
        places = [names.index(box.tensor) for box in boxes]
        assert places == sorted(set(places))  # a box a tensor, in the order of the layers
        for box in boxes:
            assert copies[box.tensor][box.hub_index].shape == tuple(np.subtract(box.stop, box.start))
            copies[box.tensor][box.hub_index] += 1
    for name, count in copies.items():
        assert (count == expected_copies(name, arch, parallel)).all(), name


def boxes(arch: Architecture, parallel: EngineParallel, worker: int, prefix: str) -> dict[str, tuple]:
    found = (box for box in engine_layout(arch, parallel, worker) if box.tensor.startswith(prefix))
    return {box.tensor.removeprefix(prefix).removesuffix(".weight"): (box.start, box.stop) for box in found}


def test_a_layer_of_grouped_attention_over_more_workers_than_heads() -> None:
    """4 query heads and 2 key/value heads of size 2 over TP4: worker 1 has query head 1, key/value head 0."""
    attention = "model.layers.1.self_attn."
    assert boxes(SMALL, EngineParallel(tensor=4), 1, attention) == {
        "q_proj": ((2, 0), (4, 8)),
        "k_proj": ((0, 0), (2, 8)),
        "v_proj": ((0, 0), (2, 8)),
        "q_norm": ((0,), (2,)),
        "k_norm": ((0,), (2,)),
        "o_proj": ((0, 2), (8, 4)),
    }
    assert boxes(SMALL, EngineParallel(tensor=4), 2, attention)["k_proj"] == ((2, 0), (4, 8))
    assert boxes(SMALL, EngineParallel(tensor=4), 3, "model.layers.1.mlp.") == {  # 12 columns
        "gate_proj": ((9, 0), (12, 8)),
        "up_proj": ((9, 0), (12, 8)),
        "down_proj": ((0, 9), (8, 12)),
    }


def test_a_bias_is_cut_as_its_weight() -> None:
    found = boxes(ARCHITECTURES["qwen2"], EngineParallel(tensor=4), 3, "model.layers.0.self_attn.")
    assert [found[name] for name in ("q_proj.bias", "k_proj.bias", "v_proj.bias")] == [
        ((6,), (8,)),
        ((2,), (4,)),
        ((2,), (4,)),
    ]
    assert found["q_proj"] == ((6, 0), (8, 8)) and found["v_proj"] == ((2, 0), (4, 8))


def test_a_layer_of_latent_attention_with_experts() -> None:
    """TP2 x DP2, worker 3 = data rank 1, tensor rank 1: heads 2 and 3; without EP a quarter of every expert."""
    parallel = EngineParallel(tensor=2, data=2)
    assert boxes(LATENT, parallel, 3, "model.layers.1.self_attn.") == {
        "q_a_proj": ((0, 0), (6, 8)),
        "q_a_layernorm": ((0,), (6,)),
        "q_b_proj": ((10, 0), (20, 6)),
        "kv_a_proj_with_mqa": ((0, 0), (6, 8)),
        "kv_a_layernorm": ((0,), (4,)),
        "kv_b_proj": ((14, 0), (28, 4)),
        "o_proj": ((0, 8), (8, 16)),
    }
    mlp = boxes(LATENT, parallel, 3, "model.layers.1.mlp.")
    assert mlp["experts.2.gate_proj"] == ((3, 0), (4, 8)) and mlp["experts.2.down_proj"] == ((0, 3), (8, 4))
    assert mlp["shared_experts.gate_proj"] == ((4, 0), (8, 8)) and mlp["gate.e_score_correction_bias"] == ((0,), (4,))
    whole = EngineParallel(tensor=2, data=2, expert_parallel=True, sequence_parallel_moe=True)
    mlp = boxes(LATENT, whole, 3, "model.layers.1.mlp.")
    assert mlp["shared_experts.gate_proj"] == ((0, 0), (8, 8)) and mlp["experts.3.up_proj"] == ((0, 0), (4, 8))
    assert boxes(LATENT, whole, 3, "model.layers.0.mlp.")["gate_proj"] == ((6, 0), (12, 8))  # a dense layer is split


def test_experts_are_placed_in_order_and_the_first_workers_have_one_more() -> None:
    arch = dataclasses.replace(SMALL, num_experts=11)
    parallel, prefix = EngineParallel(tensor=2, data=2, expert_parallel=True), "model.layers.0.mlp.experts."
    owned = [sorted({int(name.split(".")[0]) for name in boxes(arch, parallel, w, prefix)}) for w in range(4)]
    assert owned == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


def test_the_vocabulary_is_padded_to_64_and_the_boxes_end_where_it_does() -> None:
    """130 rows are padded to 192: at TP4, 48 a worker; with 11 rows of 64 only the first worker has any."""
    assert [padded_vocabulary(n) for n in (1, 64, 65, 130, 151936)] == [64, 64, 128, 192, 151936]
    arch = dataclasses.replace(SMALL, vocab_size=130)
    rows = [boxes(arch, EngineParallel(tensor=4), worker, "lm_head") for worker in range(4)]
    assert [(box[""][0][0], box[""][1][0]) for box in rows if box] == [(0, 48), (48, 96), (96, 130)]
    assert [len(boxes(SMALL, EngineParallel(tensor=2), w, "model.embed")) for w in range(2)] == [1, 0]
    assert boxes(ARCHITECTURES["tied"], EngineParallel(), 0, "lm_head") == {}


def test_bytes_of_real_engines() -> None:
    """Parameters a worker keeps; Kimi-K2 at TP8 x DP4 with EP: 12 experts of 384 a layer and an eighth of the rest."""

    def kept(arch: Architecture, parallel: EngineParallel) -> int:
        return sum(
            int(np.prod([b - a for a, b in zip(box.start, box.stop, strict=True)]))
            for box in engine_layout(arch, parallel, 0)
        )

    expert = 3 * 7168 * 2048
    split = kept(KIMI_K2, EngineParallel(tensor=8, data=4, expert_parallel=True))
    whole = kept(KIMI_K2, EngineParallel(tensor=8, data=4, expert_parallel=True, sequence_parallel_moe=True))
    assert whole - split == 60 * expert * 7 // 8  # one shared expert a layer, whole instead of an eighth
    attention = (1536 + 576) * 7168 + 1536 + 512 + 64 * (192 * 1536 + 256 * 512 + 128 * 7168) // 8 + 2 * 7168
    vocabulary, dense = 2 * 163840 * 7168 // 8, 3 * 7168 * 18432 // 8
    moe = 12 * expert + expert // 8 + 384 * 7168 + 384
    assert split == vocabulary + 61 * attention + dense + 60 * moe + 7168 == 34_127_656_448
    # Qwen3-235B at TP8: the 4 key/value heads twice, norms and router on every worker.
    total = sum(int(np.prod(shape)) for shape in hub_shapes(QWEN3_235B).values())
    replicated = 94 * (2 * 4096 + 2 * 128 + 128 * 4096) + 4096
    key_value = 94 * 2 * 512 * 4096
    assert kept(QWEN3_235B, EngineParallel(tensor=8)) == (total - replicated - key_value) // 8 + replicated + (
        key_value // 4
    )


@pytest.mark.parametrize(
    ("changes", "parallel", "message"),
    [
        ({}, {"tensor": 3}, "engine.tensor: got 3, expected a divisor of the model's 4 attention heads"),
        ({"num_attention_heads": 6}, {"tensor": 6, "expert_parallel": True}, "got 6, .* 64 padded rows of the voc"),
        ({"intermediate_size": 6}, {"tensor": 4}, "engine.tensor: got 4, .* 6 intermediate columns"),
        ({}, {"tensor": 4, "data": 2}, "engine.tensor x data: got 8, .* 4 columns of an expert"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            {"tensor": 4},
            "engine.tensor: got 4, expected a divisor or a multiple of the model's 6 key/value heads",
        ),
    ],
)
def test_engines_that_do_not_divide_the_model_are_refused(changes: dict, parallel: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(engine_layout(dataclasses.replace(SMALL, **changes), EngineParallel(**parallel), 0))


def test_shared_experts_that_do_not_divide_are_refused_unless_they_are_whole() -> None:
    arch = dataclasses.replace(LATENT, shared_expert_intermediate_size=3)
    parallel = EngineParallel(tensor=2, data=2, expert_parallel=True)
    with pytest.raises(ValueError, match="engine.tensor: got 2, .* 3 columns of the shared experts"):
        list(engine_layout(arch, parallel, 0))
    assert list(engine_layout(arch, dataclasses.replace(parallel, sequence_parallel_moe=True), 0))


def test_engines_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="engine.data: got 0, expected at least 1"):
        EngineParallel(data=0)
    with pytest.raises(ValueError, match="engine.sequence_parallel_moe: got tensor = 2, data = 1, expert_parallel"):
        EngineParallel(tensor=2, expert_parallel=True, sequence_parallel_moe=True)
    with pytest.raises(ValueError, match="worker: got 2, expected 0..1"):
        list(engine_layout(SMALL, EngineParallel(tensor=2), 2))
