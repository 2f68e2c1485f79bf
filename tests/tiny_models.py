"""Tiny random checkpoints as a user would have them: a Hugging Face directory with a tokenizer.

Weights are drawn wide enough that the next-token distributions are far from flat (a logit spread of about
`logit_scale`) and the norms are not ones, so that a wrong norm, head or router shows in the log-probs. The
same arguments always write the same bytes of weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789+-=>., abcdefghijklmnopqrstuvwxyz"
EOS_ID = SPECIAL_TOKENS.index("<eos>")


def character_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Three special tokens, one for each of `CHARACTERS`, then fillers `<t46>`... up to `vocab_size`."""
    tokens = [*SPECIAL_TOKENS, *CHARACTERS]
    if vocab_size < len(tokens):
        tokens = tokens[:vocab_size]
    tokens += [f"<t{i}>" for i in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def tiny_config(
    *,
    vocab_size: int = 64,
    num_layers: int = 2,
    hidden_size: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    num_experts: int = 8,
    top_k: int = 2,
    moe_intermediate_size: int = 64,
    intermediate_size: int = 96,
    norm_topk_prob: bool = True,
    tie_word_embeddings: bool = False,
    decoder_sparse_step: int = 1,
    mlp_only_layers: Sequence[int] = (),
    max_position_embeddings: int = 256,
) -> Qwen3MoeConfig:
    """A Qwen3-MoE configuration, what real ones vary as arguments. head_dim != hidden_size / num_heads."""
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=moe_intermediate_size,
        intermediate_size=intermediate_size,
        norm_topk_prob=norm_topk_prob,
        tie_word_embeddings=tie_word_embeddings,
        decoder_sparse_step=decoder_sparse_step,
        mlp_only_layers=list(mlp_only_layers),
        max_position_embeddings=max_position_embeddings,
        router_aux_loss_coef=0.0,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=0,
        attention_bias=False,
    )


COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}  # fmt: skip


def qwen2_config(**changes: Any) -> Qwen2Config:
    """A Qwen2 configuration: biases on queries, keys and values."""
    return Qwen2Config(**COMMON | changes)


def llama3_config(**changes: Any) -> LlamaConfig:
    """A Llama 3 configuration; of 8 wavelengths (6, 20, 63, ... tokens) one is kept, one in between, the rest long."""
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    return LlamaConfig(**COMMON | {"rope_parameters": rope} | changes)


YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.6,
}  # fmt: skip


def deepseek_config(**changes: Any) -> DeepseekV3Config:
    """A DeepSeek-V3 configuration: a dense first layer, two of four expert groups a token, YaRN with two mscales."""
    sizes = {
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 24, "n_routed_experts": 8, "n_shared_experts": 2,
        "moe_intermediate_size": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_parameters": YARN,
    }  # fmt: skip
    return DeepseekV3Config(**COMMON | sizes | changes)


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int, logit_scale: float = 2.5) -> None:
    """Redraw all weights in place: matrices N(0, 1/fan_in), norms U(0.5, 1.5), biases N(0, 1), head x `logit_scale`.

    The routers' biases are N(0, 0.1): enough to change which experts are chosen.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(".bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            continue
        if parameter.dim() == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            continue
        draw = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
        is_head = name == "lm_head.weight" or (model.config.tie_word_embeddings and name == "model.embed_tokens.weight")
        parameter.copy_(draw * logit_scale if is_head else draw)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random fp32 transformers model of `config` in eval mode; the same seed gives the same weights."""
    model = AutoModelForCausalLM.from_config(config).float().eval()
    randomize(model, seed)
    return model


def write_checkpoint(path: Path, model: PreTrainedModel, model_type: str | None = None) -> Path:
    """Write `model` and a character tokenizer as a Hugging Face directory; returns `path`.

    `model_type` replaces the one in config.json: transformers 5.19 has no `kimi_k2`, which is deepseek_v3.
    """
    model.save_pretrained(path)
    character_tokenizer(model.config.vocab_size).save_pretrained(path)
    if model_type is not None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": model_type}))
    return path


def read_checkpoint(path: Path, **changes: Any) -> PreTrainedModel:
    """transformers' fp32 model of a directory, its configuration changed."""
    values = json.loads((path / "config.json").read_text()) | changes
    kind = {"kimi_k2": "deepseek_v3"}.get(values["model_type"], values["model_type"])
    config = AutoConfig.for_model(**values | {"model_type": kind})
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()


def hub_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the directory's safetensors files under their hub names (one tensor an expert)."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors
