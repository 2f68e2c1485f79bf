"""Which Hugging Face tensors make up each Megatron-core parameter: the table, one entry a parameter.

A Megatron parameter is a concatenation, along one axis, of row (or column) runs of hub tensors. The table says
which runs, in which order, and how a tensor-parallel group divides them. It knows nothing of ranks: `layout.py`
turns an entry into the boxes that one rank holds. Names on the Hugging Face side are those of the hub's files
(one tensor an expert).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_dppo.architecture import Architecture

Split = Literal["replicated", "whole", "each"]


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
    and experts.
    """

    param: str
    runs: tuple[Run, ...]
    shape: tuple[int, ...]
    axis: int = 0
    split: Split = "replicated"
    layer: int | None = None
    expert: int | None = None


def hub_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the model's Hugging Face checkpoint, in the order of the layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(arch, padded_vocab=arch.vocab_size):
        for run in entry.runs:
            extent = max(shapes[run.tensor][entry.axis] if run.tensor in shapes else 0, run.start + run.count)
            shapes[run.tensor] = tuple(extent if axis == entry.axis else n for axis, n in enumerate(entry.shape))
    return shapes


def entries(arch: Architecture, padded_vocab: int, transformer_engine: bool = False) -> Iterator[Entry]:
    """The table of a Qwen3 or Qwen3-MoE model, embedding first, head last.

    `padded_vocab`: rows of Megatron's embedding and head (the vocabulary rounded up so that TP divides it).
    `transformer_engine`: names of Megatron's TE layer spec, which keeps a norm inside the linear behind it.
    """
    hidden = arch.hidden_size
    vocab = (Run("model.embed_tokens.weight", 0, arch.vocab_size),)
    yield Entry("embedding.word_embeddings.weight", vocab, (padded_vocab, hidden), split="whole")
    for layer in range(arch.num_layers):
        yield from _attention(arch, layer, transformer_engine)
        yield from (_moe if arch.moe_layers[layer] else _dense_mlp)(arch, layer, transformer_engine)
    yield Entry("decoder.final_layernorm.weight", (Run("model.norm.weight", 0, hidden),), (hidden,))
    head = vocab if arch.tie_word_embeddings else (Run("lm_head.weight", 0, arch.vocab_size),)
    yield Entry("output_layer.weight", head, (padded_vocab, hidden), split="whole")


def _attention(arch: Architecture, layer: int, transformer_engine: bool) -> Iterator[Entry]:
    hub, local = f"model.layers.{layer}.", "decoder.layers.{layer}."
    hidden, dim, query = arch.hidden_size, arch.head_dim, arch.heads_per_group * arch.head_dim
    norm = "self_attention.linear_qkv.layer_norm_weight" if transformer_engine else "input_layernorm.weight"
    yield Entry(local + norm, (Run(hub + "input_layernorm.weight", 0, hidden),), (hidden,), layer=layer)
    # Megatron interleaves by group: the group's query heads, its key head, its value head, then the next group.
    runs: list[Run] = []
    for group in range(arch.num_key_value_heads):
        runs.append(Run(hub + "self_attn.q_proj.weight", group * query, query))
        runs.append(Run(hub + "self_attn.k_proj.weight", group * dim, dim))
        runs.append(Run(hub + "self_attn.v_proj.weight", group * dim, dim))
    rows = arch.num_key_value_heads * (query + 2 * dim)
    yield Entry(local + "self_attention.linear_qkv.weight", tuple(runs), (rows, hidden), split="whole", layer=layer)
    for megatron, hugging_face in (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")):
        run = Run(f"{hub}self_attn.{hugging_face}.weight", 0, dim)
        yield Entry(f"{local}self_attention.{megatron}.weight", (run,), (dim,), layer=layer)
    columns = arch.num_attention_heads * dim
    run = Run(hub + "self_attn.o_proj.weight", 0, columns)
    yield Entry(
        local + "self_attention.linear_proj.weight", (run,), (hidden, columns), axis=1, split="whole", layer=layer
    )


def _dense_mlp(arch: Architecture, layer: int, transformer_engine: bool) -> Iterator[Entry]:
    hub, local = f"model.layers.{layer}.", "decoder.layers.{layer}."
    norm = "mlp.linear_fc1.layer_norm_weight" if transformer_engine else "pre_mlp_layernorm.weight"
    run = Run(hub + "post_attention_layernorm.weight", 0, arch.hidden_size)
    yield Entry(local + norm, (run,), (arch.hidden_size,), layer=layer)
    yield from _gated_mlp(hub + "mlp.", local + "mlp.", arch.hidden_size, arch.intermediate_size, layer, None)


def _moe(arch: Architecture, layer: int, transformer_engine: bool) -> Iterator[Entry]:
    hub, local = f"model.layers.{layer}.", "decoder.layers.{layer}."
    hidden, experts = arch.hidden_size, arch.num_experts
    run = Run(hub + "post_attention_layernorm.weight", 0, hidden)
    yield Entry(local + "pre_mlp_layernorm.weight", (run,), (hidden,), layer=layer)
    run = Run(hub + "mlp.gate.weight", 0, experts)
    yield Entry(local + "mlp.router.weight", (run,), (experts, hidden), layer=layer)
    for expert in range(experts):
        expert_local = local + "mlp.experts.local_experts.{expert}."
        expert_hub = f"{hub}mlp.experts.{expert}."
        yield from _gated_mlp(expert_hub, expert_local, hidden, arch.moe_intermediate_size, layer, expert)


def _gated_mlp(hub: str, local: str, hidden: int, width: int, layer: int, expert: int | None) -> Iterator[Entry]:
    gate_up = (Run(hub + "gate_proj.weight", 0, width), Run(hub + "up_proj.weight", 0, width))
    yield Entry(local + "linear_fc1.weight", gate_up, (2 * width, hidden), split="each", layer=layer, expert=expert)
    down = (Run(hub + "down_proj.weight", 0, width),)
    yield Entry(local + "linear_fc2.weight", down, (hidden, width), axis=1, split="whole", layer=layer, expert=expert)
