"""Tiny random Qwen3-MoE checkpoints as a user would have them: a Hugging Face directory with a tokenizer.

Weights are drawn wide enough that the next-token distributions are far from flat (a logit spread of about
`logit_scale`) and the norms are not ones, so that a wrong norm, head or router shows in the log-probs. The
same arguments always write the same bytes of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

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


@torch.no_grad()
def randomize(model: Qwen3MoeForCausalLM, seed: int, logit_scale: float = 2.5) -> None:
    """Redraw all parameters in place: matrices N(0, 1/fan_in), norms U(0.5, 1.5), head x `logit_scale`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            continue
        draw = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
        is_head = name == "lm_head.weight" or (model.config.tie_word_embeddings and name == "model.embed_tokens.weight")
        parameter.copy_(draw * logit_scale if is_head else draw)


def tiny_model(config: Qwen3MoeConfig, seed: int = 0, logit_scale: float = 2.5) -> Qwen3MoeForCausalLM:
    """A random fp32 transformers model of `config` in eval mode; the same seed gives the same weights."""
    model = Qwen3MoeForCausalLM(config).float().eval()
    randomize(model, seed, logit_scale)
    return model


def write_checkpoint(path: Path, model: Qwen3MoeForCausalLM) -> Path:
    """Write `model` and a character tokenizer as a Hugging Face directory; returns `path`."""
    model.save_pretrained(path)
    character_tokenizer(model.config.vocab_size).save_pretrained(path)
    return path


def hub_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the directory's safetensors files under their hub names (one tensor an expert)."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors
