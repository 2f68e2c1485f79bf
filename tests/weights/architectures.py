"""Architectures of every family, small enough to fill with numbers, two real ones, and layouts of the small ones."""

from __future__ import annotations

import dataclasses

from megatron_dppo.architecture import Architecture, LatentAttention
from megatron_dppo.weights.layout import Parallel

SMALL = Architecture(
    model_type="qwen3_moe", num_layers=4, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=2,
    intermediate_size=12, vocab_size=11, max_position_embeddings=32, rope_theta=1e4, rms_norm_eps=1e-6,
    tie_word_embeddings=False, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=4,
    moe_layers=(True, False, True, True),
)  # fmt: skip
LATENT = dataclasses.replace(
    SMALL, model_type="deepseek_v3", num_key_value_heads=4, head_dim=5, shared_expert_intermediate_size=8,
    moe_layers=(False, True, True, True),
    latent=LatentAttention(q_lora_rank=6, kv_lora_rank=4, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4),
)  # fmt: skip
DENSE = dataclasses.replace(SMALL, num_experts=0, moe_layers=(False,) * 4)
ARCHITECTURES = {
    "qwen3_moe": SMALL,
    "tied": dataclasses.replace(SMALL, tie_word_embeddings=True),
    "qwen2": dataclasses.replace(DENSE, model_type="qwen2"),
    "llama": dataclasses.replace(DENSE, model_type="llama"),
    "deepseek_v3": LATENT,
    "queries_in_one_step": dataclasses.replace(
        LATENT, model_type="kimi_k2", latent=dataclasses.replace(LATENT.latent, q_lora_rank=None)
    ),
}
LAYOUTS = [
    Parallel(),
    Parallel(tensor=2, ranks=2),
    Parallel(tensor=4, expert=2, ranks=4),  # more TP ranks than key/value heads
    Parallel(tensor=2, expert=2, expert_tensor=2, ranks=8),
    Parallel(expert=4, ranks=4),
    Parallel(tensor=2, expert=2, pipeline=2, ranks=8),
    Parallel(pipeline=4, ranks=4),
    Parallel(tensor=2, ranks=6),  # three data-parallel replicas
    Parallel(pipeline=2, virtual=2, ranks=2),
    Parallel(tensor=2, expert=2, pipeline=2, ranks=4, chunk_layers=(3, 1)),
    Parallel(pipeline=2, virtual=2, ranks=4, chunk_layers=(0, 2, 1, 1)),
]
QWEN3_235B = dataclasses.replace(
    SMALL, num_layers=94, hidden_size=4096, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
    intermediate_size=12288, vocab_size=151936, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536,
    moe_layers=(True,) * 94,
)  # fmt: skip
KIMI_K2 = dataclasses.replace(
    LATENT, model_type="kimi_k2", num_layers=61, hidden_size=7168, num_attention_heads=64, num_key_value_heads=64,
    head_dim=192, intermediate_size=18432, vocab_size=163840, num_experts=384, num_experts_per_tok=8,
    moe_intermediate_size=2048, shared_expert_intermediate_size=2048, moe_layers=(False,) + (True,) * 60,
    latent=LatentAttention(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
)  # fmt: skip
