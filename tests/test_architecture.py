"""What is read from a config.json: every family as the hub has it and as transformers writes it; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dppo.architecture import (
    LatentAttention,
    Llama3Rope,
    YarnRope,
    architecture_from_hf,
    load_architecture,
)
from tests.tiny_models import deepseek_config, llama3_config, qwen2_config, tiny_config

HUB: dict[str, Any] = {  # as Qwen3-30B-A3B has it
    "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rope_scaling": None, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
    "use_sliding_window": False, "hidden_act": "silu",
}  # fmt: skip


def test_a_hub_config() -> None:
    arch = architecture_from_hf(HUB)
    assert (arch.num_experts, arch.num_experts_per_tok, arch.moe_layers) == (128, 8, (True,) * 48)
    assert (arch.rope_theta, arch.heads_per_group, arch.is_moe) == (1e6, 8, True)


def test_a_config_that_transformers_5_wrote() -> None:
    written = tiny_config(num_layers=4, decoder_sparse_step=2, mlp_only_layers=(3,)).to_dict()
    assert "num_local_experts" in written or "num_experts" in written
    arch = architecture_from_hf({k: v for k, v in written.items() if k != "num_experts"} | {"num_local_experts": 8})
    assert (arch.num_experts, arch.moe_layers, arch.rope_theta) == (8, (False, True, False, False), 10000.0)


QWEN2: dict[str, Any] = {  # as DeepSeek-R1-Distill-Qwen-1.5B has it
    "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 1536, "num_attention_heads": 12,
    "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936, "max_position_embeddings": 131072,
    "rope_theta": 10000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
    "use_mrope": False, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21,
}  # fmt: skip
LLAMA: dict[str, Any] = {  # as Llama-3.2-3B has it
    "model_type": "llama", "num_hidden_layers": 28, "hidden_size": 3072, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {  # as DeepSeek-V3 has it
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "vocab_size": 129280,
    "max_position_embeddings": 163840, "rope_theta": 10000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "first_k_dense_replace": 3, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "attention_bias": False,
    "hidden_act": "silu", "ep_size": 1,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
}  # fmt: skip


def test_qwen2_has_a_bias_and_no_norms_of_heads() -> None:
    arch = architecture_from_hf(QWEN2)
    assert (arch.qkv_bias, arch.qk_norm, arch.head_dim, arch.rope_scaling) == (True, False, 128, None)
    assert architecture_from_hf(HUB).qk_norm and not architecture_from_hf(HUB).qkv_bias


def test_llama3_has_scaled_frequencies() -> None:
    arch = architecture_from_hf(LLAMA)
    assert (arch.qkv_bias, arch.qk_norm, arch.is_moe) == (False, False, False)
    assert arch.rope_scaling == Llama3Rope(32.0, 1.0, 4.0, 8192)


def test_deepseek_v3_and_kimi_k2() -> None:
    arch = architecture_from_hf(DEEPSEEK)
    assert arch.latent == LatentAttention(1536, 512, 128, 64, 128)
    assert arch.rope_scaling == YarnRope(40, 4096, 32, 1, 1.0, 1.0)
    assert (arch.head_dim, arch.num_experts, arch.shared_expert_intermediate_size) == (192, 256, 2048)
    assert (arch.num_expert_groups, arch.expert_groups_per_tok, arch.routed_scaling_factor) == (8, 4, 2.5)
    assert arch.moe_layers == (False,) * 3 + (True,) * 58 and arch.sigmoid_router
    kimi = DEEPSEEK | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    assert architecture_from_hf(kimi).num_expert_groups == 1 and sum(architecture_from_hf(kimi).moe_layers) == 60


@pytest.mark.parametrize("config", [qwen2_config(), llama3_config(), deepseek_config()], ids=lambda c: c.model_type)
def test_what_transformers_5_writes_is_read_alike(config: Any) -> None:
    """Nested rope parameters and renamed keys, against the older spelling of the same numbers."""
    written = config.to_dict()
    rope = dict(written["rope_parameters"])
    older = {k: v for k, v in written.items() if k not in ("rope_parameters", "num_local_experts")}
    older |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert architecture_from_hf(written) == architecture_from_hf(older)


def test_a_dense_model_has_no_experts() -> None:
    arch = architecture_from_hf(HUB | {"model_type": "qwen3"})
    assert not arch.is_moe and arch.num_experts == 0


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"model_type": "mixtral"}, "model_type: got 'mixtral', expected one of qwen3_moe, qwen3"),
        ({"mlp_bias": True}, "mlp_bias: got true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: got sliding_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, expected 1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope low_freq_factor: got None"),
        ({"attention_bias": True}, "attention_bias: got true"),
        ({"use_sliding_window": True}, "use_sliding_window: got true"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type: got 'yarn'"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob: got true, expected false with one expert per token"),
    ],
)
def test_what_would_not_be_exact_is_refused(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        architecture_from_hf(HUB | change)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"num_key_value_heads": 8}, "num_key_value_heads: got 8, expected num_attention_heads = 128"),
        ({"attention_bias": True}, "attention_bias: got true"),
        ({"rope_interleave": False}, "rope_interleave: got False, expected True"),
        ({"scoring_func": "softmax"}, "scoring_func: got 'softmax', expected 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method: got 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: got 2, expected 1"),
        ({"norm_topk_prob": False}, "norm_topk_prob: got false, expected true"),
        ({"topk_group": 2}, "num_experts_per_tok / topk_group: got 8 / 2, expected 2"),
        ({"rope_scaling": LLAMA["rope_scaling"]}, "rope_type: got 'llama3', expected 'default' or 'yarn'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope original_max_position_embeddings: got None"),
        ({"rope_scaling": DEEPSEEK["rope_scaling"] | {"mscale": None}}, "got None, 1.0, expected both or neither"),
        ({"rope_scaling": DEEPSEEK["rope_scaling"] | {"attention_factor": 1.2}}, "attention_factor: got 1.2"),
        ({"rope_scaling": DEEPSEEK["rope_scaling"] | {"truncate": False}}, "truncate: got false"),
    ],
)
def test_what_megatron_computes_otherwise_is_refused(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        architecture_from_hf(DEEPSEEK | change)


def test_a_latent_model_names_its_sizes() -> None:
    with pytest.raises(ValueError, match="kv_lora_rank, n_group: got nothing, expected a value"):
        architecture_from_hf({k: v for k, v in DEEPSEEK.items() if k not in ("kv_lora_rank", "n_group")})


def test_several_faults_come_in_one_message() -> None:
    with pytest.raises(ValueError, match="attention_bias.*; hidden_act"):
        architecture_from_hf(HUB | {"attention_bias": True, "hidden_act": "gelu"})


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="^no config.json in"):
        load_architecture(tmp_path)
