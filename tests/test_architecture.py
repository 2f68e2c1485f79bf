"""What is read from a config.json: both spellings of the number of experts, the MoE pattern, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_dppo.architecture import architecture_from_hf, load_architecture
from tests.tiny_models import tiny_config

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


def test_a_dense_model_has_no_experts() -> None:
    arch = architecture_from_hf(HUB | {"model_type": "qwen3"})
    assert not arch.is_moe and arch.num_experts == 0


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"model_type": "llama"}, "model_type: got 'llama', expected one of qwen3_moe, qwen3"),
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


def test_several_faults_come_in_one_message() -> None:
    with pytest.raises(ValueError, match="attention_bias.*; hidden_act"):
        architecture_from_hf(HUB | {"attention_bias": True, "hidden_act": "gelu"})


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model.path: no config.json in"):
        load_architecture(tmp_path)
