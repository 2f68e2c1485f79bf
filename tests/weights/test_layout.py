"""The boxes of all ranks tile every hub tensor exactly once, at every layout; some boxes computed by hand."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from math import prod

import numpy as np
import pytest

from megatron_dppo.weights.layout import (
    Coordinates,
    Parallel,
    chunk_layers,
    coordinates,
    megatron_layout,
    padded_vocab_size,
    uneven_chunks,
)
from megatron_dppo.weights.mapping import entries, float32_tensors, hub_shapes, mtp_tensors
from tests.weights.architectures import ARCHITECTURES, KIMI_K2, LATENT, LAYOUTS, QWEN3_235B, SMALL


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_owned_boxes_tile_every_tensor_once(parallel: Parallel, family: str) -> None:
    arch = ARCHITECTURES[family]
    written = {name: np.zeros(shape, int) for name, shape in hub_shapes(arch).items()}
    assert ("lm_head.weight" in written) is not arch.tie_word_embeddings
    for rank in range(parallel.ranks):
        for piece in megatron_layout(arch, parallel, rank):
            if piece.replica == 0:
                written[piece.tensor][piece.hub_index] += 1
    for name, count in written.items():
        assert (count == 1).all(), name


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_pieces_of_a_parameter_fill_it_without_overlap(parallel: Parallel, family: str) -> None:
    for rank in range(parallel.ranks):
        filled: dict[str, np.ndarray] = {}
        for piece in megatron_layout(ARCHITECTURES[family], parallel, rank):
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


def test_a_bias_is_interleaved_as_its_weight() -> None:
    def boxes(kind: str) -> list[tuple[str, int, int, int]]:
        layout = megatron_layout(ARCHITECTURES["qwen2"], Parallel(tensor=4, ranks=4), 3)
        pieces = [p for p in layout if p.param == f"decoder.layers.0.self_attention.linear_qkv.{kind}"]
        return [(p.tensor.removesuffix(kind), p.start[0], p.stop[0], p.offset[0]) for p in pieces]

    assert boxes("bias") == boxes("weight")
    assert [box[1:] for box in boxes("bias")] == [(2, 4, 0), (2, 4, 2)]


def test_latent_attention_is_split_by_heads_and_its_down_projections_are_whole() -> None:
    """TP2 over four heads of 3 + 2 query rows, 3 + 4 key and value rows, 4 value columns; rank 1 has heads 2 and 3."""
    layout = megatron_layout(LATENT, Parallel(tensor=2, ranks=2), 1)
    prefix = "decoder.layers.1.self_attention."
    pieces = [p for p in layout if p.param.startswith(prefix)]
    boxes = {
        p.param.removeprefix(prefix): (p.tensor.removeprefix("model.layers.1.self_attn."), p.start, p.stop)
        for p in pieces
    }
    assert boxes == {
        "linear_q_down_proj.weight": ("q_a_proj.weight", (0, 0), (6, 8)),
        "q_layernorm.weight": ("q_a_layernorm.weight", (0,), (6,)),
        "linear_q_up_proj.weight": ("q_b_proj.weight", (10, 0), (20, 6)),
        "linear_kv_down_proj.weight": ("kv_a_proj_with_mqa.weight", (0, 0), (6, 8)),
        "kv_layernorm.weight": ("kv_a_layernorm.weight", (0,), (4,)),
        "linear_kv_up_proj.weight": ("kv_b_proj.weight", (14, 0), (28, 4)),
        "linear_proj.weight": ("o_proj.weight", (0, 8), (8, 16)),
    }
    assert {p.replica for p in pieces if p.start[0] == p.start[-1] == 0} == {1}  # rank 0 exports what both hold


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_transformer_engine_renames_norms_only(family: str) -> None:
    plain, fused = (list(entries(ARCHITECTURES[family], 11, engine)) for engine in (False, True))
    assert [dataclasses.replace(e, param="") for e in plain] == [dataclasses.replace(e, param="") for e in fused]
    renamed = {(a.param, b.param) for a, b in zip(plain, fused, strict=True) if a.param != b.param}
    assert renamed and all("norm" in a and b.endswith("layer_norm_weight") for a, b in renamed)


def test_shared_experts_are_split_over_tp_and_the_routers_bias_is_not() -> None:
    parallel = Parallel(tensor=2, expert=2, ranks=2)  # experts are not split, shared experts are
    shapes = {}
    for piece in megatron_layout(LATENT, parallel, 1):
        if piece.param.startswith("decoder.layers.1.mlp."):
            shapes[piece.tensor.removeprefix("model.layers.1.mlp.")] = (piece.start, piece.stop)
    assert shapes["shared_experts.gate_proj.weight"] == ((4, 0), (8, 8))
    assert shapes["shared_experts.down_proj.weight"] == ((0, 4), (8, 8))
    assert shapes["experts.2.gate_proj.weight"] == ((0, 0), (4, 8))
    assert shapes["gate.e_score_correction_bias"] == ((0,), (4,))
    assert float32_tensors(LATENT) == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 3)}
    assert not float32_tensors(SMALL)


def test_layers_behind_the_last_are_multi_token_prediction() -> None:
    names = ["model.layers.3.mlp.gate.weight", "model.layers.4.eh_proj.weight", "model.layers.10.x", "lm_head.weight"]
    assert mtp_tensors(LATENT, names) == names[1:3]


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
    assert coordinates(parallel, 0) == Coordinates(0, 0, 0, 0, 0, 0, 0)
    assert coordinates(parallel, 3) == Coordinates(
        tensor=1, context=0, data=1, pipeline=0, expert_tensor=0, expert=1, expert_data=1
    )
    assert coordinates(parallel, 6) == Coordinates(
        tensor=0, context=0, data=1, pipeline=1, expert_tensor=0, expert=0, expert_data=1
    )
    parallel = Parallel(tensor=2, context=2, expert=2, pipeline=2, ranks=16)
    assert coordinates(parallel, 15) == Coordinates(
        tensor=1, context=1, data=1, pipeline=1, expert_tensor=0, expert=1, expert_data=3
    )
    assert coordinates(parallel, 10) == Coordinates(
        tensor=0, context=1, data=0, pipeline=1, expert_tensor=0, expert=0, expert_data=1
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
    arch, parallel = QWEN3_235B, Parallel(tensor=4, expert=16, pipeline=2, ranks=32)
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
    with pytest.raises(ValueError, match="tensor x context x pipeline = 4, expected a divisor of ranks = 6"):
        Parallel(tensor=2, pipeline=2, ranks=6)


def test_chunks_of_virtual_stages_alternate_between_ranks() -> None:
    """Four layers, two ranks of two chunks: rank 0 has layers 0 and 2, rank 1 layers 1 and 3."""

    def norms(rank: int, **changes: object) -> list[tuple[str, str]]:
        layout = megatron_layout(SMALL, Parallel(pipeline=2, virtual=2, ranks=2, **changes), rank)  # type: ignore[arg-type]
        return [
            (p.param, p.tensor) for p in layout if p.tensor.endswith(("input_layernorm.weight", "model.norm.weight"))
        ]

    plain = "decoder.layers.{}.input_layernorm.weight", "model.layers.{}.input_layernorm.weight"
    assert norms(0) == [
        ("chunk0." + plain[0].format(0), plain[1].format(0)),
        ("chunk1." + plain[0].format(0), plain[1].format(2)),
    ]
    assert norms(1)[-1] == ("chunk1.decoder.final_layernorm.weight", "model.norm.weight")
    uneven = norms(1, chunk_layers=(0, 2, 1, 1))
    assert [tensor.split(".")[2] for _, tensor in uneven[:3]] == ["0", "1", "3"]
    assert uneven[1][0] == "chunk0." + plain[0].format(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_layers": (1, 2)}, "parallel.chunk_layers: got 3 layers in all, expected the model's 4"),
        ({"virtual": 3}, "parallel.pipeline x virtual: got 6, expected a divisor of 4 layers"),
    ],
)
def test_chunks_that_do_not_fit_the_model(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(megatron_layout(SMALL, Parallel(pipeline=2, ranks=2, **changes), 0))


def test_chunks_that_do_not_fit_the_ranks() -> None:
    with pytest.raises(ValueError, match="parallel.chunk_layers: got 3 numbers, expected pipeline x virtual = 2"):
        Parallel(pipeline=2, ranks=2, chunk_layers=(1, 1, 2))
    with pytest.raises(ValueError, match="parallel.virtual: got 2, expected 1 with one pipeline stage"):
        Parallel(virtual=2)
    with pytest.raises(ValueError, match="parallel.chunk_layers: got no layer for pipeline rank 1, expected one"):
        Parallel(pipeline=3, ranks=3, chunk_layers=(2, 0, 2))
    with pytest.raises(ValueError, match="parallel.chunk_layers: got -1 layers, expected at least 0"):
        Parallel(pipeline=2, ranks=2, chunk_layers=(-1, 5))


def test_layers_that_do_not_divide_have_a_way_out() -> None:
    message = r"got 3, expected a divisor of 4 layers or parallel.chunk_layers, such as \[1,2,1\]$"
    with pytest.raises(ValueError, match=message):
        chunk_layers(4, Parallel(pipeline=3, ranks=3), 0)
    with pytest.raises(ValueError, match="expected a divisor of 4 layers$"):  # a stage would have none
        chunk_layers(4, Parallel(pipeline=8, ranks=8), 0)
    for num_layers, chunks in ((61, 16), (94, 8), (5, 5), (7, 2)):
        uneven = uneven_chunks(num_layers, chunks)
        assert (sum(uneven), len(uneven), max(uneven) - min(uneven) <= 1) == (num_layers, chunks, True)


def test_both_spellings_of_experts_hold_the_same_boxes() -> None:
    """Megatron's grouped module has its experts' weights side by side: `linear_fc1.weight0`, `weight1`, ..."""
    parallel = Parallel(tensor=2, expert=2, expert_tensor=2, ranks=4)
    for rank in range(parallel.ranks):
        each = list(megatron_layout(SMALL, parallel, rank))
        grouped = list(megatron_layout(SMALL, parallel, rank, grouped_experts=True))
        assert {p.param for p in grouped if ".experts." in p.param and "layers.0." in p.param} == {
            f"decoder.layers.0.mlp.experts.linear_fc{i}.weight{expert}" for i in (1, 2) for expert in (0, 1)
        }
        for one, other in zip(each, grouped, strict=True):
            name = re.sub(r"local_experts\.(\d+)\.(\w+)\.weight", r"\2.weight\1", one.param)
            assert dataclasses.replace(one, param=name) == other


def test_every_rank_of_a_trillion_parameters_in_seconds() -> None:
    """Kimi-K2's numbers at TP 8 x PP 8 x EP 32, uneven stages: the boxes of all 256 ranks, counted."""
    parallel = Parallel(tensor=8, expert=32, pipeline=8, ranks=256, chunk_layers=(8, 8, 8, 8, 8, 8, 8, 5))
    owned = sum(
        prod(b - a for a, b in zip(piece.start, piece.stop, strict=True))
        for rank in range(parallel.ranks)
        for piece in megatron_layout(KIMI_K2, parallel, rank)
        if piece.replica == 0
    )
    assert owned == sum(prod(shape) for shape in hub_shapes(KIMI_K2).values())
    assert 1.0e12 < owned < 1.05e12
