"""The boxes of all ranks tile every hub tensor exactly once, at every layout; some boxes computed by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter
from math import prod

import numpy as np
import pytest

from megatron_dppo.architecture import Architecture
from megatron_dppo.weights.layout import (
    Coordinates,
    Parallel,
    coordinates,
    megatron_layout,
    padded_vocab_size,
)
from megatron_dppo.weights.mapping import hub_shapes

SMALL = Architecture(
    model_type="qwen3_moe", num_layers=4, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=2,
    intermediate_size=12, vocab_size=11, max_position_embeddings=32, rope_theta=1e4, rms_norm_eps=1e-6,
    tie_word_embeddings=False, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=4,
    moe_layers=(True, False, True, True),
)  # fmt: skip
LAYOUTS = [
    Parallel(),
    Parallel(tensor=2, ranks=2),
    Parallel(tensor=4, expert=2, ranks=4),  # more TP ranks than key/value heads
    Parallel(tensor=2, expert=2, expert_tensor=2, ranks=8),
    Parallel(expert=4, ranks=4),
    Parallel(tensor=2, expert=2, pipeline=2, ranks=8),
    Parallel(pipeline=4, ranks=4),
    Parallel(tensor=2, ranks=6),  # three data-parallel replicas
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_owned_boxes_tile_every_tensor_once(parallel: Parallel, tied: bool) -> None:
    arch = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    written = {name: np.zeros(shape, int) for name, shape in hub_shapes(arch).items()}
    assert ("lm_head.weight" in written) is not tied
    for rank in range(parallel.ranks):
        for piece in megatron_layout(arch, parallel, rank):
            if piece.replica == 0:
                written[piece.tensor][piece.hub_index] += 1
    for name, count in written.items():
        assert (count == 1).all(), name


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_pieces_of_a_parameter_fill_it_without_overlap(parallel: Parallel) -> None:
    for rank in range(parallel.ranks):
        filled: dict[str, np.ndarray] = {}
        for piece in megatron_layout(SMALL, parallel, rank):
            box = filled.setdefault(piece.param, np.zeros((64, 64) if len(piece.start) == 2 else (64,), int))
            box[piece.local_index] += 1
        for name, box in filled.items():
            assert box.max() <= 1, name
            extent = [int(np.any(box, axis=tuple(a for a in range(box.ndim) if a != d)).sum()) for d in range(box.ndim)]
            assert box.sum() == prod(extent), f"{name} has holes"


def test_qkv_is_interleaved_by_group_and_split_inside_a_group() -> None:
    """TP4 over two groups of [q q k v], head size 2: rank 0 holds a group's queries, rank 1 its key and value."""

    def boxes(rank: int) -> list[tuple[str, int, int, int]]:
        layout = megatron_layout(SMALL, Parallel(tensor=4, ranks=4), rank)
        pieces = [p for p in layout if p.param == "decoder.layers.0.self_attention.linear_qkv.weight"]
        return [(p.tensor.split(".")[-2], p.start[0], p.stop[0], p.offset[0]) for p in pieces]

    assert boxes(0) == [("q_proj", 0, 4, 0)]
    assert boxes(1) == [("k_proj", 0, 2, 0), ("v_proj", 0, 2, 2)]
    assert boxes(2) == [("q_proj", 4, 8, 0)]
    assert boxes(3) == [("k_proj", 2, 4, 0), ("v_proj", 2, 4, 2)]


def test_gate_and_up_stay_beside_each_other_on_every_rank() -> None:
    layout = megatron_layout(SMALL, Parallel(tensor=2, ranks=2), 1)
    pieces = [p for p in layout if p.param == "decoder.layers.1.mlp.linear_fc1.weight"]
    assert [(p.tensor.split(".")[-2], p.start[0], p.stop[0], p.offset[0]) for p in pieces] == [
        ("gate_proj", 6, 12, 0),
        ("up_proj", 6, 12, 6),
    ]


def test_experts_and_layers_have_local_names() -> None:
    parallel = Parallel(expert=2, pipeline=2, ranks=4)
    rank = next(r for r in range(4) if coordinates(parallel, r).pipeline == 1 and coordinates(parallel, r).expert == 1)
    by_param = {p.param: p.tensor for p in megatron_layout(SMALL, parallel, rank)}
    assert by_param["decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"] == (
        "model.layers.2.mlp.experts.3.down_proj.weight"
    )
    assert "embedding.word_embeddings.weight" not in by_param
    assert by_param["output_layer.weight"] == "lm_head.weight"


def test_coordinates_are_megatrons_default_order() -> None:
    parallel = Parallel(tensor=2, expert=2, pipeline=2, ranks=8)
    assert coordinates(parallel, 0) == Coordinates(0, 0, 0, 0, 0, 0)
    assert coordinates(parallel, 3) == Coordinates(
        tensor=1, data=1, pipeline=0, expert_tensor=0, expert=1, expert_data=1
    )
    assert coordinates(parallel, 6) == Coordinates(
        tensor=0, data=1, pipeline=1, expert_tensor=0, expert=0, expert_data=1
    )


@pytest.mark.parametrize(
    ("vocab", "tensor", "padded"),
    [(151936, 8, 152576), (151936, 1, 151936), (16, 2, 16), (17, 2, 18), (255, 2, 256), (256, 2, 256), (260, 2, 512)],
)
def test_padded_vocabulary(vocab: int, tensor: int, padded: int) -> None:
    assert padded_vocab_size(vocab, tensor) == padded


def test_a_shard_of_padding_only_is_in_the_layout_with_nothing_to_copy() -> None:
    arch = dataclasses.replace(SMALL, vocab_size=513)  # padded to 1024 = 4 x 256: the last rank has no real row
    piece = next(
        p for p in megatron_layout(arch, Parallel(tensor=4, expert=2, ranks=4), 3) if p.param.startswith("embedding")
    )
    assert piece.start[0] == piece.stop[0]


def test_qwen3_235b_at_a_real_layout_tiles_by_volume() -> None:
    """94 layers x 128 experts over TP4 x PP2 x EP16, 32 ranks: element counts add up to the model's."""
    arch = dataclasses.replace(
        SMALL, num_layers=94, hidden_size=4096, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
        intermediate_size=12288, vocab_size=151936, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536,
        moe_layers=(True,) * 94,
    )  # fmt: skip
    parallel = Parallel(tensor=4, expert=16, pipeline=2, ranks=32)
    volume: Counter[str] = Counter()
    for rank in range(parallel.ranks):
        for piece in megatron_layout(arch, parallel, rank):
            if piece.replica == 0:
                volume[piece.tensor] += prod(b - a for a, b in zip(piece.start, piece.stop, strict=True))
    expected = {name: prod(shape) for name, shape in hub_shapes(arch).items()}
    assert volume == expected
    assert sum(expected.values()) == pytest.approx(235e9, rel=0.01)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (Parallel(pipeline=3, ranks=3), "parallel.pipeline: got 3, expected a divisor of 4 layers"),
        (Parallel(expert=3, ranks=3), "parallel.expert: got 3, expected a divisor of the model's 4 experts"),
        (Parallel(tensor=3, ranks=3), "parallel.tensor: got 3"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused(parallel: Parallel, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(megatron_layout(SMALL, parallel, 0))


def test_ranks_must_be_a_multiple_of_the_model_parallel_size() -> None:
    with pytest.raises(ValueError, match="tensor x pipeline = 4, expected a divisor of ranks = 6"):
        Parallel(tensor=2, pipeline=2, ranks=6)
