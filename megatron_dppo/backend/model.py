"""A model under Megatron-core, filled from a Hugging Face directory.

The model ends at the hidden states before the output layer (see `layers.HiddenStatesOutput`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import gpt_model
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_dppo.architecture import Architecture, Llama3Rope, load_architecture
from megatron_dppo.backend.device import has_gpu
from megatron_dppo.backend.layers import HiddenStatesOutput, Layers, block_spec, uses_transformer_engine
from megatron_dppo.backend.parallel import Rank
from megatron_dppo.backend.replay import install_replay
from megatron_dppo.backend.rope import llama3_inverse_frequencies
from megatron_dppo.head.policy_head import HeadMemory
from megatron_dppo.head.statistics import VocabShard
from megatron_dppo.weights.hub_files import HubFiles, check_tensors
from megatron_dppo.weights.layout import (
    Parallel,
    Piece,
    chunk_layers,
    chunk_prefix,
    megatron_layout,
    padded_vocab_size,
)
from megatron_dppo.weights.local import load_pieces
from megatron_dppo.weights.sync import Held

Recompute = Literal["none", "selective", "full"]


def transformer_config(
    arch: Architecture,
    parallel: Parallel,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: Recompute,
    expert_bias_rate: float,
    grouped_experts: bool,
) -> TransformerConfig:
    """Megatron's configuration of the model: exact with respect to transformers, no dropout, no auxiliary loss."""
    settings = _latent_settings(arch) if arch.latent else {}
    if arch.is_moe:
        settings |= _moe_settings(arch, parallel)
        settings |= {"moe_router_bias_update_rate": expert_bias_rate, "moe_grouped_gemm": grouped_experts}
    if recompute != "none":
        settings["recompute_granularity"] = recompute
    if recompute == "full":
        settings |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    if parallel.pipeline > 1:
        settings["pipeline_model_parallel_layout"] = _pipeline_layout(arch, parallel)
    return (MLATransformerConfig if arch.latent else TransformerConfig)(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.intermediate_size,
        layernorm_epsilon=arch.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=arch.qk_norm or arch.latent is not None,
        add_qkv_bias=arch.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Megatron's other way of interleaving mixes up its messages where two stages have each other on both sides.
        overlap_p2p_comm=parallel.virtual > 1,
        batch_p2p_comm=parallel.virtual == 1,
        variable_seq_lengths=parallel.pipeline > 1,  # micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # the default refuses such lengths, in dense models too
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        use_cpu_initialization=not has_gpu(),
        perform_initialization=False,  # every parameter is filled from the checkpoint
        **settings,
    )


def _pipeline_layout(arch: Architecture, parallel: Parallel) -> list[list[str]]:
    """What each chunk of layers holds, in the order of the model's depth: even, uneven and virtual stages alike."""
    chunks = [
        ["decoder"] * len(chunk_layers(arch.num_layers, parallel, rank, chunk))
        for chunk in range(parallel.virtual)
        for rank in range(parallel.pipeline)
    ]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _moe_settings(arch: Architecture, parallel: Parallel) -> dict[str, Any]:
    """The routers' auxiliary loss stays off: it is not linear in the micro-batch, so a split would change the loss."""
    limited = arch.num_expert_groups > 1
    return {
        "num_moe_experts": arch.num_experts,
        "moe_router_topk": arch.num_experts_per_tok,
        "moe_ffn_hidden_size": arch.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": arch.shared_expert_intermediate_size or None,
        # A list makes Megatron spell checkpoints layer by layer, even where all layers are alike.
        "moe_layer_freq": 1 if all(arch.moe_layers) else [int(is_moe) for is_moe in arch.moe_layers],
        "moe_router_score_function": "sigmoid" if arch.sigmoid_router else "softmax",
        # softmax over the chosen experts equals softmax over all, chosen and renormalised
        "moe_router_pre_softmax": not arch.norm_topk_prob,
        "moe_router_num_groups": arch.num_expert_groups if limited else None,
        "moe_router_group_topk": arch.expert_groups_per_tok if limited else None,
        "moe_router_topk_scaling_factor": arch.routed_scaling_factor if arch.sigmoid_router else None,
        "moe_router_enable_expert_bias": arch.sigmoid_router,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def _latent_settings(arch: Architecture) -> dict[str, Any]:
    latent, yarn = arch.latent, arch.rope_scaling
    assert latent is not None and not isinstance(yarn, Llama3Rope)
    settings: dict[str, Any] = {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rotary_base": arch.rope_theta,
    }
    if yarn is None:  # a factor of 1: the default would still scale the softmax
        return settings | {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return settings | {
        "rope_type": "yarn",
        "rotary_scaling_factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def build_chunks(
    arch: Architecture, rank: Rank, config: TransformerConfig, *, transformer_engine: bool
) -> tuple[gpt_model.GPTModel, ...]:
    """This rank's chunks of layers (one, unless stages are virtual), their parameters not yet filled.

    Raises ValueError where Megatron could not hold the model at this layout (its own messages come as they are).
    """
    if (arch.is_moe or arch.latent) and rank.parallel.tensor > 1 and not config.sequence_parallel:
        what = "experts" if arch.is_moe else "latent attention"
        raise ValueError(f"parallel.sequence_parallel: got false, expected true ({what} under TP > 1 needs it)")
    chunks = range(rank.parallel.virtual)
    return tuple(_build_chunk(arch, rank, config, chunk, transformer_engine) for chunk in chunks)


def _build_chunk(
    arch: Architecture, rank: Rank, config: TransformerConfig, chunk: int, transformer_engine: bool
) -> gpt_model.GPTModel:
    has_head = rank.is_last_stage and chunk == rank.parallel.virtual - 1
    vp_stage = chunk if rank.parallel.virtual > 1 else None
    model = gpt_model.GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, vp_stage, transformer_engine=transformer_engine),
        vocab_size=padded_vocab_size(arch.vocab_size, rank.parallel.tensor),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=rank.at.pipeline == 0 and chunk == 0,
        post_process=has_head,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        vp_stage=vp_stage,
    )
    if has_head:
        # Not a subclass of GPTModel: its post-processing changes its signature between Megatron's versions.
        model.output_layer.__class__ = HiddenStatesOutput
    if isinstance(arch.rope_scaling, Llama3Rope):
        frequencies = llama3_inverse_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling)
        model.rotary_pos_emb.inv_freq = frequencies.to(torch.cuda.current_device())
    _mark_split_weights(model)
    _mark_experts(model, rank.parallel)
    _count_only_tokens(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("embedding.", "output_layer.")):
                parameter.zero_()  # rows of vocabulary padding belong to no tensor of the checkpoint
    return model.cuda()


def _mark_split_weights(model: nn.Module) -> None:
    """What Megatron notes while it initialises weights, which is skipped here: which ones TP splits.

    Without the mark a split weight counts as a copy, and the norm that clips gradients misses all ranks but the first.
    """
    split_axis = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        for kind, axis in split_axis.items():
            if isinstance(module, kind) and module.weight is not None:
                for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                    if hasattr(module.weight, name):
                        delattr(module.weight, name)  # the defaults; Megatron asserts that nothing is set yet
                set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=axis, stride=1)


def _mark_experts(model: nn.Module, parallel: Parallel) -> None:
    """Experts have replicas of their own as soon as their grid is another one than the dense layers'; Megatron sees to
    that only for expert parallelism, and would sum the gradients of whole experts under TP over too few ranks."""
    if parallel.expert > 1 or parallel.expert_tensor != parallel.tensor:
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                parameter.allreduce = False  # type: ignore[attr-defined]


def _count_only_tokens(model: nn.Module) -> None:
    """Routers with a bias count each expert's tokens, without padding; Megatron's own way with a mask is for as many
    experts as tokens."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module._apply_expert_bias = partial(_count_tokens, module)


def _count_tokens(router: TopKRouter, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
    """`routing_map bool[T, E]`, `padding_mask bool[T]`. In passes with gradient, so that recomputing counts once."""
    if router.enable_expert_bias and torch.is_grad_enabled():
        chosen = routing_map if padding_mask is None else routing_map & ~padding_mask[:, None]
        router.local_tokens_per_expert += chosen.sum(dim=0)


def unwrapped(chunk: nn.Module) -> Any:
    """The GPTModel, without Megatron's DDP around it."""
    return chunk.module if hasattr(chunk, "module") else chunk


def _router_biases(chunk: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint has (others are counters and caches)."""
    return {name: buffer for name, buffer in chunk.named_buffers() if name.endswith("router.expert_bias")}


@dataclass(frozen=True)
class Model:
    """A rank's part of the policy, its layout in hub tensors, and what its head needs to know."""

    rank: Rank
    chunks: tuple[nn.Module, ...]  # of layers, in the order of depth: GPTModels, or Megatron's DDP around each
    config: TransformerConfig
    arch: Architecture
    pieces: tuple[Piece, ...]
    device: torch.device
    temperature: float
    head_memory: HeadMemory
    transformer_engine: bool  # whose layers these are, or ours

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by the names of the layout's pieces."""
        return self._named(lambda chunk: dict(chunk.named_parameters()))

    @property
    def weights(self) -> dict[str, Tensor]:
        """Everything that the layout's pieces name: parameters and the routers' biases."""
        return self.parameters | self._named(_router_biases)

    def _named(self, tensors_of: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            chunk_prefix(self.rank.parallel, v) + name: tensor
            for v, chunk in enumerate(self.chunks)
            for name, tensor in tensors_of(unwrapped(chunk)).items()
        }

    @property
    def head_weight(self) -> Tensor:
        """The LM head's shard [padded vocabulary / TP, H] of the last stage (the embedding's where they are tied)."""
        last = unwrapped(self.chunks[-1])
        if last.share_embeddings_and_output_weights:
            return last.shared_embedding_or_output_weight()
        return last.output_layer.weight

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers in the model of this rank's layers with experts."""
        parallel, stage = self.rank.parallel, self.rank.at.pipeline
        chunks = (chunk_layers(self.arch.num_layers, parallel, stage, chunk) for chunk in range(parallel.virtual))
        return tuple(layer for chunk in chunks for layer in chunk if self.arch.moe_layers[layer])

    @property
    def held(self) -> Held:
        """The weights for those who take them away: engines and files."""
        parallel = self.rank.parallel

        def pieces_of(rank: int) -> Iterable[Piece]:
            own = rank == self.rank.rank
            return self.pieces if own else layout_of(self.arch, parallel, rank, self.transformer_engine)

        dtype = self.config.params_dtype
        return Held(self.arch, self.rank.rank, parallel.ranks, self.weights, pieces_of, dtype, self.device)

    def shard(self, weight: Tensor) -> VocabShard:
        """This TP rank's rows of the head."""
        return VocabShard(self.rank.at.tensor * weight.shape[0], self.arch.vocab_size, self.rank.tensor_group)


def layout_of(arch: Architecture, parallel: Parallel, rank: int, transformer_engine: bool) -> Iterator[Piece]:
    """What a rank holds, by the parameters' names in the layers that are used."""
    return megatron_layout(
        arch, parallel, rank, transformer_engine=transformer_engine, grouped_experts=transformer_engine
    )


def load_model(
    path: Path,
    rank: Rank,
    dtype: torch.dtype,
    *,
    sequence_parallel: bool,
    temperature: float = 1.0,
    head_memory: HeadMemory = HeadMemory(),
    recompute: Recompute = "none",
    expert_bias_rate: float = 0.0,
    layers: Layers = "auto",
    replay: bool = False,
) -> Model:
    """This rank's part of the model in a Hugging Face directory; each rank reads only the rows it holds.

    `recompute`: what backward computes again instead of keeping it, the core of attention or whole layers.
    `expert_bias_rate`: by which a gradient step moves the bias of a router's experts towards an even load. `layers`:
    Transformer Engine's or ours; "auto": the former where it is installed. `replay`: routers can take recorded routes.

    What this package does not compute (multi-token prediction) is left out; rank 0 says so. Raises ValueError and
    FileNotFoundError naming what is wrong with the files. Collectives: none, but where a tied head is on another stage
    than the embedding one all-reduce of [V / TP, H] between the two, of numbers that are then overwritten.
    """
    arch, files = load_architecture(path), HubFiles(path)
    if (skipped := check_tensors(files, arch)) and rank.rank == 0:
        message = "%s: %d tensors are left out, %s first: neither trained nor exported"
        logging.getLogger(__name__).warning(message, path, len(skipped), skipped[0])
    fused = uses_transformer_engine(layers)
    config = transformer_config(arch, rank.parallel, dtype, sequence_parallel, recompute, expert_bias_rate, fused)
    chunks = build_chunks(arch, rank, config, transformer_engine=fused)
    pieces = tuple(layout_of(arch, rank.parallel, rank.rank, fused))
    device = next(p.device for chunk in chunks for p in chunk.parameters())
    if replay:
        install_replay(chunks)
    model = Model(rank, chunks, config, arch, pieces, device, temperature, head_memory, fused)
    load_pieces(model.weights, pieces, files)
    files.close()
    return model
