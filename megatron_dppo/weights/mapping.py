"""Which Hugging Face tensors make up each Megatron-core parameter: the table, one entry a parameter.

A Megatron parameter is a concatenation, along one axis, of row (or column) runs of hub tensors. The table says
which runs, in which order, and how a tensor-parallel group divides them. It knows nothing of ranks: `layout.py`
turns an entry into the boxes that one rank holds. Names on the Hugging Face side are those of the hub's files
(one tensor an expert).

Adding an architecture is adding rows: what it has beside, or in place of, the parts below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_dppo.architecture import Architecture

Split = Literal["replicated", "whole", "each"]
# A parameter that is one hub tensor: Megatron's name, the hub's, the shape, the axis that TP splits (None: no split).
Row = tuple[str, str, tuple[int, ...], int | None]


@dataclass(frozen=True)
class Run:
    """`count` consecutive indices, from `start`, of a hub tensor along the entry's axis."""

    tensor: str
    start: int
    count: int


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter.

    `param`: its name inside its pipeline stage's model, with `{layer}` and `{expert}` standing for local indices.
    `runs`: concatenated along `axis` they are the whole (unsplit) parameter.
    `split`: `whole` cuts the concatenation in equal parts; `each` cuts every run and concatenates the cuts (gate
    and up stay next to each other on every rank); `replicated` gives it to every rank of the group.
    `shape`: of the whole parameter, padding included. `layer`/`expert`: global indices, None outside of layers
    and experts. `float32`: a buffer that is no parameter, and stays in float32 whatever the model's dtype.
    """

    param: str
    runs: tuple[Run, ...]
    shape: tuple[int, ...]
    axis: int = 0
    split: Split = "replicated"
    layer: int | None = None
    expert: int | None = None
    float32: bool = False


def hub_shapes(arch: Architecture, experts: range | None = None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the model's Hugging Face checkpoint, in the order of the layers.

    `experts`: only these of every layer (None: all).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(arch, padded_vocab=arch.vocab_size, experts=experts):
        for run in entry.runs:
            extent = max(shapes[run.tensor][entry.axis] if run.tensor in shapes else 0, run.start + run.count)
            shapes[run.tensor] = tuple(extent if axis == entry.axis else n for axis, n in enumerate(entry.shape))
    return shapes


def float32_tensors(arch: Architecture) -> frozenset[str]:
    """Hub names of the buffers that stay in float32 (the routers' biases); the rest has the model's dtype."""
    found = (e for e in entries(arch, padded_vocab=arch.vocab_size) if e.float32)
    return frozenset(run.tensor for entry in found for run in entry.runs)


def hub_dtypes(arch: Architecture, dtype: str) -> dict[str, str]:
    """Name -> dtype of every tensor of a model in `dtype` ("bfloat16"), in the order of `hub_shapes`."""
    float32 = float32_tensors(arch)
    return {name: "float32" if name in float32 else dtype for name in hub_shapes(arch)}


def mtp_tensors(arch: Architecture, names: Iterable[str]) -> list[str]:
    """The tensors among `names` that belong to layers behind the last: multi-token prediction, never loaded."""
    layer = re.compile(r"model\.layers\.(\d+)\.")
    return [name for name in names if (found := layer.match(name)) and int(found[1]) >= arch.num_layers]


def entries(
    arch: Architecture,
    padded_vocab: int,
    transformer_engine: bool = False,
    layers: range | None = None,
    experts: range | None = None,
    grouped_experts: bool = False,
) -> Iterator[Entry]:
    """The table of a model, embedding first, head last.

    `padded_vocab`: rows of Megatron's embedding and head (the vocabulary rounded up so that TP divides it).
    `transformer_engine`: names of Megatron's TE layer spec, which keeps a norm inside the linear behind it.
    `layers`, `experts`: only these (None: all), so that a rank of a large model does not walk the others'.
    `grouped_experts`: names of Megatron's grouped expert module (one with a weight an expert), not of one module each.
    """
    hidden = arch.hidden_size
    vocab = (Run("model.embed_tokens.weight", 0, arch.vocab_size),)
    yield Entry("embedding.word_embeddings.weight", vocab, (padded_vocab, hidden), split="whole")
    attention = _grouped_attention if arch.latent is None else _latent_attention
    experts = range(arch.num_experts) if experts is None else experts
    for layer in range(arch.num_layers) if layers is None else layers:
        yield from attention(arch, layer, transformer_engine)
        if arch.moe_layers[layer]:
            yield from _moe(arch, layer, experts, grouped_experts)
        else:
            yield from _dense_mlp(arch, layer, transformer_engine)
    yield Entry("decoder.final_layernorm.weight", (Run("model.norm.weight", 0, hidden),), (hidden,))
    head = vocab if arch.tie_word_embeddings else (Run("lm_head.weight", 0, arch.vocab_size),)
    yield Entry("output_layer.weight", head, (padded_vocab, hidden), split="whole")


def _single(rows: Iterable[Row], layer: int) -> Iterator[Entry]:
    """Entries of parameters that are one hub tensor each; names are inside the layer."""
    for param, tensor, shape, axis in rows:
        run = Run(f"model.layers.{layer}.{tensor}", 0, shape[axis or 0])
        split: Split = "replicated" if axis is None else "whole"
        yield Entry("decoder.layers.{layer}." + param, (run,), shape, axis or 0, split, layer)


def _grouped_attention(arch: Architecture, layer: int, transformer_engine: bool) -> Iterator[Entry]:
    """Qwen2 (bias), Qwen3 (norms of the heads), Llama 3 (neither)."""
    hidden, dim, query = arch.hidden_size, arch.head_dim, arch.heads_per_group * arch.head_dim
    norm = "self_attention.linear_qkv.layer_norm_weight" if transformer_engine else "input_layernorm.weight"
    yield from _single([(norm, "input_layernorm.weight", (hidden,), None)], layer)
    rows = arch.num_key_value_heads * (query + 2 * dim)
    shapes: dict[str, tuple[int, ...]] = {"weight": (rows, hidden)} | ({"bias": (rows,)} if arch.qkv_bias else {})
    for kind, shape in shapes.items():
        # Megatron interleaves by group: the group's query heads, its key head, its value head, then the next group.
        runs: list[Run] = []
        for group in range(arch.num_key_value_heads):
            for part, count in (("q", query), ("k", dim), ("v", dim)):
                runs.append(Run(f"model.layers.{layer}.self_attn.{part}_proj.{kind}", group * count, count))
        param = "decoder.layers.{layer}.self_attention.linear_qkv." + kind
        yield Entry(param, tuple(runs), shape, split="whole", layer=layer)
    columns = arch.num_attention_heads * dim
    norms: list[Row] = [
        ("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", (dim,), None),
        ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", (dim,), None),
    ]
    out: Row = ("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (hidden, columns), 1)
    yield from _single([*(norms if arch.qk_norm else []), out], layer)


def _latent_attention(arch: Architecture, layer: int, transformer_engine: bool) -> Iterator[Entry]:
    """DeepSeek-V3, Kimi-K2: down projections on every TP rank, up projections split by heads."""
    latent, hidden, heads = arch.latent, arch.hidden_size, arch.num_attention_heads
    assert latent is not None
    q_rank, kv_rank = latent.q_lora_rank, latent.kv_lora_rank
    queries, values = heads * arch.head_dim, heads * latent.v_head_dim
    q_norm, kv_norm = "q_layernorm.weight", "kv_layernorm.weight"
    if transformer_engine:
        q_norm, kv_norm = "linear_q_up_proj.layer_norm_weight", "linear_kv_up_proj.layer_norm_weight"
    rows: list[Row]
    if q_rank is None:
        rows = [("linear_q_proj.weight", "q_proj.weight", (queries, hidden), 0)]
    else:
        rows = [
            ("linear_q_down_proj.weight", "q_a_proj.weight", (q_rank, hidden), None),
            (q_norm, "q_a_layernorm.weight", (q_rank,), None),
            ("linear_q_up_proj.weight", "q_b_proj.weight", (queries, q_rank), 0),
        ]
    rows += [
        ("linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight", (kv_rank + latent.qk_rope_head_dim, hidden), None),
        (kv_norm, "kv_a_layernorm.weight", (kv_rank,), None),
        ("linear_kv_up_proj.weight", "kv_b_proj.weight", (heads * latent.qk_nope_head_dim + values, kv_rank), 0),
        ("linear_proj.weight", "o_proj.weight", (hidden, values), 1),
    ]
    yield from _single([("input_layernorm.weight", "input_layernorm.weight", (hidden,), None)], layer)
    placed: list[Row] = [(f"self_attention.{p}", f"self_attn.{t}", shape, axis) for p, t, shape, axis in rows]
    yield from _single(placed, layer)


def _dense_mlp(arch: Architecture, layer: int, transformer_engine: bool) -> Iterator[Entry]:
    norm = "mlp.linear_fc1.layer_norm_weight" if transformer_engine else "pre_mlp_layernorm.weight"
    yield from _single([(norm, "post_attention_layernorm.weight", (arch.hidden_size,), None)], layer)
    yield from _gated_mlp("mlp.", "mlp.{}.weight", arch.hidden_size, arch.intermediate_size, layer)


def _moe(arch: Architecture, layer: int, experts: range, grouped: bool) -> Iterator[Entry]:
    hidden = arch.hidden_size
    rows: list[Row] = [
        ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (hidden,), None),
        ("mlp.router.weight", "mlp.gate.weight", (arch.num_experts, hidden), None),
    ]
    yield from _single(rows, layer)
    if arch.sigmoid_router:
        bias: Row = ("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", (arch.num_experts,), None)
        yield from (replace(entry, float32=True) for entry in _single([bias], layer))
    if width := arch.shared_expert_intermediate_size:
        yield from _gated_mlp("mlp.shared_experts.", "mlp.shared_experts.{}.weight", hidden, width, layer)
    local = "mlp.experts.{}.weight{{expert}}" if grouped else "mlp.experts.local_experts.{{expert}}.{}.weight"
    for expert in experts:
        yield from _gated_mlp(f"mlp.experts.{expert}.", local, hidden, arch.moe_intermediate_size, layer, expert)


def _gated_mlp(hub: str, local: str, hidden: int, width: int, layer: int, expert: int | None = None) -> Iterator[Entry]:
    """`hub`: what stands before the hub's three names; `local`: Megatron's name, with `{}` for which linear."""
    hub, local = f"model.layers.{layer}.{hub}", "decoder.layers.{{layer}}." + local
    up, down = local.format("linear_fc1"), local.format("linear_fc2")
    gate_up = (Run(hub + "gate_proj.weight", 0, width), Run(hub + "up_proj.weight", 0, width))
    yield Entry(up, gate_up, (2 * width, hidden), split="each", layer=layer, expert=expert)
    columns = (Run(hub + "down_proj.weight", 0, width),)
    yield Entry(down, columns, (hidden, width), axis=1, split="whole", layer=layer, expert=expert)
