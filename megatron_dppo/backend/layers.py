"""Layers of our own inside Megatron-core's model, and the layer specs that use them.

With Transformer Engine its layer spec is used as Megatron builds it. Without it, Megatron's own
attention refuses tensor parallelism beyond the key/value heads and its own RMSNorm refuses sequence parallelism; the
modules below have neither limit. Its spec of multi-latent attention splits the down projections over TP and then loses
a part of the rotary key's gradient (each rank keeps that of its own heads only): they are whole on every rank here, as
in Transformer Engine's spec.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig, multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from megatron_dppo.architecture import LATENT_NORM_EPS
from megatron_dppo.backend.device import has_gpu
from megatron_dppo.backend.replay import Routes
from megatron_dppo.head.rows import to_device

# megatron-core 0.19 knows its own replicated linear only beside Transformer Engine.
if not multi_latent_attention.Linear:
    multi_latent_attention.Linear = Linear

Layers = Literal["auto", "torch", "transformer_engine"]


def transformer_engine_installed() -> bool:
    """True where Transformer Engine can be used: it is importable and there is a GPU."""
    return has_gpu() and importlib.util.find_spec("transformer_engine") is not None


def uses_transformer_engine(layers: Layers) -> bool:
    """A config's choice, with "auto" decided. Raises ValueError for what cannot be used here."""
    if layers == "transformer_engine" and not transformer_engine_installed():
        raise ValueError("model.layers: got transformer_engine, expected auto or torch: it is not installed with a GPU")
    return layers != "torch" and transformer_engine_installed()


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, with their lengths on the host for `CausalAttention` and the routes
    that are replayed for `Replay`: every layer gets it, also when it is computed again in backward."""

    lengths: list[int] = field(default_factory=list)
    routes: Routes | None = None  # what each router is to take, where anything is replayed

    @classmethod
    def of(
        cls, cu_seqlens: npt.NDArray[np.int32], device: torch.device, routes: Routes | None = None
    ) -> PackedSequences:
        """`cu_seqlens i32[n + 1]`: where each of n sequences begins, and the last one ends."""
        lengths = np.diff(cu_seqlens).tolist()
        ends, longest = to_device(cu_seqlens, device), max(lengths)
        return cls(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest,
            lengths=lengths, routes=routes,
        )  # fmt: skip


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32 and rounded once (as transformers does)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.eps = eps
        # Each TP rank sees other tokens under sequence parallelism: Megatron sums such gradients over the group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape and dtype."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


class LatentNorm(RMSNorm):
    """The norm of a latent inside multi-latent attention; its epsilon is no setting of the model."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **_: Any) -> None:
        super().__init__(config, hidden_size, LATENT_NORM_EPS)


class LatentAttention(MLASelfAttention):
    """Multi-latent attention of the linear layers and norms that its spec names.

    megatron-core 0.19 would have queries without a latent normed in a fused layer, which the models do not.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        parts = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in parts}


class CausalAttention(nn.Module):
    """Core attention through torch's scaled_dot_product_attention: causal, grouped queries, packed or padded sequences.

    `softmax_scale` is None for 1 / sqrt(D). Padding needs no mask: a token attends only to tokens before it. Packed
    sequences are attended to one by one. Keeps what SDPA keeps for backward. Heads are split over TP ranks before it.

    Under context parallelism each rank has two chunks of every packed sequence (`data.packing.context_share`). One
    all-gather over the context group brings it the keys and values of all tokens; one reduce-scatter in backward.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.context = config.context_parallel_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> Tensor:
        """Of this rank: query [S, B, heads, D], key [S, B, groups, D], value [S, B, groups, V] -> [S, B, heads * V]; of
        packed sequences [S, heads, D] and so on -> [S, heads * V]."""
        if packed_seq_params is None:
            assert self.context == 1, "context parallelism divides packed sequences"
            return self._attend(query, key, value)
        if self.context > 1:
            return self._attend_over_context(query, key, value, packed_seq_params.lengths)
        parts = (x[:, None].split(packed_seq_params.lengths) for x in (query, key, value))
        return torch.cat([self._attend(q, k, v) for q, k, v in zip(*parts, strict=True)])[:, 0]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The last query attends to all keys, each one before to one less; as many queries as keys, or fewer."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        mask = None if len(query) == len(key) else causal_lower_right(len(query), len(key))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend_over_context(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        rank, last = group.rank(), 2 * self.context - 1
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
        of_ranks = both.view(self.context, len(key), *both.shape[1:])
        out, start = [], 0
        for length in lengths:
            chunk = length // (last + 1)
            begins, ends = (of_ranks[:, at : at + chunk] for at in (start, start + chunk))
            in_order = torch.cat([begins.flatten(0, 1), ends.flip(0).flatten(0, 1)])[:, None]  # the ends run backwards
            k, v = in_order.split([key.shape[-1], value.shape[-1]], dim=-1)
            for number, at in ((rank, start), (last - rank, start + chunk)):
                seen = (number + 1) * chunk
                out.append(self._attend(query[at : at + chunk, None], k[:seen], v[:seen]))
            start += 2 * chunk
        return torch.cat(out)[:, 0]


class HiddenStatesOutput(ColumnParallelLinear):
    """The output layer's weight without its product: the model returns hidden states, the policy head does the rest.

    `hidden [S(/TP), B, H]` comes back as it is. Megatron still finds a column-parallel `output_layer.weight`, so
    checkpoints, tied embeddings and the optimizer see the model they know.
    """

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return input_, None


def block_spec(
    config: TransformerConfig, vp_stage: int | None, *, transformer_engine: bool
) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's layers: Transformer Engine's, or ours.

    Raises ValueError for multi-latent attention that Transformer Engine's norms would compute otherwise.
    """
    if transformer_engine:
        if config.multi_latent_attention and config.layernorm_epsilon != LATENT_NORM_EPS:
            raise ValueError(
                f"rms_norm_eps: got {config.layernorm_epsilon}, expected {LATENT_NORM_EPS} for multi-latent attention "
                "under Transformer Engine (its norms of the latents take the same number, the model's do not)"
            )
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        if config.params_dtype == torch.float32:  # Transformer Engine's attention to packed sequences is for 16 bits
            for layer in {id(s): s for s in spec.layer_specs}.values():
                layer.submodules.self_attention.submodules.core_attention = CausalAttention
        return spec
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in {id(s): s for s in spec.layer_specs}.values():
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention = parts.self_attention.submodules
        attention.core_attention = CausalAttention
        if config.multi_latent_attention:
            attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
            parts.self_attention.module = LatentAttention
            attention.kv_layernorm = LatentNorm
            attention.q_layernorm = IdentityOp if config.q_lora_rank is None else LatentNorm
        elif config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    spec.layer_norm = RMSNorm
    return spec
