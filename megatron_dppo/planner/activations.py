"""What a layer keeps for backward, for each token of a micro-batch.

Counted from what autograd saves in this package's layers (`backend/layers.py`) under Megatron-core 0.16, storage by
storage; Transformer Engine's layers from what its modules save. Balanced experts. `docs/planner.md` has how far traces
agree. Names: H hidden, E experts, K experts a token, F their width; bytes are d a number in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dppo.architecture import Architecture
from megatron_dppo.weights.layout import Parallel


@dataclass(frozen=True)
class Layers:
    """Whose layers compute, and in what.

    `fused`: Transformer Engine's. `itemsize`: bytes of the model's dtype. `on_gpu`: torch has attention for heads whose
    values are of another width there. `sequence_shares`: ranks that divide the tokens outside of attention and MLP.
    """

    fused: bool
    itemsize: int
    on_gpu: bool
    sequence_shares: int


def kept_bytes(arch: Architecture, parallel: Parallel, layers: Layers, is_moe: bool, longest: int) -> float:
    """Of one layer, for one token of the context rank's share, which TP ranks share under sequence parallelism.

    `longest`: tokens of the longest sequence.
    """
    attention = _grouped if arch.latent is None else _latent
    norms = 2 * (_norm(arch.hidden_size, layers) + layers.itemsize * arch.hidden_size)  # and what follows each
    outer = norms / layers.sequence_shares
    return outer + attention(arch, parallel, layers, longest) + _mlp(arch, parallel, layers, is_moe)


def layer_input_bytes(arch: Architecture, layers: Layers) -> float:
    """Hidden states [S / TP, H], for one token: all that full recomputation keeps of a layer."""
    return layers.itemsize * arch.hidden_size / layers.sequence_shares


def final_norm_bytes(arch: Architecture, layers: Layers) -> float:
    """Behind the last layer, for one token."""
    return _norm(arch.hidden_size, layers) / layers.sequence_shares


def dispatched_bytes(arch: Architecture, parallel: Parallel, layers: Layers) -> float:
    """One copy of a token's rows for its experts, as a rank has them."""
    rows = arch.num_experts_per_tok * parallel.expert_tensor if arch.is_moe else 1
    return rows * layers.itemsize * arch.hidden_size / layers.sequence_shares


def attention_core_bytes(arch: Architecture, parallel: Parallel, layers: Layers, longest: int) -> float:
    """What selective recomputation does not keep: the output of attention's core and its statistics."""
    heads = arch.num_attention_heads / parallel.tensor
    if arch.latent is not None:
        if not layers.fused and not layers.on_gpu:
            return 4 * heads * (2 * arch.head_dim + arch.latent.v_head_dim + longest)
        return heads * (layers.itemsize * arch.latent.v_head_dim + 4)
    return heads * (layers.itemsize * arch.head_dim + 4)


def _norm(width: float, layers: Layers) -> float:
    """Ours keeps its input in float32 and the normalised rows; Transformer Engine's its input."""
    return layers.itemsize * width + 4 + (0 if layers.fused else 4 * width)


def _grouped(arch: Architecture, parallel: Parallel, layers: Layers, longest: int) -> float:
    d, dim = layers.itemsize, arch.head_dim
    heads, groups = arch.num_attention_heads / parallel.tensor, arch.num_key_value_heads / parallel.tensor
    # With fewer key/value heads than ranks Megatron gathers all queries, keys and values before it takes its own.
    gathered = groups < 1
    groups = max(groups, 1)
    queries, keys = heads * dim, groups * dim
    projected = dim * (arch.num_attention_heads + 2 * arch.num_key_value_heads) if gathered else queries + 2 * keys
    kept = d * projected + d * (queries + keys)  # values are a view of the projection; queries and keys after rope
    kept += d * queries + 4 * heads  # the output, which the last projection keeps, and its log-sums
    if not layers.fused:
        kept += d * queries  # our sequences are attended to one by one, and then joined
        if parallel.context > 1:
            kept += d * 2 * keys * parallel.context - d * keys  # keys and values of the whole sequence
    kept += 4 * d * dim  # cos and sin of queries and keys
    if arch.qk_norm:
        kept += _norm(queries, layers) - 4 + 4 * heads
        # In float32 the norm's input is the projection itself, where it is a view of it.
        kept += _norm(keys, layers) - 4 + 4 * groups - (4 * keys if d == 4 and not layers.fused else 0)
    return kept


def _latent(arch: Architecture, parallel: Parallel, layers: Layers, longest: int) -> float:
    latent, d = arch.latent, layers.itemsize
    assert latent is not None
    heads = arch.num_attention_heads / parallel.tensor
    kept = 0.0
    for width in (latent.q_lora_rank or 0, latent.kv_lora_rank):
        if width:
            kept += _norm(width, layers) + d * width  # down projections are whole on every rank, tokens are shared
    kept /= layers.sequence_shares
    kept += 4 * d * latent.qk_rope_head_dim
    values = heads * latent.v_head_dim
    if layers.fused or layers.on_gpu:
        kept += d * (2 * heads * arch.head_dim + values) + 4 * heads
        return kept + d * values * (1 if layers.fused else 2)
    # torch has no such attention on the CPU: it multiplies matrices, in float32, and keeps the weights of all pairs.
    return kept + 4 * heads * (2 * arch.head_dim + latent.v_head_dim + longest) + d * values


def _mlp(arch: Architecture, parallel: Parallel, layers: Layers, is_moe: bool) -> float:
    d = layers.itemsize
    if not is_moe:
        return 5 * d * arch.intermediate_size / parallel.tensor
    experts, per_token = arch.num_experts, arch.num_experts_per_tok
    router = 20 * per_token + 5 * experts + (12 * per_token + 5 * experts if arch.sigmoid_router else 0)
    # Each expert-parallel group has the tokens of as many ranks, which under ETP all see all of its rows.
    rows = per_token * (d * arch.hidden_size * parallel.expert_tensor + 6 * d * arch.moe_intermediate_size + 4)
    shared = 5 * d * arch.shared_expert_intermediate_size
    return (router + rows) / layers.sequence_shares + shared / parallel.tensor
