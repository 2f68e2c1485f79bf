"""What a Megatron torch_dist checkpoint calls its tensors, and which rows of which hub tensor fill which box of them.

A checkpoint holds global tensors, whatever the ranks that wrote it: parameters before any split. Megatron spells
them in three ways, and a loader has to ask for the one that is there (`content_metadata` in the checkpoint says):

- stacked: one tensor for all layers, with a leading axis of layers, and one of experts behind it;
- per_layer: one a layer, experts stacked (Megatron's choice where dense and MoE layers mix);
- singleton: one a layer and expert, gate and up apart. The only one whose loading scales to many experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_dppo.architecture import Architecture
from megatron_dppo.weights.mapping import Entry, Run, entries

KeyScheme = Literal["stacked", "per_layer", "singleton"]
SCHEMES: tuple[KeyScheme, ...] = get_args(KeyScheme)
BLOCK_BYTES = 64 << 20  # the most that is in memory at once
MANY_EXPERTS = 1024  # layers x experts beyond which Megatron's loading of stacked tensors takes minutes
# Norms that Transformer Engine keeps inside the linear layer behind them; Megatron's other specs follow, or not.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
LOCAL_EXPERT = "local_experts.{expert}."


@dataclass(frozen=True)
class Block:
    """`rows` whole rows of a hub tensor, and the box of a global tensor that they fill.

    `keys`: the names that layer specs have for the tensor (all are written, any is read).
    """

    tensor: str
    row: int
    rows: int
    keys: tuple[str, ...]
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def default_scheme(arch: Architecture) -> KeyScheme:
    """What Megatron asks for by default, as far as its loading of that scales."""
    if arch.num_experts * arch.num_layers > MANY_EXPERTS:
        return "singleton"
    return "stacked" if len(set(arch.moe_layers)) == 1 else "per_layer"


def content_metadata(scheme: KeyScheme) -> dict[str, bool]:
    """What to pass to Megatron's `sharded_state_dict(metadata=...)` so that it asks for this scheme's keys."""
    return {"singleton_local_shards": scheme == "singleton", "non_homogeneous_layers": scheme != "stacked"}


def global_blocks(
    arch: Architecture,
    scheme: KeyScheme,
    itemsize: int = 4,
    block_bytes: int = BLOCK_BYTES,
    layers: range | None = None,
) -> Iterator[Block]:
    """Every row of every hub tensor once, in the order of the mapping table; `itemsize`: of the widest dtype.

    `layers`: only these (None: all).
    """
    plain = entries(arch, padded_vocab=arch.vocab_size, layers=layers)
    fused = entries(arch, padded_vocab=arch.vocab_size, transformer_engine=True, layers=layers)
    for entry, other in zip(plain, fused, strict=True):
        if entry.param == "output_layer.weight" and arch.tie_word_embeddings:
            continue  # Megatron saves it as the embedding
        names = dict.fromkeys((entry.param, _fused(entry.param), other.param))
        for run, suffix, extent, position in _placed_runs(entry, scheme):
            keys = tuple(_key(name, entry, scheme) + suffix for name in names)
            rest = entry.shape[1:]
            lead, lead_shape = _leading_axes(entry, arch, scheme)
            most = max(1, block_bytes // (math.prod(rest) * itemsize))
            first, rows = (run.start, run.count) if entry.axis == 0 else (0, entry.shape[0])
            for row in range(0, rows, most):
                count = min(most, rows - row)
                yield Block(
                    tensor=run.tensor,
                    row=first + row,
                    rows=count,
                    keys=keys,
                    global_shape=(*lead_shape, extent, *rest),
                    offset=(*lead, position + row, *(0 for _ in rest)),
                    shape=(*(1 for _ in lead), count, *rest),
                )


def extra_states(arch: Architecture, scheme: KeyScheme) -> Iterator[str]:
    """Keys of the empty objects that Megatron's modules ask for beside their tensors; more than any one spec wants."""
    seen: set[str] = set()
    for transformer_engine in (False, True):
        for entry in entries(arch, arch.vocab_size, transformer_engine):
            module = entry.param.rpartition(".")[0]
            modules = (
                [module, module.rpartition(".")[0] + ".core_attention"] if "self_attention" in module else [module]
            )
            for name in modules:
                key = _key(f"{name}._extra_state", entry, scheme) + _shard_suffix(entry, arch, scheme)
                if key not in seen:
                    seen.add(key)
                    yield key


def _fused(name: str) -> str:
    for plain, fused in FUSED_NORMS.items():
        if plain in name:
            return name.replace(plain, fused)
    return name


def _placed_runs(entry: Entry, scheme: KeyScheme) -> Iterator[tuple[Run, str, int, int]]:
    """Each run with the suffix of its key, the extent of that key's tensor along the axis, and its place there."""
    if entry.axis == 1:
        (run,) = entry.runs
        assert run.start == 0 and run.count == entry.shape[1], "columns of a hub tensor are not split between entries"
        yield run, "", entry.shape[0], 0
        return
    if scheme == "singleton" and entry.split == "each":
        gate, up = entry.runs
        yield gate, "_w", gate.count, 0
        yield up, "_v", up.count, 0
        return
    position = 0
    for run in entry.runs:
        yield run, "", entry.shape[0], position
        position += run.count


def _key(name: str, entry: Entry, scheme: KeyScheme) -> str:
    if entry.expert is not None:
        name = name.replace(LOCAL_EXPERT, f"experts.{entry.expert}." if scheme == "singleton" else "experts.")
    if entry.layer is None:
        return name
    return name.replace("layers.{layer}.", "layers." if scheme == "stacked" else f"layers.{entry.layer}.")


def _leading_axes(entry: Entry, arch: Architecture, scheme: KeyScheme) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and extent of the axes in front: layers, then experts."""
    axes = []
    if scheme == "stacked" and entry.layer is not None:
        axes.append((entry.layer, arch.num_layers))
    if scheme != "singleton" and entry.expert is not None:
        axes.append((entry.expert, arch.num_experts))
    return tuple(at for at, _ in axes), tuple(extent for _, extent in axes)


def _shard_suffix(entry: Entry, arch: Architecture, scheme: KeyScheme) -> str:
    lead, extent = _leading_axes(entry, arch, scheme)
    if not lead:
        return "/shard_0_1"
    return f"/shard_{'.'.join(map(str, lead))}_{'.'.join(map(str, extent))}"
