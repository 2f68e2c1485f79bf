"""The shape of a model, read once from a Hugging Face `config.json`.

Everything that depends on a model's numbers (Megatron's configuration, the weight mapping, the checks of a
config) takes them from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dppo.architecture_rules import LATENT_MODEL_TYPES, rope_parameters, rope_type, unsupported_features
from megatron_dppo.files import read_json_object

LATENT_NORM_EPS = 1e-6  # of the norms inside multi-latent attention, whatever the model's rms_norm_eps


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's rotary frequencies: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnRope:
    """YaRN as DeepSeek-V3 has it; the two mscales give the factor of cos and sin and that of the softmax."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class LatentAttention:
    """Sizes of multi-latent attention; `q_lora_rank` is None where queries are projected in one step."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: grouped-query or multi-latent attention, dense or mixture-of-experts layers."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # of queries and keys
    intermediate_size: int  # of the dense layers
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_scaling: Llama3Rope | YarnRope | None = None
    latent: LatentAttention | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0  # of all shared experts of a layer together
    norm_topk_prob: bool = True
    num_expert_groups: int = 1  # 1: a token may go to any expert
    expert_groups_per_tok: int = 1
    routed_scaling_factor: float = 1.0
    moe_layers: tuple[bool, ...] = ()  # one per layer: True where the layer has experts

    @property
    def is_moe(self) -> bool:
        """True when at least one layer has experts."""
        return any(self.moe_layers)

    @property
    def moe_layer_numbers(self) -> tuple[int, ...]:
        """The layers that have experts, counted from 0."""
        return tuple(layer for layer, is_moe in enumerate(self.moe_layers) if is_moe)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def qk_norm(self) -> bool:
        """True where the heads of queries and keys have a norm."""
        return self.model_type in ("qwen3", "qwen3_moe")

    @property
    def qkv_bias(self) -> bool:
        """True where the projections to queries, keys and values have a bias."""
        return self.model_type == "qwen2"

    @property
    def sigmoid_router(self) -> bool:
        """True where experts are scored by a sigmoid and chosen by score plus bias; else softmax without bias."""
        return self.latent is not None


def forward_flops(arch: Architecture, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Floating-point operations of a forward pass over each of some sequences f64[N], of `lengths i64[N]` tokens.

    Two for each weight that a token meets (its experts only, and the head), and causal attention, quadratic in length.
    """
    hidden, heads, latent = arch.hidden_size, arch.num_attention_heads, arch.latent
    if latent is None:
        qk_width = v_width = arch.head_dim
        attention = hidden * arch.head_dim * 2 * (heads + arch.num_key_value_heads)
    else:
        qk_width, v_width = latent.qk_nope_head_dim + latent.qk_rope_head_dim, latent.v_head_dim
        queries = heads * qk_width
        attention = hidden * queries if latent.q_lora_rank is None else latent.q_lora_rank * (hidden + queries)
        attention += hidden * (latent.kv_lora_rank + latent.qk_rope_head_dim)
        attention += latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + v_width) + heads * v_width * hidden
    experts = arch.num_experts_per_tok * arch.moe_intermediate_size + arch.shared_expert_intermediate_size
    moe = hidden * (3 * experts + arch.num_experts)
    num_moe = sum(arch.moe_layers)
    weights = arch.num_layers * attention + num_moe * moe + hidden * arch.vocab_size
    weights += (arch.num_layers - num_moe) * 3 * hidden * arch.intermediate_size
    pairs = arch.num_layers * heads * (qk_width + v_width) / 2
    tokens = lengths.astype(np.float64)
    return 2 * (tokens * weights + tokens**2 * pairs)


def load_architecture(model_path: Path | str) -> Architecture:
    """Reads `config.json` of a Hugging Face directory.

    Raises FileNotFoundError where there is none and ValueError, naming the file, where it cannot be read or the model
    is one that this package would not compute exactly (another model type, biases, unknown rope scaling, a sliding
    window, other activations).
    """
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {model_path}, expected a Hugging Face model directory")
    hf = read_json_object(path)
    try:
        return architecture_from_hf(hf)
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def architecture_from_hf(hf: dict[str, Any]) -> Architecture:
    """The Architecture of a parsed `config.json`; raises ValueError naming every feature that is not supported."""
    faults = unsupported_features(hf)
    if faults:
        raise ValueError("; ".join(faults))
    heads = hf["num_attention_heads"]
    latent = _latent_attention(hf)
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    moe_layers = _moe_layers(hf)
    return Architecture(
        model_type=hf["model_type"],
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_attention_heads=heads,
        num_key_value_heads=hf.get("num_key_value_heads") or heads,
        head_dim=latent.qk_nope_head_dim + latent.qk_rope_head_dim if latent else head_dim,
        intermediate_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        rope_theta=float(rope_parameters(hf).get("rope_theta", 10000.0)),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        rope_scaling=_rope_scaling(rope_parameters(hf)),
        latent=latent,
        moe_layers=moe_layers,
        **(_experts(hf) if any(moe_layers) else {}),
    )


def _rope_scaling(rope: dict[str, Any]) -> Llama3Rope | YarnRope | None:
    kind = rope_type(rope)
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return Llama3Rope(*(rope[name] for name in names))
    if kind == "yarn":
        return YarnRope(
            factor=rope["factor"],
            original_max_position_embeddings=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            mscale=rope.get("mscale") or 1.0,
            mscale_all_dim=rope.get("mscale_all_dim") or 0.0,
        )
    return None


def _latent_attention(hf: dict[str, Any]) -> LatentAttention | None:
    if hf["model_type"] not in LATENT_MODEL_TYPES:
        return None
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return LatentAttention(*(hf[name] for name in names))


def _num_experts(hf: dict[str, Any]) -> int:
    """transformers 5 writes `num_local_experts` where the hub's files have `num_experts` or `n_routed_experts`."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    return next((hf[name] for name in names if hf.get(name)), 0)


def _experts(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    moe = {
        "num_experts": _num_experts(hf),
        "num_experts_per_tok": hf["num_experts_per_tok"],
        "moe_intermediate_size": hf["moe_intermediate_size"],
    }
    if hf["model_type"] == "qwen3_moe":
        return moe | {"norm_topk_prob": hf.get("norm_topk_prob", False)}
    limited = hf["topk_group"] < hf["n_group"]
    return moe | {
        "norm_topk_prob": hf["norm_topk_prob"],
        "shared_expert_intermediate_size": (hf["n_shared_experts"] or 0) * hf["moe_intermediate_size"],
        "num_expert_groups": hf["n_group"] if limited else 1,
        "expert_groups_per_tok": hf["topk_group"] if limited else 1,
        "routed_scaling_factor": float(hf["routed_scaling_factor"]),
    }


def _moe_layers(hf: dict[str, Any]) -> tuple[bool, ...]:
    """Which layers have experts.

    Qwen3-MoE: every `decoder_sparse_step`-th, except those in `mlp_only_layers`. DeepSeek-V3: all from
    `first_k_dense_replace` on.
    """
    layers, kind = range(hf["num_hidden_layers"]), hf["model_type"]
    if kind == "qwen3_moe" and _num_experts(hf):
        step, dense = hf.get("decoder_sparse_step", 1), set(hf.get("mlp_only_layers") or ())
        return tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)
    if kind in LATENT_MODEL_TYPES:
        return tuple(layer >= hf["first_k_dense_replace"] for layer in layers)
    return tuple(False for _ in layers)
